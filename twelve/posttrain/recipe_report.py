"""What a recipe shows of its stages: one measure for all of them, the report, the card, and the model in its folder."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from twelve import convert, report, tasks
from twelve.convert.card import render
from twelve.engine import Engine
from twelve.errors import InputError
from twelve.evaluate.accuracy import GROUP
from twelve.files import atomic_write, command
from twelve.posttrain.curriculum import Cell, serving
from twelve.posttrain.reinforcement import pooled, score
from twelve.posttrain.rewards import Rewards, language_share, well_formed
from twelve.posttrain.rl import trained_on
from twelve.posttrain.rollout import fitting, sample
from twelve.posttrain.stages import Progress


def measure(
    model: str | Path, cells: Sequence[Cell], problems: int, max_tokens: int, device: str | None = None
) -> dict[str, Any]:
    """Greedy answers to about `problems` held-out problems, by task: accuracy, and over all tasks the tokens of an
    answer, the share of its words that are in the question's language, the share of well-formed answers, and the
    seconds that this took."""
    began = time.monotonic()
    network, tokenizer = convert.load(model, device=device, packed=True)
    engine = Engine(network, tokenizer, speculation="off")
    cells = serving("test", cells)
    each, asked = -(-problems // len(cells)), []
    for cell in cells:
        stream = tasks.problems(cell.task, "test", 0, [cell.level], [cell.language])
        asked += islice(fitting(tokenizer, stream, engine.context), each)
    groups = []
    for start in range(0, len(asked), GROUP):
        groups += sample(engine, tokenizer, asked[start : start + GROUP], 1, max_tokens, temperature=0.0, seed=0)
    score(groups, Rewards(), max_tokens)
    rows = []
    for task in dict.fromkeys(cell.task for cell in cells):
        scores = [group.scores[0] for group in groups if group.problem.task == task]
        if not scores:
            raise InputError(f"{task} has no held-out problems at these levels, so nothing can be measured")
        row = {"task": task, "asked": len(scores), "score": sum(scores)}
        row["accuracy"], row["standard_error"] = pooled([row])
        rows.append(row)
    answers = [(group.problem.language, group.answers[0]) for group in groups]
    count = len(answers)
    return {
        "tasks": rows, "length": sum(answer.completion_tokens for _, answer in answers) / count,
        "language": sum(language_share(answer.text, language) for language, answer in answers) / count,
        "format": sum(well_formed(answer.text) for _, answer in answers) / count,
        "seconds": round(time.monotonic() - began, 2),
    }  # fmt: skip


def figures(folder: Path, progress: Progress) -> dict[str, Any]:
    """What the verb says."""
    rows = progress.stages
    (before, _), (after, error) = (pooled(row["measured"]["tasks"]) for row in (rows[0], rows[-1]))
    return {
        "model": str(folder), "recipe": progress.options["recipe"], "accuracy_before": before, "accuracy_after": after,
        "standard_error": error, "stages": rows, "seconds": round(sum(row["seconds"] for row in rows), 1),
        "report": str(folder / "report.html"), "next": command("twelve", "chat", folder),
    }  # fmt: skip


def lines(progress: Progress) -> list[dict[str, Any]]:
    """The table: a line for each stage, with what it changed."""
    table, before = [], None
    for row in progress.stages:
        measured = row["measured"]
        line = {"stage": row["name"], "minutes": round(row["seconds"] / 60, 1)}
        for index, task in enumerate(measured["tasks"]):
            was = f"{before['tasks'][index]['accuracy']:.1%} → " if before else ""
            line[task["task"]] = f"{was}{task['accuracy']:.1%} ± {task['standard_error']:.1%}"
        line |= {"tokens an answer": round(measured["length"], 1), "in its language": f"{measured['language']:.0%}",
                 "well-formed": f"{measured['format']:.0%}"}  # fmt: skip
        notes = [f"{row['traces']:,} traces, pass rate {row['pass_rate']:.0%}"] if "traces" in row else []
        table.append(line | {"note": "; ".join(notes + ([row["ended"]] if "ended" in row else []))})
        before = measured
    return table


def write_report(folder: Path, progress: Progress, quiet: bool) -> None:
    """`report.html`, and its table on the terminal."""
    table = lines(progress)
    bars = {row["name"]: pooled(row["measured"]["tasks"]) for row in progress.stages}
    asked = {name: str(value) for name, value in progress.options.items() if value not in (None, [])}
    report.write_report(folder / "report.html", f"{folder.name}: recipe {progress.options['recipe']}", [
        ("Stages", [report.bars("Right answers to held-out problems", bars, "greedy; ± one standard error", 1.0),
                    report.table(table)]),
        ("Run", [report.facts(asked)]),
    ])  # fmt: skip
    if not quiet:
        print()
        for line in table:
            print("   ".join(f"{name} {value}" for name, value in line.items() if value != ""))


def card(folder: Path, progress: Progress, cells: Sequence[Cell]) -> str:
    """The model card."""
    options = progress.options
    return render(
        folder, f"Made from `{options['model']}` by the recipe {options['recipe']}, on checkable tasks. Right answers "
        "are greedy ones to held-out problems, ± one standard error.",
        verb="rl", config=convert.load_config(folder / progress.stages[-1]["name"]), parents=[options["model"]],
        data=trained_on(cells), seed=options["seed"], languages={cell.language for cell in cells},
        measured=lines(progress), options=options,
        limits="It was trained for these tasks, and may have become worse at others.",
    )  # fmt: skip


def publish(last: Path, folder: Path, card: str) -> None:
    """Make `folder` the model that `last` is: links to its files, which take no room, and config.json at the end, which
    makes a folder a model."""
    with atomic_write(folder / "README.md") as temporary:
        temporary.write_text(card, encoding="utf-8")
    files = [path for path in last.iterdir() if path.is_file() and path.name != "README.md" and path.name[0] != "."]
    for path in sorted(files, key=lambda path: path.name == "config.json"):
        with atomic_write(folder / path.name) as temporary:
            try:
                os.link(path, temporary)
            except OSError:  # a file system without links
                shutil.copyfile(path, temporary)
