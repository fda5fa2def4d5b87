"""lm-eval on one model folder, through our adapter and through its own Hugging Face backend: do the scores agree?

    python bench/lm_eval_peers.py en-val.jsonl.gz ko-val.jsonl.gz [--model smollm2] [--items 500] [--json FILE]

Needs twelve[lm-eval] and twelve[bench]. The task is a local file for each language. Half of its items are word problems
with three numbers to choose from, half are beginnings of articles of the files given, each with its own continuation
and two in which words have changed places. The model is written as a Hugging Face folder in float32, which both
sides load. Each side is a process of its own; seconds are those of lm-eval's evaluation, without loading, by the
clock and of the processor. The hf backend runs with each of --batches, ours has no such setting. `twelve eval
--choices` on the same files stands beside.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from random import Random

LANGUAGES = ("en", "ko")
METRICS = ("acc", "acc_norm", "acc_bytes")
CONTEXT, CONTINUATION = {"en": 12, "ko": 6}, {"en": 6, "ko": 4}  # words of an article
TASK = """\
task: choices_{language}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_bytes, aggregation: mean, higher_is_better: true}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", nargs=2, metavar="FILE", help="articles in English and in Korean")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--batches", type=int, nargs="+", default=[16])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--side", nargs=3, help=argparse.SUPPRESS)  # name, model folder, folder of tasks
    options = parser.parse_args()
    if options.side:
        print(json.dumps(side(*options.side, options.threads)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = prepare(folder, options)
        sides = ["twelve", *(f"hf {batch}" for batch in options.batches), "eval"]
        found = {name: run(name, model, folder, options) for name in sides}
    show(found, options)
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")


# --- the task ---------------------------------------------------------------------------------------------------------


def prepare(folder: Path, options: argparse.Namespace) -> Path:
    """The task's files, and the model's folder."""
    for language, path in zip(LANGUAGES, options.texts, strict=True):
        count = options.items // len(LANGUAGES)
        rows = [*problems(language, count // 2), *articles(path, count - count // 2, language)]
        lines = (json.dumps({**row, "language": language}, ensure_ascii=False) + "\n" for row in rows)
        file = folder / f"{language}.jsonl"
        file.write_text("".join(lines), encoding="utf-8")
        (folder / f"{language}.yaml").write_text(TASK.format(language=language, file=file))
    model = folder / "model"
    command = [sys.executable, "-m", "twelve", "convert", options.model, "--out", str(model), "--dtype", "float32"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return model


def problems(language: str, count: int) -> list[dict]:
    """Word problems with the right number and two near it."""
    from twelve import tasks

    rows = []
    for number, problem in enumerate(islice(tasks.problems("word_problems", "test", 0, [1], [language]), count)):
        draw, answer = Random(number), int(problem.answer)
        near = [value for value in range(answer - 5, answer + 6) if value >= 0 and value != answer]
        choices = draw.sample([answer, *draw.sample(near, 2)], 3)
        prompt = f"{problem.question} {'답:' if language == 'ko' else 'Answer:'}"
        rows.append({"prompt": prompt, "choices": list(map(str, choices)), "answer": choices.index(answer)})
    return rows


def articles(path: str, count: int, language: str) -> list[dict]:
    """Beginnings of articles, each with its continuation and two in which two words have changed places."""
    from twelve.data.reader import read_documents

    rows, context, length = [], CONTEXT[language], CONTINUATION[language]
    for document in read_documents([path]):
        words = document.text.split()
        after = words[context : context + length]
        if len(rows) == count:
            break
        if len(set(after)) < length:  # two equal ones could change places without a trace
            continue
        draw, pairs = Random(f"{language} {len(rows)}"), range(length - 1)
        choices = [after]
        for first in draw.sample(pairs, 2):
            other = list(after)
            other[first], other[first + 1] = after[first + 1], after[first]
            choices.append(other)
        draw.shuffle(choices)
        rows.append({"prompt": " ".join(words[:context]), "choices": [" ".join(choice) for choice in choices],
                     "answer": choices.index(after)})  # fmt: skip
    if len(rows) < count:
        raise SystemExit(f"{path} has only {len(rows)} articles that are long enough, not {count}")
    return rows


# --- the sides --------------------------------------------------------------------------------------------------------


def run(name: str, model: Path, folder: Path, options: argparse.Namespace) -> dict:
    """One side in a process of its own."""
    command = [sys.executable, __file__, *options.texts, "--threads", str(options.threads),
               "--side", name, str(model), str(folder)]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache"), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=os.environ | offline, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def side(name: str, model: str, folder: str, threads: int) -> dict:
    """Scores of each language, their standard errors, the likelihoods of all choices, and seconds."""
    import torch

    torch.set_num_threads(threads)
    return ours(model, folder) if name == "eval" else harness(name, model, folder)


def ours(model: str, folder: str) -> dict:
    from twelve.convert import load
    from twelve.evaluate.choices import choice_accuracy
    from twelve.evaluate.items import read_items

    network, tokenizer = load(model)
    network.eval()
    clock, scores = Clock(), {}
    for language in LANGUAGES:
        [found] = choice_accuracy(network, tokenizer, language, read_items(f"{folder}/{language}.jsonl"))
        row = found.to_dict()
        scores[language] = {"acc": [row["accuracy"], row["standard_error"]],
                            "acc_bytes": [row["accuracy_by_byte"], row["standard_error_by_byte"]]}  # fmt: skip
    return {"scores": scores, **clock.read()}


def harness(name: str, model: str, folder: str) -> dict:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    if name == "twelve":
        from twelve.evaluate.lm_eval import TwelveLM

        lm = TwelveLM(pretrained=model)
    else:
        from lm_eval.models.huggingface import HFLM

        lm = HFLM(pretrained=model, dtype="float32", device="cpu", batch_size=int(name.split()[1]))
    names = [f"choices_{language}" for language in LANGUAGES]
    manager = TaskManager(include_path=folder, include_defaults=False)
    clock = Clock()
    results = simple_evaluate(lm, tasks=names, task_manager=manager)
    seconds = clock.read()
    scores, nats = {}, []
    for language, task in zip(LANGUAGES, names, strict=True):
        row = results["results"][task]
        scores[language] = {name: [row[f"{name},none"], row[f"{name}_stderr,none"]] for name in METRICS}
        ordered = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
        nats += [[float(reply[0]) for reply in sample["filtered_resps"]] for sample in ordered]
    return {"scores": scores, "nats": nats, **seconds}


class Clock:
    def __init__(self) -> None:
        self.began = time.monotonic(), time.process_time()

    def read(self) -> dict[str, float]:
        return {"seconds": time.monotonic() - self.began[0], "processor": time.process_time() - self.began[1]}


def show(found: dict[str, dict], options: argparse.Namespace) -> None:
    print(f"{options.model}, {options.items} items, {options.threads} thread(s), {platform.machine()}; points of 100")
    for name, one in found.items():
        for language, scores in one["scores"].items():
            told = (f"{metric} {100 * value:.2f} ± {100 * error:.2f}" for metric, (value, error) in scores.items())
            print(f"{name:<8} {language}  {', '.join(told)}")
        print(f"{name:<8} {one['seconds']:.1f} s, {one['processor']:.1f} s of the processor")
    first, *others = (one for one in found.values() if "nats" in one)
    for other in others:
        apart = max(abs(a - b) for row, twin in zip(first["nats"], other["nats"], strict=True)
                    for a, b in zip(row, twin, strict=True))  # fmt: skip
        changed = sum(row.index(max(row)) != twin.index(max(twin))
                      for row, twin in zip(first["nats"], other["nats"], strict=True))  # fmt: skip
        points = max(abs(value[0] - other["scores"][language][metric][0]) * 100
                     for language, scores in first["scores"].items() for metric, value in scores.items())  # fmt: skip
        print(f"largest difference: {points:.2f} points, {apart:.1e} nats of a choice; {changed} chosen otherwise")


if __name__ == "__main__":
    main()
