"""Chained arithmetic: a running total, one short step after the other. The level is the number of steps."""

from __future__ import annotations

from random import Random

from twelve.tasks.korean import Noun
from twelve.tasks.problem import Chain, Problem, check
from twelve.tasks.verify import integer_score

LARGEST_LEVEL = 20
START = range(1, 51)
ENGLISH = {"+": "add {n}", "-": "subtract {n}", "*": "multiply by {n}", "/": "divide by {n}"}
KOREAN = {"+": "{n:을/를} 더하", "-": "{n:을/를} 빼", "*": "{n:을/를} 곱하", "/": "{n:으로/로} 나누"}  # and then 고
KOREAN_END = {"더하": "더한다", "빼": "뺀다", "곱하": "곱한다", "나누": "나눈다"}


def generate(seed: int, level: int, language: str) -> Problem:
    """Operands are 1 to 9 (products: 2 or 3, exact quotients: 2 to 5), every total is 0 to 99.

    InputError for another level or language.
    """
    check(level, LARGEST_LEVEL, language)
    draw = Random(f"arithmetic {seed} {level}")
    start = draw.choice(START)
    chain = Chain(draw, start)
    operations = [chain.extend("+-*/") for _ in range(level)]
    question = _korean(start, operations) if language == "ko" else _english(start, operations)
    return Problem("arithmetic", language, level, question, "\n".join(chain.steps), chain.total)


def score(problem: Problem, text: str) -> float:
    """1 for the exact answer, else 0."""
    return integer_score(problem.answer, text)


def _english(start: int, operations: list[tuple[str, int]]) -> str:
    *first, last = [ENGLISH[operation].format(n=number) for operation, number in operations]
    told = f"{', '.join(first)}, then {last}" if first else last
    return f"Start with {start}. {told.capitalize()}. What is the result?"


def _korean(start: int, operations: list[tuple[str, int]]) -> str:
    told = [KOREAN[operation].format(n=Noun(number)) for operation, number in operations]
    last, _, stem = told.pop().rpartition(" ")
    chained = "".join(f"{step}고 " for step in told)
    return f"{start}에서 시작해 {chained}{last} {KOREAN_END[stem]}. 결과는?"
