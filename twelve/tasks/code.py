"""Code: write a Python function that changes a list step by step. The level is the count of changes; tests decide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from twelve.tasks.korean import Noun
from twelve.tasks.problem import Problem, check
from twelve.tasks.sandbox import run_tests
from twelve.tasks.verify import final_answer

LARGEST_LEVEL = 5
PYTHON = ("python", "python3", "py")  # what a fence may say


@dataclass(frozen=True)
class Step:
    """One thing to do: in words, as code, and done. {n} is a number that is drawn; ends says that no list is left."""

    english: str
    korean: str
    code: str
    apply: Callable[[list[int], int], list[int] | int]
    ends: bool = False


STEPS = (
    Step("keep only the even ones", "짝수만 남기고", "[x for x in numbers if x % 2 == 0]",
         lambda v, n: [x for x in v if x % 2 == 0]),
    Step("keep only the odd ones", "홀수만 남기고", "[x for x in numbers if x % 2 == 1]",
         lambda v, n: [x for x in v if x % 2 == 1]),
    Step("keep only those greater than {n}", "{n}보다 큰 수만 남기고", "[x for x in numbers if x > {n}]",
         lambda v, n: [x for x in v if x > n]),
    Step("keep only those less than {n}", "{n}보다 작은 수만 남기고", "[x for x in numbers if x < {n}]",
         lambda v, n: [x for x in v if x < n]),
    Step("add {n} to each", "각 수에 {n:을/를} 더하고", "[x + {n} for x in numbers]", lambda v, n: [x + n for x in v]),
    Step("subtract {n} from each", "각 수에서 {n:을/를} 빼고", "[x - {n} for x in numbers]",
         lambda v, n: [x - n for x in v]),
    Step("multiply each by {n}", "각 수에 {n:을/를} 곱하고", "[x * {n} for x in numbers]",
         lambda v, n: [x * n for x in v]),
    Step("square each", "각 수를 제곱하고", "[x * x for x in numbers]", lambda v, n: [x * x for x in v]),
    Step("take the absolute value of each", "각 수를 절댓값으로 바꾸고", "[abs(x) for x in numbers]",
         lambda v, n: [abs(x) for x in v]),
    Step("reverse the order", "순서를 뒤집고", "numbers[::-1]", lambda v, n: v[::-1]),
    Step("sort them in ascending order", "오름차순으로 정렬하고", "sorted(numbers)", lambda v, n: sorted(v)),
    Step("drop the first {n}", "처음 {n}개를 버리고", "numbers[{n}:]", lambda v, n: v[n:]),
    Step("keep only the first {n}", "처음 {n}개만 남기고", "numbers[:{n}]", lambda v, n: v[:n]),
    Step("return the sum", "합을 돌려주는", "sum(numbers)", lambda v, n: sum(v), True),
    Step("return how many are left", "남은 개수를 돌려주는", "len(numbers)", lambda v, n: len(v), True),
    Step("return the largest, or 0 if none is left", "가장 큰 수를(남은 수가 없으면 0을) 돌려주는",
         "max(numbers, default=0)", lambda v, n: max(v, default=0), True),
    Step("return the list", "그 결과를 돌려주는", "numbers", lambda v, n: v, True),
)  # fmt: skip
CHANGES, ENDS = [step for step in STEPS if not step.ends], [step for step in STEPS if step.ends]


def generate(seed: int, level: int, language: str) -> Problem:
    """No change can be left out: some test would fail. The steps follow one list. InputError for another level or
    language."""
    check(level, LARGEST_LEVEL, language)
    draw = Random(f"code {seed} {level}")
    while True:
        chosen = [(step, draw.randint(2, 9)) for step in [*draw.sample(CHANGES, level), draw.choice(ENDS)]]
        inputs = [[draw.randint(-20, 20) for _ in range(length)] for length in (7, 0, 1, 8, 9, 10, 11, 12, 12)]
        results = [_run(chosen, numbers)[-1] for numbers in inputs]
        without = [chosen[:place] + chosen[place + 1 :] for place in range(level)]
        if all(results != [_run(fewer, numbers)[-1] for numbers in inputs] for fewer in without):
            break
    *changes, end = [step.code.format(n=number) for step, number in chosen]
    source = "def solve(numbers):\n" + "".join(f"    numbers = {code}\n" for code in changes) + f"    return {end}"
    tests = [f"assert solve({numbers}) == {result}" for numbers, result in zip(inputs, results, strict=True)]
    if language == "ko":
        told = ", ".join(step.korean.format(n=Noun(number)) for step, number in chosen)
        question = f"정수 리스트 numbers를 받아 {told} 파이썬 함수 solve(numbers)를 작성하라."
    else:
        *first, last = [step.english.format(n=number) for step, number in chosen]
        question = f"Write a Python function solve(numbers) for a list of integers: {', '.join(first)}, then {last}."
    steps = "\n".join(map(str, [inputs[0], *_run(chosen, inputs[0])]))
    return Problem("code", language, level, question, steps, source, {"tests": "\n".join(tests)}, key=source)


def score(problem: Problem, text: str) -> float:
    """1 if the code passes the tests, else 0. Code is what the last ```python block holds, of the answer if there is
    one, or else the last block of no language, or else the answer itself."""
    said = text.rpartition("</think>")[2].partition("<think>")[0]
    answer = final_answer(said) if "<answer>" in said else None
    source = _fenced(said if answer is None else answer) or answer
    return float(bool(source) and run_tests(source, problem.data["tests"]))


def _fenced(text: str) -> str | None:
    """The last block that says that it is Python, or else the last that says nothing."""
    parts = text.split("```")
    found: dict[bool, str] = {}
    for block in parts[1 : len(parts) - 1 : 2]:  # the last part is outside, or its fence is not closed
        tag, line, source = block.partition("\n")
        tag = tag.strip().lower()
        if line and (tag in PYTHON or not tag):
            found[bool(tag)] = source
    return found.get(True, found.get(False))


def _run(chosen: list[tuple[Step, int]], numbers: list[int]) -> list[list[int] | int]:
    """What each step makes of the numbers."""
    values: list[list[int] | int] = [numbers]
    for step, number in chosen:
        values.append(step.apply(values[-1], number))
    return values[1:]
