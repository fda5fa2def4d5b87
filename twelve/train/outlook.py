"""What a training will be, before it begins: the shape that `pretrain` takes without sizes, and what it will cost."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from twelve import heap
from twelve.config import ModelConfig
from twelve.data.survey import Survey, holds_tokens, survey
from twelve.data.tokenizer import Tokenizer, check_vocab_size
from twelve.errors import InputError
from twelve.model.transformer import has_compiler
from twelve.plan import cost
from twelve.plan.fit import EXPERTS_PER_TOKEN, Choice, Request, choose
from twelve.plan.law import load
from twelve.plan.machine import Machine, measure, product_speed
from twelve.plan.memory import training
from twelve.train.precision import pick_device

STARTING = 4.0  # seconds: Python, torch, and what else is imported
TRIAL = 5.0  # seconds of steps that tell the speed, and of making the model again
COMPILING = 45.0
LEAST_TEXT = 1 << 14  # bytes that something can be learnt from
FREE = 0.9  # of what is free: the most that is planned with
TABLE_CLOSING = 2e-8  # seconds an element of a memory: written twice, in float32, and hashed
DRIFT = 1.7  # by which a processor may be faster or slower than when it was measured, before it is measured again


@dataclass(frozen=True)
class Outlook:
    """The shape that was chosen, and what the choice rests on. Seconds of the run's parts in `times`."""

    best: Choice  # as this moment's speed of the machine makes it
    choices: list[Choice]  # all that fit, by the speed that the machine was measured with, the best first
    corpus: Survey
    machine: Machine
    times: dict[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.times.values())

    def shape(self) -> dict[str, Any]:
        """What `pretrain` is to be told to do the same."""
        c, best = self.best.config, self.best
        return {
            "width": c.hidden_size, "layers": c.num_hidden_layers, "experts": best.experts,
            "experts_per_token": EXPERTS_PER_TOKEN, "vocab_size": c.vocab_size, "context": best.context,
            "batch": best.batch, "micro_batch": best.micro_batch, "learning_rate": best.learning_rate,
            "memory_rows": c.engram_vocab_size if c.engram_layer_ids else 0,
        }  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for training/plan.json."""
        best = self.best
        return {
            **self.shape(), "tokens": best.tokens, "steps": best.steps, "seconds": round(self.seconds, 1),
            "times": {name: round(value, 1) for name, value in self.times.items()}, "memory": best.memory,
            "bits_per_byte": round(best.bits, 4), "standard_error": round(best.error, 4),
        }  # fmt: skip

    def lines(self) -> dict[str, str]:
        """What was chosen, and why."""
        c, best = self.best.config, self.best
        inside = f"{best.experts} experts, {c.num_experts_per_tok} a token" if best.experts else "dense"
        if c.engram_layer_ids:
            inside += f"; a memory of {cost.table_rows(c):,} rows"
        micro = f" in parts of {best.micro_batch}" if best.micro_batch < best.batch else ""
        return {
            "shape": f"width {c.hidden_size}, {c.num_hidden_layers} layers, {inside}; vocabulary {c.vocab_size:,}",
            "training": f"{best.steps:,} steps of {best.batch} x {best.context} tokens{micro}, learning rate "
            f"{best.learning_rate:g} with a decay over the last 40%",
            "why": self._why(),
        }

    def _why(self) -> str:
        best = self.choices[0]
        told = [f"lowest expected bits per byte, {best.bits:.3f}, of {len(self.choices)} shapes that fit"]
        routed = best.experts > 0
        for other in self.choices:
            if (other.experts > 0) != routed:
                name = "dense" if routed else f"with {other.experts} experts"
                told.append(f"the best {name} ({_size_of(other)}) {other.bits:.3f}")
                break
        smaller = [other for other in self.choices if other.config.hidden_size < best.config.hidden_size]
        larger = [other for other in self.choices if other.config.hidden_size > best.config.hidden_size]
        told += [f"{_size_of(some[0])} {some[0].bits:.3f}" for some in (smaller, larger) if some]
        if not routed and any(other.experts for other in self.choices):
            told.append("so dense is better at this size")
        if best.epochs > 3.99:
            told.append("the text is read four times, and more would gain little")
        return "; ".join(told)


def expect(
    paths: Sequence[str | Path], minutes: float, *, memory: int | None = None, device: str | None = None,
    tokenizer: str | None = None, vocab_size: int | None = None, context: int | None = None, batch: int | None = None,
    learning_rate: float | None = None, mtp: int = 0, switches: dict[str, Any] | None = None,
    compile: bool | None = None, filter: bool = False,
) -> Outlook:  # fmt: skip
    """The best training of so many minutes for everything.

    memory: bytes that the process is to stay below. What else is given is kept. The same request is answered with the
    same shape while the machine is known (its speed of this moment only bears on what is expected). InputError for what
    cannot be.
    """
    if not minutes > 0:
        raise InputError(f"{minutes:g} minutes are no time: ask for more with --minutes")
    if vocab_size is not None:
        check_vocab_size(vocab_size)
    if paths:
        holds_tokens(paths, vocab_size=vocab_size)
        corpus = survey(paths, tokenizer, filter)
    elif filter:
        raise InputError("--filter says what is done with text: name some, as a PATH")
    else:
        corpus = Survey(None, vocabulary=Tokenizer.load(tokenizer).vocab_size if tokenizer is not None else None)
    if corpus.text_bytes is not None and corpus.text_bytes < LEAST_TEXT:
        raise InputError(
            f"{', '.join(map(str, paths))}: {corpus.text_bytes:,} bytes of text are too little to learn from "
            f"(at least {LEAST_TEXT:,}); give more, or name a model's sizes to train it all the same"
        )
    target = pick_device(device)
    if not can_plan(target):
        raise InputError(f"plans are made for cpu and cuda, and {target.type} is neither: name the model's sizes")
    machine, now = _machine(target)
    limit = _limit(machine, target, memory)
    if compile is None:
        compile = compiles(target, minutes)
    times = {"starting": STARTING, "trial steps": TRIAL + (COMPILING if compile else 0)}

    def seconds(config: ModelConfig) -> float:
        return 60 * minutes - sum(times.values()) - corpus.preparing(config.vocab_size) - _closing(config)

    request = Request(
        seconds, limit, _speed(machine, target), machine.threads, text_bytes=corpus.text_bytes, sample=corpus.sample,
        vocabulary=corpus.vocabulary or vocab_size, bytes_per_token=corpus.bytes_per_token,
        context=context, batch=batch, learning_rate=learning_rate, mtp=mtp,
        switches=switches or {}, compiled=compile,
    )  # fmt: skip
    rows = load()
    choices = choose(request, rows)
    now_possible = choose(replace(request, gflops=now), rows)
    best = next((as_chosen for choice in now_possible if (as_chosen := _trained_as(choice, choices[0]))), choices[0])
    times["preparing the data"] = corpus.preparing(best.config.vocab_size)
    times["training"] = best.seconds
    times["saving"] = _closing(best.config)
    return Outlook(best, choices, corpus, machine, times)


def compiles(device: torch.device, minutes: float | None) -> bool:
    """Whether compiling pays: it takes up to a minute, and saves about a tenth of every step on a CPU."""
    return device.type == "cuda" or (device.type == "cpu" and (minutes or 0) >= 20 and has_compiler())


def can_plan(device: torch.device) -> bool:
    """Whether the speed of this kind of device is known."""
    return device.type in ("cpu", "cuda")


def fitting_micro_batch(config: ModelConfig, batch: int, context: int, memory: int | None, tokens: int) -> int:
    """Rows of a forward pass with which training stays below `memory` bytes. InputError where not even one does."""
    micro = batch
    while memory is not None and sum(training(config, micro, context, data_tokens=tokens).values()) > memory:
        if micro == 1:
            needed = sum(training(config, 1, context, data_tokens=tokens).values())
            raise InputError(
                f"{memory / 2**30:.2f} GiB do not hold this training, which needs {needed / 2**30:.2f} GiB: give it "
                "that (--memory), or take a smaller model"
            )
        micro = -(-micro // 2)
    return micro


def require_room(config: ModelConfig, context: int, device: torch.device) -> None:
    """InputError for a training of which not even one row at a time fits into the device. An Engram table may be larger
    than the memory."""
    if device.type not in ("cpu", "cuda"):
        return
    there = heap.memory()[0] if device.type == "cpu" else torch.cuda.mem_get_info(device)[1]
    needed = sum(size for part, size in training(config, 1, context).items() if part != "table")
    if needed > there:
        raise InputError(
            f"this training needs at least {needed / 2**30:.2f} GiB, and there are {there / 2**30:.2f}: take a smaller "
            "model, or a shorter --context"
        )


def _machine(device: torch.device) -> tuple[Machine, float]:
    """This machine, and the `_speed` (GFLOP/s) to expect of it: the geometric mean of what is known of another hour and
    of this moment's, since each may be a fifth off that of the minutes to come."""
    machine = measure()
    known = _speed(machine, device)
    if device.type != "cpu":
        return machine, known
    now = product_speed(time.perf_counter)
    if not 1 / DRIFT < now / known < DRIFT:
        machine = measure(refresh=True)
        return machine, _speed(machine, device)
    return machine, math.sqrt(now * known)


def _speed(machine: Machine, device: torch.device) -> float:
    """GFLOP/s of the type that training computes in."""
    return machine.gflops["float32"] if device.type == "cpu" else machine.gpus[device.index or 0]["gflops"]


def _limit(machine: Machine, device: torch.device, asked: int | None) -> int:
    total, free = machine.memory_total, machine.memory_available
    if device.type != "cpu":
        total = free = machine.gpus[device.index or 0]["memory"]
    if asked is not None and asked > total:
        raise InputError(
            f"{asked / 2**30:.2f} GiB are more than the {total / 2**30:.2f} GiB that there are: ask for less with "
            "--memory"
        )
    return min(int(FREE * free), asked or free)


def _trained_as(choice: Choice, chosen: Choice) -> Choice | None:
    """What `choice` says of the shape that was chosen, whose memory may have other rows; None of another shape."""
    config = replace(choice.config, engram_vocab_size=chosen.config.engram_vocab_size)
    if config != chosen.config:
        return None
    return replace(choice, config=config, micro_batch=chosen.micro_batch, memory=chosen.memory)


def _closing(config: ModelConfig) -> float:
    """Seconds of the last checkpoint and the model folder; run.py keeps a little more back."""
    counts = cost.parameters(config, mtp=True)
    return 2.0 + 16 * (counts.total - counts.table) / 100e6 + TABLE_CLOSING * counts.table


def _size_of(choice: Choice) -> str:
    return f"width {choice.config.hidden_size}, {choice.config.num_hidden_layers} layers"
