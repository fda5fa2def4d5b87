"""Several answers to one problem: pass@k, maj@k, and how often they agree. Each is exact over all choices of k of them.

All take what one problem's n samples scored or said; their mean over problems, with its standard error, is the measure.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from math import comb

import numpy as np

from twelve.data.reasoning import split_reasoning
from twelve.tasks.verify import final_answer, plain, read_number, tight

MOST = 1000  # samples of a problem: beyond, the number of choices is no float

LISTED = re.compile(r"-?[0-9]+([, ]+-?[0-9]+)+")
Vote = Hashable | None


def sizes(samples: int) -> list[int]:
    """The k that are measured: 1, 2, 4, ... and all."""
    return [*(1 << power for power in range(samples.bit_length()) if 1 << power < samples), samples]


def pass_at_k(scores: Sequence[float], k: int) -> float:
    """The best score among k samples, on average over all choices of k of the n. For scores of 0 and 1, c of them 1,
    that is the unbiased estimator 1 - C(n - c, k) / C(n, k) (arXiv 2107.03374, equation 1)."""
    ordered = sorted(scores)
    best = sum(score * comb(place, k - 1) for place, score in enumerate(ordered) if score)
    return best / comb(len(scores), k)


def maj_at_k(votes: Sequence[Vote], scores: Sequence[float], k: int) -> float:
    """The score of the answer that most of k samples give (arXiv 2203.11171), on average over all choices of k of n.

    Answers that tie win equally often. None is no vote, and k samples without any score 0.
    """
    counts = Counter(vote for vote in votes if vote is not None)
    values: dict[int, float] = defaultdict(float)  # of all answers that are given so often
    for vote, score in zip(votes, scores, strict=True):
        if vote is not None:
            values[counts[vote]] += score / counts[vote]
    total = 0.0
    for count, value in values.items():
        if value:
            others = list(counts.values())
            others.remove(count)
            total += value * _wins(count, others, len(votes) - counts.total(), k)
    return total / comb(len(votes), k)


def agreement(votes: Sequence[Vote]) -> float:
    """The share of pairs of samples that give the same answer; those that give none agree with nobody. 1 for a single
    answer."""
    counts = Counter(vote for vote in votes if vote is not None)
    pairs = len(votes) * (len(votes) - 1)
    return sum(count * (count - 1) for count in counts.values()) / pairs if pairs else float(counts.total())


def vote(text: str, finished: bool = True) -> Vote:
    """The answer that a text settles on, so that those which say the same are equal: a number and its unit, a list of
    numbers however they are set apart, else words whatever their case. Of expressions and programs each spelling is an
    answer of its own, for a voter knows no more. A text without a marked answer says all that follows its reasoning,
    or, cut short, nothing."""
    answer = final_answer(text)
    if answer is None and finished:
        answer = split_reasoning(text)[1]
    if answer is None:
        return None
    answer = plain(answer)
    if LISTED.fullmatch(listed := answer.strip("[](){} ")) and read_number(answer) is None:
        return tuple(re.split("[, ]+", listed))
    return read_number(answer) or tight(answer).casefold() or None


def _wins(own: int, others: Sequence[int], silent: int, k: int) -> float:
    """In how many choices of k samples an answer that `own` of them give has the most votes; beside m others that have
    as many, 1 / (m + 1) of a choice. `others`: how often each other answer is given; `silent` samples give none."""
    ways = 0.0
    for most in range(1, min(own, k) + 1):
        table = np.zeros((k // most, k - most + 1))  # [others with as many votes, samples drawn of others]: choices
        table[0, 0] = 1
        for count in others:
            following = np.zeros_like(table)
            for drawn in range(min(count, most, k - most) + 1):
                tied = int(drawn == most)
                following[tied:, drawn:] += comb(count, drawn) * table[: len(table) - tied, : table.shape[1] - drawn]
            table = following
        rest = [comb(silent, k - most - drawn) for drawn in range(table.shape[1])]
        ways += comb(own, most) * float((table @ np.array(rest, float) / np.arange(1, len(table) + 1)).sum())
    return ways
