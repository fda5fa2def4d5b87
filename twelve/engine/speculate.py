"""Guess tokens ahead, so that one step checks several; and stop where that does not pay.

A guess is kept if and only if it is the token that the model draws there, coins included: what comes out is what would
have come out without guesses, greedy or sampled. Guesses come from the sequence itself (prompt lookup: what followed
the last few tokens when they occurred before) or from the model's multi-token prediction module.

Whether to guess is a matter of price: one more row in a step costs time in which other tokens could have been drawn. On
one sequence a step reads all weights for a single row, and another is nearly free; in a large batch it is not. The time
of a step as a function of its rows is learnt while running. It decides how much is guessed, never what is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from twelve.engine.sequence import Sequence
from twelve.errors import InputError

MODES = ("auto", "off", "ngram", "mtp")
LONGEST, SHORTEST = 4, 2  # tokens that must have occurred before
MOST_DRAFTS = 8  # of one sequence in a step
FIRST_PRICE = 0.1  # for each sequence in the step, before there are measurements
LEAST_PRICE = 0.02
TOO_DEAR = 0.9  # a price at which even sure guesses would gain little
FIRST_ACCEPTANCE = 0.5
LEARNING = 0.1  # weight of the newest guess in a sequence's acceptance
FORGETTING = 0.98  # weight of the steps before, in their times
SOONEST_PROBE, LATEST_PROBE = 16, 128  # a sequence's steps between guesses that are not expected to pay
OUTLIER, MOST_OUTLIERS = 2.0, 3  # a step that took so many times as long counts only after so many in a row


class NgramDraft:
    """Where each run of 2 to 4 tokens of one growing sequence occurred last. A token costs the same however late."""

    def __init__(self) -> None:
        self._after: dict[int, int] = {}  # hash of a run -> index of the token after its latest occurrence
        self._done = 0  # tokens that are known as "the token after"

    def propose(self, tokens: list[int], count: int) -> list[int]:
        """At most `count` guesses for what follows `tokens`, which have only grown since the last call."""
        after = self._after
        for end in range(max(self._done, SHORTEST), len(tokens)):
            for size in range(SHORTEST, min(LONGEST, end) + 1):
                after[hash(tuple(tokens[end - size : end]))] = end
        self._done = len(tokens)
        for size in range(min(LONGEST, len(tokens)), SHORTEST - 1, -1):
            start = after.get(hash(tuple(tokens[-size:])))  # equal hashes of other runs: a bad guess, no more
            if start is not None:
                drafts = tokens[start : start + count]
                while len(drafts) < count:  # the run overlaps its own continuation: a loop
                    drafts.append(drafts[len(drafts) - (len(tokens) - start)])
                return drafts
        return []


class Speculation:
    """Decides how many tokens to guess for whom. `mode` is one of MODES; "auto" is "ngram".

    The module costs its layer and the head for every guess, right or wrong, and must read every prompt; looking back
    costs nothing. On the small models measured so far (docs/lab.md) only the second paid, so the module is for asking.
    """

    def __init__(self, mode: str, has_mtp: bool) -> None:
        """InputError for an unknown mode, or "mtp" with a model that has no such module."""
        if mode not in MODES:
            raise InputError(f"speculation {mode!r} is unknown: choose one of {', '.join(MODES)}")
        if mode == "mtp" and not has_mtp:
            raise InputError("speculation 'mtp' needs a model with a multi-token prediction module, and this has none")
        self.uses_mtp = mode == "mtp"
        self.uses_ngrams = not self.uses_mtp and mode != "off"
        self.drafted = self.accepted = 0
        self._acceptance = FIRST_ACCEPTANCE  # of all sequences; a new one begins with it
        self._steps, self._probe = 0, SOONEST_PROBE
        self._times = Line()
        self._draft_seconds = 0.0  # of the MTP module, for one guess

    def price(self, sequences: int) -> float:
        """Tokens that a step of so many sequences would draw in the time that one more row takes."""
        intercept, slope = self._times.fit()
        if slope is None:
            return min(FIRST_PRICE * sequences, 1.0)
        price = (slope + self._draft_seconds) * sequences / max(intercept + slope * sequences, 1e-9)
        return min(max(price, LEAST_PRICE), 1.0)

    def propose(self, sequences: Iterable[Sequence]) -> None:
        """Give those that decode their `drafts` for the next step."""
        if not (self.uses_mtp or self.uses_ngrams):
            return
        decoding = [sequence for sequence in sequences if len(sequence.tokens) - sequence.computed == 1]
        self._steps += 1
        price = self.price(len(decoding))
        if price > TOO_DEAR and self.uses_ngrams:
            return
        probes = int(price <= TOO_DEAR)  # one in a step, however many are due
        for sequence in decoding:
            count = self._count(sequence, price)
            if not count and probes and self._due(sequence):
                count, probes = 1, 0
                self._probe = min(2 * self._probe, LATEST_PROBE)  # until it proves right
            count = min(count, sequence.limit - len(sequence.tokens) - 1)
            if self.uses_mtp:  # guessed after the step before, if it was to be
                sequence.drafts = sequence.drafts[: max(count, 0)]
            elif count > 0:
                if sequence.ngrams is None:
                    sequence.ngrams = NgramDraft()
                sequence.drafts = sequence.ngrams.propose(sequence.tokens, count)

    def wants_mtp(self, sequences: list[Sequence]) -> list[bool]:
        """Which of a step's sequences the MTP module should follow: all prompts, and those worth a guess next."""
        price = self.price(len(sequences))
        return [
            len(sequence.tokens) <= sequence.prompt + 1
            or self._count(sequence, price) > 0
            or (price <= TOO_DEAR and self._due(sequence, ahead=1))
            for sequence in sequences
        ]

    def _count(self, sequence: Sequence, price: float) -> int:
        """How many guesses in a row are worth their rows."""
        p = sequence.acceptance
        if p is None:
            p = self._acceptance
        if p < price:
            return 0
        return MOST_DRAFTS if p > 0.99 else min(int(math.log(price) / math.log(p)), MOST_DRAFTS)  # p^count >= price

    def _due(self, sequence: Sequence, ahead: int = 0) -> bool:
        """Whether to try one guess that is not expected to pay, to see if that has changed."""
        return (self._steps + ahead + sequence.slot) % self._probe == 0

    def learn(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        """Of so many guesses for the sequence the first `accepted` were right."""
        self.drafted += drafted
        self.accepted += accepted
        p = self._acceptance if sequence.acceptance is None else sequence.acceptance
        for right in [1.0] * accepted + [0.0] * (accepted < drafted):
            p += LEARNING * (right - p)
            self._acceptance += LEARNING / 5 * (right - self._acceptance)
        sequence.acceptance = p
        if accepted:
            self._probe = SOONEST_PROBE

    def timed(self, rows: int, seconds: float) -> None:
        """A step without prompts took so long."""
        self._times.add(rows, seconds)

    def timed_drafts(self, count: int, seconds: float) -> None:
        """The MTP module took so long to guess for so many."""
        self._draft_seconds += LEARNING * (seconds / count - self._draft_seconds)


class Line:
    """A straight line through points that come one by one, the older the lighter."""

    def __init__(self) -> None:
        self._sums = [0.0] * 5  # of weights, x, y, x^2, x y
        self._passed_over = 0

    def add(self, x: float, y: float) -> None:
        intercept, slope = self.fit()
        if y > OUTLIER * (intercept + (slope or 0.0) * x) > 0 and self._passed_over < MOST_OUTLIERS:
            self._passed_over += 1  # something else took the time
            return
        self._passed_over = 0
        self._sums = [FORGETTING * old + new for old, new in zip(self._sums, (1.0, x, y, x * x, x * y), strict=True)]

    def fit(self) -> tuple[float, float | None]:
        """Intercept and slope; the slope is None as long as all x were the same."""
        n, x, y, xx, xy = self._sums
        if not n:
            return 0.0, None
        spread = xx / n - (x / n) ** 2
        if spread < 0.01:
            return y / n, None
        slope = max((xy / n - x / n * y / n) / spread, 0.0)
        return max((y - slope * x) / n, 0.0), slope
