"""The demo: from nothing to a small model that reasons, sharpened by reinforcement learning, in minutes.

A cold start learns from solved problems made on the spot: easy ones worked out completely, hard ones broken off
somewhere. Then GRPO, with nothing but a checker, and beside it, for the same seconds under the same checker, its
control: SFT on the right ones of its own answers. No data is read and nothing is fetched. The same command resumes.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch

from twelve import report, tasks
from twelve.convert import load, load_config
from twelve.engine import Engine
from twelve.errors import InputError
from twelve.evaluate import Accuracy, task_accuracy
from twelve.files import FolderLock, atomic_write, read_json, write_json
from twelve.model import count_parameters
from twelve.posttrain.rl import rl
from twelve.tasks import Problem
from twelve.train.plan import Plan
from twelve.train.pretrain import pretrain

TASKS = ("arithmetic", "word_problems")
LANGUAGES = {"en": "English", "ko": "Korean"}
LEVELS = (1, 2, 3, 4)  # worked out completely
HARD = (5, 6, 7, 8)  # broken off after a number of steps that is drawn: one trace in `level` is complete
ASKED = 50  # held-out problems for each task and language, at the hardest level, greedily and drawn
ASKED_BELOW = 15  # the same at the other levels, greedily
SOLVED = 12_000  # problems in the corpus for a minute of the cold start
COLD, SHARPEN = 0.5, 0.21  # shares of the time: the cold start; RL, and its control
METRICS = Path("training", "metrics.jsonl")  # in a model folder
MODEL = {
    "vocab_size": 512, "width": 128, "layers": 4, "experts": 8, "experts_per_token": 2, "mtp": 0, "context": 256,
    "batch": 16, "learning_rate": 4e-3,
}  # fmt: skip
STEP = {"prompts": 24, "group": 8, "max_tokens": 128, "problems": 32}
STAGES = {"cold_start": "cold start", "rl": "after RL", "control": "control"}
METHODS = {"rl": {"method": "grpo"}, "control": {"method": "rejection"}}
CONTROL = "SFT on its own right answers (rejection sampling), same seconds, same checker"


def demo(
    out: str | Path = "runs/demo", minutes: float = 9.0, seed: int = 0, device: str | None = None
) -> dict[str, Any]:
    """Train for `minutes` and measure; writes cold-start/, model/ (after RL), control/, report.html and summary.json
    into the folder `out`.

    Returns the summary. InputError when `out` holds a demo with other options, Interrupted on Ctrl-C while training.
    """
    started = time.monotonic()
    folder = Path(out)
    options = {"minutes": minutes, "seed": seed, "levels": [*LEVELS, *HARD], "asked": ASKED, **MODEL, **STEP}
    folders = {"cold_start": folder / "cold-start", "rl": folder / "model", "control": folder / "control"}
    with FolderLock(folder):
        path = folder / "demo.json"
        if path.exists() and read_json(path) != options:
            raise InputError(f"{folder} holds a demo with other options: name another folder with --out")
        problems = folder / "problems.jsonl"
        foreign = [one for one in (problems, folder / "report.html", folder / "summary.json") if one.exists()]
        if foreign and not path.exists():
            raise InputError(f"{folder} holds a {foreign[0].name} that is no demo's: name another folder with --out")
        write_json(path, options)
        if not problems.exists():
            write_problems(problems, max(2_000, round(SOLVED * COLD * minutes)), seed)
        training = train(problems, folders["cold_start"], COLD * minutes, seed, device)
        for name, method in METHODS.items():
            sharpen(folders["cold_start"], folders[name], SHARPEN * minutes, seed, device, method)
        cells = {name: measure(model, seed, device) for name, model in folders.items()}
        spent = {name: _seconds(model) for name, model in folders.items()}
        accuracy = {name: {**at_the_hardest(cells[name]), "seconds": spent[name]} for name in folders}
        accuracy["control"]["method"] = CONTROL
        summary = {
            **training, "minutes": minutes, "seed": seed, "hardest_level": HARD[-1], "accuracy": accuracy,
            "cells": {name: [cell.to_dict() for cell in found] for name, found in cells.items()},
            "seconds": round(time.monotonic() - started, 1),
        }  # fmt: skip
        write_json(folder / "summary.json", summary)
        _write_report(folder / "report.html", summary, cells, folders)
    _print(cells, accuracy)
    return {
        "model": str(folders["rl"]), "report": str(folder / "report.html"), **summary,
        "next": f"twelve chat {folders['rl']}   (or twelve serve), and ask: {cells['rl'][0].samples[0]['prompt']}",
    }  # fmt: skip


def _seconds(model: Path) -> float:
    """Of training: 0 where a busy machine had no time for a single step."""
    rows = report.read_metrics(model / METRICS)
    return rows[-1]["seconds"] if rows else 0.0


def write_problems(path: Path, count: int, seed: int) -> None:
    """`count` conversations that solve problems of the split "train": tasks, levels, languages in turn; hard ones are
    broken off."""
    told = " and ".join(LANGUAGES.values())
    print(f"corpus    {count:,} problems of {', '.join(TASKS)} in {told}: up to {LEVELS[-1]} steps solved, "
          f"{HARD[0]} to {HARD[-1]} broken off")  # fmt: skip
    streams = [tasks.problems(name, "train", seed, (*LEVELS, *HARD), tuple(LANGUAGES)) for name in TASKS]
    draw = Random(seed)
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for turn in islice(zip(*streams, strict=True), count // len(streams)):
            for problem in turn:
                messages = problem.messages() if problem.level in LEVELS else broken_off(problem, draw)
                file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def broken_off(problem: Problem, draw: Random) -> list[dict[str, str]]:
    """The conversation with the first 1 .. level steps of the solution, and where these lead as the answer."""
    steps = problem.steps.splitlines()[: draw.randint(1, problem.level)]
    reached = steps[-1].rpartition("=")[2]
    said = "\n".join(steps)
    return [
        {"role": "user", "content": problem.question},
        {"role": "assistant", "content": f"<think>{said}</think><answer>{reached}</answer>"},
    ]


def train(problems: Path, model: Path, minutes: float, seed: int, device: str | None) -> dict[str, Any]:
    """The cold start: train, or go on, or find that it was done; the figures of the run."""
    if not _is_done(model):
        plain = {"engram_vocab_size": 0}  # sums have no n-grams to remember
        pretrain([str(problems)], model, minutes=minutes, seed=seed, device=device, switches=plain, **MODEL)
    sizes = count_parameters(load_config(model), mtp=True)
    last = report.read_metrics(model / METRICS)[-1]
    return {
        "parameters": sizes["total"], "active_parameters": sizes["active"], "steps": last["step"],
        "tokens": last["tokens"], "training_seconds": last["seconds"], "loss": last["loss"],
    }  # fmt: skip


def sharpen(start: Path, model: Path, minutes: float, seed: int, device: str | None, method: dict[str, str]) -> None:
    """Reinforcement learning on the hard levels, or its control."""
    if not _is_done(model):
        rl(start, model, TASKS, level=HARD, minutes=minutes, seed=seed, device=device, **STEP, **method)


def _is_done(model: Path) -> bool:
    plan = Plan.load(model)
    if plan is None or not plan.complete:
        return False
    print(f"model     {model} is trained already")
    return True


def measure(model: Path, seed: int, device: str | None) -> list[Accuracy]:
    """Answers to problems whose calculations no training saw: greedy at every level, and drawn at the hardest."""
    network, tokenizer = load(model, device=device)
    engine = Engine(network, tokenizer)
    hardest = [(HARD[-1], 0.0, ASKED), (HARD[-1], 1.0, ASKED)]
    below = [(level, 0.0, ASKED_BELOW) for level in (*LEVELS, *HARD[:-1])]
    found = []
    for level, temperature, asked in (*hardest, *below):
        for language in LANGUAGES:
            for name in TASKS:
                cell = task_accuracy(engine, tokenizer, name, language, level, asked, seed, temperature,
                                     STEP["max_tokens"])  # fmt: skip
                cell.drawn = temperature > 0
                found.append(cell)
    return found


def at_the_hardest(cells: list[Accuracy]) -> dict[str, float]:
    """Shares of right answers at the hardest level, greedy and drawn, and the larger of their standard errors."""
    greedy, drawn = (pooled(_of(cells, level=HARD[-1], drawn=drawn)) for drawn in (False, True))
    error = max(greedy["standard_error"], drawn["standard_error"])
    return {"greedy": greedy["accuracy"], "sampled": drawn["accuracy"], "standard_error": error}


def pooled(cells: Iterable[Accuracy]) -> dict[str, float]:
    """Accuracy over several cells, with its binomial standard error."""
    cells = list(cells)
    asked = sum(cell.asked for cell in cells)
    share = sum(cell.score for cell in cells) / asked
    return {"accuracy": share, "standard_error": math.sqrt(share * (1 - share) / asked), "asked": asked}


def _of(cells: Iterable[Accuracy], **wanted: Any) -> list[Accuracy]:
    return [cell for cell in cells if all(getattr(cell, name) == value for name, value in wanted.items())]


def _print(cells: dict[str, list[Accuracy]], accuracy: dict[str, dict[str, Any]]) -> None:
    print(f"\nright answers to problems of {HARD[-1]} steps whose calculations no training saw (± one standard error)")
    for name, said in STAGES.items():
        found = accuracy[name]
        print(f"  {said:<11} greedy {found['greedy']:6.1%}   drawn {found['sampled']:6.1%}   "
              f"± {found['standard_error']:.1%}   {found['seconds']:.0f} s")  # fmt: skip
    print(f"  control: {CONTROL}")
    print("\nthe first answers after RL, as they came")
    for language in LANGUAGES:
        for cell in _of(cells["rl"], language=language, level=HARD[-1], drawn=False):
            sample = cell.samples[0]
            thought = sample["reasoning"].replace("\n", "  ")
            print(f"  Q {sample['prompt']}\n    {thought}\n  A {sample['text']}   (right: {sample['expected']})")
    print()


def _write_report(
    path: Path, summary: dict[str, Any], cells: dict[str, list[Accuracy]], folders: dict[str, Path]
) -> None:
    accuracy = summary["accuracy"]
    tiles = {f"right at level {HARD[-1]}, {said}": f"{accuracy[name]['greedy']:.1%}" for name, said in STAGES.items()}
    bars = {
        f"{said}, {how}": (accuracy[name][how], accuracy[name]["standard_error"])
        for how in ("greedy", "sampled")
        for name, said in STAGES.items()
    }
    levels = (*LEVELS, *HARD)
    by_level = {
        said: (levels, [pooled(_of(cells[name], level=level, drawn=False))["accuracy"] for level in levels])
        for name, said in STAGES.items()
    }
    logs = {STAGES[name]: report.read_metrics(folders[name] / METRICS) for name in METHODS}

    def over_time(title: str, key: str) -> str:
        lines = {name: ([row["seconds"] for row in rows], [row[key] for row in rows]) for name, rows in logs.items()}
        return report.curve(title, lines, x_label="seconds")

    rows = [
        {"stage": STAGES[name], "task": cell.task.replace("_", " "), "language": LANGUAGES[cell.language],
         "level": cell.level, "answers": "drawn" if cell.drawn else "greedy", "asked": cell.asked,
         "right": round(cell.score), "accuracy": cell.accuracy, "± s.e.": cell.standard_error}
        for name, found in cells.items() for cell in found
    ]  # fmt: skip
    shown = [
        {**sample, "correct": sample["score"] == 1,
         "note": f"{STAGES[name]}: {cell.task.replace('_', ' ')}, {LANGUAGES[cell.language]}, level {cell.level}"}
        for name in ("cold_start", "rl") for cell in _of(cells[name], level=HARD[-1], drawn=False)
        for sample in cell.samples[:1]
    ]  # fmt: skip
    machine = f"{platform.system()} {platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    run = {"command": f"twelve demo --minutes {summary['minutes']:g} --seed {summary['seed']}", "machine": machine}
    sections = [
        ("Result", [
            report.tiles({
                **tiles, "parameters": summary["parameters"], "active a token": summary["active_parameters"],
                "seconds in all": round(summary["seconds"]),
            }),
            report.bars(f"Right answers at level {HARD[-1]}", bars, "± one standard error", high=1.0),
            report.curve("Right answers by level, greedy", by_level, x_label="level"),
            report.text(
                f"The level is the number of calculations in a problem. The cold start saw problems of up to "
                f"{LEVELS[-1]} steps solved, and harder ones broken off. No whole calculation that is asked here from "
                "level 3 on was in any training, in either language or task; shorter ones may be the beginning of one "
                f"that was broken off. Control: {CONTROL}. One run, one seed: bench/reasoning.py "
                "repeats it. This accuracy says nothing about other kinds of reasoning."
            ),
        ]),
        ("Learning", [over_time("Right answers, drawn, all hard levels", "accuracy"),
                      over_time("Tokens of an answer", "length")]),
        ("Answers, the first of each kind as they came", [report.samples(shown)]),
        ("The cold start", report.training_curves(report.read_metrics(folders["cold_start"] / METRICS))),
        ("Run", [report.facts({**run, **MODEL, **STEP}), report.table(rows)]),
    ]  # fmt: skip
    subtitle = "DeepSeek-V3's shape, trained from nothing on this machine, then reinforced"
    report.write_report(path, "A model that reckons", sections, subtitle)
