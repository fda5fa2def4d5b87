"""What all tasks share: the problem, the split into training and test, and chains of calculations."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

from twelve.errors import InputError

LANGUAGES = ("ko", "en")
HELD_OUT_SHARE = 10  # one problem in ten is for testing only
LARGEST = 99  # no result in a chain is larger, or below 0


@dataclass(frozen=True)
class Problem:
    """A question with its worked solution, and what a scorer needs."""

    task: str
    language: str  # "ko" or "en"
    level: int  # how hard, from 1; each task says what of
    question: str
    steps: str  # the worked solution, a step a line; may be empty
    answer: int | str
    data: Mapping[str, object] = field(default_factory=dict, hash=False)  # for the scorer, beyond the answer
    key: str = ""  # what is asked, whatever the wording; empty where the steps say it

    def messages(self) -> list[dict[str, str]]:
        """The conversation that teaches it."""
        return [
            {"role": "user", "content": self.question},
            {"role": "assistant", "content": f"<think>{self.steps}</think><answer>{self.answer}</answer>"},
        ]


def is_held_out(problem: Problem) -> bool:
    """Whether a problem is for testing only. Its key decides, or else its steps, or else its question: all wordings of
    what has the same key, or the same steps, fall on one side."""
    content = problem.key or problem.steps or problem.question
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:8]) % HELD_OUT_SHARE == 0


def check(level: int, largest_level: int, language: str) -> None:
    """InputError for a level or language that a task does not have."""
    if language not in LANGUAGES:
        raise InputError(f"unknown language {language!r}; there are: {', '.join(LANGUAGES)}")
    if not 1 <= level <= largest_level:
        raise InputError(f"level {level} must lie between 1 and {largest_level}")


class Chain:
    """A running total and the equations that led to it. Every total is a whole number from 0 to LARGEST."""

    def __init__(self, draw: Random, total: int):
        self.draw, self.total = draw, total
        self.steps: list[str] = []

    def extend(self, operations: Sequence[str]) -> tuple[str, int]:
        """Draw one of `operations` (of + - * /) that the total allows, and its number, from 1 to 9."""
        numbers = {
            "+": range(1, min(9, LARGEST - self.total) + 1),
            "-": range(1, min(9, self.total) + 1),
            "*": [n for n in (2, 3) if 0 < self.total * n <= LARGEST],
            "/": [n for n in (2, 3, 4, 5) if self.total and self.total % n == 0],
        }
        operation = self.draw.choice([operation for operation in operations if numbers[operation]])
        number = self.draw.choice(numbers[operation])
        self.apply(operation, number)
        return operation, number

    def apply(self, operation: str, number: int) -> None:
        before = self.total
        self.total = {
            "+": before + number, "-": before - number, "*": before * number, "/": before // number,
        }[operation]  # fmt: skip
        self.steps.append(f"{before}{operation}{number}={self.total}")
