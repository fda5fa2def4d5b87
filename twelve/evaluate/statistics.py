"""How sure a measure is: the standard error of a mean, and tests of two models on the same items."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev


@dataclass(frozen=True)
class Share:
    """A mean over items, and its standard error."""

    value: float
    standard_error: float

    def __str__(self) -> str:
        return f"{self.value:.1%} ± {self.standard_error:.1%}"


def share(values: Sequence[float]) -> Share:
    """The mean of items' values. What belongs together (the repeats of a problem) must be one value: errors of draws
    that share a problem are not independent."""
    return Share(fmean(values), standard_error(values))


def standard_error(values: Sequence[float]) -> float:
    """Of the mean: s / sqrt(n), with s the unbiased estimate; for right (1) and wrong (0), sqrt(p (1 - p) / (n - 1)).
    0 for a single item, which tells nothing of others."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def finite(value: float) -> float | None:
    """The number for JSON, which has no NaN."""
    return value if math.isfinite(value) else None


def student(t: float, freedom: int) -> float:
    """Two-sided p-value of Student's t, in closed form (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    if not math.isfinite(t):
        return 0.0
    angle = math.atan(abs(t) / math.sqrt(freedom))
    cosine, odd = math.cos(angle), freedom % 2
    term = cosine if odd else 1.0
    total = term if freedom > 1 else 0.0
    for step in range(3 if odd else 2, freedom, 2):
        term *= cosine**2 * (step - 1) / step
        total += term
    inside = (angle + math.sin(angle) * total) * 2 / math.pi if odd else math.sin(angle) * total
    return min(1.0, max(0.0, 1.0 - inside))


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value (McNemar, Psychometrika 12, 1947): of the items that one model alone gets right, each is
    the first's or the second's like a fair coin."""
    tosses, few = only_first + only_second, min(only_first, only_second)
    tail, ways = 0, 1  # of getting so many heads
    for heads in range(few + 1):
        tail += ways
        ways = ways * (tosses - heads) // (heads + 1)
    return min(1.0, 2 * tail / 2**tosses)
