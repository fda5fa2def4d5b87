"""Choices by likelihood: how often the right one of several continuations is the likeliest."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from twelve.errors import InputError
from twelve.evaluate.items import Item
from twelve.evaluate.likelihood import Pair, encode_pairs, fit, log_likelihoods
from twelve.evaluate.statistics import share

KEPT_SAMPLES = 8


@dataclass
class ChoiceAccuracy:
    """The share of items of one file and language whose right choice is the likeliest: as a whole, and a byte."""

    path: str
    language: str
    items: int
    chance: float  # the share that guessing gets
    cut_short: int  # contexts that lost their beginning
    right: list[float] = field(repr=False)  # of every item 1, or 0, or where m choices tie, 1 / m
    right_by_byte: list[float] = field(repr=False)
    seconds: float = 0.0
    samples: list[dict[str, Any]] = field(default_factory=list)

    def __str__(self) -> str:
        cut = f", {self.cut_short} contexts cut short" if self.cut_short else ""
        return (
            f"{share(self.right)}, a byte {share(self.right_by_byte)} ({self.items:,} items, guessing gets "
            f"{self.chance:.1%}{cut})"
        )

    def to_dict(self) -> dict[str, Any]:
        whole, by_byte = share(self.right), share(self.right_by_byte)
        rest = {name: value for name, value in asdict(self).items() if not name.startswith("right")}
        return {
            "accuracy": whole.value, "standard_error": whole.standard_error,
            "accuracy_by_byte": by_byte.value, "standard_error_by_byte": by_byte.standard_error, **rest,
        }  # fmt: skip


def choice_accuracy(model, tokenizer, path: str, items: Sequence[Item]) -> list[ChoiceAccuracy]:
    """Accuracy of each language. Choices are compared by the sum of their tokens' log-probabilities (lm-eval's `acc`),
    and by that sum over the UTF-8 bytes of the choice (its `acc_bytes`).

    InputError for a choice that does not fit the model's context."""
    results = []
    for language in dict.fromkeys(item.language for item in items):
        started = time.monotonic()
        asked = [item for item in items if item.language == language]
        pairs, cut = _encoded(asked, tokenizer, model.config.max_position_embeddings)
        found = iter(log_likelihoods(model, pairs))
        nats = [[next(found).nats for _ in item.choices] for item in asked]
        by_byte = [
            [value / len(choice.encode()) for value, choice in zip(values, item.choices, strict=True)]
            for values, item in zip(nats, asked, strict=True)
        ]
        result = ChoiceAccuracy(
            path, language, len(asked), fmean(1 / len(item.choices) for item in asked), cut,
            [_right(item, values) for item, values in zip(asked, nats, strict=True)],
            [_right(item, values) for item, values in zip(asked, by_byte, strict=True)],
        )  # fmt: skip
        result.samples = [
            {"prompt": item.prompt, "choices": item.choices, "answer": item.answer, "nats": values, "right": right}
            for item, values, right in zip(asked[:KEPT_SAMPLES], nats, result.right, strict=False)
        ]
        result.seconds = time.monotonic() - started
        results.append(result)
    return results


def _encoded(items: Sequence[Item], tokenizer, context: int) -> tuple[list[Pair], int]:
    """The pairs of all choices, made to fit, and of how many items that cut one."""
    pairs = iter(encode_pairs(tokenizer, [pair for item in items for pair in item.pairs()]))
    made: list[Pair] = []
    cut = 0
    for item in items:
        own = [next(pairs) for _ in item.choices]
        try:
            fitting = fit(own, context)
        except InputError as error:
            raise InputError(f"{item.where}: a choice of {error}") from None
        made += fitting
        cut += fitting != own
    return made, cut


def _right(item: Item, values: Sequence[float]) -> float:
    """1 where the answer has the largest value; choices that tie share it. Equal texts are one choice."""
    best = {choice for choice, value in zip(item.choices, values, strict=True) if value == max(values)}
    return (item.choices[item.answer] in best) / len(best)
