"""Checkable tasks, found by name: a module each, or a file of the user's (see adapters.py), with the same functions.

generate(seed, level, language) -> Problem  a pure function; "ko" and "en" of a seed and level say the same
score(problem, text) -> float               0 to 1, for what a model answered
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from importlib import import_module
from itertools import count, islice, product
from pathlib import Path
from typing import Any

from twelve.errors import InputError
from twelve.tasks.adapters import JsonlTask, WorkerTask
from twelve.tasks.problem import LANGUAGES, Problem, is_held_out

__all__ = [
    "LANGUAGES", "Problem", "check", "fingerprints", "get", "is_held_out", "names", "problems", "require_unchanged",
    "score_all",
]  # fmt: skip

NAMES = (
    "arithmetic", "word_problems", "countdown", "equations", "sorting", "calendar_clock", "units", "logic", "sequences",
    "code",
)  # fmt: skip
IN_PROCESSES = ("code",)  # their scores wait for other processes
PATIENCE = 10_000  # draws without a new question after which there are no more
CHECKED = 20  # problems, before a task is trusted


def names() -> list[str]:
    return list(NAMES)


def get(name: str) -> Any:
    """The task: a name of `names()`, a path to a .py or .jsonl file, or gym:NAME.

    A .jsonl path may end in #train or #test: the file is only for that. InputError for what is no task.
    """
    if name in NAMES:
        return import_module(f"twelve.tasks.{name}")
    path = Path(name.partition("#")[0])
    if name.startswith("gym:"):
        return _adapter(name, 0)
    if path.suffix not in (".py", ".jsonl"):
        raise InputError(
            f"unknown task {name!r}; there are: {', '.join(NAMES)}, a .py or .jsonl file of your own, and gym:NAME"
        )
    if not path.is_file():
        raise InputError(f"there is no task file {path}")
    if path.suffix == ".py" and "#" in name:
        raise InputError(f"{name}: {path.name} draws its problems, and keeps those for testing apart: leave out the #")
    return _adapter(name, path.stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _adapter(name: str, changed: int) -> WorkerTask | JsonlTask:
    if name.startswith("gym:"):
        return WorkerTask(name, "gym")
    return WorkerTask(name, "user_file") if name.endswith(".py") else JsonlTask(name)


def problems(
    name: str, split: str, seed: int = 0, levels: Sequence[int] = (1,), languages: Sequence[str] = LANGUAGES
) -> Iterator[Problem]:
    """Problems of a task, levels and languages in turn. No calculation of the split "test" is ever in "train", be it in
    the other language or in another task (see `is_held_out`).

    "train" has no end and may repeat itself; "test" gives every question once, and ends when there are no new ones.
    Languages that the task does not have are left out; InputError when that leaves none.
    """
    if split not in ("train", "test"):
        raise InputError(f"unknown split {split!r}: train or test")
    task, seen, last = get(name), set(), 0
    spoken = getattr(task, "LANGUAGES", None)  # all of ours speak all
    if spoken and not (languages := [language for language in languages if language in spoken]):
        raise InputError(f"{name} has no problems in another language than {', '.join(spoken)}")
    only = getattr(task, "split", "")
    if only and only != split:
        raise InputError(f"{name} is for {only} only")
    for number, (level, language) in ((n, each) for n in count() for each in product(levels, languages)):
        problem = task.generate(seed << 32 | number, level, language)
        if number - last > PATIENCE:
            return
        if (not only and is_held_out(problem) != (split == "test")) or problem.question in seen:
            continue
        if split == "test":
            seen.add(problem.question)
        last = number
        yield problem


def score_all(problems: Sequence[Problem], texts: Sequence[str]) -> list[float]:
    """The score of each text as an answer to its problem, 0 to 1. Problems may be of several tasks."""
    scores = [0.0] * len(problems)
    for name in dict.fromkeys(problem.task for problem in problems):
        places = [place for place, problem in enumerate(problems) if problem.task == name]
        given = [problems[place] for place in places], [texts[place] for place in places]
        for place, score in zip(places, _score(name, *given), strict=True):
            scores[place] = score
    return scores


def _score(name: str, problems: Sequence[Problem], texts: Sequence[str]) -> list[float]:
    task = get(name)
    if hasattr(task, "score_all"):
        return task.score_all(problems, texts)
    if name in IN_PROCESSES:
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            return list(threads.map(task.score, problems, texts))
    return [task.score(problem, text) for problem, text in zip(problems, texts, strict=True)]


def check(name: str) -> None:
    """InputError when a task cannot be trained on: it has no problems, or its reference answers fail its own scorer."""
    task = get(name)
    levels = getattr(task, "LEVELS", range(1, task.LARGEST_LEVEL + 1))
    split = getattr(task, "split", "") or "train"
    some = list(islice(problems(name, split, levels=levels), CHECKED))
    if not some:
        raise InputError(f"{name} has no problems for training: nearly all that it draws are held out for testing")
    for problem in some:
        answer, solution = problem.answer, problem.messages()[-1]["content"]
        forms = (solution, f"{answer}", f"<answer>{answer}</answer>", f"#### {answer}", f"\\boxed{{{answer}}}")
        best = max(score_all([problem] * len(forms), forms))
        if best < 0.5:
            asked = " ".join(problem.question.split())
            raise InputError(
                f"{name}: the reference answer {answer!r:.40} scores {best:g} by its own scorer; question: {asked:.80}"
            )


def fingerprints(names: Iterable[str]) -> dict[str, str]:
    """Of the tasks that are files, by name, the SHA-256: what they ask and how they score."""
    paths = {name: Path(name.partition("#")[0]) for name in names}
    return {name: _digest(path, path.stat().st_mtime_ns) for name, path in paths.items() if path.is_file()}


def require_unchanged(before: Mapping[str, str]) -> None:
    """InputError when a task's file is no longer the one that `before`, its fingerprints, were taken of."""
    now = fingerprints(before)
    for name, digest in before.items():
        if now.get(name) != digest:
            raise InputError(
                f"{name} is not the file that this run began with: put that back and run the same command again, or "
                "begin in another folder"
            )


@lru_cache(maxsize=64)
def _digest(path: Path, changed: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
