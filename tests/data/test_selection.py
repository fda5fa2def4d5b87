"""Shares of sources, and which documents are chosen."""

import math
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twelve.data.selection import Coverage, Quota, budgets, shares
from twelve.data.words import read_words
from twelve.errors import InputError


def test_shares_are_weight_times_size_to_the_temperature():
    assert shares([100, 300], [1, 1], 1) == pytest.approx([0.25, 0.75])
    assert shares([100, 400], [1, 1], 2) == pytest.approx([1 / 3, 2 / 3])
    assert shares([100, 300], [3, 1], 1) == pytest.approx([0.5, 0.5])
    assert shares([1, 10**9], [1, 0], 0.01) == [1, 0]  # what is not taken does not make the rest vanish
    assert shares([1, 10**9], [1, 1], 1e6) == pytest.approx([0.5, 0.5], abs=1e-4)


def test_budgets():
    assert budgets([1000, 3000], [1, 1], 1, 400) == [100, 300]
    assert budgets([100, 3000], [1, 1], 1e9, 1000) == [100, 900]  # the small one gives all it has
    assert budgets([100, 300], [1, 1], 1, 10**6) == [100, 300]
    assert budgets([100, 300], [1, 1], 1, None) == [100, 300]
    assert budgets([100, 300], [1, 1], 1e9, None) == [100, 100]
    assert budgets([100, 300], [2, 1], 1, None) == [100, 150]
    assert budgets([100, 0, 300], [1, 1, 0], 1, None) == [100, 0, 0]
    with pytest.raises(InputError, match="nothing to choose from"):
        budgets([0, 10], [1, 0], 1, None)


WEIGHT = st.floats(0, 10).map(lambda value: round(value, 3))
SOURCES = st.lists(st.tuples(st.integers(0, 10**9), WEIGHT), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None)
@given(SOURCES, st.floats(0.3, 20), st.integers(1, 10**9))
def test_budgets_never_exceed_and_spend_what_they_can(sources, temperature, budget):
    sizes, weights = zip(*sources, strict=True)
    usable = sum(size for size, weight in sources if weight)
    if not usable:
        return
    taken = budgets(sizes, weights, temperature, budget)
    assert all(0 <= part <= size for part, size in zip(taken, sizes, strict=True))
    assert sum(taken) <= budget and sum(taken) >= min(budget, usable) - len(sizes) - 1e-6 * budget


def texts(draw, count, words):
    return [" ".join(draw.choices(words, k=30)) for _ in range(count)]


def choose(batches, portion, groups=None, scores=None):
    coverage, taken = Coverage(), []
    read = [read_words(batch) for batch in batches]
    for words in read:
        coverage.count(words)
    quota = Quota(portion)
    for at, (batch, words) in enumerate(zip(batches, read, strict=True)):
        sizes = np.array([len(text) for text in batch])
        group = np.zeros(len(batch), np.int64) if groups is None else np.array(groups[at])
        score = np.ones(len(batch)) if scores is None else np.array(scores[at])
        taken.append(coverage.choose(words, sizes, group, score, quota))
    return taken


def test_the_quota_is_met_in_every_group():
    draw = random.Random(0)
    words = [f"w{n}" for n in range(500)]
    batches = [texts(draw, 60, words) for _ in range(8)]
    groups = [[draw.randrange(2) for _ in batch] for batch in batches]
    taken = choose(batches, [0.25, 0.6], groups)
    for group, portion in enumerate((0.25, 0.6)):
        sizes = [(len(text), bool(take)) for batch, of, takes in zip(batches, groups, taken, strict=True)
                 for text, number, take in zip(batch, of, takes, strict=True) if number == group]  # fmt: skip
        goal = portion * sum(size for size, _ in sizes)
        assert goal <= sum(size for size, take in sizes if take) < goal + max(size for size, _ in sizes)


def test_what_nobody_else_says_and_what_is_bad_is_left():
    draw = random.Random(1)
    common = [f"w{n}" for n in range(300)]
    good = texts(draw, 90, common)
    noise = [" ".join(f"n{draw.randrange(10**9)}" for _ in range(30)) for _ in range(30)]
    [taken] = choose([good + noise], [0.3])
    assert taken[:90].sum() >= 30 and taken[90:].sum() == 0
    [taken] = choose([good], [0.3], scores=[[1.0] * 45 + [0.01] * 45])
    assert taken[45:].sum() == 0


def test_the_choice_predicts_the_corpus_better_than_any_random_one():
    """Topics of very different size; cross-entropy of all words under those of the chosen texts, each with one more."""
    draw = random.Random(2)
    topics = [[f"t{topic}w{n}" for n in range(60)] for topic in range(40)]
    of_topic = draw.choices(topics, [1 / (1 + rank) for rank in range(40)], k=600)
    corpus = [" ".join(draw.choices(words, k=draw.randint(10, 60))) for words in of_topic]
    counts = Counter(" ".join(corpus).split())

    def entropy(chosen):
        found = Counter(" ".join(chosen).split())
        total = sum(found.values()) + len(counts)
        return -sum(count * math.log((found[word] + 1) / total) for word, count in counts.items())

    taken = choose([corpus[:200], corpus[200:400], corpus[400:]], [0.2])
    ours = [text for text, take in zip(corpus, np.concatenate(taken), strict=True) if take]
    size = sum(map(len, ours))
    others = []
    for _ in range(30):
        draw.shuffle(corpus)
        others.append(entropy(corpus[: next(n for n in range(600) if sum(map(len, corpus[:n])) >= size)]))
    assert entropy(ours) < min(others)
