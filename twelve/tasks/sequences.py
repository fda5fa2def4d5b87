"""Number sequences: what comes next. The level says by which rule; the steps try the rules in this order.

1: the same difference. 2: the same ratio. 3: the same difference two terms apart. 4: each term is the sum of the two
before it. 5: differences that grow by the same number. 6: differences with the same ratio.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from random import Random

from twelve.tasks.problem import Problem, check
from twelve.tasks.verify import integer_score

LARGEST_LEVEL = 6
SHOWN = 5  # terms
LARGEST = 5000  # no term is larger, or smaller than its negative
ROWS = (  # what must be the same all along the sequence, of neighbours a, b (and c)
    ("b-a", lambda a, b: b - a),
    ("b/a", lambda a, b: Fraction(b, a)),
    ("c-a", lambda a, b, c: c - a),
    ("c-b-a", lambda a, b, c: c - b - a),  # and 0
    ("c-2b+a", lambda a, b, c: c - 2 * b + a),
    ("(c-b)/(b-a)", lambda a, b, c: Fraction(c - b, b - a)),
)


def generate(seed: int, level: int, language: str) -> Problem:
    """All rules that fit the terms agree on the next one. InputError for another level or language."""
    check(level, LARGEST_LEVEL, language)
    draw = Random(f"sequences {seed} {level}")
    while True:
        terms = _terms(draw, level)
        if max(map(abs, terms)) > LARGEST or not all(terms) or any(a == b for a, b in pairwise(terms)):
            continue  # a ratio would have no value
        shown, answer = terms[:-1], terms[-1]
        fitting = [rule for rule in range(1, len(ROWS) + 1) if fits(rule, shown)]
        if fitting[0] == level and all(_next(rule, shown)[0] == answer for rule in fitting):
            break
    listed = ", ".join(map(str, shown))
    question = f"{listed} 다음에 올 수는?" if language == "ko" else f"What number comes next: {listed}?"
    tried = range(1, level + 1)
    rows = [f"{ROWS[rule - 1][0]}: {' '.join(map(str, _until_it_differs(rule, shown)))}" for rule in tried]
    steps = "\n".join(rows + _next(level, shown)[1])
    return Problem("sequences", language, level, question, steps, answer, key=listed)


def score(problem: Problem, text: str) -> float:
    """1 for the exact answer, else 0."""
    return integer_score(problem.answer, text)


def fits(rule: int, terms: Sequence[int]) -> bool:
    """Whether a rule, 1 to 6, holds for these terms; no two neighbours are equal and none is 0."""
    row = _row(rule, terms)
    return len(set(row)) == 1 and (rule != 4 or row[0] == 0)


def _terms(draw: Random, level: int) -> list[int]:
    """One more term than is shown."""
    if level == 2:
        start, ratio = draw.randint(1, 99), draw.choice((2, 3, -2, -3))
        terms = [start * ratio**place for place in range(SHOWN + 1)]
        return terms[::-1] if draw.random() < 0.5 else terms
    terms = [draw.randint(-50, 50), draw.randint(-50, 50)] if level == 3 else [draw.randint(1, 40), draw.randint(1, 40)]
    change = draw.choice([n for n in range(-9, 10) if n])
    ratio = draw.choice((2, 3, -2))
    while len(terms) <= SHOWN:
        a, b = terms[-2:]
        terms.append({1: 2 * b - a, 3: a + change, 4: a + b, 5: 2 * b - a + change, 6: b + ratio * (b - a)}[level])
    return terms


def _row(rule: int, terms: Sequence[int]) -> list[int | Fraction]:
    _, value = ROWS[rule - 1]
    width = value.__code__.co_argcount
    return [value(*terms[place : place + width]) for place in range(len(terms) - width + 1)]


def _until_it_differs(rule: int, terms: Sequence[int]) -> list[int | Fraction]:
    """A row, as far as it must be worked out to see whether the rule holds."""
    row = _row(rule, terms)
    wanted = 0 if rule == 4 else row[0]
    differs = next((place for place, value in enumerate(row) if value != wanted), len(row) - 1)
    return row[: differs + 1]


def _next(rule: int, terms: Sequence[int]) -> tuple[int, list[str]]:
    """The term that a rule which fits gives, and its equations."""
    *_, a, b = terms
    same = _row(rule, terms)[-1]
    if rule in (1, 3, 4):
        first, added = {1: (b, same), 3: (a, same), 4: (b, a)}[rule]
        return first + added, [f"{first}{added:+}={first + added}"]
    if rule == 2:
        return int(b * same), [_times(b, same)]
    difference = b - a + same if rule == 5 else (b - a) * same
    grown = f"{b - a}{same:+}={difference}" if rule == 5 else _times(b - a, same)
    return int(b + difference), [grown, f"{b}{int(difference):+}={int(b + difference)}"]


def _times(number: int, ratio: Fraction) -> str:
    by = f"*{ratio}" if ratio.denominator == 1 else f"/{1 / ratio}"
    return f"{number}{by}={number * ratio}"
