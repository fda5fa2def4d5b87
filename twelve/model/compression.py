"""Tokenizer compression (Engram, arXiv 2601.07372): tokens that are one word, but for case, accents and blanks, share
one id, so that their n-grams share rows."""

from __future__ import annotations

import re
import unicodedata
from typing import Protocol

import numpy as np

# letters of Hangul that stand alone, and their half-width forms
LETTERS = re.compile("([\u3131-\u318e\uffa0-\uffdc]+)")


class Vocabulary(Protocol):
    """What a tokenizer must tell of its tokens."""

    vocab_size: int
    control_tokens: frozenset[str]

    def id_of(self, token: str) -> int | None: ...

    def decode_bytes(self, ids: list[int]) -> bytes: ...


def compress(tokenizer: Vocabulary) -> np.ndarray:
    """Token id -> compressed id, int32 [vocab_size]; compressed ids are numbered in the order of first appearance.

    Control tokens, tokens that are no whole characters, and those of which nothing would be left keep ids of their own.
    """
    control = {tokenizer.id_of(token) for token in tokenizer.control_tokens}
    numbers: dict[str | int, int] = {}
    compressed = np.empty(tokenizer.vocab_size, np.int32)
    for token in range(tokenizer.vocab_size):
        key = token if token in control else _normal_form(tokenizer.decode_bytes([token])) or token
        compressed[token] = numbers.setdefault(key, len(numbers))
    return compressed


def _normal_form(token: bytes) -> str | None:
    try:
        return normalise(token.decode())
    except UnicodeDecodeError:
        return None


def normalise(text: str) -> str:
    """NFKC, NFD, no accents, lower case, runs of blanks as one, none at the ends; only blanks are one blank.

    Hangul syllables come out as their letters, which is one to one. Letters that stand alone stay so: NFKC would join
    ㄱㅏ to 가.
    """
    parts = LETTERS.split(text)
    parts[::2] = (_fold(part) for part in parts[::2])
    parts[1::2] = ("".join(map(_full_width, part)) for part in parts[1::2])
    text = re.sub(r"\s+", " ", "".join(parts))
    return text if text == " " else text.strip()


def _fold(text: str) -> str:
    apart = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
    return "".join(character for character in apart if unicodedata.category(character) != "Mn").lower()


def _full_width(letter: str) -> str:
    decomposition = unicodedata.decomposition(letter)  # of a half-width letter: "<narrow> 3131"
    return chr(int(decomposition.split()[1], 16)) if decomposition.startswith("<narrow>") else letter
