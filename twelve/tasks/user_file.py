"""A task in a file of the user's own, as its worker process sees it (see adapters.py for the other end).

    LEVELS = (1, 2, 3)              # these four may be left out
    LANGUAGES = ("en",)
    SYSTEM = "Answer with a number."
    EXAMPLES = [("2 + 2?", "4")]
    MAX_TOKENS = 64

    def generate(seed, level, language):  # level and language may be left out
        a, b = random.Random(seed).choices(range(10), k=2)
        return {"question": f"{a} + {b}?", "answer": a + b, "steps": f"{a}+{b}={a + b}"}

    def score(problem, text):       # may be left out: then the final answer must be equal to the reference
        return final_answer(text) == str(problem["answer"])  # of twelve.tasks.verify; not in its reasoning

`generate` gives a Problem or a dict; what a dict holds beyond the fields of a Problem goes into its `data`.
"""

from __future__ import annotations

import inspect
import json
import math
import random
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

from twelve.errors import InputError
from twelve.files import valid
from twelve.tasks.problem import LANGUAGES, Problem

FIELDS = {"task", "language", "level", "question", "steps", "answer", "key"}
HANGUL = re.compile("[가-힣]")


class Given(Problem):
    """A problem as the user's `score` gets it: problem["answer"] is problem.answer, and names of `data` work, too."""

    def __getitem__(self, name: str) -> Any:
        if name == "solution":
            name = "steps"
        return getattr(self, name) if name in FIELDS or name == "data" else self.data[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in FIELDS or name in ("data", "solution") or name in self.data else default


def functions(path: str) -> dict[str, Callable]:
    """What the worker serves. InputError for a file that is no task; errors of the file itself pass."""
    module = _load(path)
    if not callable(getattr(module, "generate", None)):
        raise InputError(f"{path} has no function generate(seed, level, language)")
    wanted = _arguments(path, module.generate)

    def about() -> dict[str, Any]:
        given = getattr(module, "LEVELS", (1,))
        levels = list(given) if isinstance(given, Iterable) else []
        if not levels or not all(isinstance(level, int) and level >= 1 for level in levels):
            raise InputError(f"{path}: LEVELS must be numbers from 1 on, like (1, 2, 3); not {given!r:.80}")
        languages = list(getattr(module, "LANGUAGES", LANGUAGES if "language" in wanted else ()) or ())
        if unknown := [language for language in languages if language not in LANGUAGES]:
            raise InputError(f"{path}: LANGUAGES has {unknown[0]!r}; there are: {', '.join(LANGUAGES)}")
        if not isinstance(getattr(module, "SYSTEM", None), str | None):
            raise InputError(f"{path}: SYSTEM must be text")
        most = getattr(module, "MAX_TOKENS", None)
        if most is not None and (type(most) is not int or most < 1):
            raise InputError(f"{path}: MAX_TOKENS must be a whole number from 1 on")
        examples = getattr(module, "EXAMPLES", ()) or ()
        if any(not isinstance(pair, list | tuple) or len(pair) != 2 for pair in examples):
            raise InputError(f"{path}: EXAMPLES must be pairs of a question and its answer")
        languages = languages or [generate(0, min(levels), "en")["language"]]
        return {
            "levels": sorted(set(levels)), "languages": languages, "system": getattr(module, "SYSTEM", None),
            "examples": [list(map(str, pair)) for pair in examples],
            "max_tokens": getattr(module, "MAX_TOKENS", None), "scores": callable(getattr(module, "score", None)),
        }  # fmt: skip

    def generate(seed: int, level: int, language: str) -> dict[str, Any]:
        random.seed(f"{seed} {level}")  # a file that forgets to use the seed can be repeated all the same
        given = {"level": level, "language": language}
        made = module.generate(seed, **{name: given[name] for name in wanted})
        return _fields(path, made, level, language if "language" in wanted else None)

    def score(problem: dict[str, Any], text: str) -> float:
        value = module.score(Given(**problem), text)
        try:
            return float(value)
        except (TypeError, ValueError):
            raise InputError(f"{path}: score returned {value!r:.80}, not a number from 0 to 1") from None

    return {"about": about, "generate": generate, "score": score}


def _load(path: str) -> ModuleType:
    source = Path(path).read_bytes()
    sys.path.insert(0, str(Path(path).resolve().parent))
    module = ModuleType("task_file")
    module.__file__ = path
    sys.modules["task_file"] = module
    exec(compile(source, path, "exec"), module.__dict__)
    return module


def _arguments(path: str, generate: Callable) -> list[str]:
    """Of "level" and "language", those that it takes."""
    first, *rest = inspect.signature(generate).parameters.values() or [None]
    rest = [each for each in rest if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)]
    needed = [each.name for each in rest if each.default is each.empty]
    if first is None or set(needed) - {"level", "language"}:
        wrong = ", ".join(needed) or "nothing"
        raise InputError(f"{path}: generate takes (seed, level, language), or fewer of them; not {wrong}")
    return [name for name in ("level", "language") if name in {each.name for each in rest}]


def _fields(path: str, made: Any, level: int, language: str | None) -> dict[str, Any]:
    """A Problem's fields, as JSON can carry them."""
    if isinstance(made, Problem):
        given = dict(vars(made))
    elif isinstance(made, Mapping):
        given = {("steps" if name == "solution" else name): value for name, value in made.items()}
    else:
        raise InputError(f"{path}: generate returned {type(made).__name__}, not a Problem or a dict")
    if not isinstance(given.get("question"), str) or not given["question"].strip() or "answer" not in given:
        raise InputError(f"{path}: generate must return a 'question' (text) and an 'answer'")
    data = {**dict(given.pop("data", {})), **{name: given.pop(name) for name in list(given) if name not in FIELDS}}
    try:
        data = json.loads(json.dumps(data, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: what generate returns beside question and answer must be JSON: {error}") from None
    steps = given.get("steps") or ""
    spoken = language or ("ko" if HANGUL.search(given["question"]) else "en")
    return {
        "task": path, "language": given.get("language") or spoken, "level": int(given.get("level") or level),
        "question": valid(given["question"]), "steps": steps if isinstance(steps, str) else "\n".join(map(str, steps)),
        "answer": _answer(path, given["answer"]), "data": data, "key": str(given.get("key") or ""),
    }  # fmt: skip


def _answer(path: str, answer: Any) -> int | str:
    if isinstance(answer, str | bool | Fraction):
        return valid(str(answer))
    if isinstance(answer, float) and math.isfinite(answer):
        return int(answer) if answer.is_integer() else repr(answer)
    try:
        return answer.__index__()  # int, and the integers of numpy
    except AttributeError:
        raise InputError(f"{path}: the answer {answer!r:.80} is neither text nor a number") from None
