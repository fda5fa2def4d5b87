"""Which problems come next: a sampler over cells of task, level and language, and gates that admit harder ones.

`uniform` takes all cells alike. `curriculum` prefers cells that are solved sometimes, where a group of answers has
something to compare: p (1 - p) of the measured pass rate p; and a level opens once the level below is solved often
enough. The interface is prime-rl's: one sampler, gates that must all agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random
from typing import Any

from twelve import tasks
from twelve.errors import InputError

HOW = ("uniform", "curriculum")
MEMORY = 0.8  # of the old pass rate that a step's answers leave
UNKNOWN = 0.5  # pass rate of a cell that was never asked: worth a look
FLOOR = 0.05  # added to p (1 - p), so that no open cell is forgotten, solved or not
OPENS_AT = 0.3  # pass rate of the level below


@dataclass(frozen=True)
class Cell:
    """A kind of problem."""

    task: str
    level: int
    language: str

    @property
    def key(self) -> str:
        return f"{self.task} {self.level} {self.language}"


def serving(split: str, cells: Iterable[Cell]) -> list[Cell]:
    """The cells that have problems of a split: a file may be for training or for testing only."""
    return [cell for cell in cells if getattr(tasks.get(cell.task), "split", "") in ("", split)]


Gate = Callable[["Curriculum", Cell], bool]


def level_below_is_solved(curriculum: Curriculum, cell: Cell) -> bool:
    """The gate of `curriculum`: the next easier level of the same task and language passes OPENS_AT of its answers."""
    below = [other for other in curriculum.cells
             if (other.task, other.language) == (cell.task, cell.language) and other.level < cell.level]  # fmt: skip
    return not below or curriculum.rates.get(max(below, key=lambda other: other.level).key, 0.0) >= OPENS_AT


class Curriculum:
    """Draws cells and learns from the scores. `rates` (cell's key -> pass rate) is all that it remembers."""

    def __init__(self, cells: Iterable[Cell], how: str = "uniform", rates: dict[str, float] | None = None) -> None:
        if how not in HOW:
            raise InputError(f"unknown curriculum {how!r}; there are: {', '.join(HOW)}")
        self.cells = list(cells)
        self.how = how
        self.rates: dict[str, float] = {} if rates is None else rates
        self.gates: list[Gate] = [level_below_is_solved] if how == "curriculum" else []

    def open(self) -> list[Cell]:
        """The cells that every gate admits."""
        return [cell for cell in self.cells if all(gate(self, cell) for gate in self.gates)]

    def weight(self, cell: Cell) -> float:
        if self.how == "uniform":
            return 1.0
        rate = self.rates.get(cell.key, UNKNOWN)
        return rate * (1 - rate) + FLOOR

    def draw(self, count: int, seed: Any) -> list[Cell]:
        """`count` cells in proportion to their weights, evenly: systematic sampling, one random number a draw."""
        cells = self.open()
        Random(f"cells {seed}").shuffle(cells)
        weights = [self.weight(cell) for cell in cells]
        stride = sum(weights) / count
        point, drawn, reached = Random(f"draw {seed}").random() * stride, [], 0.0
        for cell, weight in zip(cells, weights, strict=True):
            reached += weight
            while point < reached and len(drawn) < count:
                drawn.append(cell)
                point += stride
        return drawn + cells[-1:] * (count - len(drawn))  # rounding may leave the last one out

    def record(self, cell: Cell, passed: float) -> None:
        """A group's mean score."""
        before = self.rates.get(cell.key)
        self.rates[cell.key] = passed if before is None else MEMORY * before + (1 - MEMORY) * passed
