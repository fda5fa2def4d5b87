"""Finding the final answer in what a model wrote, and comparing it exactly."""

from __future__ import annotations

import re

TAGGED = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
BOXED = re.compile(r"\\boxed\s*\{([^{}]*)\}")
HASHES = re.compile(r"####([^\n]*)")
INTEGER = re.compile(r"[+-]?(?:[0-9]{1,40}|[0-9]{1,3}(?:[, ][0-9]{3}){1,12})")
PLAIN = str.maketrans("０１２３４５６７８９，－＋−\u00a0\u3000", "0123456789,-+-  ")


def final_answer(text: str) -> str | None:
    """The answer that a text settles on: the last <answer>...</answer>, else \\boxed{...}, else what follows ####.

    Reasoning does not count: only what comes after the last </think>, and nothing of a text that never leaves <think>.
    """
    _, closed, after = text.rpartition("</think>")
    if not closed and text.lstrip().startswith("<think>"):
        return None
    for form in (TAGGED, BOXED, HASHES):
        if found := form.findall(after):
            return found[-1].strip()
    return None


def as_integer(text: str) -> int | None:
    """A whole number, alone: full-width digits, and commas or blanks between thousands, are read too."""
    text = text.translate(PLAIN).strip()
    return int(re.sub("[, ]", "", text)) if INTEGER.fullmatch(text) else None


def integer_score(answer: int, text: str) -> float:
    """1 if the final answer is exactly this number, else 0."""
    given = final_answer(text)
    return float(given is not None and as_integer(given) == answer)
