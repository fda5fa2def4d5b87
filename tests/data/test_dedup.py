"""Near duplicates found, and not found, against exact sets of word n-grams."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twelve.data import dedup
from twelve.data.dedup import ALIKE, NONE, Seen, alike, shingles, sign
from twelve.data.language import KO, languages
from twelve.data.words import read_words


def signatures(texts):
    words = read_words(texts)
    return sign(words, *shingles(words, languages(words).code))


def jaccard(one: str, other: str) -> float:
    """Of sets of word 5-grams, as a plain loop makes them."""
    grams = []
    for text in (one, other):
        words = text.lower().split()
        grams.append({tuple(words[at : at + 5]) for at in range(max(1, len(words) - 4))})
    return len(grams[0] & grams[1]) / len(grams[0] | grams[1])


def text(draw: random.Random, count: int) -> list[str]:
    return [f"w{draw.randrange(10**6)}" for _ in range(count)]


def edited(words: list[str], share: float, draw: random.Random) -> list[str]:
    return [f"x{draw.randrange(10**6)}" if draw.random() < share else word for word in words]


def test_shingles_are_word_ngrams():
    texts = ["one two three four five six", "a b", "", "하나 둘 셋 넷", "!!", "하나 둘"]
    words = read_words(texts)
    grams, first = shingles(words, np.array([2, 2, 0, KO, 0, KO]))
    assert np.diff(first).tolist() == [2, 1, 0, 2, 0, 1]
    assert grams[0] == read_words(["One, two: three four five."]).windows(5)[0]
    assert grams[3] == read_words(["하나 둘 셋"]).windows(3)[0]


def test_signatures_estimate_jaccards_index():
    draw = random.Random(1)
    errors = []
    for share in (0, 0.005, 0.01, 0.03, 0.1, 0.3, 1):
        for _ in range(12):
            words = text(draw, 400)
            pair = [" ".join(words), " ".join(edited(words, share, draw))]
            minima = signatures(pair).minima
            errors.append(alike(minima[0], minima[1]) - jaccard(*pair))
    assert abs(np.mean(errors)) < 0.02 and np.sqrt(np.mean(np.square(errors))) < 0.065  # sqrt(1/4/60)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["", "a b c d e f", "가 나 다 라 마", "A, b! c d e f", "a b d e g", "z"]), min_size=1))
def test_a_signature_does_not_depend_on_the_batch(texts):
    together = signatures(texts)
    for number, one in enumerate(texts):
        alone = signatures([one])
        assert together.marks[number] == alone.marks[0]
        assert (together.bands[number] == alone.bands[0]).all() and (together.minima[number] == alone.minima[0]).all()


def test_duplicates_are_found_in_any_batch_and_of_the_first():
    draw = random.Random(2)
    base = [" ".join(text(draw, 200)) for _ in range(40)]
    copies = [one.upper() for one in base]
    near = [" ".join([*edited(one.split(), 0.01, draw), "end"]) for one in base]
    other = [" ".join(edited(one.split(), 0.5, draw)) for one in base]
    texts = base + copies + near + other
    for size in (len(texts), 7):
        earlier, exact, score = run(texts, size)
        assert (earlier[:40] == NONE).all() and (earlier[120:] == NONE).all()
        assert earlier[40:80].tolist() == list(range(40)) and exact[40:80].all() and not exact[80:].any()
        true = np.array([jaccard(one, two) for one, two in zip(base, near, strict=True)])
        found = earlier[80:120] != NONE
        assert found[true >= ALIKE + 0.12].all() and not found[true < ALIKE - 0.2].any()
        assert (np.isin(earlier[80:120][found], [*range(40), *range(40, 80)])).all()
        assert (np.abs(score[80:120] - true)[found] < 0.2).all()


def run(texts, size):
    with Seen() as seen:
        parts = [seen.add(signatures(texts[at : at + size])) for at in range(0, len(texts), size)]
        assert len(seen) == len(texts)
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


@pytest.mark.parametrize(("share", "low", "high"), [(0.003, 0.97, 1), (0.02, 0.85, 1), (0.08, 0, 0.35), (0.3, 0, 0)])
def test_recall_follows_likeness(share, low, high):
    draw = random.Random(3)
    base = [text(draw, 300) for _ in range(150)]
    texts = [" ".join(words) for words in base] + [" ".join(edited(words, share, draw)) for words in base]
    earlier, _, _ = run(texts, 100)
    assert low <= (earlier[150:] == np.arange(150)).mean() <= high


def test_korean_texts_with_small_edits():
    draw = random.Random(4)
    syllables = [chr(0xAC00 + 28 * n) for n in range(300)]
    words = ["".join(draw.choices(syllables, k=3)) for _ in range(120)]
    one = " ".join(words)
    two = " ".join([*words[:60], "새로운", *words[61:]])
    earlier, exact, score = run([one, two, one.replace(" ", ",  "), one], 3)
    assert earlier.tolist() == [NONE, 0, 0, 0] and exact.tolist() == [False, False, False, True]
    assert 0.85 < score[1] < 1 == score[2] == score[3]


def test_columns_keep_the_first_of_every_key_through_merges(monkeypatch):
    monkeypatch.setattr(dedup, "FIRST_RUN", 8)
    draw = np.random.default_rng(5)
    column, first = dedup._Column(), {}
    for start in range(0, 400, 10):
        keys = draw.integers(0, 90, 10).astype(np.uint32)
        numbers = np.arange(start, start + 10)
        for key, number in zip(keys.tolist(), numbers.tolist(), strict=True):
            first.setdefault(key, number)
        assert column.add(keys, numbers).tolist() == [first[key] for key in keys.tolist()]
    assert len(column._old) + len(column._new) == 400 and len(column._old) > 300


def test_state_is_what_the_docstring_says():
    with Seen() as seen:
        draw = np.random.default_rng(6)
        for _ in range(20):
            bands = draw.integers(0, 2**32, (1000, dedup.BANDS), dtype=np.uint32)
            minima = draw.integers(0, 256, (1000, dedup.SIZE), dtype=np.uint8)
            seen.add(dedup.Signatures(draw.integers(0, 2**63, 1000).astype(np.uint64), bands, minima))
        held = seen._marks.itemsize * len(seen) + sum(c._old.nbytes + c._new.nbytes for c in seen._columns)
        assert held == 112 * len(seen)
        assert seen._file.tell() == 60 * len(seen)
