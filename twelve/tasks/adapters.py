"""Tasks that are no module of ours: a user's own .py file, a generator of reasoning-gym, rows of a .jsonl file.

They have what a module has (`generate`, `score`, `LARGEST_LEVEL`), and `LEVELS` and `LANGUAGES`; those in a worker also
`score_all`, and from a user's file `SYSTEM`, `EXAMPLES` and `MAX_TOKENS`.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from twelve.errors import InputError
from twelve.files import valid
from twelve.tasks.problem import LANGUAGES, Problem
from twelve.tasks.verify import answer_score, final_answer
from twelve.tasks.worker import Reply, Worker

SECONDS = 5.0  # of one call
PATIENCE = 3  # calls in a row that do not return, or end the process
TRUSTED = 64  # calls of `score` before the share of those that raise is judged


class WorkerTask:
    """A task whose functions run in a worker process: `module` is user_file or gym.

    What the scorer gets wrong costs the sample, not the run: raising or taking longer than `seconds` scores 0, with one
    warning. InputError where going on makes no sense: more than half of all calls raise, three in a row do not return
    or end the process, or a score lies outside of 0 to 1.
    """

    def __init__(self, name: str, module: str, seconds: float = SECONDS):
        self.name, self.seconds = name, seconds
        self._worker = Worker(f"twelve.tasks.{module}", name)
        self._scored = self._raised = self._lost = 0
        self._warned: set[bool] = set()
        about = self._ask("about")
        self.LEVELS, self.LANGUAGES = tuple(about["levels"]), tuple(about["languages"])
        self.LARGEST_LEVEL = self.LEVELS[-1]
        self.SYSTEM, self.EXAMPLES, self._scores = about["system"], about["examples"], about["scores"]
        if about["max_tokens"]:
            self.MAX_TOKENS = about["max_tokens"]

    def generate(self, seed: int, level: int, language: str) -> Problem:
        """InputError for a level that it does not have, and, with the line of the file, when its `generate` raises."""
        if level not in self.LEVELS:
            raise InputError(f"{self.name} has no level {level}; it has {', '.join(map(str, self.LEVELS))} (LEVELS)")
        return Problem(**self._ask("generate", seed, level, language))

    def score(self, problem: Problem, text: str) -> float:
        return self.score_all([problem], [text])[0]

    def score_all(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[float]:
        """Scores of many texts in one round trip."""
        if not self._scores:
            return [answer_score(problem.answer, text) for problem, text in zip(problems, texts, strict=True)]
        sent = [
            [{**vars(problem), "data": dict(problem.data)}, text] for problem, text in zip(problems, texts, strict=True)
        ]
        scores: list[float] = []
        while len(scores) < len(sent):
            some = sent[len(scores) : len(scores) + 256]
            scores += [self._judge(reply) for reply in self._worker.call("score", some, self.seconds, PATIENCE)]
        return scores

    def _judge(self, reply: Reply) -> float:
        self._scored += 1
        self._lost = self._lost + 1 if reply.lost else 0
        if self._lost >= PATIENCE:
            limit = f"(limit: {self.seconds:g} s)"
            raise InputError(f"{self.name}: score {reply.error} {PATIENCE} times in a row {limit}")
        if not reply.error:
            if not 0 <= reply.value <= 1:
                raise InputError(f"{self.name}: score returned {reply.value}, which is not from 0 to 1")
            return reply.value
        if reply.fatal:
            raise InputError(reply.error)
        self._raised += not reply.lost
        if self._scored >= TRUSTED and self._raised > self._scored / 2:
            raise InputError(f"score raised on {self._raised} of {self._scored} answers, last: {self._place(reply)}")
        if reply.lost not in self._warned:
            self._warned.add(reply.lost)
            print(f"warning: score counts 0 where it fails, now with {self._place(reply)}", file=sys.stderr)
        return 0.0

    def _ask(self, function: str, *arguments: Any) -> Any:
        [reply] = self._worker.call(function, [arguments], self.seconds)
        if reply.error:
            raise InputError(f"{self._place(reply)}, in generate" if not reply.fatal else reply.error)
        return reply.value

    def _place(self, reply: Reply) -> str:
        return reply.error if reply.error.startswith(self.name) else f"{self.name}: it {reply.error}"


class JsonlTask:
    """Rows of a .jsonl file, all of level 1: GSM8K's (`question`, `answer` with ####), SVAMP's (`Body` and `Question`,
    `Answer`), or `question`, `problem` or `prompt` with `answer` or `solution` or both.

    One row in ten is for testing, by its content, unless the name says what the file is for: `gsm8k-test.jsonl#test` or
    `gsm8k-train.jsonl#train`. RL takes both: it learns from the one and is measured by the other.
    """

    LEVELS, LARGEST_LEVEL = (1,), 1

    def __init__(self, name: str):
        self.name = name
        path, _, split = name.partition("#")
        if split not in ("", "train", "test"):
            raise InputError(f"{name}: after # comes train or test")
        self.split = split
        rows = _rows(Path(path), name)
        self.rows = {code: [row for row in rows if row.language == code] for code in LANGUAGES}
        self.LANGUAGES = tuple(code for code in LANGUAGES if self.rows[code])
        self._order: tuple[Any, list[int]] = (None, [])

    def generate(self, seed: int, level: int, language: str) -> Problem:
        """The lower 32 bits of a seed go through all rows, in an order that the others shuffle."""
        if language not in self.LANGUAGES or level != 1:
            raise InputError(f"{self.name} has level 1 and {', '.join(self.LANGUAGES)} only")
        rows = self.rows[language]
        key = (language, seed >> 32, (seed & 0xFFFFFFFF) // len(rows))
        if self._order[0] != key:
            order = list(range(len(rows)))
            Random(str(key)).shuffle(order)
            self._order = key, order
        return rows[self._order[1][(seed & 0xFFFFFFFF) % len(rows)]]

    def score(self, problem: Problem, text: str) -> float:
        return answer_score(problem.answer, text)


def _rows(path: Path, name: str) -> list[Problem]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # a string may hold other ends of lines
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} line {number} is not JSON: {error}") from None
        rows.append(_row(row, name, f"{path} line {number}"))
    if not rows:
        raise InputError(f"{path} has no problems")
    return rows


def _row(row: Any, name: str, place: str) -> Problem:
    row = row if isinstance(row, dict) else {}
    asked = [row.get("Body"), row.get("Question") or row.get("question") or row.get("problem") or row.get("prompt")]
    question = valid(" ".join(part.strip() for part in asked if isinstance(part, str)))
    answer, steps = row.get("answer", row.get("Answer")), str(row.get("solution") or "")
    if isinstance(answer, str) and "####" in answer:
        steps, _, answer = answer.rpartition("####")
    if answer is None:
        answer = final_answer(steps)
    if not question or not isinstance(answer, str | int | float) or not str(answer).strip():
        raise InputError(f"{place} has no question with an answer: it needs 'question' and 'answer'")
    if isinstance(answer, float) and not math.isfinite(answer):
        raise InputError(f"{place}: the answer is no number")
    told = valid(str(answer).strip())
    told = re.sub(r"\A(-?[0-9][0-9,]*)\.0+\Z", r"\1", told)  # SVAMP writes 51.0
    language = "ko" if re.search("[가-힣]", question) else "en"
    steps = re.sub("<<[^<>]*>>", "", steps).strip()
    return Problem(name, language, 1, question, steps, told, key=question)
