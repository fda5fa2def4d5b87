"""Standard errors against a bootstrap, and tests against exact ones."""

import math
import time
from itertools import product
from math import comb
from statistics import fmean

import numpy as np
import pytest
import torch

from twelve.evaluate.bits import BitsPerByte, ratio_error
from twelve.evaluate.compare import compare_bits, compare_shares
from twelve.evaluate.repeats import maj_at_k, pass_at_k
from twelve.evaluate.statistics import mcnemar, share, standard_error, student


def bootstrap(statistic, items, rounds=4000):
    """The standard deviation of a statistic over samples drawn with replacement."""
    draw = np.random.default_rng(0)
    return np.std([statistic(draw.integers(0, items, items)) for _ in range(rounds)], ddof=1)


def test_the_error_of_a_share_is_the_bootstraps():
    right = (np.random.default_rng(1).random(200) < 0.3).astype(float)
    expected = bootstrap(lambda chosen: right[chosen].mean(), len(right))
    assert standard_error(right.tolist()) == pytest.approx(expected, rel=0.05)
    p = right.mean()
    assert standard_error(right.tolist()) == pytest.approx(math.sqrt(p * (1 - p) / 199))


def test_the_error_of_repeats_is_that_of_a_bootstrap_over_problems():
    """Drawing problems anew, with all their samples: the clusters. Errors over single samples would be too small."""
    draw = np.random.default_rng(2)
    hard = draw.random(150)  # how often a problem is solved
    scores = (draw.random((150, 8)) < hard[:, None]).astype(float)
    votes = [["right" if score else str(draw.integers(3)) for score in row] for row in scores]
    for measure in (lambda row: fmean(scores[row]), lambda row: pass_at_k(scores[row], 4),
                    lambda row: maj_at_k(votes[row], scores[row], 4)):  # fmt: skip
        values = np.array([measure(row) for row in range(150)])
        assert share(values.tolist()).standard_error == pytest.approx(
            bootstrap(lambda chosen, values=values: values[chosen].mean(), 150), rel=0.05
        )
    assert standard_error(scores.flatten().tolist()) < 0.7 * share(scores.mean(1).tolist()).standard_error


def test_the_error_of_bits_per_byte_is_the_bootstraps():
    draw = np.random.default_rng(3)
    sizes = draw.lognormal(6, 0.8, 300)
    bits = sizes * draw.normal(2.0, 0.4, 300)
    expected = bootstrap(lambda chosen: bits[chosen].sum() / sizes[chosen].sum(), 300)
    found = ratio_error(torch.tensor(bits), torch.tensor(sizes), bits.sum() / sizes.sum())
    assert found == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize(
    ("t", "freedom", "p"),
    # quantiles of printed tables: 5% and 1%, two-sided
    [(12.706, 1, 0.05), (4.303, 2, 0.05), (3.182, 3, 0.05), (2.776, 4, 0.05), (2.571, 5, 0.05), (2.228, 10, 0.05),
     (63.657, 1, 0.01), (2.861, 19, 0.01), (1.984, 100, 0.05), (0.0, 7, 1.0)],
)  # fmt: skip
def test_students_t_is_that_of_the_tables(t, freedom, p):
    assert student(t, freedom) == student(-t, freedom) == pytest.approx(p, rel=2e-3)


def test_students_t_becomes_the_normal_distribution():
    assert student(1.959964, 200_001) == pytest.approx(0.05, rel=1e-4) == student(1.959964, 200_000)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (5, 5), (1, 9), (9, 1), (0, 10), (12, 3), (0, 300)])
def test_mcnemar_is_the_exact_binomial_test(first, second):
    """The chance of a count as far from the middle, or farther, in so many tosses of a coin."""
    n, apart = first + second, abs(first - second)
    exact = sum(comb(n, heads) for heads in range(n + 1) if abs(n - 2 * heads) >= apart) / 2**n
    assert mcnemar(first, second) == pytest.approx(exact)


def test_mcnemar_of_many_items_is_quick():
    began = time.process_time()
    z = (300 - 0.5) / math.sqrt(20_000 / 4)  # of 20,000 items 300 more than half, as a normal distribution has it
    assert mcnemar(10_300, 9_700) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.02)
    assert time.process_time() - began < 2


def test_mcnemar_is_the_share_of_swaps_that_differ_as_much():
    """Every item's two models exchanged or not: all 2^n ways have the same chance if they are equally good."""
    a, b = [1, 1, 1, 0, 1, 0, 1, 1, 0, 1], [0, 1, 0, 0, 0, 1, 0, 0, 0, 1]
    apart = np.array(a) - np.array(b)
    swaps = np.array(list(product((1, -1), repeat=len(a)))) @ apart
    found = compare_shares("x", a, b)
    assert found.p_value == pytest.approx(np.mean(np.abs(swaps) >= abs(apart.sum())))
    assert found.test == "McNemar" and found.difference == pytest.approx(0.4)


def test_a_comparison_pairs_the_items():
    """Two models that differ little on items that differ much: the error is that of the differences."""
    draw = np.random.default_rng(4)
    first = draw.random(400)
    second = first - 0.01 + 0.02 * draw.standard_normal(400)
    found = compare_shares("x", first.tolist(), second.tolist())
    expected = bootstrap(lambda chosen: (first - second)[chosen].mean(), 400)
    assert found.standard_error == pytest.approx(expected, rel=0.05) and found.test == "paired t"
    assert found.p_value < 1e-6 and found.standard_error < 0.1 * standard_error(first.tolist())
    assert compare_shares("x", first.tolist(), first.tolist()).p_value == 1


def test_items_that_all_differ_alike_are_no_certainty():
    """Two problems, half of one's answers right and none of the other's: a coin thrown twice."""
    found = compare_shares("x", [0.5, 0.5], [0.0, 0.0])
    assert (found.difference, found.p_value, found.test) == (0.5, 0.5, "sign")
    assert compare_shares("x", [0.5] * 10, [0.0] * 10).p_value == pytest.approx(2 / 2**10)
    assert compare_shares("x", [0.3, 0.4], [0.2, 0.3]).p_value == 0.5  # the same, but for rounding


def test_a_comparison_of_bits_per_byte_pairs_documents():
    draw = np.random.default_rng(5)
    sizes = torch.tensor(draw.lognormal(6, 0.8, 300))
    bits = sizes * torch.tensor(draw.normal(2.0, 0.4, 300))
    less = bits - sizes * torch.tensor(draw.normal(0.02, 0.05, 300))

    def measured(bits):
        ratio = float(bits.sum() / sizes.sum())
        return BitsPerByte(ratio, 0.0, float(bits.sum()), int(sizes.sum()), 1, 300, 1, 1.0, bits, sizes)

    found = compare_bits("x", measured(bits), measured(less))
    expected = bootstrap(lambda chosen: float((bits - less)[chosen].sum() / sizes[chosen].sum()), 300)
    assert found.standard_error == pytest.approx(expected, rel=0.06)
    assert found.p_value == pytest.approx(student(found.difference / found.standard_error, 299))
    assert "bits a byte" in str(found) and "paired t, 300 items" in str(found)
