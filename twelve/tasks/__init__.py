"""Checkable tasks: a module each, found by its name, with the same two functions.

generate(seed, level, language) -> Problem  a pure function; "ko" and "en" of a seed and level say the same
score(problem, text) -> float               0 to 1, for what a model answered
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from itertools import count, product
from types import ModuleType

from twelve.errors import InputError
from twelve.tasks.problem import LANGUAGES, Problem, is_held_out

__all__ = ["LANGUAGES", "Problem", "get", "is_held_out", "names", "problems"]

NAMES = ("arithmetic", "word_problems")
PATIENCE = 10_000  # draws without a new question after which there are no more


def names() -> list[str]:
    return list(NAMES)


def get(name: str) -> ModuleType:
    """The task's module. InputError for an unknown name."""
    if name not in NAMES:
        raise InputError(f"unknown task {name!r}; there are: {', '.join(NAMES)}")
    return import_module(f"twelve.tasks.{name}")


def problems(
    name: str, split: str, seed: int = 0, levels: Sequence[int] = (1,), languages: Sequence[str] = LANGUAGES
) -> Iterator[Problem]:
    """Problems of a task, levels and languages in turn. No calculation of the split "test" is ever in "train", be it in
    the other language or in another task (see `is_held_out`).

    "train" has no end and may repeat itself; "test" gives every question once, and ends when there are no new ones.
    """
    if split not in ("train", "test"):
        raise InputError(f"unknown split {split!r}: train or test")
    task, seen, last = get(name), set(), 0
    for number, (level, language) in ((n, each) for n in count() for each in product(levels, languages)):
        problem = task.generate(seed << 32 | number, level, language)
        if number - last > PATIENCE:
            return
        if is_held_out(problem) != (split == "test") or problem.question in seen:
            continue
        if split == "test":
            seen.add(problem.question)
        last = number
        yield problem
