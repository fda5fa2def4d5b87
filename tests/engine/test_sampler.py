"""The sampler: Philox as published, right frequencies, the exact nucleus, draws that depend on seed and place alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twelve.engine.request import sub_seed
from twelve.engine.sampler import check_finite, draw, gumbel, log_probabilities, nucleus, philox, seed_key
from twelve.errors import InputError

LOGITS = np.log(np.array([0.5, 0.25, 0.125, 0.0625, 0.0625]))


def drawn(logits, positions, temperature=1.0, top_p=1.0, seed=3):
    """A draw of the same logits at each position."""
    n = len(positions)
    return draw(
        np.tile(np.asarray(logits), (n, 1)), np.asarray(positions), np.full(n, temperature, np.float32),
        np.full(n, top_p, np.float32), np.tile(seed_key(seed), (n, 1)),
    )  # fmt: skip


def frequencies(logits, count=4000, **options):
    return np.bincount(drawn(logits, range(count), **options), minlength=len(logits)) / count


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # Random123, tests/kat_vectors
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_words(counter, key, words):
    counter, key, words = ([int(word, 16) for word in text.split()] for text in (counter, key, words))
    assert [int(word[0]) for word in philox(counter, key)] == words


def test_temperature_zero_takes_the_first_of_the_most_likely():
    assert drawn([1.0, 3.0, 3.0, -np.inf], [0], temperature=0, top_p=0.1).tolist() == [1]


@pytest.mark.parametrize(("temperature", "dtype"), [(1.0, np.float64), (0.5, np.float64), (2.0, np.float32)])
def test_frequencies_follow_the_softmax(temperature, dtype):
    p = np.exp(LOGITS / temperature)
    count = 20_000
    seen = frequencies(LOGITS.astype(dtype), count, temperature=temperature)
    chi_square = (count * (seen - p / p.sum()) ** 2 / (p / p.sum())).sum()
    assert chi_square < 18.5  # 4 degrees of freedom: one seed in a thousand


def test_a_tiny_temperature_does_not_overflow():
    assert drawn([0.0, 800.0, 799.0], [0], temperature=1e-12).tolist() == [1]


def test_top_p_keeps_the_smallest_sufficient_set():
    assert frequencies(LOGITS, top_p=0.7, seed=5) == pytest.approx([2 / 3, 1 / 3, 0, 0, 0], abs=0.03)
    assert set(nucleus(np.exp(LOGITS), 0.75)) == {0, 1}
    assert list(nucleus(np.exp(LOGITS), 0.0)) == [0]


@settings(deadline=None, max_examples=200)
@given(st.lists(st.floats(-30, 30), min_size=1, max_size=60), st.floats(0, 0.999))
def test_nucleus_is_what_sorting_everything_gives(logits, top_p):
    p = np.exp(np.array(logits) - max(logits))
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    whole = order[: np.searchsorted(np.cumsum(p[order]), top_p) + 1]
    assert list(nucleus(p, top_p)) == list(whole)


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 300), st.floats(0.1, 40))
def test_leaving_out_what_cannot_win_changes_nothing(seed, rows, size, spread):
    random = np.random.default_rng(seed)
    logits = random.normal(size=(rows, size)) * spread
    temperature = random.choice([0.0, 0.3, 1.0, 2.0], size=rows).astype(np.float32)
    top_p = random.choice([0.0, 0.5, 0.9, 1.0], size=rows).astype(np.float32)
    keys = np.stack([seed_key(seed + row) for row in range(rows)])
    found = draw(logits, np.arange(rows), temperature, top_p, keys)
    for row in range(rows):
        if temperature[row] == 0:
            assert found[row] == logits[row].argmax()
            continue
        scores = logits[row] / float(temperature[row])
        p = np.exp(scores - scores.max())
        sums = np.full(size, -np.inf)
        ids = nucleus(p / p.sum(), float(top_p[row])) if top_p[row] < 1 else np.arange(size)
        coins = gumbel(np.tile(keys[row], (size, 1)), np.full(size, row), np.arange(size))
        sums[ids] = scores[ids] + coins[ids]
        assert found[row] == sums.argmax()


def test_impossible_tokens_are_never_drawn():
    logits = np.array([-np.inf, 0.0, -np.inf, 0.0, -np.inf])
    for top_p in (1.0, 0.9):
        assert set(drawn(logits, range(500), top_p=top_p)) == {1, 3}


def test_a_draw_depends_on_seed_and_position_only():
    together = drawn(LOGITS, range(50), seed=7).tolist()
    assert [drawn(LOGITS, [position], seed=7)[0] for position in range(50)] == together
    assert drawn(LOGITS, range(50), seed=8).tolist() != together
    wide = np.concatenate((LOGITS, np.full(50, -50.0)))  # a larger vocabulary: the coin belongs to the token's id
    assert drawn(wide, range(50), seed=7).tolist() == together


def test_draws_of_like_distributions_agree_mostly():
    near = LOGITS + np.array([0.1, -0.1, 0.1, -0.1, 0.1])
    assert (drawn(LOGITS, range(2000)) == drawn(near, range(2000))).mean() > 0.9


def test_without_a_seed_every_sequence_differs():
    assert drawn(np.zeros(1000), range(10), seed=None).tolist() != drawn(np.zeros(1000), range(10), seed=None).tolist()


def test_a_seed_written_down_today_gives_the_same_with_another_numpy():
    assert drawn(np.zeros(100_000), range(4), seed=5).tolist() == [89210, 35386, 13066, 78964]


def test_negative_and_large_seeds_count():
    draws = {seed: tuple(drawn(np.zeros(1000), range(5), seed=seed)) for seed in (-1, 0, 2**63, 2**64, 2**127)}
    assert len(set(draws.values())) == 5
    assert (seed_key(2**128 + 7) == seed_key(7)).all() and seed_key(1 + (2 << 32) + (3 << 64)).tolist() == [1, 2, 3, 0]


def test_sub_seeds_differ_and_begin_with_the_seed_itself():
    assert sub_seed(None, 3) is None
    assert sub_seed(42, 0) == 42
    seeds = [sub_seed(seed, index) for seed in (-1, 0, 1, 42) for index in range(4)]
    assert len(set(seeds)) == len(seeds)


def test_log_probabilities_are_the_log_softmax():
    found = log_probabilities(np.stack((LOGITS + 100, LOGITS[::-1])), np.array([2, 0]))
    assert found == pytest.approx(np.log([0.125, 0.0625]))


def test_what_is_no_number_is_told():
    check_finite(np.array([[0.0, -np.inf]]))
    for bad in (np.nan, np.inf):
        with pytest.raises(InputError, match="not a number"):
            check_finite(np.array([[0.0, 1.0], [0.0, bad]]))
