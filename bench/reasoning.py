"""What reinforcement learning, its controls, curricula, distillation and the language reward do to a small model.

    python bench/reasoning.py effect curriculum distill language --seeds 3 4 5 6 7 --out runs/reasoning

Every run is a process of its own on one thread, `--workers` at a time, and leaves its row in rows.jsonl: the same
command goes on where it stopped. All arms of a comparison start from the same cold start and get the same seconds.

effect      a cold start whose traces are complete for 1 to 3 steps and broken off for 4 to 6, then GRPO; SFT on its own
            right answers (rejection sampling); more of the cold start's SFT; SFT on complete traces (a ceiling)
curriculum  GRPO with levels drawn alike against p (1 - p) and gates, on two tasks
distill     a smaller student under GRPO against the same student taught by the RL-trained model of `effect`: on 200
            selected or 2,000 random traces, or on its own samples; and a student cut from the teacher, in one stage
            or in three
language    GRPO with and without the language reward, from reasoning in the question's language in 6 of 10 cold traces
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import islice, product
from pathlib import Path
from random import Random
from statistics import mean

import runs

from twelve import report, tasks
from twelve.tasks import LANGUAGES

EASY, HARD = (1, 2, 3), (4, 5, 6)
TRACES = 40_000
MODEL = {"vocab_size": 384, "width": 64, "layers": 4, "experts": 4, "experts_per_token": 2, "context": 256, "batch": 16,
         "learning_rate": 4e-3, "switches": {"engram_vocab_size": 0}}  # fmt: skip
SFT = {"muon": True, "learning_rate": 1e-3, "context": 256, "batch": 16}  # as the cold start, from a lower rate
RL = {"prompts": 24, "group": 8, "max_tokens": 128, "level": HARD, "problems": 6}
ASKED = 100  # held-out problems a level and language
ASKED_LANGUAGE = 0.6  # half, no hint at all, gave the reward nothing to hold on to in a minute
WORDS = {"en": ("now ", "then ", "so ", "next "), "ko": ("이제 ", "다음에 ", "그러면 ", "여기서 ")}

ARMS = {
    "effect": ("cold start", "grpo", "rejection", "more sft", "complete traces"),
    "curriculum": ("arithmetic uniform", "arithmetic curriculum", "word_problems uniform", "word_problems curriculum"),
    "distill": ("student", "student grpo", "200 selected", "2000 random", "on-policy", "one stage, cut",
                "three stages, cut"),
    "language": ("cold start", "without reward", "with reward"),
}  # fmt: skip


# --- data -------------------------------------------------------------------------------------------------------------


def write_traces(path: Path, task: str, seed: int, complete: bool = False, levels=(*EASY, *HARD), words=False) -> None:
    """Conversations of `task`, hard levels broken off after 1 .. level steps unless `complete`; with `words` every step
    begins with a word of a language that is drawn for each trace, and is the question's in ASKED_LANGUAGE of them."""
    draw = Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        for problem in islice(tasks.problems(task, "train", seed, levels, LANGUAGES), TRACES):
            steps, answer = problem.steps.splitlines(), problem.answer
            if problem.level in HARD and not complete:
                steps = steps[: draw.randint(1, problem.level)]
                answer = steps[-1].rpartition("=")[2]
            if words:
                others = [code for code in LANGUAGES if code != problem.language]
                language = problem.language if draw.random() < ASKED_LANGUAGE else draw.choice(others)
                steps = [draw.choice(WORDS[language]) + step for step in steps]
            said = "\n".join(steps)
            messages = [
                {"role": "user", "content": problem.question},
                {"role": "assistant", "content": f"<think>{said}</think><answer>{answer}</answer>"},
            ]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


# --- one run ----------------------------------------------------------------------------------------------------------


def run(experiment: str, arm: str, seed: int, out: Path, cold: int, minutes: float) -> runs.Row:
    """What one arm measures; trains whatever is not there yet."""
    import torch

    torch.set_num_threads(1)
    folder = out / experiment / f"{arm.replace(' ', '-')}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    task = arm.split()[0] if experiment == "curriculum" else "arithmetic"
    model = {"effect": _effect, "curriculum": _curriculum, "distill": _distill, "language": _language}[experiment](
        arm, seed, out, folder, cold, minutes
    )
    return {"seconds": time.monotonic() - began, **measure(model, task)}


def cold_start(out: Path, seed: int, steps: int, task: str = "arithmetic", **changes) -> Path:
    from twelve.train.pretrain import pretrain

    words = changes.pop("words", False)
    kind = [f"{key}{value}" for key, value in changes.items()] + (["words"] if words else [])
    name = "-".join([task, *kind, str(seed)])
    model, traces = out / "cold" / name, out / "cold" / f"{name}.jsonl"
    if not (model / "config.json").exists():
        model.parent.mkdir(parents=True, exist_ok=True)
        write_traces(traces, task, seed, words=words)
        pretrain([str(traces)], model, steps=steps, seed=seed, quiet=True, **MODEL | changes)
    return model


def _effect(arm: str, seed: int, out: Path, folder: Path, cold: int, minutes: float) -> Path:
    from twelve.posttrain.rl import rl
    from twelve.train.sft import sft

    start = cold_start(out, seed, cold)
    if arm == "cold start":
        return start
    if arm in ("grpo", "rejection"):
        rl(start, folder / "model", ["arithmetic"], method=arm, minutes=minutes, seed=seed, quiet=True, **RL)
    else:
        write_traces(folder / "traces.jsonl", "arithmetic", seed + 1000, complete=arm == "complete traces")
        sft(start, [str(folder / "traces.jsonl")], folder / "model", minutes=minutes, seed=seed, quiet=True, **SFT)
    return folder / "model"


def _curriculum(arm: str, seed: int, out: Path, folder: Path, cold: int, minutes: float) -> Path:
    from twelve.posttrain.rl import rl

    task, how = arm.split()
    start = cold_start(out, seed, cold, task)
    rl(start, folder / "model", [task], curriculum=how, minutes=minutes, seed=seed, quiet=True, **RL)
    return folder / "model"


def _distill(arm: str, seed: int, out: Path, folder: Path, cold: int, minutes: float) -> Path:
    from twelve.posttrain.distill import distill
    from twelve.posttrain.rl import rl

    teacher = out / "effect" / f"grpo-{seed}" / "model"
    student = cold_start(out, seed, cold, layers=2)
    asked = {"task": ["arithmetic"], "level": HARD, "max_tokens": 128, "seed": seed, "minutes": minutes, "quiet": True}
    how = {"learning_rate": SFT["learning_rate"], "batch": 16, "context": 256}
    if arm == "student":
        return student
    if arm == "student grpo":
        rl(student, folder / "model", ["arithmetic"], minutes=minutes, seed=seed, quiet=True, **RL)
        return folder / "model"
    if arm == "on-policy":
        distill([str(teacher)], folder / "model", how="on-policy", student=str(student), learning_rate=3e-4, **asked)
    elif arm.endswith("cut"):  # from the teacher, at once or by way of students of 4 and 3 layers
        layers = [4, 3, 2] if arm.startswith("three") else [2]
        distill([str(teacher)], folder / "model", layers=layers, traces=2000, select_how="random", **asked, **how)
    else:
        count, _, which = arm.partition(" ")
        distill([str(teacher)], folder / "model", student=str(student), traces=int(count), **asked, **how,
                select_how="best" if which == "selected" else "random")  # fmt: skip
    found = json.loads((folder / "model" / "distill.json").read_text())
    return Path(found["stages"][-1]["model"])


def _language(arm: str, seed: int, out: Path, folder: Path, cold: int, minutes: float) -> Path:
    from twelve.posttrain.rl import rl

    start = cold_start(out, seed, cold, words=True)
    if arm == "cold start":
        return start
    reward = 0.5 if arm == "with reward" else 0.0
    rl(start, folder / "model", ["arithmetic"], language_reward=reward, minutes=minutes, seed=seed, quiet=True, **RL)
    return folder / "model"


def measure(model: Path, task: str) -> dict:
    """Greedy and drawn accuracy at every level, on problems that no training saw, and the language of the reasoning."""
    from twelve.convert import load
    from twelve.engine import Engine, Request, sub_seed
    from twelve.evaluate.accuracy import prompt_ids
    from twelve.posttrain.rewards import language_share

    network, tokenizer = load(model, device="cpu")
    engine = Engine(network, tokenizer, speculation="off")
    row: dict = {"greedy": {}, "sampled": {}, "length": {}, "language": {}}
    for level in (*EASY, *HARD):
        asked = [p for code in LANGUAGES for p in islice(tasks.problems(task, "test", 0, [level], [code]), ASKED)]
        prompts = [prompt_ids(tokenizer, problem) for problem in asked]
        for how, temperature in (("greedy", 0.0), ("sampled", 1.0)):
            answers = engine.generate(
                Request(prompt, 128, temperature, seed=sub_seed(9, index)) for index, prompt in enumerate(prompts)
            )
            texts = [answer.text for answer in answers]
            row[how][level] = mean(tasks.score_all(asked, texts))
        row["length"][level] = mean(answer.completion_tokens for answer in answers)
        for code in LANGUAGES:
            shares = [language_share(text, code) for p, text in zip(asked, texts, strict=True) if p.language == code]
            row["language"].setdefault(code, []).append(mean(shares))
    return row | {"language": {code: mean(shares) for code, shares in row["language"].items()}}


# --- all of them ------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", choices=[*ARMS, []], default=[])
    parser.add_argument("--seeds", nargs="+", type=int, default=[3, 4, 5, 6, 7])
    parser.add_argument("--cold", type=int, default=700, help="steps of a cold start of 4,096 tokens")
    parser.add_argument("--minutes", type=float, default=3, help="of every arm")
    parser.add_argument("--plot", type=Path, metavar="SVG", help="a picture of `effect`")
    runs.add_options(parser, "runs/reasoning")
    options = parser.parse_args()
    if job := options.one:
        runs.add_row(options.out, job | run(**job, out=options.out, cold=options.cold, minutes=options.minutes))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for experiment in options.experiments:
        for some in jobs(experiment, options.seeds):
            failed += runs.run_all(some, "{experiment}, {arm}, seed {seed}", options.out, options.workers)
    rows = runs.read_rows(options.out)
    for experiment in dict.fromkeys(row["experiment"] for row in rows):
        print_table(experiment, [row for row in rows if row["experiment"] == experiment])
    write_report(options.out / "report.html", rows)
    if options.plot:
        options.plot.write_text(plot([row for row in rows if row["experiment"] == "effect"]), encoding="utf-8")
    runs.end(failed)


def jobs(experiment: str, seeds: list[int]) -> tuple[list[runs.Job], list[runs.Job]]:
    """Those that make the cold starts, one for each, and those that start from them later."""
    arms = ARMS[experiment]
    first = arms[:1] if experiment != "curriculum" else tuple(arm for arm in arms if arm.endswith("uniform"))

    def of(some: list[str]) -> list[runs.Job]:
        return [{"experiment": experiment, "arm": arm, "seed": seed} for seed, arm in product(seeds, some)]

    return of(first), of([arm for arm in arms if arm not in first])


def hard(row: dict, how: str) -> float:
    return mean(row[how][str(level)] for level in HARD)


def print_table(experiment: str, rows: list[dict]) -> None:
    print(f"\n{experiment}: levels {HARD[0]} to {HARD[-1]}, mean ± standard error over seeds")
    print(f"{'arm':24} {'seeds':>5} {'greedy':>15} {'drawn':>15} {'hardest, drawn':>15} {'easy, drawn':>13} "
          f"{'tokens':>7} {'ko':>6} {'en':>6}")  # fmt: skip
    for arm in ARMS[experiment]:
        mine = [row for row in rows if row["arm"] == arm]
        if not mine:
            continue
        cells = [runs.spread([hard(row, how) for row in mine], 0.0) for how in ("greedy", "sampled")]
        cells.append(runs.spread([row["sampled"][str(HARD[-1])] for row in mine], 0.0))
        shown = "".join(f"{value:8.1%} ± {error:4.1%}" for value, error in cells)
        easy = mean(row["sampled"][str(level)] for row in mine for level in EASY)
        length = mean(row["length"][str(HARD[-1])] for row in mine)
        language = "".join(f"{mean(row['language'][code] for row in mine):7.1%}" for code in ("ko", "en"))
        print(f"{arm:24} {len(mine):5} {shown} {easy:13.1%} {length:7.1f} {language}")
    first, *others = [arm for arm in ARMS[experiment] if any(row["arm"] == arm for row in rows)]
    if experiment == "effect" and "grpo" in others:
        first, others = "grpo", [arm for arm in others if arm != "grpo"]
    if experiment == "curriculum":
        pairs = [(f"{task} uniform", f"{task} curriculum") for task in ("arithmetic", "word_problems")]
    else:
        pairs = [(first, other) for other in others]
    for one, other in pairs:
        values = {arm: {row["seed"]: hard(row, "sampled") for row in rows if row["arm"] == arm} for arm in (one, other)}
        both = sorted(values[one].keys() & values[other].keys())
        if both:
            difference, error = runs.spread([values[other][seed] - values[one][seed] for seed in both], 0.0)
            print(f"  {other} less {one}, drawn, paired: {difference:+.1%} ± {error:.1%}")


def write_report(path: Path, rows: list[dict]) -> None:
    sections = []
    for experiment in dict.fromkeys(row["experiment"] for row in rows):
        mine = [row for row in rows if row["experiment"] == experiment]
        bars = {}
        for how in ("greedy", "sampled"):
            for arm in ARMS[experiment]:
                values = [hard(row, how) for row in mine if row["arm"] == arm]
                if values:
                    bars[f"{arm}, {how}"] = runs.spread(values, 0.0)
        shown = [report.bars(f"Right at levels {HARD[0]} to {HARD[-1]}", bars, "± standard error over seeds", high=1.0)]
        if experiment == "language":
            shares = {
                f"{arm}, {code}": runs.spread([row["language"][code] for row in mine if row["arm"] == arm], 0.0)
                for arm in dict.fromkeys(row["arm"] for row in mine)
                for code in LANGUAGES
            }
            shown.append(report.bars("Words of the reasoning in the asked language", shares, high=1.0))
        sections.append((experiment, shown))
    report.write_report(path, "Reasoning, with controls", sections)


def plot(rows: list[dict]) -> str:
    """Drawn accuracy at the hard levels by arm, with a whisker of one standard error and a dot a seed, as SVG."""
    left, width, height = 150, 400, 34
    parts, seeds = [], 0
    arms = [arm for arm in ARMS["effect"] if any(row["arm"] == arm for row in rows)]
    for number, arm in enumerate(arms):
        values, y = [hard(row, "sampled") for row in rows if row["arm"] == arm], 34 + number * height
        average, error = runs.spread(values, 0.0)
        parts += [
            runs.label(left - 10, y, NAMES.get(arm, arm), "end"),
            runs.bar(left, y, width, values, "#3b6ea8" if arm == "grpo" else "#a9b8c6"),
            runs.label(left + width + 12, y, f"{average:.1%} ± {error:.1%}"),
        ]
        seeds = len(values)
    title = f"Right answers at {HARD[0]} to {HARD[-1]} steps, drawn: mean, standard error, and {seeds} seeds"
    return runs.svg(title, left + width + 130, 44 + len(arms) * height, parts)


NAMES = {"grpo": "GRPO", "rejection": "rejection sampling", "more sft": "more SFT"}


if __name__ == "__main__":
    main()
