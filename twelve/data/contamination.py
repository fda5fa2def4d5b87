"""Evaluation files in training text: n-grams that both have.

Words are compared in lower case and without punctuation, 13 of them in a row as GPT-3 did (Brown and others 2020,
appendix C): long enough that two people seldom write the same by chance. Korean takes 8: a Korean word holds its
particles and says what 1.6 English ones say, so that 8 of them, some 30 syllables, are as rare as 13 in English, while
13 would be longer than most questions. A text of an evaluation file that is shorter is looked for as a whole, down to
half the length; what is shorter still cannot be told from chance, and is counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from twelve.data.language import SYLLABLE
from twelve.data.reader import find_files, is_rows, read_objects, read_texts
from twelve.data.words import HANGUL, LATIN, RARE, HashSet, Words, read_words
from twelve.errors import InputError

KOREAN_WORDS = 0.6  # Korean words that say as much as an English one
BATCH = 1 << 20  # characters read at once
MEETING = 1 << 10  # characters that hold n words


class Contamination:
    """The n-grams of evaluation files, in memory: some 35 bytes a word, so give it the files for evaluation, and the
    training text to `rows_in`."""

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
        self._grams = {size: _in_order(parts) for size, parts in sorted(grams.items(), reverse=True)}

    @property
    def _least(self) -> int:
        """Words of the shortest text that is looked for."""
        return (min(self.n, self.korean_n) + 1) // 2

    def rows_in(self, texts: Iterable[str]) -> dict[str, str]:
        """Every row that shares words with one of the texts, as file:line, and the stretch of a text that has them.

        What many rows say (the words that all questions begin with) counts for each of them, but their list is gone
        through once for each n-gram, however often texts have it.
        """
        found: dict[str, str] = {}
        met = {size: np.zeros(len(known), bool) for size, (known, _) in self._grams.items()}
        for _, batch in _batches(("", piece) for text in texts for piece in _pieces(text)):
            words = read_words(batch)
            for size, at, entry in self._hits(words):
                entry, once = np.unique(entry, return_index=True)
                new = ~met[size][entry]
                met[size][entry] = True
                for place, start, end in self._stretches(size, at[once[new]], entry[new]):
                    if (row := self.places[place]) not in found:
                        found[row] = words.slice(words.starts[start], words.ends[end])
        return found

    def first(self, words: Words) -> dict[int, tuple[str, str]]:
        """Of each text that shares words with a row, by its number: the first such row, and n words of the text."""
        found: dict[int, tuple[str, str]] = {}
        for size, at, entry in self._hits(words):
            for begin, place in zip(at.tolist(), self._grams[size][1][entry].tolist(), strict=True):
                if (text := int(words.text[begin])) not in found:
                    found[text] = self.places[place], words.slice(words.starts[begin], words.ends[begin + size - 1])
        return found

    def _hits(self, words: Words) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """By size of n-gram, the longest first: the words where n-grams begin that are known, and their first entry."""
        likely, _ = self._begins.find(words.windows(self._least))
        for size, (known, _) in self._grams.items():
            at = likely[words.whole(size, likely)]
            hashes = words.windows(size, at)
            entry = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
            same = known[entry] == hashes
            yield size, at[same], entry[same]

    def _stretches(self, size: int, at: np.ndarray, entry: np.ndarray) -> Iterator[tuple[int, int, int]]:
        """For each place that has one of these n-grams, the first stretch that it has: from this word to that one."""
        known, places = self._grams[size]
        counts = np.searchsorted(known, known[entry], side="right") - entry
        which = np.repeat(np.arange(len(entry)), counts)
        within = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
        place, at = places[entry[which] + within], at[which]
        order = np.lexsort((at, place))
        place, at = place[order], at[order]
        new_place = np.diff(place) != 0
        ends = np.flatnonzero(np.append(new_place | (np.diff(at) != 1), True))
        starts = np.flatnonzero(np.append(True, new_place)) if len(place) else []
        for start, end in zip(starts, ends[np.searchsorted(ends, starts)], strict=True):
            yield int(place[start]), int(at[start]), int(at[end]) + size - 1


def _in_order(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The n-grams in order, and their places; one that several texts have stands there once for each."""
    hashes, places = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(hashes, kind="stable")
    hashes, places = hashes[order], places[order]
    fresh = np.append(True, (np.diff(hashes) != 0) | (np.diff(places) != 0))
    return hashes[fresh], places[fresh].astype(np.uint32)


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


def _pieces(text: str) -> Iterator[str]:
    """Of a long text, whose arrays would be far longer: what stands where two pieces meet is in both."""
    for start in range(0, max(1, len(text)), BATCH):
        yield text[start : start + BATCH + MEETING]


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
