"""Distillation from traces: the teacher samples, the verifier filters, and the best of what is left is kept.

What is written is JSONL of messages, which `twelve sft` reads.
"""

from __future__ import annotations

import json
import re
import time
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from tqdm import tqdm

from twelve import tasks
from twelve.errors import InputError
from twelve.evaluate.accuracy import asked
from twelve.files import atomic_write
from twelve.posttrain.curriculum import Cell, serving
from twelve.posttrain.teacher import EndpointError, Teacher
from twelve.tasks import Problem

WINDOW = 16  # problems asked together; after a stop, what nobody solved is asked again from the last solved one's on
HOPELESS = 16  # windows without one accepted answer after which there is no point in going on
FEATURES = 512  # dimensions that n-grams are hashed into
GRAM = 4  # characters

Trace = dict[str, Any]  # messages, task, level, language, pass_rate, problem


class NothingPassed(InputError):
    """The verifier let nothing through."""


def problem_stream(cells: Sequence[Cell], seed: int = 0) -> Iterator[Problem]:
    """Training problems without end, of each task, level and language in turn; those that are for testing only are left
    out. InputError for one that has none."""
    cells = serving("train", cells)
    streams = [
        tasks.problems(cell.task, "train", seed * len(cells) + index, [cell.level], [cell.language])
        for index, cell in enumerate(cells)
    ]
    while True:
        for cell, stream in zip(cells, streams, strict=True):
            if (problem := next(stream, None)) is None:
                raise InputError(f"{cell.task} has no problems for training, of level {cell.level} in {cell.language}")
            yield problem


def collect(
    path: str | Path, teachers: dict[str | None, Sequence[Teacher]], cells: Sequence[Cell], *, problems: int = 1000,
    samples: int = 4, max_tokens: int = 256, temperature: float = 1.0, seed: int = 0, seconds: float | None = None,
    quiet: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Ask `samples` answers to each of `problems` problems, and append what passes the verifier to the JSONL `path`.
    Every problem that was solved has a line there, even where an earlier one asked the same and had the same answers.

    `teachers` are those of a task by its name, and under None those of every other; several take turns. Stops early
    when `seconds` are over. What is written stays: the same call again goes on behind the last problem in the file.
    Returns {"problems", "samples", "accepted", "pass_rate"}.

    NothingPassed when that is so; InputError when an endpoint stops answering, with what there is and how to go on, and
    when the file of a task changes meanwhile.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    began, longest = time.monotonic(), 0.0
    traces = read_traces(path, mend=True)
    solved, known = {trace["problem"] for trace in traces}, {_text(trace) for trace in traces}
    window = max(solved, default=0) // WINDOW
    first = window * WINDOW
    stream = islice(problem_stream(cells, seed), first, problems)
    tried, accepted = first, len(known)
    files = tasks.fingerprints(cell.task for cell in cells)
    bar = tqdm(total=problems, initial=first, desc="traces", unit="problem", disable=quiet)
    with open(path, "a", encoding="utf-8") as file, bar:
        while batch := list(enumerate(islice(stream, WINDOW), start=tried)):
            now = time.monotonic()
            if seconds is not None and now + longest > began + seconds:
                break
            try:
                for number, problem, texts in _answers(batch, solved, teachers, samples, max_tokens, temperature, seed):
                    passed = _accepted(problem, texts, number)
                    tasks.require_unchanged(files)
                    new = [trace for trace in passed if _text(trace) not in known]
                    known.update(map(_text, new))
                    lines = (json.dumps(trace, ensure_ascii=False) + "\n" for trace in new or passed[:1])
                    file.write("".join(lines))
                    file.flush()
                    accepted += len(new)
            except EndpointError as error:
                kept = f"{accepted:,} traces are kept in {path}"
                raise InputError(f"{error}; {kept}: run the same command again to go on") from error
            tried, longest = tried + len(batch), max(longest, time.monotonic() - now)
            bar.update(len(batch))
            bar.set_postfix_str(f"{accepted:,} traces")
            if not accepted and tried >= HOPELESS * WINDOW:
                break
    if not accepted:
        names = ", ".join({cell.task: None for cell in cells})
        raise NothingPassed(
            f"nothing passed the verifier: 0 of {tried * samples:,} answers to {tried:,} problems of {names}, a pass "
            "rate of 0%: choose easier levels, more --max-tokens or a better teacher"
        )
    rates = {trace["problem"]: trace["pass_rate"] for trace in read_traces(path)}
    return {
        "problems": tried, "samples": tried * samples, "accepted": accepted,
        "pass_rate": round(sum(rates.values()) / max(1, tried), 4),
    }  # fmt: skip


def _answers(
    batch: list[tuple[int, Problem]], solved: set[int], teachers: dict[str | None, Sequence[Teacher]], samples: int,
    max_tokens: int, temperature: float, seed: int,
) -> Iterator[tuple[int, Problem, list[str]]]:  # fmt: skip
    """Each problem that is not solved yet, with its number and the complete answers of its teacher ("" for others)."""
    shares: dict[int, tuple[Teacher, list[tuple[int, Problem]]]] = {}
    for number, problem in batch:
        able = teachers.get(problem.task) or teachers[None]
        teacher = able[number % len(able)]
        if number not in solved:
            shares.setdefault(id(teacher), (teacher, []))[1].append((number, problem))
    for teacher, share in shares.values():
        numbers, problems = zip(*share, strict=True)
        seeds = [seed << 32 | number for number in numbers]
        for index, answers in teacher.answers(problems, samples, max_tokens, temperature, seeds):
            yield *share[index], [answer.text if answer.complete else "" for answer in answers]


def _accepted(problem: Problem, texts: list[str], number: int) -> list[Trace]:
    """The different right answers among those to one problem; `pass_rate` is the share of right ones."""
    scores = tasks.score_all([problem] * len(texts), texts)
    right = [text for text, score in zip(texts, scores, strict=True) if score >= 1]
    return [
        {
            "messages": [*asked(problem), {"role": "assistant", "content": text}], "task": problem.task,
            "level": problem.level, "language": problem.language, "pass_rate": len(right) / len(texts),
            "problem": number,
        }
        for text in dict.fromkeys(right)
    ]  # fmt: skip


def read_traces(path: str | Path, mend: bool = False) -> list[Trace]:
    """The traces of a file, none if there is no file; `mend` takes away a last line that a killed process left half.

    InputError for anything else that is no trace.
    """
    path = Path(path)
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    if lines[-1]:
        if not mend:
            raise InputError(f"{path} ends within a line: it is being written, or was when its writer was stopped")
        with open(path, "r+b") as file:
            file.truncate(path.stat().st_size - len(lines[-1]))
    traces = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            trace = json.loads(line)
            trace["messages"], trace["problem"], trace["pass_rate"] = (
                trace["messages"], int(trace["problem"]), float(trace["pass_rate"]),
            )  # fmt: skip
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}:{number}: not a trace ({error!r}): name another file") from error
        traces.append(trace)
    return traces


def write_traces(path: str | Path, traces: Sequence[Trace]) -> None:
    with atomic_write(path) as temporary:
        lines = (json.dumps(trace, ensure_ascii=False) + "\n" for trace in traces)
        temporary.write_text("".join(lines), encoding="utf-8")


# --- selection --------------------------------------------------------------------------------------------------------


def select(traces: Sequence[Trace], count: int, seed: int = 0, how: str = "best") -> list[Trace]:
    """`count` of the traces (all, where there are no more), in their order; of those that say the same, the first.

    "best" spreads them evenly over tasks, levels and languages. In each of these it takes, one after the other, what
    is most useful: a problem that the teacher solves sometimes (4 p (1 - p), from 0 to 1) plus the distance of the
    solution to the nearest one taken before (1 - cosine of their n-grams, from 0 to 1); of equals the shortest.
    "random" draws.
    """
    if how not in ("best", "random"):
        raise InputError(f"unknown selection {how!r}: best or random")
    first: dict[str, Trace] = {}
    for trace in traces:
        first.setdefault(_text(trace), trace)
    traces = list(first.values())
    if count >= len(traces):
        return traces
    if how == "random":
        return [traces[index] for index in sorted(Random(seed).sample(range(len(traces)), count))]
    cells = defaultdict(list)
    for index, trace in enumerate(traces):
        cells[trace["task"], trace["level"], trace["language"]].append(index)
    quotas = _shares([len(members) for members in cells.values()], count)
    chosen: list[int] = []
    for members, quota in zip(cells.values(), quotas, strict=True):
        Random(seed).shuffle(members)
        members.sort(key=lambda index: len(_solution(traces[index])))
        chosen += _farthest([traces[index] for index in members], quota, members)
    return [traces[index] for index in sorted(chosen)]


def _shares(sizes: Sequence[int], count: int) -> list[int]:
    """`count` divided as evenly as `sizes` allow."""
    shares = [0] * len(sizes)
    for place, index in enumerate(sorted(range(len(sizes)), key=lambda index: sizes[index])):
        shares[index] = min(sizes[index], count // (len(sizes) - place))
        count -= shares[index]
    return shares


def _farthest(traces: list[Trace], count: int, names: list[int]) -> list[int]:
    """Greedy farthest-first from the most useful; `names` of the chosen."""
    features = np.stack([_features(_solution(trace)) for trace in traces])
    useful = np.array([4 * trace["pass_rate"] * (1 - trace["pass_rate"]) for trace in traces])
    distance = np.ones(len(traces))
    chosen = []
    for _ in range(count):
        best = int(np.argmax(np.round(useful + distance, 6)))  # the first of equals, which is the shortest
        chosen.append(names[best])
        distance = np.minimum(distance, 1 - features @ features[best])
        useful[best] = -np.inf
    return chosen


def _text(trace: Trace) -> str:
    """Question and solution."""
    return "\n".join(message["content"] for message in trace["messages"])


def _solution(trace: Trace) -> str:
    return trace["messages"][-1]["content"]


def _features(text: str) -> np.ndarray:
    """Counts of the n-grams of a text without its spacing and case, hashed into [FEATURES], of length 1."""
    text = re.sub(r"\s+", " ", text).strip().casefold()
    counts = np.zeros(FEATURES, np.float32)
    for start in range(max(1, len(text) - GRAM + 1)):
        counts[zlib.crc32(text[start : start + GRAM].encode()) % FEATURES] += 1
    return counts / np.linalg.norm(counts)
