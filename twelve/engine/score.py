"""The log-probability of given tokens, through the runner that draws them."""

from collections import deque

import numpy as np

from twelve.engine.runner import Runner, Step
from twelve.engine.scheduler import Scheduler, before, pages_for


def score(sequences: list[list[int]], runner: Runner, scheduler: Scheduler, rows: int) -> list[np.ndarray]:
    """The log-probability of every token but the first of each: [length - 1] each. A step has at most `rows` rows.

    Takes pages from the scheduler's pool for as long as it needs them; sequences under way give way where it has too
    few, and resume afterwards.
    """
    out = [np.empty(max(len(ids) - 1, 0)) for ids in sequences]
    waiting = deque(index for index, scores in enumerate(out) if len(scores))
    pages: dict[int, list[int]] = {}  # of those that are begun
    done = dict.fromkeys(waiting, 0)
    try:
        while waiting or pages:
            parts, left = [], rows
            for index in [*pages, *waiting]:
                if index not in pages:
                    taken = _take(scheduler, pages_for(len(out[index])), must=not pages)
                    if taken is None:
                        break
                    pages[waiting.popleft()] = taken
                count = min(left, len(out[index]) - done[index])
                parts.append((index, count))
                left -= count
                if not left:
                    break
            step = _step(parts, sequences, done, pages, scheduler.reach)
            _, logprobs = runner.step(step)
            for (index, count), start in zip(parts, step.starts, strict=False):
                out[index][done[index] : done[index] + count] = logprobs[start : start + count]
                done[index] += count
                if done[index] == len(out[index]):
                    scheduler.pool.release(pages.pop(index))
    finally:
        for held in pages.values():
            scheduler.pool.release(held)
    return out


def _take(scheduler: Scheduler, count: int, must: bool) -> list[int] | None:
    """So many pages, at the cost of running sequences if it `must` be; None otherwise."""
    pool = scheduler.pool
    while must and pool.available < count:
        scheduler.preempt()
    return [pool.take() for _ in range(count)] if pool.available >= count else None


def _step(parts: list[tuple[int, int]], sequences: list[list[int]], done: dict, pages: dict, reach: int) -> Step:
    counts = [count for _, count in parts]
    total = sum(counts)
    table = np.full((len(parts), max(len(pages[index]) for index, _ in parts)), -1, np.int32)
    for row, (index, _) in zip(table, parts, strict=True):
        row[: len(pages[index])] = pages[index]
    tokens, targets = [], []
    for index, count in parts:
        at = done[index]
        tokens += sequences[index][at : at + count]
        targets += sequences[index][at + 1 : at + count + 1]
    return Step(
        tokens=np.array(tokens, np.int64),
        starts=np.cumsum([0, *counts]),
        positions=np.array([done[index] for index, _ in parts], np.int64),
        pages=table,
        drawn=np.arange(total),
        temperature=np.zeros(total, np.float32),
        top_p=np.ones(total, np.float32),
        keys=np.zeros((total, 4), np.uint32),
        before=before([(sequences[index], done[index]) for index, _ in parts], reach),
        targets=np.array(targets, np.int64),
    )
