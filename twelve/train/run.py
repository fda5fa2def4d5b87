"""A training run as its folder sees it: one writer, a plan that holds, a resume, and a model folder at the end."""

from __future__ import annotations

import errno
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from twelve import report
from twelve.config import ModelConfig
from twelve.convert import check_place, save
from twelve.convert.card import render, sources
from twelve.data.language import LANGUAGES, languages
from twelve.data.words import read_words
from twelve.errors import InputError
from twelve.files import FolderLock, command
from twelve.heap import keep_freed_memory
from twelve.lora import merge
from twelve.model import count_parameters
from twelve.train.loop import NO_END, Interrupted, Trainer
from twelve.train.memory import JOURNAL
from twelve.train.plan import Plan

EPOCHS = 3  # where neither minutes nor steps are given
CALIBRATION_SECONDS = 4.0
SAVE_BYTES_PER_SECOND = 100e6  # cautious, for what the end of a run writes
HIDDEN = ("model", "before", "after")  # figures that the report does not show as tiles
VERBS = {"on-policy": "distill"}  # of stages that are no verb themselves
SAMPLED = 16  # batches whose languages the card names


@dataclass
class Prepared:
    """What a stage brings: its plan (without its length), and how to make its trainer."""

    plan: Plan
    make_trainer: Callable[[], Trainer]  # with the model as the run begins
    tokenizer: Any
    about: Callable[[dict[str, Any]], dict[str, Any]]  # what the model card says of the stage, from the figures
    chats: bool  # whether the model answers conversations
    epoch_steps: float = 0  # steps that see every token once; 0 where data are made on the way


def run(
    stage: str, out: str | Path, options: dict[str, Any], prepare: Callable[[Path, Plan | None], Prepared],
    minutes: float | None, steps: int | None, started: float | None, quiet: bool,
) -> dict[str, Any]:  # fmt: skip
    """Run or resume the stage in folder `out`. `prepare(folder, earlier plan)` reads what the stage needs.

    Returns the figures of the run. Raises InputError when another process works on the folder or the options differ
    from those that the folder's run was started with, and Interrupted after Ctrl-C.
    """
    started = time.monotonic() if started is None else started
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: name a folder with --out")
    with FolderLock(folder):
        plan = Plan.load(folder)
        resumed = plan is not None
        if plan is None and (folder / "config.json").exists():
            raise InputError(f"{folder} holds a model already: name another folder with --out")
        if plan is None:
            check_place(folder)
        if plan is not None:
            plan.check_options(stage, options, folder)
            if plan.complete:
                raise InputError(f"{folder} is complete: name another folder with --out, or `twelve chat {folder}`")
        prepared = prepare(folder, plan)
        plan = prepared.plan
        torch.set_num_threads(plan.threads)
        keep_freed_memory()
        (folder / "training").mkdir(parents=True, exist_ok=True)
        if not resumed:
            (folder / JOURNAL).unlink(missing_ok=True)  # of trial steps that led to no plan
        trainer = prepared.make_trainer()
        if not resumed and _fix_length(trainer, prepared, minutes, steps, started):
            trainer = None  # before another takes as much memory
            trainer = prepared.make_trainer()
        _print_plan(trainer, prepared, minutes, resumed)
        seconds_left = None
        if minutes is not None:
            reserve = _reserve(trainer)

            def seconds_left() -> float:
                return 60 * minutes - trainer.earlier - (time.monotonic() - started) - reserve - trainer.closing

        try:
            trainer.run(seconds_left, quiet)
        except Interrupted as stop:
            raise Interrupted(f"{folder}: {stop}") from None
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise InputError(f"no space left in {folder}: free some space, then run the same command again") from error
        return _finish(trainer, prepared, folder, started)


def _fix_length(
    trainer: Trainer, prepared: Prepared, minutes: float | None, steps: int | None, started: float
) -> bool:
    """Fill in the plan's number of steps, from the speed of a few trial steps when a time is asked for.

    True when the trainer did such steps.
    """
    plan = prepared.plan
    trial = minutes is not None and steps is None and not trainer.timed
    if trial:
        plan.revisions = [(0, NO_END)]  # far from the decay
        trainer.train_step()  # the first one allocates and compiles
        began, done = time.monotonic(), 0
        while done < 2 or (time.monotonic() - began < min(CALIBRATION_SECONDS, 1.2 * minutes) and done < 50):
            trainer.train_step()
            done += 1
        seconds_per_step = (time.monotonic() - began) / done
        left = 60 * minutes - (time.monotonic() - started) - _reserve(trainer) - trainer.closing
        steps = max(1, round(left / seconds_per_step))
        if left < 10 * seconds_per_step:
            raise InputError(
                f"{minutes:g} minutes leave {max(0, left):.0f} s for training, at {seconds_per_step:.1f} s a step: "
                "ask for more minutes or a smaller model"
            )
    elif steps is None:
        steps = NO_END if minutes is not None else max(1, round(EPOCHS * prepared.epoch_steps))
    steps = min(steps, plan.most_steps or NO_END)
    plan.revisions = [(0, steps)]
    plan.warmup = min(plan.warmup, max(1, steps // 10))
    plan.save(trainer.folder)
    return trial


def _reserve(trainer: Trainer) -> float:
    """Seconds to keep for the last checkpoint, the model folder and the report."""
    trained = sum(parameter.numel() for parameter in trainer.parameters)
    sizes = _sizes(trainer.plan)
    written = 12 * trained + 4 * (sizes["parameters"] - sizes.get("table_parameters", 0))  # a table is in its place
    return 2.0 + written / SAVE_BYTES_PER_SECOND


def _print_plan(trainer: Trainer, prepared: Prepared, minutes: float | None, resumed: bool) -> None:
    plan, sizes = trainer.plan, _sizes(trainer.plan)
    total, active = sizes["parameters"] / 1e6, sizes["active_parameters"] / 1e6
    rows = sizes.get("table_parameters", 0) / 1e6
    trained = sum(parameter.numel() for parameter in trainer.parameters) / 1e6
    steps = plan.steps(0)
    length = f"{steps:,} steps" + (f", what {minutes:g} minutes are thought to hold" if minutes and not resumed else "")
    if steps >= NO_END:
        length = f"{minutes:g} minutes"
    adapters = f", {trained:.2f}M of adapters are trained" if trained < 0.9 * (total - rows) else ""
    print(f"model     {total:.2f}M parameters, {active:.2f}M of them active a token{adapters}")
    if prepared.epoch_steps:
        tokens = steps * plan.batch_size * plan.context
        epochs = steps / prepared.epoch_steps
        print(f"data      {plan.data.get('tokens', 0):,} tokens; the run reads {tokens:,} ({epochs:.2f} epochs)")
        length += f" of {plan.batch_size} x {plan.context} tokens"
    print(
        f"length    {length}\n"
        f"machine   {plan.threads} threads, {plan.precision}{', compiled' if plan.compile else ''}",
        *(f"{name:<9} {value}" for name, value in trainer.announce().items()),
        sep="\n", flush=True,
    )  # fmt: skip


def _sizes(plan: Plan) -> dict[str, int]:
    counts = count_parameters(ModelConfig(**plan.config), mtp=True)
    sizes = {"parameters": counts["total"], "active_parameters": counts["active"]}
    return sizes | ({"table_parameters": counts["table"]} if counts["table"] else {})


def _finish(trainer: Trainer, prepared: Prepared, folder: Path, started: float) -> dict[str, Any]:
    plan = trainer.plan
    rows = report.read_metrics(trainer.metrics)
    last = rows[-max(1, len(rows) // 50) :]  # the mean of the last 2%: one step's loss is noise
    figures = {
        "model": str(folder), **_sizes(plan), "steps": trainer.step, "tokens": trainer.tokens,
        "loss": round(sum(row["loss"] for row in last) / max(1, len(last)), 4),
        "training_seconds": round(trainer.seconds, 1),
        "tokens_per_second": round(trainer.tokens / max(trainer.seconds, 1e-9), 1), **trainer.outcome(),
    }  # fmt: skip
    save(merge(trainer.model.eval()), prepared.tokenizer, folder, _card(prepared, figures))
    path = folder / "training" / "report.html"
    asked = {key: value for key, value in plan.options.items() if value is not None}
    machine = f"{platform.processor() or platform.machine()}, {plan.threads} threads, torch {torch.__version__}"
    sections = [
        ("Result", [report.tiles({k.replace("_", " "): v for k, v in figures.items() if k not in HIDDEN})]),
        *trainer.sections(rows),
        ("Run", [report.facts({**asked, "machine": machine, "precision": plan.precision, "seed": plan.seed})]),
    ]
    report.write_report(path, f"{folder.name}: {plan.stage}", sections)
    plan.complete = True
    plan.save(folder)
    if (table := trainer.optimizer.table) is not None:
        table.end()
    trainer.checkpoint.unlink(missing_ok=True)  # several times the model's size, and nothing is left to resume
    following = command("twelve", "chat", folder)
    if not prepared.chats:
        following = command("twelve", "generate", folder) + ' "..."'
    return {**figures, "seconds": round(time.monotonic() - started, 1), "report": str(path), "next": following}


def _card(prepared: Prepared, figures: dict[str, Any]) -> str:
    plan, about = prepared.plan, prepared.about(figures)
    measured = {
        **about.pop("measured"),
        "parameters": f"{figures['parameters']:,} ({figures['active_parameters']:,} active a token)",
        "training": f"{figures['steps']:,} steps in {figures['training_seconds']} s",
        "machine": f"{plan.threads} threads, {plan.precision}, torch {torch.__version__}",
    }
    data = [*about.pop("data", ()), *(sources(plan.options["paths"], plan.data) if plan.data else ())]
    return render(
        figures["model"], verb=VERBS.get(plan.stage, plan.stage), config=ModelConfig(**plan.config), seed=plan.seed,
        options=plan.options, measured=measured, data=data, chats=prepared.chats, **about,
    )  # fmt: skip


def spoken(batches: Callable[[int], Any], tokenizer: Any) -> list[str]:
    """The languages of the data, of those that we tell apart: in which a tenth or more of the rows of some batches
    are."""
    rows = [row for step in range(SAMPLED) for row in batches(step).ids.tolist()]
    codes = languages(read_words([tokenizer.decode(row) for row in rows])).code.tolist()
    return [name for code, name in enumerate(LANGUAGES) if name != "other" and codes.count(code) >= len(rows) / 10]
