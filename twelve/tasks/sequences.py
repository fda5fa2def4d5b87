"""Number sequences: what comes next. The level says which rule; a solver tries the rules in this order.

1: the same difference. 2: the same ratio. 3: the same difference two terms apart. 4: every term the sum of the two before
it. 5: differences that grow by the same number. 6: differences with the same ratio.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from random import Random

from twelve.tasks.problem import Problem, check
from twelve.tasks.verify import integer_score

LARGEST_LEVEL = 6
SHOWN = 6  # terms; with fewer, two of the rules would often fit
LARGEST = 2000  # no term is larger, or smaller than its negative


def generate(seed: int, level: int, language: str) -> Problem:
    """All rules that fit the terms agree on the next one. InputError for another level or language."""
    check(level, LARGEST_LEVEL, language)
    draw = Random(f"sequences {seed} {level}")
    while True:
        terms = _draw_terms(draw, level)
        steps, answer = solve(terms[:-1])
