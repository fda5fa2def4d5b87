"""Signs of a policy that falls apart, each with the figures that show it. What is bad is measured by how it began."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

from twelve.engine import Completion
from twelve.tasks.verify import final_answer

WINDOW = 5  # steps that are looked at together
CLEARLY = 0.05  # share of right answers by which a run got better, whatever its answers look like
PERIOD, TIMES = 8, 4  # tokens of the longest cycle that counts as repeating, and how often it must come


def figures(answers: Sequence[Completion]) -> dict[str, float]:
    """Of a step's answers: tokens of one, and the shares cut off, without a final answer, and ending in a loop."""
    count = len(answers)
    return {
        "length": sum(answer.completion_tokens for answer in answers) / count,
        "cut": sum(answer.finish_reason == "length" for answer in answers) / count,
        "unparsed": sum(final_answer(answer.text) is None for answer in answers) / count,
        "repeating": sum(repeats(answer.token_ids) for answer in answers) / count,
    }


def repeats(ids: Sequence[int]) -> bool:
    """Whether the tokens end in a cycle of at most PERIOD tokens that comes TIMES times or more."""
    for period in range(1, PERIOD + 1):
        tail = ids[-period * TIMES :]
        if len(tail) == period * TIMES and all(tail[i] == tail[i - period] for i in range(period, len(tail))):
            return True
    return False


def collapse(rows: Sequence[dict[str, Any]]) -> str | None:
    """The reason to stop, from the figures of all steps so far, or None."""
    if len(rows) < 2 * WINDOW:
        return None
    parts = rows[:WINDOW], rows[-WINDOW:]
    first, last = ({name: mean(row[name] for row in part) for name in NAMES} for part in parts)
    worse, better = last["accuracy"] < first["accuracy"], last["accuracy"] > first["accuracy"] + CLEARLY
    if last["entropy"] < 0.02 * first["entropy"] and last["accuracy"] < 0.9:
        return f"its entropy fell from {first['entropy']:.3g} to {last['entropy']:.3g} nats: all answers are the same"
    if last["length"] < 0.2 * first["length"] and worse:
        return f"its answers shrank from {first['length']:.0f} to {last['length']:.0f} tokens and got worse"
    for name, said in (("cut", "run into the limit of tokens"), ("unparsed", "hold no final answer"),
                       ("repeating", "end in a loop")):  # fmt: skip
        if last[name] > 0.8 and first[name] < 0.5 and not better:
            return f"{last[name]:.0%} of its answers {said}, at first {first[name]:.0%}"
    if last["accuracy"] < 0.25 * first["accuracy"] and first["accuracy"] > 0.1:
        return f"the share of right answers fell from {first['accuracy']:.1%} to {last['accuracy']:.1%}"
    return None


NAMES = ("entropy", "length", "accuracy", "cut", "unparsed", "repeating")
