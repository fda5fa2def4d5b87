"""Unit conversion: quantities in different units, added up in one of them. The level is the count of quantities."""

from __future__ import annotations

from decimal import Decimal
from math import prod
from random import Random

from twelve.tasks.korean import Noun
from twelve.tasks.problem import Problem, check
from twelve.tasks.verify import answer_score

LARGEST_LEVEL = 5
METRIC = {  # from large to small, and how many of the next one each holds
    "length": {"km": 1000, "m": 100, "cm": 10, "mm": 1},
    "mass": {"t": 1000, "kg": 1000, "g": 1},
    "volume": {"L": 1000, "mL": 1},
}
KINDS = {
    **METRIC,
    "time": {"days": 24, "hours": 60, "minutes": 60, "seconds": 1},
    "money": {"eok won": 10_000, "man won": 10_000, "won": 1},  # Korean counts in ten thousands
}
KOREAN = {  # metric units look the same
    "days": "일", "hours": "시간", "minutes": "분", "seconds": "초",
    "eok won": "억 원", "man won": "만 원", "won": "원",
}  # fmt: skip
FARTHEST = 2  # units apart


def generate(seed: int, level: int, language: str) -> Problem:
    """Every number is whole or a finite decimal. InputError for another level or language."""
    check(level, LARGEST_LEVEL, language)
    draw = Random(f"units {seed} {level}")
    kind = draw.choice(list(KINDS))
    units = list(KINDS[kind])
    target = draw.randrange(len(units))
    near = [unit for unit in range(len(units)) if abs(unit - target) <= FARTHEST]
    steps: list[str] = []
    terms, total = [], Decimal(0)
    for place in range(level):
        unit = draw.choice([unit for unit in near if place or unit != target])
        amount = _amount(draw, kind, unit, target)
        terms.append((amount, units[unit]))
        value, lines = _convert(amount, list(KINDS[kind].values()), unit, target)
        steps += lines
        if place:
            steps.append(f"{_plain(total)}+{_plain(value)}={_plain(total + value)}")
        total += value
    ask = _korean if language == "ko" else _english
    key = f"{units[target]} {' '.join(f'{_plain(amount)} {unit}' for amount, unit in terms)}"
    answer = int(total) if total == int(total) else _plain(total)
    return Problem("units", language, level, ask(terms, units[target]), "\n".join(steps), answer, key=key)


def score(problem: Problem, text: str) -> float:
    """1 for the exact number, with or without a decimal point, else 0."""
    return answer_score(problem.answer, text)


def _amount(draw: Random, kind: str, unit: int, target: int) -> Decimal:
    """One that is not 1, and gives at most two decimals in the target unit (none for times)."""
    if unit == target:
        return Decimal(draw.randint(2, 500))
    if unit < target:
        tenths = kind != "time" and draw.random() < 0.3
        return Decimal(draw.randint(11, 99)) / 10 if tenths else Decimal(draw.randint(2, 60))
    factor = prod(list(KINDS[kind].values())[target:unit])
    if kind == "time":
        return Decimal(draw.randint(2, 30) * factor)
    return Decimal(draw.randint(2, 500) * max(1, factor // 100))


def _convert(amount: Decimal, sizes: list[int], unit: int, target: int) -> tuple[Decimal, list[str]]:
    """The amount in the target unit, and an equation for every unit on the way."""
    steps = []
    while unit < target:
        steps.append(f"{_plain(amount)}*{sizes[unit]}={_plain(amount * sizes[unit])}")
        amount, unit = amount * sizes[unit], unit + 1
    while unit > target:
        unit -= 1
        steps.append(f"{_plain(amount)}/{sizes[unit]}={_plain(amount / sizes[unit])}")
        amount /= sizes[unit]
    return amount, steps


def _plain(number: Decimal) -> str:
    return f"{number.normalize():f}"


def _english(terms: list[tuple[Decimal, str]], target: str) -> str:
    added = " + ".join(f"{_plain(amount)} {unit}" for amount, unit in terms)
    note = " (1 eok = 10000 man, 1 man = 10000)" if target.endswith("won") else ""
    return f"What is {added} in {target}?{note}"


def _korean(terms: list[tuple[Decimal, str]], target: str) -> str:
    *first, last = [Noun(_plain(amount) + KOREAN.get(unit, unit)) for amount, unit in terms]
    asked = f"몇 {KOREAN.get(target, target)}인가?"
    if not first:
        return f"{last:은/는} {asked}"
    return f"{Noun(', '.join(first)):과/와} {last:을/를} 더하면 {asked}"
