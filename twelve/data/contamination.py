"""Evaluation files in training text: n-grams that both have.

Words are compared in lower case and without punctuation, 13 of them in a row as GPT-3 did (Brown and others 2020,
appendix C): long enough that two people seldom write the same by chance. Korean takes 8: a Korean word holds its
particles and says what 1.6 English ones say, so that 8 of them, some 30 syllables, are as rare as 13 in English, while
13 would be longer than most questions. A text of an evaluation file that is shorter is looked for as a whole, down to
half the length; what is shorter still cannot be told from chance, and is counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from twelve.data.language import SYLLABLE
from twelve.data.reader import find_files, is_rows, read_objects, read_texts
from twelve.data.words import HANGUL, LATIN, RARE, HashSet, Words, read_words
from twelve.errors import InputError

KOREAN_WORDS = 0.6  # Korean words that say as much as an English one
BATCH = 1 << 20  # characters of evaluation text read at once


class Contamination:
    """The n-grams of evaluation files, in memory: some 35 bytes a word, so give it the files for evaluation, and the
    training text to `overlaps`."""

    def __init__(self, paths: Sequence[str | Path], n: int = 13):
        """Read all texts of `paths`: in .jsonl and .parquet every text of a row, however deep; else paragraphs.

        InputError for a missing or damaged file, a row that is no JSON, or nothing to look for at all.
        """
        self.n, self.korean_n = n, max(2, round(KOREAN_WORDS * n))
        self.places: list[str] = []  # file:line of every text
        grams: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
        begins = []
        looked_for: set[str] = set()
        for places, texts in _batches(_evaluation_texts(paths)):
            words = read_words(texts)
            place = len(self.places) + np.arange(len(texts))
            self.places += places
            full = np.where(_is_korean(words), self.korean_n, self.n)
            sizes = np.minimum(full, words.lengths)
            sizes[sizes < (full + 1) // 2] = 0
            looked_for.update(places[text] for text in np.flatnonzero(sizes).tolist())
            for size in np.unique(sizes[sizes > 0]).tolist():
                at = np.flatnonzero(words.whole(size) & (sizes == size)[words.text])
                grams.setdefault(size, []).append((words.windows(size, at), place[words.text[at]]))
                begins.append(words.windows(self._least, at))
        if not grams:
            raise InputError(f"{', '.join(map(str, paths))}: no text of {(n + 1) // 2} words or more to look for")
        self.rows = len(set(self.places))
        self.short = self.rows - len(looked_for)  # rows that have no text long enough to look for
        self._begins = HashSet(np.concatenate(begins))
        self._grams = {size: _first_places(parts) for size, parts in sorted(grams.items(), reverse=True)}

    @property
    def _least(self) -> int:
        """Words of the shortest text that is looked for."""
        return (min(self.n, self.korean_n) + 1) // 2

    def overlaps(self, text: str) -> list[tuple[str, str]]:
        """Every stretch of `text` that is in an evaluation file: (file:line, the matching words)."""
        words = read_words([text])
        found = []
        for size, at, place in self._hits(words):
            breaks = np.flatnonzero((np.diff(at) != 1) | (np.diff(place) != 0)) + 1
            for stretch in np.split(np.arange(len(at)), breaks) if len(at) else ():
                start, end = words.starts[at[stretch[0]]], words.ends[at[stretch[-1]] + size - 1]
                found.append((self.places[place[stretch[0]]], words.slice(start, end)))
        return found

    def first(self, words: Words) -> dict[int, tuple[str, str]]:
        """An overlap of each text that has one, as in `overlaps`, by the number of the text."""
        found: dict[int, tuple[str, str]] = {}
        for size, at, place in self._hits(words):
            for begin, row in zip(at.tolist(), place.tolist(), strict=True):
                if (text := int(words.text[begin])) not in found:
                    found[text] = self.places[row], words.slice(words.starts[begin], words.ends[begin + size - 1])
        return found

    def _hits(self, words: Words) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """By size of n-gram, the longest first: the words where n-grams begin that are known, and their places."""
        likely, _ = self._begins.find(words.windows(self._least))
        for size, (known, places) in self._grams.items():
            at = likely[words.whole(size, likely)]
            hashes = words.windows(size, at)
            entry = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
            same = known[entry] == hashes
            yield size, at[same], places[entry[same]]


def _first_places(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The n-grams in order, each once, and the first place of each."""
    hashes, places = (np.concatenate(column) for column in zip(*parts, strict=True))
    unique, at = np.unique(hashes, return_index=True)
    return unique, places[at].astype(np.uint32)


def _is_korean(words: Words) -> np.ndarray:
    counts = words.counts
    return SYLLABLE * (counts[:, HANGUL] + counts[:, RARE]) >= counts[:, LATIN]


def _evaluation_texts(paths: Sequence[str | Path]) -> Iterator[tuple[str, str]]:
    """(file:line, text) of every text in evaluation files."""
    files = find_files(paths)
    for path in [*files.train, *files.held_out]:
        if is_rows(path):
            for where, row in read_objects(path):
                yield from ((where, text) for text in _strings(row))
            continue
        line = 1
        for piece in read_texts(path):
            for part in re.split(r"(\n\s*\n)", piece):
                if part.strip():
                    yield f"{path}:{line}", part
                line += part.count("\n")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)


def _batches(texts: Iterator[tuple[str, str]]) -> Iterator[tuple[list[str], list[str]]]:
    places, batch, size = [], [], 0
    for place, text in texts:
        places.append(place)
        batch.append(text)
        size += len(text)
        if size >= BATCH:
            yield places, batch
            places, batch, size = [], [], 0
    if batch:
        yield places, batch
