"""The verb `distill`: what large models can do, passed on to small ones, in one stage or in a chain of them."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twelve import convert, report, tasks
from twelve.errors import InputError
from twelve.files import FolderLock, command, read_json, write_json
from twelve.posttrain.curriculum import Cell, serving
from twelve.posttrain.logits import LogitsLesson
from twelve.posttrain.on_policy import on_policy
from twelve.posttrain.rl import cells_of
from twelve.posttrain.stages import require_no_foreign_files
from twelve.posttrain.student import kept_layers, make_student
from twelve.posttrain.teacher import Teacher, is_endpoint, open_teacher, require_one_vocabulary
from twelve.posttrain.traces import collect, read_traces, select, write_traces
from twelve.train.plan import Plan
from twelve.train.sft import sft

HOW = ("traces", "logits", "on-policy")
MINUTES = 10.0  # where neither minutes nor steps are given
MAX_TOKENS = 256  # of an answer, where the task does not say
SAMPLING = 0.5  # of a timed stage's minutes, for the teacher's answers
FRESH = {"muon": True, "learning_rate": 4e-3}  # as pretraining: a model that knows nothing learns in large steps


@dataclass
class Stage:
    """One teacher or several, one student, one folder."""

    folder: Path
    teachers: dict[str | None, list[str]]  # by task; None for all others
    student: str | None  # a model; None: made of the first teacher's `layers`
    layers: int | None = None


def distill(
    teachers: Sequence[str], out: str | Path, *, how: str = "traces", student: str | None = None,
    layers: Sequence[int] | None = None, width: int | None = None, experts: int | None = None,
    task: Sequence[str] = ("arithmetic",), level: Sequence[int] | None = None, language: Sequence[str] | None = None,
    teacher_for: Mapping[str, str] | None = None, key_env: str | None = None, traces: int = 1000, samples: int = 4,
    select_how: str = "best", max_tokens: int | None = None, minutes: float | None = None, steps: int | None = None,
    seed: int = 0, batch: int | None = None, context: int | None = None, learning_rate: float | None = None,
    lora: int | None = None, device: str | None = None, started: float | None = None, quiet: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Distil `teachers` (models, or endpoints for traces) into a student; the same call again goes on where it stopped.

    how: "traces" fine-tunes on answers that the verifier accepted, `traces` of them picked from `samples` to each of
    twice as many problems; "logits" also takes over the teacher's probabilities on these; "on-policy" has the student
    answer. student: a model; or else `layers`, a chain of students each of which teaches the next, cut from their
    teachers or, with a width or a number of experts, fresh. teacher_for: teachers of single tasks, in the first stage.
    minutes: for the whole chain, in equal parts; steps: of each stage.

    Every stage is a model folder in `out`. Returns the figures, "stages" among them. InputError for what cannot be.
    """
    began = time.monotonic() if started is None else started
    if minutes is None and steps is None:
        minutes = MINUTES
    cells = cells_of(task, level, language, splits=("train",))
    if max_tokens is None:
        max_tokens = max(getattr(tasks.get(name), "MAX_TOKENS", MAX_TOKENS) for name in task)
    options = {
        "teachers": [*map(str, teachers)], "how": how, "student": student and str(student),
        "layers": layers and list(layers), "width": width, "experts": experts,
        "cells": [[cell.task, cell.level, cell.language] for cell in cells], "teacher_for": dict(teacher_for or {}),
        "key_env": key_env, "traces": traces, "samples": samples, "select_how": select_how, "max_tokens": max_tokens,
        "minutes": minutes, "steps": steps, "seed": seed, "batch": batch, "context": context,
        "learning_rate": learning_rate, "lora": lora, "device": device,
    }  # fmt: skip
    if files := tasks.fingerprints(map(str, task)):
        options["task_sha256"] = files
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: name a folder with --out")
    stages = _stages(folder, options)
    _check(stages, options)
    with FolderLock(folder):
        if not (folder / "distill.json").exists():
            require_no_foreign_files(folder)
        done = _earlier(folder, options)
        for number, stage in enumerate(stages):
            if number < len(done):
                continue
            if not quiet:
                print(f"stage {number + 1} of {len(stages)}: {how}, into {stage.folder}", flush=True)
            share = minutes and minutes / len(stages)
            try:
                done.append(_run(stage, cells, options, share, began if number == 0 else time.monotonic(), quiet))
            except InputError:
                if not done:
                    _forget(folder, stage)
                raise
            write_json(folder / "distill.json", {"options": options, "stages": done})
        page = folder / "report.html"
        asked = {name: value for name, value in options.items() if value is not None}
        report.write_report(page, f"{folder.name}: distillation", [
            ("Stages", [report.table(done)]), ("Run", [report.facts({k: str(v) for k, v in asked.items()})]),
        ])  # fmt: skip
    for number, row in enumerate(done, start=1):
        said = (f"{name.replace('_', ' ')} {value}" for name, value in row.items() if name not in ("model", "student"))
        print(f"stage {number}   {row['model']}: {row['student']}; {', '.join(said)}")
    following = command("twelve", "chat", done[-1]["model"])
    if measurable := serving("test", cells):
        names, levels = dict.fromkeys(cell.task for cell in measurable), sorted({cell.level for cell in measurable})
        following = command("twelve", "eval", done[-1]["model"], "--task", *names, "--level", *levels)
    return {
        "model": done[-1]["model"], "stages": done, "report": str(page),
        "seconds": round(time.monotonic() - began, 1), "next": following,
    }  # fmt: skip


def _stages(folder: Path, options: dict[str, Any]) -> list[Stage]:
    """What there is to do. InputError where a student is missing or named twice."""
    student, layers = options["student"], options["layers"]
    if (student is None) == (layers is None):
        raise InputError("name the student: a model with --student, or how many layers of the teacher with --layers")
    teachers = {None: options["teachers"]} | {name: [each] for name, each in options["teacher_for"].items()}
    if student is not None:
        return [Stage(folder / f"1-{options['how']}", teachers, student)]
    stages: list[Stage] = []
    for number, count in enumerate(layers, start=1):
        stages.append(Stage(folder / f"{number}-layers-{count}", teachers, None, count))
        teachers = {None: [str(stages[-1].folder)]}
    return stages


def _check(stages: list[Stage], options: dict[str, Any]) -> None:
    """InputError for what a stage would only find out after hours."""
    how, first = options["how"], stages[0]
    if how not in HOW:
        raise InputError(f"unknown way {how!r} to distil; there are: {', '.join(HOW)}")
    unused = set(options["teacher_for"]) - {task for task, _, _ in options["cells"]}
    if unused:
        raise InputError(f"--teacher-for {min(unused)}: this is none of the tasks; name it with --task, too")
    named = [name for several in first.teachers.values() for name in several]
    endpoints = [name for name in named if is_endpoint(name)]
    if endpoints and how != "traces":
        raise InputError(f"{endpoints[0]} gives text, not probabilities: use --how traces, or a model folder")
    for name in {*named, *([first.student] if first.student is not None else [])} - {*endpoints}:
        convert.resolve(name)
    if first.student is not None and options["width"] is not None:
        raise InputError("--width is for a fresh student, and --student names one that exists: leave one out")
    if how == "logits" and len(named) > 1:
        raise InputError("--how logits takes one teacher: use on-policy, which mixes several, or traces")
    if first.student is None:
        source = first.teachers[None][0]
        if is_endpoint(source):
            raise InputError(f"{source} has neither layers nor a tokenizer to give: name a model with --student")
        fresh = options["width"] is not None or options["experts"] is not None
        depth = convert.load_config(source).num_hidden_layers
        for stage in stages if not fresh else ():
            kept_layers(depth, stage.layers)
            depth = stage.layers
    if how != "traces":
        words = convert.load_tokenizer(first.student or first.teachers[None][0])
        for name in named:
            require_one_vocabulary(convert.load_tokenizer(name), words, name)


def _earlier(folder: Path, options: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures of the stages that are complete. InputError for a folder of another run."""
    path = folder / "distill.json"
    if not path.exists():
        write_json(path, {"options": options, "stages": []})
    before = read_json(path)
    tasks.require_unchanged(before["options"].get("task_sha256", {}))
    for key, value in options.items():
        if before["options"].get(key) != value:
            raise InputError(
                f"{folder} holds a distillation with {key}={before['options'].get(key)!r}, not {value!r}: ask for the "
                "same to go on, or use another folder"
            )
    return before["stages"]


def _forget(folder: Path, stage: Stage) -> None:
    """After an error in the first stage: where nothing was sampled or trained, the mended command may be another."""
    training = stage.folder / "training"
    if Plan.load(stage.folder) is None and not (training / "sampled.jsonl").exists():
        shutil.rmtree(training, ignore_errors=True)
        (folder / "distill.json").unlink()


def _run(
    stage: Stage, cells: Sequence[Cell], options: dict[str, Any], minutes: float | None, started: float, quiet: bool
) -> dict[str, Any]:
    """One stage, or the rest of it; its line in the report."""
    folder, how = stage.folder, options["how"]
    training = {
        "minutes": minutes, "steps": options["steps"], "seed": options["seed"], "lora": options["lora"],
        "device": options["device"], "started": started, "quiet": quiet,
    }  # fmt: skip
    words = student = stage.student
    if student is None:
        student = folder / "training" / "student"
        size = {name: options[name] for name in ("width", "experts")}
        words = make_student(stage.teachers[None][0], student, stage.layers, seed=options["seed"], **size)
        training |= FRESH if any(value is not None for value in size.values()) and not options["lora"] else {}
    training |= {name: options[name] for name in ("batch", "learning_rate") if options[name] is not None}
    row = {"model": str(folder), "student": words, "how": how}
    plan = Plan.load(folder)
    if plan is not None and plan.complete:  # killed after its last file, before its line was written
        last = report.read_metrics(folder / "training" / "metrics.jsonl")[-1]
        names = {"steps": "step", "tokens": "tokens", "loss": "loss", "training_seconds": "seconds"}
        return row | {name: last[key] for name, key in names.items()}
    if how == "on-policy":
        figures = on_policy(student, stage.teachers, folder, cells, max_tokens=options["max_tokens"], **training)
    else:
        path, counts = _traces(stage, cells, options, minutes, quiet)
        row |= counts
        lesson = LogitsLesson(stage.teachers[None][0], device=options["device"], quiet=quiet)
        training |= {"context": options["context"]} if options["context"] else {}
        figures = sft(student, [str(path)], folder, lesson=lesson if how == "logits" else None, **training)
    return row | {name: figures[name] for name in ("parameters", "steps", "tokens", "loss", "training_seconds")}


def _traces(
    stage: Stage, cells: Sequence[Cell], options: dict[str, Any], minutes: float | None, quiet: bool
) -> tuple[Path, dict[str, Any]]:
    """The file of selected traces, sampled if need be, and what to say of it."""
    folder = stage.folder / "training"
    path, sampled = folder / "traces.jsonl", folder / "sampled.jsonl"
    if not path.exists():
        opened: dict[str, Teacher] = {}
        for name in (name for several in stage.teachers.values() for name in several):
            if name not in opened:
                opened[name] = open_teacher(name, options["key_env"], options["device"])
        counts = collect(
            sampled, {task: [opened[name] for name in several] for task, several in stage.teachers.items()}, cells,
            problems=2 * options["traces"], samples=options["samples"], max_tokens=options["max_tokens"],
            seed=options["seed"], seconds=minutes and SAMPLING * 60 * minutes, quiet=quiet,
        )  # fmt: skip
        write_json(folder / "traces.json", counts)
        write_traces(path, select(read_traces(sampled), options["traces"], options["seed"], options["select_how"]))
    counts = read_json(folder / "traces.json")
    return path, {"traces": len(read_traces(path)), "pass_rate": counts["pass_rate"]}
