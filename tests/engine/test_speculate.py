"""Guesses: where they come from, when they pay, and that they change nothing but the time."""

import time

import pytest
from hashing import expected, hash_engine
from hypothesis import given, settings
from hypothesis import strategies as st

from twelve.engine import Request
from twelve.engine.speculate import FIRST_PRICE, LONGEST, SHORTEST, NgramDraft, Speculation
from twelve.errors import InputError


def slow_propose(tokens, count):
    """By looking through everything, from the end."""
    for size in range(min(LONGEST, len(tokens)), SHORTEST - 1, -1):
        for end in range(len(tokens) - 1, size - 1, -1):
            if tokens[end - size : end] == tokens[-size:]:
                longer = list(tokens)
                for index in range(count):
                    longer.append(longer[end + index])
                return longer[len(tokens) :]
    return []


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 6), st.integers(1, 7))
def test_what_followed_the_last_tokens_when_they_occurred_last(tokens, count, stride):
    draft = NgramDraft()
    for end in range(0, len(tokens) + 1, stride):
        assert draft.propose(tokens[:end], count) == slow_propose(tokens[:end], count)


def test_a_token_costs_the_same_late_as_early():
    draft, tokens = NgramDraft(), []

    def seconds():
        start = time.perf_counter()
        for index in range(500):
            tokens.append(index * 7919 % 1000)
            draft.propose(tokens, 4)
        return time.perf_counter() - start

    early = min(seconds() for _ in range(5))
    for _ in range(100):
        seconds()
    assert min(seconds() for _ in range(5)) < 5 * early


@pytest.mark.parametrize("mode", ["off", "ngram", "mtp", "auto"])
def test_no_mode_changes_what_is_drawn(mode, monkeypatch):
    monkeypatch.setattr(Speculation, "price", lambda self, sequences: 0.05)  # a fake model's time says nothing
    requests = [Request([index, 1, 2], 120, seed=index) for index in range(4)]
    engine = hash_engine(20, mtp=True, speculation=mode)
    done = engine.generate(requests)
    assert [one.token_ids for one in done] == [expected(r.prompt_ids, r.seed, 120) for r in requests]
    stats = engine.stats
    assert (stats.drafted > 0) == (mode != "off") and stats.accepted <= stats.drafted
    if mode != "off":
        assert stats.accepted > stats.drafted / 4
        assert stats.steps < 110  # of 120 tokens
    assert stats.drawn == 480


def test_log_probabilities_come_with_the_right_tokens():
    plain, guessing = hash_engine(20, speculation="off"), hash_engine(20, speculation="ngram")
    request = Request([1, 2, 3], 100, seed=1, logprobs=True)
    assert plain.generate([request]) == guessing.generate([request])
    assert len(guessing.generate([request])[0].logprobs) == 100


def test_unknown_modes_and_missing_modules_are_told():
    with pytest.raises(InputError, match="'fast' is unknown: choose one of auto, off, ngram, mtp"):
        Speculation("fast", True)
    with pytest.raises(InputError, match="needs a model with a multi-token prediction module"):
        Speculation("mtp", False)
    assert Speculation("mtp", True).uses_mtp and not Speculation("auto", True).uses_mtp
    assert Speculation("auto", True).uses_ngrams and not Speculation("mtp", True).uses_ngrams


class Decoding:
    """What a policy sees of a sequence."""

    def __init__(self, tokens=(1, 2, 3, 1, 2, 3, 1, 2), slot=0):
        self.tokens, self.slot, self.computed, self.limit = list(tokens), slot, len(tokens) - 1, 10**6
        self.prompt, self.acceptance, self.ngrams, self.drafts = len(tokens), None, None, []


def run_policy(policy, sequences, steps, right, seconds):
    """Guessed rows of each step, when a guess is right by `right()` and a step of n rows takes seconds(n)."""
    guessed = []
    for _ in range(steps):
        policy.propose(sequences)
        rows = sum(1 + len(one.drafts) for one in sequences)
        policy.timed(rows, seconds(rows))
        guessed.append(rows - len(sequences))
        for one in sequences:
            if one.drafts:
                accepted = 0
                while accepted < len(one.drafts) and right():
                    accepted += 1
                policy.learn(one, len(one.drafts), accepted)
                one.drafts = []
    return guessed


def test_guesses_stop_where_they_are_wrong_and_come_back_where_they_are_right():
    policy, sequences = Speculation("ngram", False), [Decoding()]
    guessed = run_policy(policy, sequences, 400, lambda: False, lambda rows: 1 + 0.05 * rows)
    assert guessed[0] > 0 and sum(guessed[-200:]) < 10
    guessed = run_policy(policy, sequences, 400, lambda: True, lambda rows: 1 + 0.05 * rows)
    assert sum(guessed[-20:]) / 20 > 4


def test_guesses_stop_where_a_row_costs_as_much_as_a_token():
    policy, sequences = Speculation("ngram", False), [Decoding(slot=slot) for slot in range(64)]
    coins = iter(range(10**6))
    guessed = run_policy(policy, sequences, 300, lambda: next(coins) % 10 < 7, lambda rows: 0.1 * rows)
    assert sum(guessed[-100:]) / 100 < 64 / 10  # a probe now and then
    policy, sequences = Speculation("ngram", False), [Decoding()]
    guessed = run_policy(policy, sequences, 300, lambda: next(coins) % 10 < 7, lambda rows: 1 + 0.01 * rows)
    assert sum(guessed[-100:]) / 100 > 2


def test_the_price_of_a_row_is_learnt():
    policy = Speculation("ngram", False)
    assert policy.price(3) == pytest.approx(3 * FIRST_PRICE) and policy.price(256) == 1
    for rows in (8, 9, 8, 12, 8, 10) * 10:
        policy.timed(rows, 1 + 0.1 * rows)
    assert policy.price(8) == pytest.approx(8 * 0.1 / 1.8, rel=1e-6)
    policy.timed(8, 1000.0)  # the machine did something else
    assert policy.price(8) == pytest.approx(8 * 0.1 / 1.8, rel=1e-6)


def test_a_guess_that_would_go_beyond_the_end_is_not_made():
    engine = hash_engine(20, speculation="ngram")
    for count in range(1, 30):
        request = Request([1, 2, 3, 1, 2, 3, 1, 2], count, seed=1)
        assert engine.generate([request])[0].token_ids == expected(request.prompt_ids, 1, count)
