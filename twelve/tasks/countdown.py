"""Countdown: reach a target from given numbers, each used at most once. The level is the count of numbers less one."""

from __future__ import annotations

import ast
import operator
import re
from collections import Counter
from fractions import Fraction
from random import Random

from twelve.tasks.korean import Noun
from twelve.tasks.problem import Problem, check
from twelve.tasks.verify import final_answer, plain

LARGEST_LEVEL = 5
NUMBERS = range(2, 26)
TARGETS = (range(4, 51), range(10, 101), range(20, 201), range(100, 501), range(200, 1000))  # by level
APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
NODES = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
WRITTEN = str.maketrans({"×": "*", "÷": "/", "−": "-", "·": "*"})
TIMES = re.compile(r"\\(times|cdot|div)(?![a-zA-Z])")  # of LaTeX
LONGEST = 200  # characters of an answer that is read


def generate(seed: int, level: int, language: str) -> Problem:
    """Our solution uses every number, and its intermediate results are whole and positive; others may do as they like.

    InputError for another level or language.
    """
    check(level, LARGEST_LEVEL, language)
    draw = Random(f"countdown {seed} {level}")
    while True:
        numbers = draw.sample(NUMBERS, level + 1)
        target, expression, steps = _combine(draw, numbers)
        if target in TARGETS[level - 1] and target not in numbers:
            break
    listed = ", ".join(map(str, numbers))
    if language == "ko":
        question = f"{Noun(listed):을/를} 한 번까지만 쓰고 +, -, *, /와 괄호로 {Noun(target):을/를} 만드는 식은?"
    else:
        question = f"Use each of {listed} at most once, with +, -, *, / and brackets, to make {target}."
    key = f"countdown {sorted(numbers)} {target}"
    data = {"numbers": numbers, "target": target}
    return Problem("countdown", language, level, question, "\n".join(steps), expression, data, key)


def score(problem: Problem, text: str) -> float:
    """1 for any expression that makes the target of the given numbers, else 0. "= target" may stand on a side of it."""
    expression, equals, claimed = TIMES.sub(_sign, plain(final_answer(text) or "").translate(WRITTEN)).partition("=")
    if equals and expression.strip() == str(problem.data["target"]):
        expression, claimed = claimed, expression
    if claimed and claimed.strip() != str(problem.data["target"]):
        return 0.0
    found = evaluate(expression)
    if found is None:
        return 0.0
    value, used = found
    return float(value == problem.data["target"] and used <= Counter(problem.data["numbers"]))


def _sign(found: re.Match[str]) -> str:
    return "/" if found[1] == "div" else "*"


def evaluate(expression: str) -> tuple[Fraction, Counter[int]] | None:
    """Its exact value and the numbers in it; None for what is more than whole numbers, + - * / and brackets.

    The expression is parsed, never run.
    """
    if len(expression) > LONGEST or not re.fullmatch(r"[0-9+\-*/() ]+", expression):
        return None
    used: Counter[int] = Counter()
    try:
        return _value(ast.parse(expression.strip(), mode="eval").body, used), used
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None


def _value(node: ast.expr, used: Counter[int]) -> Fraction:
    if isinstance(node, ast.Constant):
        used[node.value] += 1
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, used)
    if isinstance(node, ast.BinOp) and type(node.op) in NODES:
        return APPLY[NODES[type(node.op)]](_value(node.left, used), _value(node.right, used))
    raise ValueError(f"{type(node).__name__} is no arithmetic")


def _combine(draw: Random, numbers: list[int]) -> tuple[int, str, list[str]]:
    """Join two at a time until one is left: its value, how it came about as one expression, and as steps."""
    left = [(number, str(number)) for number in numbers]
    steps = []
    while len(left) > 1:
        (a, first), (b, second) = (left.pop(draw.randrange(len(left))) for _ in range(2))
        sign = draw.choice("+*" + "-" * (a > b) + "/" * (b > 1 and a % b == 0))
        value = int(APPLY[sign](a, b))
        steps.append(f"{a}{sign}{b}={value}")
        joined = f"{first}{sign}{second}"
        left.append((value, f"({joined})" if left else joined))
    return left[0][0], left[0][1], steps
