"""The demo: solved problems made on the spot, a small V3-shape model trained on them, and what it then can do.

No data is read and nothing is fetched. The same command again resumes; a finished demo is measured anew.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from twelve import report, tasks
from twelve.convert import load, load_config
from twelve.engine import Engine
from twelve.errors import InputError
from twelve.evaluate import Accuracy, task_accuracy
from twelve.files import FolderLock, atomic_write, read_json, write_json
from twelve.model import count_parameters
from twelve.train.plan import Plan
from twelve.train.pretrain import pretrain

LANGUAGES = {"en": "English", "ko": "Korean"}
TASKS = ("arithmetic", "word_problems")
LEVELS = (1, 2, 3, 4)
ASKED = 25  # held-out problems for each task, language and level
SOLVED = 12_000  # problems in the corpus for a minute of training
METRICS = Path("training", "metrics.jsonl")  # in the model folder
MODEL = {
    "vocab_size": 512, "width": 128, "layers": 4, "experts": 8, "experts_per_token": 2, "mtp": 1, "context": 256,
    "batch": 16, "learning_rate": 4e-3,
}  # fmt: skip


def demo(
    out: str | Path = "runs/demo", minutes: float = 5.0, seed: int = 0, device: str | None = None
) -> dict[str, Any]:
    """Train for `minutes` and measure; writes model/, report.html and summary.json into the folder `out`.

    Returns the summary. InputError when `out` holds a demo with other options, Interrupted on Ctrl-C while training.
    """
    started = time.monotonic()
    folder = Path(out)
    options = {"minutes": minutes, "seed": seed, "levels": list(LEVELS), "asked": ASKED, **MODEL}
    with FolderLock(folder):
        path = folder / "demo.json"
        if path.exists() and read_json(path) != options:
            raise InputError(f"{folder} holds a demo with other options: name another folder with --out")
        write_json(path, options)
        problems = folder / "problems.jsonl"
        if not problems.exists():
            write_problems(problems, max(2_000, round(SOLVED * minutes)), seed)
        training = train(problems, folder / "model", minutes, seed, device)
        cells = measure(folder / "model", seed, device)
        summary = {
            **training, "minutes": minutes, "seed": seed, "accuracy": pooled(cells),
            "accuracy_by_language": {name: pooled(_of(cells, language=name)) for name in LANGUAGES},
            "cells": [cell.to_dict() for cell in cells], "seconds": round(time.monotonic() - started, 1),
        }  # fmt: skip
        write_json(folder / "summary.json", summary)
        _write_report(folder / "report.html", summary, cells)
    _print(cells)
    return {
        "model": str(folder / "model"), "report": str(folder / "report.html"), **summary,
        "next": f"twelve chat {folder / 'model'}   (or twelve serve), and ask: {cells[0].samples[0]['prompt']}",
    }  # fmt: skip


def write_problems(path: Path, count: int, seed: int) -> None:
    """`count` conversations that solve problems of the split "train", tasks, levels and languages in turn."""
    print(f"corpus    {count:,} solved problems of {', '.join(TASKS)}, in {' and '.join(LANGUAGES.values())}")
    streams = [tasks.problems(name, "train", seed, LEVELS, tuple(LANGUAGES)) for name in TASKS]
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for turn in islice(zip(*streams, strict=True), count // len(streams)):
            for problem in turn:
                file.write(json.dumps({"messages": problem.messages()}, ensure_ascii=False) + "\n")


def train(problems: Path, model: Path, minutes: float, seed: int, device: str | None) -> dict[str, Any]:
    """Train, or go on, or find that it was done; the figures of the run."""
    plan = Plan.load(model)
    if plan is not None and plan.complete:
        print(f"model     {model} is trained already")
    else:
        pretrain([str(problems)], model, minutes=minutes, seed=seed, device=device, **MODEL)
    sizes = count_parameters(load_config(model), mtp=True)
    last = report.read_metrics(model / METRICS)[-1]
    return {
        "parameters": sizes["total"], "active_parameters": sizes["active"], "steps": last["step"],
        "tokens": last["tokens"], "training_seconds": last["seconds"], "loss": last["loss"],
    }  # fmt: skip


def measure(model: Path, seed: int, device: str | None) -> list[Accuracy]:
    """Greedy answers to problems whose calculations were kept out of the corpus."""
    network, tokenizer = load(model, device=device)
    engine = Engine(network, tokenizer)
    return [
        task_accuracy(engine, tokenizer, name, language, level, ASKED, seed, max_tokens=32 + 16 * level)
        for language in LANGUAGES
        for level in LEVELS
        for name in TASKS
    ]


def pooled(cells: Iterable[Accuracy]) -> dict[str, float]:
    """Accuracy over several cells, with its binomial standard error."""
    cells = list(cells)
    asked = sum(cell.asked for cell in cells)
    share = sum(cell.score for cell in cells) / asked
    return {"accuracy": share, "standard_error": math.sqrt(share * (1 - share) / asked), "asked": asked}


def _of(cells: Iterable[Accuracy], **wanted: Any) -> list[Accuracy]:
    return [cell for cell in cells if all(getattr(cell, name) == value for name, value in wanted.items())]


def _percent(figures: dict[str, float]) -> str:
    return f"{figures['accuracy']:.1%} ± {figures['standard_error']:.1%}"


def _print(cells: list[Accuracy]) -> None:
    asked = sum(cell.asked for cell in cells)
    print(f"\naccuracy on {asked} problems whose calculations were not in the corpus (± one standard error)")
    print(f"{'':10}" + "".join(f"level {level:<12}" for level in LEVELS) + "all")
    for language, name in LANGUAGES.items():
        mine = _of(cells, language=language)
        rows = [*(_of(mine, level=level) for level in LEVELS), mine]
        print(f"{name:10}" + "".join(f"{_percent(pooled(row)):18}" for row in rows))
    print("\nthe first answers, as they came")
    for language in LANGUAGES:
        for cell in _of(cells, language=language, level=LEVELS[-1]):
            sample = cell.samples[0]
            thought = sample["reasoning"].replace("\n", "  ")
            print(f"  Q {sample['prompt']}\n    {thought}\n  A {sample['text']}   (right: {sample['expected']})")
    print()


def _write_report(path: Path, summary: dict[str, Any], cells: list[Accuracy]) -> None:
    tiles = {}
    for code, name in LANGUAGES.items():
        accuracy, _, error = _percent(summary["accuracy_by_language"][code]).partition(" ")
        tiles[f"{name}, {error}"] = accuracy
    bars = {}
    for language, name in LANGUAGES.items():
        for level in LEVELS:
            figures = pooled(_of(cells, language=language, level=level))
            bars[f"{name}, level {level}"] = (figures["accuracy"], figures["standard_error"])
    rows = [
        {"task": cell.task.replace("_", " "), "language": LANGUAGES[cell.language], "level": cell.level,
         "asked": cell.asked, "right": round(cell.score), "accuracy": cell.accuracy, "± s.e.": cell.standard_error}
        for cell in cells
    ]  # fmt: skip
    shown = [
        {**sample, "correct": sample["score"] == 1,
         "note": f"{cell.task.replace('_', ' ')}, {LANGUAGES[cell.language]}, level {cell.level}"}
        for cell in cells if cell.level in (LEVELS[0], LEVELS[-1]) for sample in cell.samples[:1]
    ]  # fmt: skip
    machine = f"{platform.system()} {platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    result = [
        report.tiles({
            **tiles, "parameters": summary["parameters"], "active a token": summary["active_parameters"],
            "tokens read": summary["tokens"], "seconds of training": round(summary["training_seconds"]),
        }),
        report.bars("Accuracy on held-out problems", bars, "greedy; ± one standard error", high=1.0),
        report.text(
            "The level is the number of calculations in a problem. No calculation that is asked here was in the "
            "corpus, in either language or task. This accuracy says nothing about other kinds of reasoning."
        ),
    ]  # fmt: skip
    metrics = report.read_metrics(path.parent / "model" / METRICS)
    run = {"command": f"twelve demo --minutes {summary['minutes']:g} --seed {summary['seed']}", "machine": machine}
    sections = [
        ("Result", result),
        ("Answers, the first of each kind as they came", [report.samples(shown)]),
        ("Training", report.training_curves(metrics)),
        ("Run", [report.facts({**run, **MODEL}), report.table(rows)]),
    ]
    subtitle = "DeepSeek-V3's shape, trained from nothing on this machine"
    report.write_report(path, "A model that reckons", sections, subtitle)
