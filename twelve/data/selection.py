"""A part of a corpus: how much of each source, and which documents.

How much: sources share a budget in proportion to weight * size^(1 / temperature), as multilingual models mix languages
(Conneau and others 2020, section 3.1): 1 keeps the proportions, a large temperature makes all sources equal. No
document is taken twice, so a source that is too small gives all it has and the others share what is left.

Which: those that a small n-gram model of the whole corpus asks for. Let p be how often other documents of the corpus
have an n-gram, and q how often the chosen ones do. The gradient of the cross-entropy between corpus and choice is
p / q, so a document is worth the sum of that over its n-grams, for every byte that it takes: nothing for those that no
other document has (names, noise), little for those that the chosen ones have often already (a template), much for those
that they lack. A greedy choice by it is a form of cynical selection (Axelrod 2017).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from twelve.data.words import Words
from twelve.errors import InputError

SLOTS = 24  # bits; n-grams are counted in two tables of 2^24 places, 64 MiB each, whatever the corpus
PRIOR = 50.0  # documents whose worth of p is taken as chosen before the first
ROUNDS = 4  # in which a batch is chosen from, so that documents alike within it see each other


def shares(sizes: Sequence[int], weights: Sequence[float], temperature: float) -> list[float]:
    """Of a budget, what each source has a right to; they sum to 1."""
    sizes = [size if weight else 0 for size, weight in zip(sizes, weights, strict=True)]
    largest = max(sizes)
    raw = [weight * (size / largest) ** (1 / temperature) for size, weight in zip(sizes, weights, strict=True)]
    return [value / sum(raw) for value in raw]


def budgets(sizes: Sequence[int], weights: Sequence[float], temperature: float, budget: int | None) -> list[int]:
    """Bytes to take of each source. Without a budget, as many as there are in these shares."""
    if not any(size and weight for size, weight in zip(sizes, weights, strict=True)):
        raise InputError("nothing to choose from: every source is empty, or of weight 0")
    rights = shares(sizes, weights, temperature)
    if budget is None:
        total = min(size / right for size, right in zip(sizes, rights, strict=True) if right)
        return [min(size, round(total * right)) for size, right in zip(sizes, rights, strict=True)]
    taken = [0] * len(sizes)
    open_ = {number for number, right in enumerate(rights) if right}
    while open_:
        left, right = budget - sum(taken), sum(rights[number] for number in open_)
        full = {number for number in open_ if left * rights[number] >= right * sizes[number]}
        for number in full or open_:
            taken[number] = sizes[number] if full else int(left * rights[number] / right)
        open_ = open_ - full if full else set()
    return taken


class Coverage:
    """How many documents of the corpus, and of those chosen so far, have which words and pairs of words."""

    def __init__(self) -> None:
        self._corpus, self._chosen = (np.zeros(1 << SLOTS, np.uint32) for _ in range(2))
        self._documents = self._taken = 0

    def count(self, words: Words) -> None:
        """Add texts to what is known of the corpus."""
        _, slots = _features(words)
        np.add.at(self._corpus, slots, np.uint32(1))
        self._documents += words.texts

    def choose(
        self, words: Words, sizes: np.ndarray, groups: np.ndarray, scores: np.ndarray, quota: Quota
    ) -> np.ndarray:
        """[D] bool: which of a batch of texts to take, by worth a byte times `scores`, as far as `quota` goes.

        `sizes` are bytes, `groups` the numbers that the quota has for them. Every text has been counted before.
        """
        text, slots = _features(words)
        others = (self._corpus[slots] - np.uint32(1)) / max(1, self._documents)  # p
        taken = np.zeros(words.texts, bool)
        quota.saw(groups, sizes)
        for round_ in range(ROUNDS):
            chosen = (self._chosen[slots] + PRIOR * others) / (self._taken + PRIOR)  # q
            worth = np.bincount(text, others / np.maximum(chosen, 1e-12), words.texts) * scores / np.maximum(1, sizes)
            allowed = quota.allowed((round_ + 1) / ROUNDS)
            new = np.zeros(words.texts, bool)
            for number in np.argsort(-worth, kind="stable").tolist():
                group = groups[number]
                if not taken[number] and allowed[group] > 0:
                    allowed[group] -= sizes[number]
                    new[number] = True
            quota.took(groups[new], sizes[new])
            np.add.at(self._chosen, slots[new[text]], np.uint32(1))
            self._taken += int(new.sum())
            taken |= new
        return taken


class Quota:
    """Of each group, the share of its bytes that may be taken of what has been seen of it so far."""

    def __init__(self, portions: Sequence[float]):
        self._portions = np.array(portions, np.float64)
        self._seen = np.zeros(len(portions))
        self._taken = np.zeros(len(portions))
        self._before = np.zeros(len(portions))

    def saw(self, groups: np.ndarray, sizes: np.ndarray) -> None:
        self._seen += np.bincount(groups, sizes, len(self._seen))
        self._before = self._taken.copy()

    def allowed(self, part: float) -> np.ndarray:
        """Bytes that may be taken now, if only `part` of what the last batch allows is to be."""
        return self._before + part * (self._portions * self._seen - self._before) - self._taken

    def took(self, groups: np.ndarray, sizes: np.ndarray) -> None:
        self._taken += np.bincount(groups, sizes, len(self._taken))


def _features(words: Words) -> tuple[np.ndarray, np.ndarray]:
    """The text and the slot of every word and every pair of words, each once a text."""
    shift = np.uint64(64 - SLOTS)
    pairs = words.whole(2)
    slots = np.concatenate([words.hashes >> shift, words.windows(2)[pairs] >> shift])
    text = np.concatenate([words.text, words.text[pairs]]).astype(np.uint64)
    keys = np.sort(text << np.uint64(SLOTS) | slots)
    keys = keys[np.diff(keys, prepend=~keys[:1]) != 0]
    return (keys >> np.uint64(SLOTS)).astype(np.int64), (keys & np.uint64((1 << SLOTS) - 1)).astype(np.int64)
