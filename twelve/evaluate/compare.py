"""Two models on the same items: the difference of each measure, its standard error, and a paired test.

Items that are hard for one model are hard for the other, so that the difference is known better than either figure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from twelve.evaluate.accuracy import Accuracy
from twelve.evaluate.bits import BitsPerByte, ratio_error
from twelve.evaluate.facts import Recall
from twelve.evaluate.statistics import finite, mcnemar, standard_error, student

LEAST = 1e-12  # a smaller p-value is rounding
ROUNDING = 1e-9  # and so is a spread that is a smaller share of the difference


@dataclass(frozen=True)
class Difference:
    """The first model's figure less the second's."""

    measure: str
    first: float
    second: float
    difference: float
    standard_error: float
    p_value: float  # two-sided
    test: str
    items: int
    unit: str = ""  # of a share none

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "standard_error": finite(self.standard_error), "p_value": finite(self.p_value)}

    def __str__(self) -> str:
        form = ".4f" if self.unit else ".1%"
        told = f"{self.measure}: {self.first:{form}} against {self.second:{form}}{self.unit}, difference "
        if self.items < 2:
            return f"{told}{self.difference:+{form}} (a single item, so no test)"
        chance = f"p < {LEAST:g}" if self.p_value < LEAST else f"p = {self.p_value:.2g}"
        error = f"{self.standard_error:{form}}"
        return f"{told}{self.difference:+{form}} ± {error}, {chance} ({self.test}, {self.items:,} items)"


def compare_bits(measure: str, first: BitsPerByte, second: BitsPerByte) -> Difference:
    """Of bits per byte, documents being the sample: the standard error is that of a ratio, linearised."""
    spent = first.document_bits - second.document_bits
    difference = first.bits_per_byte - second.bits_per_byte
    error = ratio_error(spent, first.document_bytes, difference)
    test, chance = _paired(difference, error, len(spent))
    return Difference(measure, first.bits_per_byte, second.bits_per_byte, difference, error, chance, test, len(spent),
                      " bits a byte")  # fmt: skip


def compare_shares(measure: str, first: Sequence[float], second: Sequence[float]) -> Difference:
    """Of the mean over items: McNemar's exact test where each is right (1) or wrong (0), else a paired t test."""
    apart = [a - b for a, b in zip(first, second, strict=True)]
    difference, error = fmean(apart), standard_error(apart)
    if {*first, *second} <= {0, 1}:
        test, chance = "McNemar", mcnemar(apart.count(1), apart.count(-1))
    else:
        test, chance = _paired(difference, error, len(apart))
    return Difference(measure, fmean(first), fmean(second), difference, error, chance, test, len(apart))


def differences(measure: str, first: Any, second: Any) -> list[Difference]:
    """Of one measure of two models: BitsPerByte, Accuracy, Recall or ChoiceAccuracy."""
    if isinstance(first, BitsPerByte):
        return [compare_bits(measure, first, second)]
    if isinstance(first, Accuracy):
        return [compare_shares(measure, first.solved, second.solved)]
    if isinstance(first, Recall):
        return [compare_shares(f"{measure}, {how}", getattr(first, how), getattr(second, how))
                for how in ("chosen", "written")]  # fmt: skip
    return [compare_shares(measure, first.right, second.right),
            compare_shares(f"{measure}, by byte", first.right_by_byte, second.right_by_byte)]  # fmt: skip


def _paired(difference: float, error: float, items: int) -> tuple[str, float]:
    """The test that fits, and its p-value. Items that all differ alike have no spread, and a t test would be sure."""
    if items < 2:
        return "paired t", math.nan
    if error <= ROUNDING * abs(difference):
        return "sign", mcnemar(items, 0) if difference else 1.0
    return "paired t", student(difference / error, items - 1)
