"""One step from plan to tokens: guess, plan, compute, and give every sequence what was drawn for it."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np

from twelve.engine.request import Delta
from twelve.engine.runner import PAGE, Runner
from twelve.engine.scheduler import Plan, Scheduler
from twelve.engine.speculate import Speculation


@dataclass
class Stats:
    """Counts since the engine was made; `pages` are those that sequences hold now."""

    steps: int = 0
    rows: int = 0
    drawn: int = 0
    drafted: int = 0
    accepted: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    pages: int = 0
    step_seconds: float = 0.0  # inside the runner, without MTP drafts


class Stepper:
    """Knows everybody who takes part in a step; none of them knows another thread."""

    def __init__(self, runner: Runner, scheduler: Scheduler, speculation: Speculation) -> None:
        self.runner, self.scheduler, self.speculation = runner, scheduler, speculation
        self._stats = Stats()

    @property
    def stats(self) -> Stats:
        counts = {"drafted": self.speculation.drafted, "accepted": self.speculation.accepted}
        pages = sum(holders > 0 for holders in self.scheduler.pool.holders)
        return replace(self._stats, preemptions=self.scheduler.preemptions, pages=pages, **counts)

    def step(self) -> None:
        """Compute and apply one step. What goes wrong reaches every sequence that was in it, and ends them."""
        plan = None
        try:
            for sequence in self.scheduler.admit():
                self._stats.cached_tokens += sequence.computed
            self.speculation.propose(self.scheduler.running)
            plan = self.scheduler.plan()
            if plan.sequences:
                self._apply(plan, *self._compute(plan))
        except BaseException as error:
            shown = error if isinstance(error, Exception) else RuntimeError("the step was interrupted")
            for sequence in list(plan.sequences) if plan else [*self.scheduler.running, *self.scheduler.waiting]:
                sequence.error = shown
                self.scheduler.remove(sequence)
            if not isinstance(error, Exception):
                raise

    def _compute(self, plan: Plan) -> tuple[list[int], list[float], list[float | None]]:
        step = self.scheduler.step(plan)
        started = time.perf_counter()
        tokens, logprobs = self.runner.step(step)
        seconds = time.perf_counter() - started
        stats = self._stats
        stats.steps += 1
        stats.rows += len(step.tokens)
        stats.step_seconds += seconds
        if len(tokens) == len(step.tokens):
            self.speculation.timed(len(tokens), seconds)
        gates = None if self.runner.gates is None else self.runner.gates[step.drawn].tolist()
        return tokens.tolist(), logprobs.tolist(), gates or [None] * len(tokens)

    def _apply(self, plan: Plan, tokens: list[int], logprobs: list[float], gates: list[float | None]) -> None:
        """Give every sequence what was drawn for it, as far as its guesses were right; gates: of those rows."""
        at, kept = 0, []  # rows of each sequence that are part of it now
        for sequence, count, drawn in zip(plan.sequences, plan.counts, plan.drawn, strict=True):
            drafts, taken = sequence.drafts, 0
            if sequence.streamed and count > drawn:
                sequence.deltas.append(Delta())  # a part of the prompt was read
            for token in tokens[at : at + drawn]:
                sequence.take(token, logprobs[at + taken], gates[at + taken])
                taken += 1
                if sequence.finish_reason is not None or taken > len(drafts) or drafts[taken - 1] != token:
                    break
            if drafts:
                self.speculation.learn(sequence, len(drafts), taken - 1)
                sequence.drafts = []
            at += drawn
            kept.append(count - drawn + taken)
            sequence.computed += kept[-1]
            self._stats.drawn += taken
        if self.speculation.uses_mtp:
            self._draft(plan, kept)
        for sequence in plan.sequences:
            if sequence.computed >= PAGE * (sequence.sealed + 1):
                self.scheduler.seal(sequence)
            if sequence.finish_reason is not None:
                self.scheduler.remove(sequence)

    def _draft(self, plan: Plan, kept: list[int]) -> None:
        """Let the MTP module read what the model has read, and guess for those that decode."""
        rows, following, guessing, drawn = [], [], [], []
        start = 0
        wanted = self.speculation.wants_mtp(plan.sequences)
        for sequence, count, valid, wants in zip(plan.sequences, plan.counts, kept, wanted, strict=True):
            if wants and sequence.finish_reason is None:
                rows += range(start, start + valid)
                following += sequence.tokens[sequence.computed - valid + 1 : sequence.computed + 1]
                if sequence.missing == 1:
                    guessing.append(sequence)
                    drawn.append(len(rows) - 1)
            start += count
        if not rows:
            return
        started = time.perf_counter()
        temperature = np.array([sequence.request.temperature for sequence in guessing], np.float32)
        keys = np.array([sequence.key for sequence in guessing], np.uint32).reshape(-1, 4)
        guesses = self.runner.draft(np.array(rows), np.array(following), np.array(drawn, np.int64), temperature, keys)
        for sequence, guess in zip(guessing, guesses.tolist(), strict=True):
            sequence.drafts = [guess]
        if len(guessing) == len(plan.sequences) and len(rows) <= 2 * len(guessing):  # no prompt among them
            self.speculation.timed_drafts(len(guessing), time.perf_counter() - started)
