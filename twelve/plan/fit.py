"""From time, memory and text to a model's shape: of all that fit, the one that should predict text best (law.py).

Nothing is chosen outside of the widths that were measured; depth follows the width as in the runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from twelve.config import ModelConfig, small_v3, with_memory
from twelve.errors import InputError
from twelve.plan import cost, memory
from twelve.plan.law import Law, Row, best_settings, bytes_per_token, fit_law, fit_utilisation, work

COMPILED = 1.12  # times as fast a step (docs/lab.md)
EPOCHS = 4  # reading a text so often is about as good as that much new text (arXiv 2305.16264)
LEAST_STEPS = 20
EXPERTS_PER_TOKEN = 2
WITHOUT_MEMORY = 0.11  # bits per byte more at equal tokens, mean of Korean and English (docs/lab.md)
BYTES_AN_ENTRY = 1000  # of text, so that every entry of a vocabulary is seen often enough
STEPS_OF_LITTLE = 100  # where there is little text the batch is made smaller, down to one row, to have so many


@dataclass(frozen=True)
class Request:
    """What is asked for, and the machine it is asked of."""

    seconds: Callable[[ModelConfig], float]  # that training has, once all else is done
    memory: int  # bytes that the process stays below
    gflops: float  # of the type that is computed in
    threads: int
    text_bytes: int | None = None  # of the corpus; None: there is no end to it
    sample: Callable[[int], int] = lambda vocabulary: 0  # bytes of text that a tokenizer is to be trained on
    vocabulary: int | None = None  # of a tokenizer that exists, or is asked for
    bytes_per_token: float | None = None  # of that tokenizer
    context: int | None = None
    batch: int | None = None
    learning_rate: float | None = None
    mtp: int = 0
    switches: dict[str, Any] = field(default_factory=dict)
    compiled: bool = False


@dataclass(frozen=True)
class Choice:
    """A shape, how it is trained, and what is expected of it."""

    config: ModelConfig
    experts: int
    batch: int
    micro_batch: int
    context: int
    learning_rate: float
    steps: int
    tokens_per_second: float
    epochs: float  # 0 without a corpus
    memory: dict[str, int]  # bytes by component, when most is held
    bits: float  # a byte, of text like that of the scaling runs
    error: float

    @property
    def tokens(self) -> int:
        return self.steps * self.batch * self.context

    @property
    def seconds(self) -> float:
        return self.tokens / self.tokens_per_second


def choose(request: Request, rows: Sequence[Row]) -> list[Choice]:
    """Every shape that is possible, that with the lowest expected bits per byte first.

    InputError in one line when there is none: too little time, or too little memory.
    """
    law, reached, settings = fit_law(rows), fit_utilisation(rows), best_settings(rows)
    possible, needed = [], []
    longest = 0.0
    for shape in _shapes(request, rows):
        nearest = min(settings, key=lambda row, shape=shape: _distance(row, *shape))
        found = _planned(request, rows, nearest, reached, *shape)
        needed.append(sum(found.memory.values()))
        if needed[-1] > request.memory:
            continue
        longest = max(longest, request.seconds(found.config))
        if found.steps >= LEAST_STEPS:
            possible.append(_judged(found, law))
    if min(needed) > request.memory:
        raise InputError(
            f"{request.memory / 2**30:.2f} GiB are too little to train any model: the smallest needs "
            f"{min(needed) / 2**30:.2f} GiB"
        )
    if not possible and _too_short(request, rows):
        raise InputError(
            f"{request.text_bytes:,} bytes of text, read {EPOCHS} times, are too few for {LEAST_STEPS} steps: give "
            "more text, or a smaller --batch or --context"
        )
    if not possible:
        raise InputError(
            f"{longest:.0f} s are left for training once everything else is done, too few for {LEAST_STEPS} steps of "
            "the smallest model: ask for more minutes"
        )
    return sorted(possible, key=lambda choice: (choice.bits, choice.config.hidden_size))


def _too_short(request: Request, rows: Sequence[Row]) -> bool:
    """Whether the text is what there is too little of."""
    if request.text_bytes is None:
        return False
    step = (request.batch or 1) * (request.context or min(row["context"] for row in rows))
    per_token = request.bytes_per_token or bytes_per_token(rows, request.vocabulary or 1)
    return EPOCHS * request.text_bytes < LEAST_STEPS * step * per_token


def _shapes(request: Request, rows: Sequence[Row]) -> Iterable[tuple[int, int, int, int]]:
    """Width, layers, experts and vocabulary of all candidates."""
    vocabularies = sorted({row["vocabulary"] for row in rows})
    if request.text_bytes is not None:
        most = request.text_bytes / BYTES_AN_ENTRY
        vocabularies = [size for size in vocabularies if size <= most] or vocabularies[:1]
    if request.vocabulary is not None:
        vocabularies = [request.vocabulary]
    for experts in sorted({row["experts"] for row in rows}):
        known = {row["width"]: row["layers"] for row in rows if row["experts"] == experts}
        widths = sorted(known)
        depths = [known[width] for width in widths]
        for width, vocabulary in itertools.product(range(widths[0], widths[-1] + 1, 64), vocabularies):
            yield width, round(float(np.interp(np.log(width), np.log(widths), depths))), experts, vocabulary


def _distance(row: Row, width: int, layers: int, experts: int, vocabulary: int) -> tuple:
    return abs(np.log(row["width"] / width)), (row["experts"] > 0) != (experts > 0), abs(row["vocabulary"] - vocabulary)


def _planned(
    request: Request, rows: Sequence[Row], nearest: Row, reached: Callable[[int, int, bool, int], float], width: int,
    layers: int, experts: int, vocabulary: int,
) -> Choice:  # fmt: skip
    """This shape, trained like the nearest run: its speed, steps and memory; not yet its bits per byte."""
    context, batch = request.context or nearest["context"], request.batch or nearest["batch"]
    shape = (vocabulary, width, layers, experts, EXPERTS_PER_TOKEN, context, request.mtp)
    data_tokens = 0
    if request.text_bytes is not None:
        data_tokens = max(1, int(request.text_bytes / (request.bytes_per_token or bytes_per_token(rows, vocabulary))))
        while request.batch is None and batch > 1 and EPOCHS * data_tokens < STEPS_OF_LITTLE * batch * context:
            batch //= 2

    def shaped(reading: int) -> ModelConfig:
        return small_v3(*shape, **with_memory(request.switches, data_tokens, reading))

    def held(config: ModelConfig, micro: int) -> dict[str, int]:
        return memory.training(config, micro, context, data_tokens=data_tokens, compiled=request.compiled)

    config = shaped(0)
    share = reached(width, vocabulary, experts > 0, request.threads)
    speed = request.gflops * 1e9 * share / work(config, context, batch)
    speed *= COMPILED if request.compiled else 1.0

    def steps_of(config: ModelConfig) -> int:
        steps = int(speed * max(0.0, request.seconds(config)) / (batch * context))
        return min(steps, max(1, EPOCHS * data_tokens // (batch * context))) if data_tokens else steps

    tokens = steps_of(config) * batch * context
    with_rows = (shaped(tokens >> halvings) for halvings in range(5))
    config = next((larger for larger in with_rows if sum(held(larger, batch).values()) <= request.memory), config)
    steps = steps_of(config)
    micro, before = batch, memory.tokenizing(request.sample(vocabulary))
    while True:
        taken = held(config, micro)
        if sum(taken.values()) <= request.memory or micro == 1:
            break
        micro = -(-micro // 2)
    taken = max(taken, before, key=lambda parts: sum(parts.values()))
    epochs = steps * batch * context / data_tokens if data_tokens else 0.0
    rate = request.learning_rate or nearest["rate"]
    return Choice(config, experts, batch, micro, context, rate, steps, speed, epochs, taken, np.inf, np.inf)


def _judged(choice: Choice, law: Law) -> Choice:
    """With the bits per byte to expect. MTP, streams and the memory's size count by what they cost in time only."""
    counts = cost.parameters(choice.config)
    outside = counts.embedding + counts.head
    active, total = counts.active - outside, counts.total - outside - counts.table
    bits, error = law.bits(active, total, choice.tokens), law.uncertainty(active, choice.tokens)
    bits += law.of_vocabulary(choice.config.vocab_size)
    if not choice.config.engram_layer_ids:  # all scaling runs have a memory
        bits += WITHOUT_MEMORY
    return replace(choice, bits=bits, error=error)
