"""Questions with choices, from the rows of a .jsonl (.gz and .zst too) or .parquet file. A row is one of

    {"prompt" or "context" or "question": text, "choices": [texts], "answer" or "label" or "gold": index or text}
    {"sentence_good": text, "sentence_bad": text}       a minimal pair, as in BLiMP
    a row of KoBEST: BoolQ, COPA, WiC, HellaSwag or SentiNeg

each with a "language", if it is not to be told from the letters. A row with both context and question asks with both.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from twelve.data.reader import read_objects
from twelve.errors import InputError
from twelve.files import valid

PROMPTS, ANSWERS = ("prompt", "context", "question"), ("answer", "label", "gold")
ENDINGS, ALTERNATIVES = tuple(f"ending_{n}" for n in range(1, 5)), ("alternative_1", "alternative_2")
HANGUL = re.compile("[가-힣]")
LINKS = {"원인": "왜냐하면", "결과": "그래서"}  # what COPA asks for
KOBEST = (  # fields, how they are asked, choices: texts, or the fields that hold them
    (("paragraph", "question"), "{paragraph} 질문: {question} 답:", ("아니오", "예")),
    (("premise", "question", *ALTERNATIVES), "{premise} {link}", ALTERNATIVES),
    (("word", "context_1", "context_2"), "{context_1} {context_2} 두 문장에서 '{word}'의 뜻은 같다:", ("아니오", "예")),
    (("context", *ENDINGS), "{context}", ENDINGS),
    (("sentence",), "{sentence} 이 말은 긍정일까 부정일까?", ("부정", "긍정")),
)


@dataclass(frozen=True)
class Item:
    """A text, and how it may go on; choices[answer] is right."""

    prompt: str
    choices: tuple[str, ...]
    answer: int
    language: str
    where: str  # file:line

    def pairs(self) -> list[tuple[str, str]]:
        """Context and continuation of every choice: with a blank between them, where none stands already."""
        joined = "" if self.prompt[-1:].isspace() else " "
        return [(self.prompt, choice if choice[0].isspace() else joined + choice) for choice in self.choices]


def read_items(path: str | Path, limit: int | None = None) -> list[Item]:
    """The first `limit` rows. InputError, with the line, for one that is not of a kind above, and for none at all."""
    items = [_item(row, where) for where, row in islice(read_objects(Path(path)), limit)]
    if not items:
        raise InputError(f"{path} has no rows")
    return items


def _item(row: dict[str, Any], where: str) -> Item:
    prompt, choices, answer = _parts(row, where)
    for choice in choices:
        if not isinstance(choice, str) or not choice.strip():
            raise InputError(f"{where}: a choice must be a text, not {choice!r:.60}")
    if len(choices) < 2:
        raise InputError(f"{where}: {len(choices)} in `choices`: give two or more")
    language = row.get("language") or ("ko" if HANGUL.search(prompt + choices[0]) else "en")
    return Item(valid(prompt), tuple(map(valid, choices)), _answer(answer, choices, where), str(language), where)


def _parts(row: dict[str, Any], where: str) -> tuple[str, list[Any], Any]:
    """Prompt, choices and answer, as the row has them."""
    answer = next((row[name] for name in ANSWERS if row.get(name) is not None), None)
    if "sentence_good" in row and "sentence_bad" in row:
        return "", [row["sentence_good"], row["sentence_bad"]], 0
    if isinstance(row.get("choices"), list):
        asked = [row[name] for name in PROMPTS if row.get(name) is not None]
        if not asked or not all(isinstance(part, str) for part in asked):
            raise InputError(f"{where}: no text to ask with: give a `prompt`, `context` or `question`")
        return "\n".join(asked), row["choices"], answer
    link = LINKS.get(str(row.get("question")).strip(), "")
    for fields, form, choices in KOBEST:
        told = [row.get(field) for field in fields]
        if not all(isinstance(text, str) for text in told) or not HANGUL.search("".join(told)):
            continue
        if link or "{link}" not in form:
            return form.format(**row | {"link": link}), [row.get(choice, choice) for choice in choices], answer
    raise InputError(f"{where}: neither `choices` with an `answer`, nor a minimal pair, nor a row of KoBEST")


def _answer(answer: Any, choices: list[str], where: str) -> int:
    """Its index: a text is a choice before it is a number in digits."""
    if isinstance(answer, str):
        if answer in choices:
            return choices.index(answer)
        answer = int(answer) if re.fullmatch(r"[0-9]{1,4}", answer.strip()) else answer
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        told = "no `answer`" if answer is None else f"the answer {answer!r:.60}"
        raise InputError(f"{where}: {told}: it must be one of the {len(choices)} choices, or its index from 0")
    return answer
