"""Documents that came before: the same text, or nearly.

Two documents are alike as their sets of word n-grams (shingles) are: Jaccard's index, shared over all. A signature of
60 minima under 60 hash functions estimates it, since two sets have a minimum in common as often as they share (MinHash,
Broder 1997); 8 bits of each minimum are enough to compare (Li and König 2010). Candidates are found by bands: a
document has 12 keys, each made of 5 minima, and meets an earlier one with which it has a key in common. So a pair that
is alike by s is met with probability 1 - (1 - s^5)^12: 0.89 at 0.7, 0.99 at 0.8, 0.03 at 0.3.

What is kept of a document is 112 bytes in memory, and 60 in a temporary file: 4 million documents take 0.45 GB.
"""

from __future__ import annotations

import os
import tempfile
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from twelve.data.language import KO
from twelve.data.words import BASE, Words, mix

BANDS, ROWS = 12, 5
SIZE = BANDS * ROWS  # minima of a signature
SHINGLE, KOREAN_SHINGLE = 5, 3  # words; a Korean word holds its particles, and says as much as almost two English ones
ALIKE = 0.7  # from here on two documents are near duplicates
FIRST_RUN = 1 << 14  # entries of a column that are sorted in anew with every batch
NONE = -1

_draw = np.random.default_rng(12)
MULTIPLIERS = _draw.integers(0, 1 << 32, SIZE, dtype=np.uint32) | np.uint32(1)
OFFSETS = _draw.integers(0, 1 << 32, SIZE, dtype=np.uint32)


@dataclass(frozen=True)
class Signatures:
    """Of D documents."""

    marks: np.ndarray  # [D] uint64: of all characters, in lower case
    bands: np.ndarray  # [D, BANDS] uint32: keys
    minima: np.ndarray  # [D, SIZE] uint8

    def take(self, which: np.ndarray) -> Signatures:
        return Signatures(self.marks[which], self.bands[which], self.minima[which])


def shingles(words: Words, language: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The n-grams that a document is compared by, and the number of each document's first: uint64 [S], [D + 1].

    A document shorter than one n-gram has one of all its words.
    """
    sizes = np.where(language == KO, KOREAN_SHINGLE, SHINGLE)
    sizes = np.minimum(sizes, np.maximum(words.lengths, 1))
    whole = words.whole(sizes)
    first = np.concatenate([[0], np.cumsum(whole)])[words.first]
    return words.windows(sizes)[whole], first


def sign(words: Words, grams: np.ndarray, first: np.ndarray) -> Signatures:
    """The signatures of documents from their `shingles`; those of a document without words are all alike."""
    filled = np.flatnonzero(np.diff(first))
    minima = np.zeros((SIZE, words.texts), np.uint32)
    low = (grams >> np.uint64(32)).astype(np.uint32)
    if len(filled):
        for row, (factor, offset) in enumerate(zip(MULTIPLIERS, OFFSETS, strict=True)):
            minima[row, filled] = np.minimum.reduceat(low * factor + offset, first[:-1][filled])
    keys = np.zeros((BANDS, words.texts), np.uint64)
    for band in range(BANDS):
        for row in minima[band * ROWS : (band + 1) * ROWS]:
            keys[band] = mix(keys[band] * np.uint64(BASE) + row + np.uint64(band + 1))
    marks = words.spans(words.edges[:-1], words.edges[1:])
    bands = (keys >> np.uint64(32)).astype(np.uint32)
    return Signatures(marks, bands.T.copy(), (minima & np.uint32(255)).astype(np.uint8).T.copy())


def alike(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Estimates of Jaccard's index from pairs of minima [.., SIZE] uint8; standard error at most 0.065."""
    same = (one == other).mean(axis=-1)
    return np.maximum(0.0, (same - 1 / 256) / (1 - 1 / 256))  # different minima agree in 8 bits once in 256 times


class Seen:
    """Context manager: all documents added so far. `folder` is where the temporary file lies."""

    def __init__(self, folder: str | Path | None = None):
        self._marks = array("Q")
        self._columns = [_Column() for _ in range(1 + BANDS)]
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115

    def __len__(self) -> int:
        return len(self._marks)

    def add(self, signatures: Signatures) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Add D documents. For each the number (in the order of adding) of an earlier one like it, or NONE; whether the
        whole text is the same; and how alike they are: 1, or an estimate from ALIKE on.

        Every document counts as seen, the duplicates too. Of the earlier ones with the same key only the first is
        looked at.
        """
        count, start = len(signatures.marks), len(self)
        own = np.arange(start, start + count)
        self._marks.frombytes(signatures.marks.tobytes())
        self._file.write(signatures.minima.tobytes())
        keys = np.column_stack([(signatures.marks >> np.uint64(32)).astype(np.uint32), signatures.bands])
        met = np.column_stack([c.add(keys[:, i], own) for i, c in enumerate(self._columns)])  # [D, 1 + BANDS]
        marks = np.frombuffer(self._marks, np.uint64)
        exact = (met[:, 0] < own) & (marks[met[:, 0]] == signatures.marks)
        earlier = np.where(exact, met[:, 0], NONE)
        scores = exact.astype(np.float32)
        del marks  # or the array could not grow
        open_ = np.flatnonzero(~exact & (met < own[:, None]).any(axis=1))
        if len(open_):
            candidates = np.sort(np.where(met[open_] < own[open_, None], met[open_], own[open_, None]), axis=1)
            new = np.diff(candidates, axis=1, prepend=NONE).astype(bool) & (candidates < own[open_, None])
            place, column = np.nonzero(new)
            numbers = candidates[place, column]
            values = alike(signatures.minima[open_[place]], self._read(numbers))
            for at, number, value in zip(open_[place].tolist(), numbers.tolist(), values.tolist(), strict=True):
                if value >= ALIKE and value > scores[at]:
                    earlier[at], scores[at] = number, value
        return earlier, exact, scores

    def _read(self, numbers: np.ndarray) -> np.ndarray:
        """[.., SIZE] uint8 minima of documents."""
        rows = [os.pread(self._file.fileno(), SIZE, SIZE * number) for number in numbers.tolist()]
        return np.frombuffer(b"".join(rows), np.uint8).reshape(-1, SIZE)

    def __enter__(self) -> Seen:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


class _Column:
    """Keys and the documents that have them, 8 bytes each, sorted: many old ones, and a run of new ones before they are
    merged, so that a batch is added in little more time than it takes to look its keys up."""

    def __init__(self) -> None:
        self._old = np.zeros(0, np.uint64)
        self._new = np.zeros(0, np.uint64)

    def add(self, keys: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """[D] int64: the first document with each of these keys, which may be the one that is added now."""
        high = keys.astype(np.uint64) << np.uint64(32)
        self._new = _merged(self._new, np.sort(high | numbers.astype(np.uint64)))
        found = self._first(self._old, high)
        found = np.where(found == NONE, self._first(self._new, high), found)
        if len(self._new) > max(FIRST_RUN, len(self._old) >> 5):
            self._old, self._new = _merged(self._old, self._new), np.zeros(0, np.uint64)
        return found

    @staticmethod
    def _first(entries: np.ndarray, high: np.ndarray) -> np.ndarray:
        if not len(entries):
            return np.full(len(high), NONE)
        found = entries[np.minimum(np.searchsorted(entries, high), len(entries) - 1)]
        same = found >> np.uint64(32) == high >> np.uint64(32)
        return np.where(same, (found & np.uint64(0xFFFFFFFF)).astype(np.int64), NONE)


def _merged(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.sort(np.concatenate([one, other]), kind="stable")  # which merges runs that are sorted already
