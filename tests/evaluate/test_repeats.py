"""pass@k, maj@k and agreement against every choice of k samples, one by one."""

from collections import Counter
from itertools import combinations
from math import comb
from random import Random
from statistics import fmean

import pytest

from twelve.evaluate.repeats import agreement, maj_at_k, pass_at_k, sizes, vote


def majority(votes, scores, k):
    """The plain way: all choices of k, and for each the mean score of the answers with most votes."""
    worth = {}
    for answer in {*votes} - {None}:
        worth[answer] = fmean(score for given, score in zip(votes, scores, strict=True) if given == answer)
    results = []
    for chosen in combinations(votes, k):
        counts = Counter(answer for answer in chosen if answer is not None)
        best = [answer for answer, count in counts.items() if count == max(counts.values())]
        results.append(fmean(worth[answer] for answer in best) if best else 0.0)
    return fmean(results)


@pytest.mark.parametrize(
    ("n", "right", "k"), [(10, 3, 1), (10, 3, 5), (10, 0, 4), (10, 10, 4), (200, 17, 100), (8, 7, 2)]
)
def test_pass_at_k_is_the_unbiased_estimator(n, right, k):
    scores = [1.0] * right + [0.0] * (n - right)
    assert pass_at_k(scores, k) == pytest.approx(1 - comb(n - right, k) / comb(n, k), abs=1e-12)


def test_pass_at_k_of_the_paper_that_named_it():
    # of 5 samples 2 right: pass@1 = 2/5; pass@2 = 1 - 3/10; pass@4 = 1, as 4 of 5 cannot all be wrong
    scores = [0, 1, 0, 0, 1]
    assert [pass_at_k(scores, k) for k in (1, 2, 3, 4, 5)] == pytest.approx([0.4, 0.7, 0.9, 1, 1])


@pytest.mark.parametrize("seed", range(20))
def test_all_agree_with_every_choice_of_k(seed):
    draw = Random(seed)
    n = draw.randint(1, 9)
    votes = [draw.choice(["7", "8", "9", "10", None, None][: draw.randint(1, 6)]) for _ in range(n)]
    worth = {answer: draw.choice([0, 0, 1, 0.5]) for answer in {*votes}} | {None: 0}
    scores = [worth[answer] for answer in votes]
    for k in range(1, n + 1):
        best = fmean(max(chosen) for chosen in combinations(scores, k))
        assert pass_at_k(scores, k) == pytest.approx(best, abs=1e-12)
        assert maj_at_k(votes, scores, k) == pytest.approx(majority(votes, scores, k), abs=1e-12)
    assert maj_at_k(votes, scores, 1) == pytest.approx(fmean(scores))  # one sample is its own majority
    same = [a == b and a is not None for a, b in combinations(votes, 2)]
    assert agreement(votes) == pytest.approx(fmean(same) if same else float(votes[0] is not None))


def test_a_majority_can_be_wrong_and_a_tie_is_shared():
    assert maj_at_k(["8", "8", "7"], [0, 0, 1], 3) == 0
    assert maj_at_k(["8", "7"], [0, 1], 2) == 0.5
    assert maj_at_k(["8", None, "7", "7"], [0, 0, 1, 1], 4) == 1
    assert maj_at_k([None, None], [0, 0], 2) == 0


def test_many_samples_are_quick_and_finite():
    votes = [str(number % 40) for number in range(200)]
    scores = [float(given == "3") for given in votes]
    found = maj_at_k(votes, scores, 100)
    assert 0.02 < found < 0.03  # forty answers, all as often: each wins one time in forty
    assert found == pytest.approx(1 / 40)
    own = list(map(str, range(400)))  # every answer is right, and another
    assert maj_at_k(own, [1.0] * 400, 400) == pytest.approx(1)


def test_sizes():
    assert [sizes(n) for n in (1, 2, 3, 8, 10)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8], [1, 2, 4, 8, 10]]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("<answer>0.5</answer>", "so \\boxed{1/2}"),
        ("<answer>1,234</answer>", "#### 1234"),
        ("<answer>Blue  Sky</answer>", "<think>red</think><answer>blue sky</answer>"),
        ("42", "<think>or 43?</think>42"),
        ("<answer>$12$</answer>", "#### 12."),
        (r"\boxed{\frac{1}{2}}", "<answer>0.5</answer>"),
        (r"\boxed{6\text{ km}}", "<answer>6 km</answer>"),
        ("<answer>1, 2, 3</answer>", "#### 1,2,3"),
        ("<answer>[82, 71, -21]</answer>", "#### 82 71 -21"),
    ],
)
def test_answers_that_say_the_same_are_one_vote(one, other):
    assert vote(one) == vote(other) is not None


@pytest.mark.parametrize(
    ("one", "other"),
    [("<answer>6</answer>", "<answer>6 km</answer>"), ("#### 5", "#### 50"), ("#### 8, 7, 2", "#### 8, 72, 2")],
)
def test_answers_that_differ_are_two(one, other):
    assert vote(one) != vote(other)


def test_no_answer_is_no_vote():
    assert vote("") is None and vote("<answer> </answer>") is None and vote("#### .") is None
    assert vote("and then 4 +", finished=False) is None
    assert vote("<answer>4</answer> and", finished=False) is not None
