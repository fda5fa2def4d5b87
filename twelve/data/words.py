"""A batch of texts as arrays: its characters by kind, its words and word n-grams as hashes.

All that judges text by the million reads from here: one pass over the characters, then numpy over whole batches. Words
are runs of letters and digits in lower case, so that punctuation, case and spacing make no difference. A hash is
polynomial, modulo 2^64, over code points or over the hashes of words, and then mixed: the hash of any stretch is the
difference of two prefix sums (Karp and Rabin, 1987).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

from twelve.files import valid

SPACE, LINE, DIGIT, LATIN, HANGUL, RARE, HAN, KANA, LETTER, PUNCTUATION, SYMBOL, MARKUP, BROKEN = range(13)
COUNT = 13  # of kinds; those from DIGIT to LETTER make up words
BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
INVERSE = pow(BASE, -1, 1 << 64)
MARKS = "<>{}|\\=_[]#*~^@&"  # that markup, code and tables are full of


@dataclass(frozen=True, eq=False)
class Words:
    """D texts of C characters (a line feed after each) and W words in all."""

    points: np.ndarray  # [C] uint32: code points, in lower case
    kinds: np.ndarray  # [C] uint8
    edges: np.ndarray  # [D + 1]: the first character of each text, and C
    starts: np.ndarray  # [W]: the first character of each word
    ends: np.ndarray  # [W]: the character after it
    first: np.ndarray  # [D + 1]: the first word of each text, and W
    prefix: np.ndarray  # [C + 1] uint64: sums of code points times powers
    hashes: np.ndarray  # [W] uint64

    @property
    def texts(self) -> int:
        return len(self.edges) - 1

    @cached_property
    def lengths(self) -> np.ndarray:
        """[D]: words of each text."""
        return np.diff(self.first)

    @cached_property
    def text(self) -> np.ndarray:
        """[W]: the text that each word belongs to."""
        return np.repeat(np.arange(self.texts), self.lengths)

    @cached_property
    def counts(self) -> np.ndarray:
        """[D, COUNT]: characters of each kind, without the line feed after each text."""
        place = np.repeat(np.arange(self.texts) * COUNT, np.diff(self.edges)) + self.kinds
        counts = np.bincount(place, minlength=self.texts * COUNT).reshape(self.texts, COUNT)
        counts[:, LINE] -= 1
        return counts

    @cached_property
    def sums(self) -> np.ndarray:
        """[W + 1] uint64: sums of the words' hashes times powers."""
        return _prefix(self.hashes)

    def spans(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """uint64 hashes of stretches of characters."""
        return _stretch(self.prefix, starts, ends)

    def windows(self, size: int | np.ndarray, at: np.ndarray | None = None) -> np.ndarray:
        """uint64 hashes of the `size` words (one number, or one for each text) from each word on, [W], or from each of
        the words `at`. Where a text ends earlier the window ends with it; see `whole`."""
        at = np.arange(len(self.hashes)) if at is None else at
        size = size if np.isscalar(size) else size[self.text[at]]
        return _stretch(self.sums, at, np.minimum(at + size, self._limits[at]))

    def whole(self, size: int | np.ndarray, at: np.ndarray | None = None) -> np.ndarray:
        """[W] bool, or one for each of the words `at`: whether all `size` words from there on are of one text."""
        at = np.arange(len(self.hashes)) if at is None else at
        size = size if np.isscalar(size) else size[self.text[at]]
        return at + size <= self._limits[at]

    @cached_property
    def _limits(self) -> np.ndarray:
        """[W]: the first word after the text of each."""
        return np.repeat(self.first[1:], self.lengths)

    def total(self, values: np.ndarray) -> np.ndarray:
        """[D]: the sums, over each text, of a value a word."""
        return np.bincount(self.text, values, minlength=self.texts)

    def slice(self, start: int, end: int) -> str:
        """Characters, in lower case."""
        return self.points[start:end].tobytes().decode("utf-32-le")


def read_words(texts: Sequence[str]) -> Words:
    """The words of a batch of texts, at most a few megabytes."""
    texts = [_plain(text) for text in texts]
    points = np.frombuffer("".join(texts).encode("utf-32-le"), np.uint32)
    kinds = _kinds()[points]
    edges = np.cumsum([0, *map(len, texts)])
    inside = np.zeros(len(points) + 1, np.int8)
    inside[:-1] = (kinds >= DIGIT) & (kinds <= LETTER)
    steps = np.diff(inside, prepend=np.int8(0))
    starts, ends = np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)
    prefix = _prefix(points)
    hashes = _stretch(prefix, starts, ends)
    return Words(points, kinds, edges, starts, ends, np.searchsorted(starts, edges), prefix, hashes)


class HashSet:
    """Which of many hashes are in a set, and at what place of it: 8 bytes an entry, and 8 to 16 for the bitmap."""

    def __init__(self, hashes: np.ndarray):
        self.hashes = np.sort(hashes)
        bits = min(28, max(12, len(hashes).bit_length() + 3))  # few of those that are absent pass the bitmap
        self._shift = np.uint64(64 - bits)
        self._bitmap = np.zeros(1 << bits, bool)
        self._bitmap[self.hashes >> self._shift] = True

    def find(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The places in `hashes` of those in the set, and the places in `self.hashes` where they are."""
        likely = np.flatnonzero(self._bitmap[hashes >> self._shift])
        at = np.searchsorted(self.hashes, hashes[likely])
        at = np.minimum(at, len(self.hashes) - 1)
        same = self.hashes[at] == hashes[likely]
        return likely[same], at[same]


def mix(values: np.ndarray) -> np.ndarray:
    """Every bit of a uint64 made to depend on all (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _plain(text: str) -> str:
    """Lower case, composed, one line feed at the end."""
    if not text.isascii():
        text = valid(text)
        if not unicodedata.is_normalized("NFC", text):
            text = unicodedata.normalize("NFC", text)
    return text.lower() + "\n"


def _prefix(values: np.ndarray) -> np.ndarray:
    sums = np.zeros(len(values) + 1, np.uint64)
    np.cumsum(values * _powers(len(values))[0][: len(values)], out=sums[1:])
    return sums


def _stretch(sums: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    return mix((sums[ends] - sums[starts]) * _powers(len(sums))[1][starts])


def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """At least `count` powers of BASE, and of its inverse."""
    return _power_table(max(16, count.bit_length()))


@cache
def _power_table(bits: int) -> tuple[np.ndarray, np.ndarray]:
    tables = []
    for base in (BASE, INVERSE):
        powers = np.full(1 << bits, base, np.uint64)
        powers[0] = 1
        tables.append(np.cumprod(powers))
    return tables[0], tables[1]


@cache
def _kinds() -> np.ndarray:
    """[0x110000] uint8: the kind of every code point."""
    kinds = np.full(0x110000, LETTER, np.uint8)
    groups = {"N": DIGIT, "P": PUNCTUATION, "S": SYMBOL, "Z": SPACE, "C": BROKEN}
    for point in range(0x10000):
        category = unicodedata.category(chr(point))
        kinds[point] = SPACE if category == "Cf" else groups.get(category[0], LETTER)
    for start, end, kind in (
        (0x41, 0x24F, LATIN), (0x1E00, 0x1EFF, LATIN), (0x1100, 0x11FF, HANGUL), (0x3130, 0x318F, HANGUL),
        (0xAC00, 0xD7A3, HANGUL), (0x2E80, 0x2FDF, HAN), (0x3400, 0x4DBF, HAN), (0x4E00, 0x9FFF, HAN),
        (0xF900, 0xFAFF, HAN), (0x20000, 0x3FFFF, HAN), (0x3041, 0x30FF, KANA), (0x31F0, 0x31FF, KANA),
    ):  # fmt: skip
        part = kinds[start : end + 1]
        part[part == LETTER] = kind
    for point in range(0xAC00, 0xD7A4):  # the 2,350 syllables of KS X 1001 are all that Korean prose needs
        if len(chr(point).encode("euc_kr")) > 2:
            kinds[point] = RARE
    kinds[0x1F000:0x20000] = SYMBOL
    kinds[0xE0000:0xE0200] = SPACE  # variation selectors and tags
    kinds[0xE0200:] = BROKEN  # not assigned, or for private use
    kinds[[ord(character) for character in MARKS]] = MARKUP
    kinds[[9, 11, 12, 13]], kinds[10], kinds[0xFFFD] = SPACE, LINE, BROKEN
    return kinds
