"""Linear equations with whole solutions. The level adds a coefficient, x on both sides, brackets, a second unknown."""

from __future__ import annotations

from random import Random

from twelve.tasks.problem import Problem, check
from twelve.tasks.verify import integer_score

LARGEST_LEVEL = 6
SOLUTIONS = [n for n in range(-20, 21) if n]
ADDED = [n for n in range(-30, 31) if n]
INSIDE = [n for n in range(-9, 10) if n]  # added in brackets, or a coefficient


def generate(seed: int, level: int, language: str) -> Problem:
    """1: x + b = c. 2: ax + b = c. 3: ax + b = dx + e. 4: a(x + b) + c = dx + e. 5: a(x + b) + c = d(x + e) + f.
    6: ax + by = c and dx + ey = f, where x + y is asked.

    InputError for another level or language.
    """
    check(level, LARGEST_LEVEL, language)
    draw = Random(f"equations {seed} {level}")
    equations, steps, answer = _two_unknowns(draw) if level == LARGEST_LEVEL else _one_unknown(draw, level)
    asked = "x + y" if level == LARGEST_LEVEL else "x"
    steps = list(dict.fromkeys([*steps, f"{asked.replace(' ', '')}={answer}"]))  # a step by 0 or 1 says nothing new
    if language == "ko":
        question = f"{', '.join(equations)}일 때 {asked}의 값은?"
    else:
        question = f"What is {asked} if {' and '.join(equations)}?"
    return Problem("equations", language, level, question, "\n".join(steps), answer, key="; ".join(equations))


def score(problem: Problem, text: str) -> float:
    """1 for the exact answer, else 0."""
    return integer_score(problem.answer, text)


def _one_unknown(draw: Random, level: int) -> tuple[list[str], list[str], int]:
    """An equation a(x + b) + c = d(x + e) + f or what the level leaves of it, the steps before x = ..., and x."""
    x, c = draw.choice(SOLUTIONS), draw.choice(ADDED)
    d = draw.randint(2, 7) if level >= 3 else 0
    a = draw.randint(d + 1, 9) if level >= 3 else draw.randint(2, 9) if level == 2 else 1
    b = draw.choice(INSIDE) if level >= 4 else 0
    e = draw.choice(INSIDE) if level >= 5 else 0
    f = a * (x + b) + c - d * (x + e)
    left, right = _side(a, b, c), _side(d, e, f)
    equation = f"{left} = {right}"
    steps = []
    if b:
        steps.append(f"{_sum((a, 'x'), (a * b, ''), (c, ''))}={right}")
        left, c = _side(a, 0, a * b + c), a * b + c
        steps.append(f"{left}={right}")
    if e:
        steps.append(f"{left}={_sum((d, 'x'), (d * e, ''), (f, ''))}")
        right, f = _side(d, 0, d * e + f), d * e + f
        steps.append(f"{left}={right}")
    if d:
        steps.append(f"{_side(a - d, 0, c)}={f}")
    if c:
        steps.append(f"{_side(a - d, 0, 0)}={_sum((f, ''), (-c, ''))}")
    if a - d > 1:
        steps.append(f"{_side(a - d, 0, 0)}={f - c}")
    return [equation], [step.replace(" ", "") for step in steps], x


def _two_unknowns(draw: Random) -> tuple[list[str], list[str], int]:
    """Two equations, the steps before x + y = ..., and x + y. One multiple of each, and y is gone."""
    x, y = draw.choice(SOLUTIONS), draw.choice(SOLUTIONS)
    while True:
        a, b, d, e = (draw.choice(INSIDE) for _ in range(4))
        if a * e != b * d and abs(b) != 1:
            break
    c, f = a * x + b * y, d * x + e * y
    first, second = (f"{_sum((p, 'x'), (q, 'y'))} = {r}" for p, q, r in ((a, b, c), (d, e, f)))
    steps = [
        f"{_sum((a * e, 'x'), (b * e, 'y'))}={c * e}",
        f"{_sum((d * b, 'x'), (e * b, 'y'))}={f * b}",
        f"{_sum((a * e - d * b, 'x'))}={_sum((c * e, ''), (-f * b, ''))}",
        f"{_sum((a * e - d * b, 'x'))}={c * e - f * b}",
        f"x={x}",
        f"{_sum((a * x, ''), (b, 'y'))}={c}",
        f"{_sum((b, 'y'))}={_sum((c, ''), (-a * x, ''))}",
        f"{_sum((b, 'y'))}={c - a * x}",
        f"y={y}",
    ]
    return [first, second], [step.replace(" ", "") for step in steps], x + y


def _side(factor: int, inside: int, rest: int) -> str:
    """factor (x + inside) + rest, without what is 0."""
    if not inside:
        return _sum((factor, "x"), (rest, ""))
    return f"{factor}({_sum((1, 'x'), (inside, ''))})" + (_signed(rest, "") if rest else "")


def _sum(*terms: tuple[int, str]) -> str:
    """3x - 5 of (3, "x") and (-5, ""); 0 when nothing is left."""
    text = "".join(_signed(factor, symbol) for factor, symbol in terms if factor)
    return f"-{text[3:]}" if text.startswith(" - ") else text[3:] or "0"


def _signed(factor: int, symbol: str) -> str:
    size = symbol if symbol and abs(factor) == 1 else f"{abs(factor)}{symbol}"
    return f" {'+' if factor > 0 else '-'} {size}"
