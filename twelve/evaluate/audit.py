"""Before a reward is trusted: how often a task's scorer accepts wrong answers, and rejects right ones. Needs no model.

Wrong answers are made from the reference answer by small changes and by the tricks that training finds: several answers
at once, the answer in the reasoning only, none at all. A change that happens to be right is left out, as told by a
check that shares no code with the scorers. Right answers are the reference in other spellings.

Both are given in those forms (<answer>, \\boxed{}, ####, alone) in which the scorer reads the plain reference at all.
"""

from __future__ import annotations

import ast
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice
from random import Random
from typing import Any

from twelve import tasks
from twelve.errors import InputError
from twelve.tasks.problem import Problem

WRONG_ANSWERS, WRONG_SOURCES = 10_000, 200  # tried; fewer where each is a program to run
REJECTED = 0.01  # share of right answers that may be rejected
EXAMPLES = 3  # of each kind that are kept
FORMS: dict[str, Callable[[str], str]] = {
    "<answer>": "<answer>{}</answer>".format,
    "boxed": lambda answer: f"\\boxed{{{answer}}}",
    "####": "#### {}".format,
    "alone": str,
    "reasoned": "<think>Let me see.</think>\n<answer>{}</answer>".format,
}
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
BEGINNING = re.compile(r"(-?\d+(?:\.\d*)?)(.*)", re.DOTALL)
WIDE = str.maketrans("0123456789", "０１２３４５６７８９")
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
Tried = tuple[str, Problem, str]  # kind, problem, text


@dataclass
class Count:
    """Attempts, and those that the scorer got wrong, by kind; some of them to look at."""

    tried: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    examples: list[dict[str, Any]] = field(default_factory=list)

    def add(self, attempts: Sequence[Tried], accepted: bool) -> None:
        """Score them; to be `accepted` (or not) is the failure."""
        scores = tasks.score_all([problem for _, problem, _ in attempts], [text for *_, text in attempts])
        for (kind, problem, text), score in zip(attempts, scores, strict=True):
            self.tried[kind] += 1
            if (score >= 0.5) == accepted:
                self.failed[kind] += 1
                if self.failed[kind] <= EXAMPLES:
                    found = {"kind": kind, "expected": problem.answer, "text": text[:200], "score": score}
                    self.examples.append({"question": problem.question[:200], **found})

    @property
    def share(self) -> float:
        return self.failed.total() / max(1, self.tried.total())

    def to_dict(self) -> dict[str, Any]:
        kinds = {kind: {"tried": n, "failed": self.failed[kind]} for kind, n in sorted(self.tried.items())}
        return {
            "tried": self.tried.total(), "failed": self.failed.total(), "kinds": kinds, "examples": self.examples,
        }  # fmt: skip


def audit(names: Sequence[str], wrong_answers: int | None = None, seed: int = 0) -> dict[str, Any]:
    """Audit tasks, a table for each as it comes; `tasks.names()` when they are ("all",).

    wrong_answers: how many a task. InputError for an unknown task, or one whose reference answers fail its own scorer.
    """
    names = tasks.names() if "all" in names else list(names)
    result: dict[str, Any] = {"seed": seed, "tasks": []}
    for name in names:
        tasks.check(name)
        result["tasks"].append(_audit(name, wrong_answers, seed))
        _print(result["tasks"][-1])
    result["passed"] = all(found["passed"] for found in result["tasks"])
    return result


def _audit(name: str, wrong_answers: int | None, seed: int) -> dict[str, Any]:
    task, draw = tasks.get(name), Random(f"audit {seed}")
    levels = getattr(task, "LEVELS", range(1, task.LARGEST_LEVEL + 1))
    split = getattr(task, "split", "") or "train"
    stream = tasks.problems(name, split, seed, levels)
    first = list(islice(stream, 24))
    is_code = name in tasks.IN_PROCESSES
    limit = wrong_answers or (WRONG_SOURCES if is_code else WRONG_ANSWERS)
    forms = {form: wrap for form, wrap in FORMS.items() if _reads(first, wrap)}
    if not forms:
        raise InputError(f"{name}: the scorer reads the reference answer in no form without its solution")
    accepts, rejects = Count(), Count()
    others = [problem.answer for problem in first]
    problems = iter([*first, *islice(stream, limit)])
    while accepts.tried.total() < limit:
        some = list(islice(problems, 4 if is_code else 40))
        if not some:
            break
        wrong, right = [], []
        for problem in some:
            ways = source_ways if is_code else answer_ways
            wrong += list(ways(problem, others, forms, draw))
            right += list(equivalent(problem, forms, draw, is_code))
            others[draw.randrange(len(others))] = problem.answer
        accepts.add(wrong[: limit - accepts.tried.total()], accepted=True)
        rejects.add(right, accepted=False)
    return {
        "task": name, "forms": list(forms), "false_accepts": accepts.to_dict(), "false_rejects": rejects.to_dict(),
        "passed": accepts.share == 0 and rejects.share < REJECTED,
    }  # fmt: skip


def _reads(problems: Sequence[Problem], wrap: Callable[[str], str]) -> bool:
    scores = tasks.score_all(problems, [wrap(str(problem.answer)) for problem in problems])
    return sum(score >= 0.5 for score in scores) > 0.9 * len(scores)


# --- wrong answers ----------------------------------------------------------------------------------------------------


def answer_ways(
    problem: Problem, others: Sequence[int | str], forms: dict[str, Callable[[str], str]], draw: Random
) -> Iterator[Tried]:
    """Ways to be wrong about one problem."""
    right = str(problem.answer)
    changed = [(kind, each) for kind, each in changes(right, others, problem.question, draw)]
    changed = [(kind, each) for kind, each in changed if not might_be_right(problem, each)]
    for kind, each in changed:
        yield kind, problem, draw.choice(list(forms.values()))(each)
    for kind, text in (("empty", ""), ("no answer", "I don't know"), ("no answer", "모르겠다"), ("claim", "correct"),
                       ("claim", "True"), ("symbols", "?")):  # fmt: skip
        yield kind, problem, draw.choice(list(forms.values()))(text)
    # "alone" reads a whole text: with it, what stands outside of the answer is part of the answer
    marked = [wrap for form, wrap in forms.items() if form != "alone"]
    if changed:
        other = draw.choice(changed)[1]
        wrap = draw.choice(list(forms.values()))
        for between in (" or ", ", ", "; ", " ", " / ", " = ", ", 아니면 "):
            both = between.join(draw.sample((right, other), 2))
            if not might_be_right(problem, both):
                yield "several answers", problem, wrap(both)
        if marked:
            last = draw.choice(marked)
            yield "changed its mind", problem, f"<answer>{right}</answer> No, it is {FORMS['<answer>'](other)}"
            yield "answer in the reasoning", problem, f"<think>It is {right}. {last(right)}</think>\n{last(other)}"
    yield "answer in the reasoning", problem, f"<think>{problem.steps}\n<answer>{right}</answer></think>"
    yield "answer in the reasoning", problem, f"<think>{problem.steps}\n#### {right}\n\\boxed{{{right}}}"
    if "<answer>" in forms:
        yield "unfinished", problem, f"<think>{problem.steps}</think><answer>{right}"


def changes(right: str, others: Sequence[int | str], question: str, draw: Random) -> Iterator[tuple[str, str]]:
    """The reference with something changed, and what else could be put in its place. Some may be right by chance."""
    found = list(NUMBER.finditer(right))
    if found:
        at = draw.choice(found)
        number = at[0]
        whole = number.partition(".")[0]

        def put(text: str) -> str:
            return right[: at.start()] + text + right[at.end() :]

        more = str(Fraction(number) + 1) if "." not in number else whole + "9" + number[len(whole) :]
        yield "off by one", put(more)
        if "." not in number:
            yield "off by one", put(str(int(number) - 1))
            yield "off by ten", put(str(int(number) + draw.choice((-10, 10))))
            yield "decimal point", put(f"{number}.5")
        yield "sign", put(number.removeprefix("-") if number.startswith("-") else f"-{number}")
        yield "digit more", put(number + str(draw.randrange(10)))
        yield "digit more", put(re.sub(r"(\d)", rf"{draw.randrange(1, 10)}\1", number, count=1))
        if len(whole.lstrip("-")) > 1:
            yield "digit less", put(number[:-1])
            yield "digits swapped", put(re.sub(r"(\d)(\d)", r"\2\1", number, count=1))
            yield "decimal point", put(re.sub(r"(\d)$", r".\1", whole))
        place = draw.choice([i for i, sign in enumerate(number) if sign.isdigit()])
        digit = (int(number[place]) + draw.randint(1, 9)) % 10
        yield "digit changed", put(f"{number[:place]}{digit}{number[place + 1 :]}")
        unit = NUMBER.sub("", right).strip()
        if len(found) == 1 and unit and unit not in "()[]":
            yield "unit dropped", number
            yield "unit changed", put(number).replace(unit, draw.choice(("kg", "초", "miles")))
    else:
        yield "cut short", right[:-1]
        yield "letter changed", right[:-1] + ("z" if right[-1:].isascii() else "뷁")
        yield "letter more", right + ("s" if right[-1:].isascii() else "들")
        yield "denied", f"not {right}"
    yield "another problem's answer", str(draw.choice(others))
    yield "another problem's answer", str(draw.choice(others))
    if told := NUMBER.findall(question):
        yield "number of the question", draw.choice(told)
    if right.isdigit() and len(right) > 1:
        yield "digits apart", " ".join(right)
    yield "question repeated", question
    yield "all numbers", " ".join(map(str, range(101)))


def might_be_right(problem: Problem, given: str) -> bool:
    """Whether a changed answer could be right after all: the same number or words, or an expression of the same value.

    It errs on the side of leaving out. Several answers to a problem are known by the data that our own tasks keep.
    """
    right = str(problem.answer)
    one, other = (BEGINNING.match(text.strip()) for text in (right, given))
    if one and other and one[2].strip() == other[2].strip():
        return Fraction(one[1]) == Fraction(other[1])
    if "target" in problem.data:
        return _value(given) == problem.data["target"]
    return _words(right) == _words(given)


def _words(text: str) -> list[str]:
    return re.findall(r"-?(?!0\d)\d+(?:\.\d+)?|[^\W\d_]+|[+*/]", text.casefold())  # 07:30 is 7:30


def _value(expression: str) -> Fraction | None:
    """Of a sum with whole numbers, + - * / and brackets."""

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        return Fraction(node.value)

    try:
        return value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError, AttributeError, KeyError, ZeroDivisionError):
        return None


def source_ways(
    problem: Problem, others: Sequence[int | str], forms: dict[str, Callable[[str], str]], draw: Random
) -> Iterator[Tried]:
    """Programs that give something else than the reference on random lists, or nothing, or cheat."""
    right = str(problem.answer)
    names = re.findall(r"^def (\w+)", right, re.MULTILINE)
    bodies = {
        "returns nothing": "pass", "raises": "raise ValueError", "raises an assertion": "raise AssertionError",
        "ends the process": "import os; os._exit(0)", "ends Python": "raise SystemExit(0)",
        "always equal": "return type('', (), {'__eq__': lambda *_: True})()",
        "wrong type": "return object()", "itself": "return _",
    }  # fmt: skip
    changed = {kind: "\n".join(f"def {name}(*_, **__): {body}" for name in names) for kind, body in bodies.items()}
    changed |= {
        "cut short": right[: right.rindex("return")], "no program": "print('all tests passed')", "empty": "",
        "one off": right + "".join(
            f"\n_{name} = {name}\ndef {name}(*given): return (_{name}(*given), 1)" for name in names
        ),
    }  # fmt: skip
    lines = right.splitlines()
    head = lines[:-1]
    number = draw.choice(list(re.finditer(r"\d+", right)) or [re.match("", right)])
    dropped = draw.choice(range(1, len(head)) or [-1])  # none, where only the head and the return are there
    near = {
        "another program": str(draw.choice(others)),
        "line dropped": "\n".join(line for place, line in enumerate(lines) if place != dropped),
        "another end": "\n".join([*head, str(draw.choice(others)).splitlines()[-1]]),
        "comparison turned": right.translate(str.maketrans("<>", "><")),
        "sign turned": right.translate(str.maketrans("+-", "-+")),
        "number changed": f"{right[: number.start()]}{draw.randint(10, 19)}{right[number.end() :]}",
    }  # fmt: skip
    changed |= {kind: source for kind, source in near.items() if differs(right, source, draw)}
    for kind, source in changed.items():
        yield kind, problem, draw.choice(list(forms.values()))(source)
    yield "answer in the reasoning", problem, f"<think>\n```python\n{right}\n```\n<answer>{right}</answer></think>"


def differs(right: str, other: str, draw: Random) -> bool:
    """Whether two programs of our own making do, in what their function gives for random lists."""

    def results(source: str) -> list[Any]:
        names: dict[str, Any] = {}
        try:
            exec(source, names)
            return [names["solve"](list(numbers)) for numbers in lists]
        except Exception as error:
            return [type(error)]

    lists = [[draw.randint(-20, 20) for _ in range(draw.randrange(13))] for _ in range(100)]
    return results(right) != results(other)


# --- right answers ----------------------------------------------------------------------------------------------------


def equivalent(
    problem: Problem, forms: dict[str, Callable[[str], str]], draw: Random, is_code: bool
) -> Iterator[Tried]:
    """The reference in other words that say the same."""
    right = str(problem.answer)
    for form, wrap in forms.items():
        yield f"in {form}", problem, wrap(right)
    for kind, each in [("comment", f"# so\n{right}\n")] if is_code else spellings(right):
        yield kind, problem, draw.choice(list(forms.values()))(each)


def spellings(right: str) -> Iterator[tuple[str, str]]:
    """Other ways to write it. Only what nobody would call wrong."""
    yield "blanks around", f"  {right} "
    yield "full-width digits", right.translate(WIDE)
    if NUMBER.fullmatch(right):
        yield "dollars of LaTeX", f"${right}$"
        yield "full stop", f"{right}."
        sign, digits = ("-", right[1:]) if right.startswith("-") else ("", right)
        whole, point, decimals = digits.partition(".")
        if not sign:
            yield "plus", f"+{right}"
        yield "zeros after the point", f"{right}0" if point else f"{right}.0"
        if len(whole) > 3 and whole == str(int(whole)):
            yield "commas", f"{sign}{int(whole):,}{point}{decimals}"
        if sign:
            yield "minus of Unicode", f"−{digits}"
    elif found := re.fullmatch(r"(-?\d+(?:\.\d+)?)( ?)([^\W\d_]+)", right):
        yield "blank before the unit", f"{found[1]}{'' if found[2] else ' '}{found[3]}"
    elif found := re.fullmatch(r"(\d+)/(\d+)", right):
        yield "fraction of LaTeX", f"\\frac{{{found[1]}}}{{{found[2]}}}"
    elif re.fullmatch(r"\w+(?:, \w+)+", right):
        yield "commas without blanks", right.replace(", ", ",")
    elif re.fullmatch(r"[A-Za-z]{3,}", right):
        yield "capitals", right.upper()
        yield "full stop", f"{right}."


def _print(found: dict[str, Any]) -> None:
    print(f"{found['task']}: {'passed' if found['passed'] else 'FAILED'} (read in: {', '.join(found['forms'])})")
    for title, key in (("wrong answers accepted", "false_accepts"), ("right answers rejected", "false_rejects")):
        count = found[key]
        print(f"  {title:24} {count['failed']:6,} of {count['tried']:,}")
        for kind, each in count["kinds"].items():
            if each["failed"]:
                print(f"    {kind:22} {each['failed']:6,} of {each['tried']:,}")
        for example in count["examples"][:5]:
            text = " ".join(example["text"].split())
            print(f"      {example['expected']!s:.40} and {text!r:.90}: {example['score']:g}")
