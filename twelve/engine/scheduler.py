"""Which rows run in the next step: continuous batching, prompts in pieces, and who gives way when pages run out.

Every sequence that decodes is in every step. Besides them a step reads at most `prefill_rows` tokens of prompts: half
of them belong to the oldest, so that it is never overtaken for good, and the rest to those with the least left to
read, so that a short prompt does not wait for a long one. When pages run out, the youngest gives its own back and
waits; its full pages stay findable, and it resumes as a prompt that ends with what it drew.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass

import numpy as np

from twelve.engine.pages import PagePool
from twelve.engine.request import Delta
from twelve.engine.runner import PAGE, Step
from twelve.engine.sequence import Sequence, Status


@dataclass
class Plan:
    """The rows of one step, by sequence."""

    sequences: list[Sequence]
    counts: list[int]  # rows of each
    drawn: list[int]  # of them, the last rows after which a token is drawn: 0, 1, or 1 and one a draft


class Scheduler:
    """Owns the queues and says who holds which pages.

    `max_pages` are those of one full context; `reach`: how many tokens before its rows a runner wants to know.
    """

    def __init__(self, pool: PagePool, max_sequences: int, max_pages: int, prefill_rows: int, reach: int = 0) -> None:
        self.pool, self.prefill_rows, self.reach = pool, prefill_rows, reach
        self.waiting: deque[Sequence] = deque()  # in order of arrival
        self.running: list[Sequence] = []  # in order of arrival
        self.preemptions = 0
        self._leaders: dict[bytes, Sequence] = {}  # by prompt, the running sequence whose pages hold all of it
        self._arrivals = 0
        # What a step must know of a sequence does not change while it runs, but for its pages: one row ("slot") each.
        self._slots = list(range(max_sequences - 1, -1, -1))
        self._table = np.full((max_sequences, max_pages), -1, np.int32)
        self._keys = np.zeros((max_sequences, 4), np.uint32)
        self._temperature = np.zeros(max_sequences, np.float32)
        self._top_p = np.zeros(max_sequences, np.float32)

    def add(self, sequence: Sequence) -> None:
        self._arrivals += 1
        sequence.arrival = self._arrivals
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """It has ended, or nobody wants it any more. Its pages are free, or findable, at once."""
        if sequence.status is Status.RUNNING:
            self._leave(sequence)
            self.running.remove(sequence)
        elif sequence.status is Status.WAITING and sequence in self.waiting:  # or given up before it could arrive
            self.waiting.remove(sequence)
        sequence.status = Status.DONE

    def admit(self) -> list[Sequence]:
        """Let in those at the front of the line for whose whole text there are pages; returns them.

        One that begins like another that is being read waits for its pages rather than reading the same itself, and
        lets those behind it pass. One with the very same prompt waits for its last, unfilled page, too.
        """
        if not self.waiting:
            return []
        admitted, held = [], []
        promised = {key for sequence in self.running for key in self._promises(sequence)}
        try:
            while self.waiting and self._slots:
                sequence = self.waiting[0]
                leader = self._leaders.get(sequence.twin_key)
                read_soon = leader is not None and leader.computed < leader.prompt - 1
                if read_soon or (promised and self._next_key(sequence) in promised):
                    held.append(self.waiting.popleft())
                elif self._enter(sequence):
                    admitted.append(self.waiting.popleft())
                    promised.update(self._promises(sequence))
                else:
                    break
        finally:  # whatever fails, nobody is lost
            self.waiting.extendleft(reversed(held))
        return admitted

    def _promises(self, sequence: Sequence) -> list[bytes]:
        """Keys of the pages that it will make findable while it reads its prompt."""
        if sequence.missing <= 1:
            return []
        pages = range(sequence.sealed, len(sequence.tokens) // PAGE)
        return [sequence.page_key(index, self.pool.identity) for index in pages]

    def _next_key(self, sequence: Sequence) -> bytes | None:
        """Of the first page that it would have to compute; None when that is not a full one."""
        for index in range((len(sequence.tokens) - 1) // PAGE):
            key = sequence.page_key(index, self.pool.identity)
            if key not in self.pool:
                return key
        return None

    def _enter(self, sequence: Sequence) -> bool:
        pool, needed = self.pool, pages_for(len(sequence.tokens))
        spare = len(self.running) // 8  # pages for those that run, or they would send the newcomer away again at once
        found = pool.lookup(lambda index: sequence.page_key(index, pool.identity), (len(sequence.tokens) - 1) // PAGE)
        if needed - len(found) + spare > pool.available:
            pool.release(found)
            return False
        with pool.holding() as pages:
            pages += found
            while len(pages) < needed:
                pages.append(pool.take())
            sequence.pages = pages
            sequence.computed = PAGE * len(found)
            sequence.sealed = len(found)
            self._follow(sequence)
        if sequence.cached_tokens is None:
            sequence.cached_tokens = min(sequence.computed, sequence.prompt)
            if sequence.streamed:
                sequence.deltas.append(Delta(cached_tokens=sequence.cached_tokens))
        slot = sequence.slot = self._slots.pop()
        request = sequence.request
        self._table[slot, :needed] = sequence.pages
        self._keys[slot], self._temperature[slot], self._top_p[slot] = sequence.key, request.temperature, request.top_p
        sequence.status = Status.RUNNING
        insort(self.running, sequence, key=lambda other: other.arrival)
        return True

    def _follow(self, sequence: Sequence) -> None:
        """Take the rest of the prompt from a running sequence with the same one, or be such a sequence for others."""
        if len(sequence.tokens) > sequence.prompt:
            return
        leader = self._leaders.setdefault(sequence.twin_key, sequence)
        last = (sequence.prompt - 1) // PAGE
        if leader is not sequence and leader.computed >= sequence.prompt - 1 > sequence.computed == PAGE * last:
            self.pool.copy(leader.pages[last], sequence.pages[last])
            sequence.computed = sequence.prompt - 1  # the last token's row gives what to draw from

    def _leave(self, sequence: Sequence) -> None:
        if self._leaders.get(sequence.twin_key) is sequence:
            del self._leaders[sequence.twin_key]
        self.pool.release(sequence.pages)
        self._table[sequence.slot, : len(sequence.pages)] = -1
        self._slots.append(sequence.slot)
        sequence.pages, sequence.slot, sequence.computed, sequence.sealed, sequence.drafts = [], -1, 0, 0, []

    def preempt(self) -> Sequence:
        """The youngest gives its pages back and waits at the front of the line."""
        youngest = self.running.pop()
        self._leave(youngest)
        youngest.status = Status.WAITING
        self.waiting.appendleft(youngest)
        self.preemptions += 1
        return youngest

    def restart(self) -> None:
        """Everybody gives the pages back and waits; what they hold, and their keys, are to change."""
        while self.running:
            self.preempt()
        for sequence in self.waiting:
            sequence.chain.clear()

    def plan(self) -> Plan:
        """The next step's rows; empty when nobody runs. Takes the pages that the rows and their drafts need."""
        ready, reading = [], []
        for sequence in list(self.running):
            if sequence.status is not Status.RUNNING:
                continue  # gave way to an older one just now
            if len(sequence.tokens) - sequence.computed > 1:
                reading.append(sequence)
            elif sequence.computed + len(sequence.drafts) < PAGE * len(sequence.pages) or self._grow(sequence):
                ready.append(sequence)
        plan = Plan(ready, [1 + len(sequence.drafts) for sequence in ready], [])
        plan.drawn = list(plan.counts)
        for sequence, count in self._shares([one for one in reading if one.status is Status.RUNNING]):
            plan.sequences.append(sequence)
            plan.counts.append(count)
            plan.drawn.append(int(count == sequence.missing))
        return plan

    def _grow(self, sequence: Sequence) -> bool:
        """Make room for its next rows, at the cost of the youngest; False when that is the sequence itself."""
        while pages_for(sequence.computed + 1 + len(sequence.drafts)) > len(sequence.pages):
            page = self.pool.take()
            if page is not None:
                self._table[sequence.slot, len(sequence.pages)] = page
                sequence.pages.append(page)
            elif sequence.drafts:
                sequence.drafts = []  # a guess is not worth another's pages
            elif self.preempt() is sequence:
                return False
        return True

    def _shares(self, reading: list[Sequence]) -> list[tuple[Sequence, int]]:
        """How many rows of its prompt each one reads."""
        if not reading:
            return []
        first = min(reading[0].missing, max(1, self.prefill_rows // 2))
        shares, left = {reading[0].arrival: first}, self.prefill_rows - first
        for sequence in sorted(reading, key=lambda one: one.missing):
            if not left:
                break
            given = shares.get(sequence.arrival, 0)
            more = min(sequence.missing - given, left)
            shares[sequence.arrival] = given + more
            left -= more
        return [(one, shares[one.arrival]) for one in reading if shares.get(one.arrival)]

    def step(self, plan: Plan) -> Step:
        """The plan as arrays."""
        sequences, tokens = plan.sequences, []
        for sequence, count in zip(sequences, plan.counts, strict=True):
            at = sequence.computed
            if count == 1:
                tokens.append(sequence.tokens[at])
            else:
                tokens += sequence.tokens[at : at + count] + sequence.drafts
        slots = np.array([sequence.slot for sequence in sequences])
        counts, drawn = np.array(plan.counts), np.array(plan.drawn)
        starts = np.zeros(len(slots) + 1, np.int64)
        np.cumsum(counts, out=starts[1:])
        owners = np.repeat(slots, drawn)
        ends = np.repeat(starts[1:] - np.cumsum(drawn), drawn)  # where the drawn rows of each begin, less those before
        return Step(
            tokens=np.array(tokens, np.int64),
            starts=starts,
            positions=np.array([sequence.computed for sequence in sequences], np.int64),
            pages=self._table[slots, : max(len(sequence.pages) for sequence in sequences)],
            drawn=ends + np.arange(len(owners)),
            temperature=self._temperature[owners],
            top_p=self._top_p[owners],
            keys=self._keys[owners],
            before=before([(sequence.tokens, sequence.computed) for sequence in sequences], self.reach),
            logprobs=any(sequence.request.logprobs for sequence in sequences),
        )

    def seal(self, sequence: Sequence) -> None:
        """Make its pages that are full by now findable."""
        while PAGE * (sequence.sealed + 1) <= sequence.computed:
            key = sequence.page_key(sequence.sealed, self.pool.identity)
            self.pool.seal(sequence.pages[sequence.sealed], key)
            sequence.sealed += 1


def before(parts: list[tuple[list[int], int]], reach: int) -> np.ndarray:
    """`Step.before` [S, reach] of (tokens of a sequence, how many of them precede its rows)."""
    out = np.full((len(parts), reach), -1, np.int64)
    if reach:
        for row, (tokens, at) in zip(out, parts, strict=True):
            known = tokens[max(0, at - reach) : at]
            row[reach - len(known) :] = known
    return out


def pages_for(tokens: int) -> int:
    return -(-tokens // PAGE)
