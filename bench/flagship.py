"""A person's own use: a task file, SmolLM2-135M through adapters, a memory limit, some minutes; before, after, control.

    python bench/flagship.py --seeds 3 4 5 --minutes 15 --memory 4GiB --out runs/flagship

The control is SFT on the model's own right answers (rejection sampling) for the same time under the same checker. Both
end as ordinary folders, which transformers must answer alike. Every run is a process of its own and is kept; with
`--workers 2` both arms of a seed run at once, on a thread each.
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

import runs

ROOT = Path(__file__).resolve().parents[1]
ARMS = ("grpo", "rejection")
COMPARED, ANSWER = 20, 10  # held-out prompts that transformers answers too, and tokens of an answer


def run(arm: str, seed: int, options: argparse.Namespace) -> runs.Row:
    """What one arm comes to."""
    import torch

    from twelve.options import size
    from twelve.posttrain.rl import rl

    torch.set_num_threads(options.threads)
    out = options.out / f"{arm}-{seed}"
    found = rl(
        "smollm2", out, [options.task], method=arm, seed=seed, minutes=options.minutes, memory=size(options.memory),
        learning_rate=options.learning_rate, prompts=options.prompts, quiet=True,
    )  # fmt: skip
    keys = ("accuracy_before", "accuracy_after", "standard_error", "steps", "peak_memory", "seconds", "ended")
    return {key: found.get(key) for key in keys} | {
        "drawn": drawn(out, options.task), "same_in_transformers": alike(out, options.task),
    }  # fmt: skip


def drawn(model: str | Path, task: str) -> float:
    """The share of right answers on held-out problems at temperature 1."""
    from twelve import tasks
    from twelve.convert import load
    from twelve.engine import Engine
    from twelve.evaluate import task_accuracy

    network, tokenizer = load(model, device="cpu")
    engine = Engine(network, tokenizer, speculation="off")
    most = tasks.get(task).MAX_TOKENS
    return task_accuracy(engine, tokenizer, task, n=200, temperature=1.0, max_tokens=most).accuracy


def alike(model: Path, task: str) -> float:
    """The share of held-out prompts to which transformers gives the same greedy answer from the same folder."""
    import torch
    from transformers import AutoModelForCausalLM

    from twelve import tasks
    from twelve.convert import load
    from twelve.engine import Engine, Request
    from twelve.evaluate.accuracy import prompt_ids

    network, tokenizer = load(model, device="cpu")
    prompts = [prompt_ids(tokenizer, p) for p in islice(tasks.problems(task, "test", languages=["en"]), COMPARED)]
    mine = Engine(network, tokenizer, speculation="off").generate(Request(ids, ANSWER, 0.0) for ids in prompts)
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    same = 0
    for ids, answer in zip(prompts, mine, strict=True):
        out = theirs.generate(torch.tensor([ids]), max_new_tokens=ANSWER, do_sample=False)[0, len(ids) :].tolist()
        same += out[: len(answer.token_ids)] == answer.token_ids
    return same / len(prompts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default=str(ROOT / "examples" / "mine.py"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[3, 4, 5])
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--memory", default="4GiB")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    runs.add_options(parser, "runs/flagship", workers=1)
    options = parser.parse_args()
    if job := options.one:
        runs.add_row(options.out, job | run(job["arm"], job["seed"], options))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    jobs = [{"arm": arm, "seed": seed} for seed in options.seeds for arm in ARMS]
    failed = runs.run_all(jobs, "{arm} {seed}", options.out, options.workers)
    for arm in ARMS:
        mine = [row for row in runs.read_rows(options.out) if row["arm"] == arm]
        if mine:
            print_table(arm, mine, options)
    runs.end(failed)


def print_table(arm: str, rows: list[runs.Row], options: argparse.Namespace) -> None:
    for key in ("accuracy_before", "accuracy_after", "drawn", "same_in_transformers"):
        values = [row[key] for row in rows]
        average, error = runs.spread(values, 0.0)
        print(f"{arm:10} {key:22} {average:6.1%} ± {error:.1%}   {[round(value, 3) for value in values]}")
    print(f"{arm:10} peak memory {max(row['peak_memory'] for row in rows) / 2**30:.2f} GiB of {options.memory}, "
          f"steps {[row['steps'] for row in rows]}")  # fmt: skip


if __name__ == "__main__":
    main()
