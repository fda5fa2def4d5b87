"""On-policy distillation (DeepSeek-V4, arXiv 2606.19348): the student answers, and at each of its tokens it moves
towards what its teachers expect there, over the whole vocabulary. It learns on its own paths, not on a teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twelve import convert
from twelve.data.tokenizer import Tokenizer
from twelve.engine import Engine
from twelve.errors import InputError
from twelve.lora import attach
from twelve.model import Transformer
from twelve.posttrain.curriculum import Cell
from twelve.posttrain.divergence import reverse_kl
from twelve.posttrain.rollout import Group, Rows, fitting, rows_of, sample
from twelve.posttrain.teacher import require_one_vocabulary
from twelve.posttrain.traces import problem_stream
from twelve.train.loop import Trainer
from twelve.train.plan import Plan
from twelve.train.precision import autocast, pick_device, pick_precision
from twelve.train.run import Prepared, run
from twelve.train.schedule import learning_rate as rate_of
from twelve.train.sft import LEARNING_RATE, LORA_LEARNING_RATE

ROW_TOKENS = 4096  # of a forward pass
Weighed = list[tuple[Transformer, float]]  # teachers, and w_i of each


class OnPolicy(Trainer):
    """L = sum_i w_i KL(student || teacher_i), mean over the tokens of a step's answers.

    `teachers` are those of a task by its name, and under None those of every other task.
    """

    def __init__(
        self, model: Transformer, plan: Plan, folder: Path, tokenizer: Tokenizer, teachers: dict[str | None, Weighed],
    ) -> None:  # fmt: skip
        super().__init__(model, plan, folder)
        self.tokenizer, self.teachers = tokenizer, teachers
        self.engine = Engine(model, tokenizer, speculation="off")
        self.stream, self.next = iter(()), -1  # problems, and the step that they are for

    def train_step(self) -> dict[str, float]:
        """As Trainer's."""
        plan, step = self.plan, self.step
        rate = rate_of(step, plan.steps(step), plan.learning_rate, plan.warmup, plan.decay_share)
        groups = self.answer(step)
        tokens = sum(len(answer.token_ids) for group in groups for answer in group.answers)
        loss = 0.0
        for task in {group.problem.task: None for group in groups}:  # all that one teacher reads, then the next
            teachers = self.teachers.get(task) or self.teachers[None]
            for rows in rows_of([g for g in groups if g.problem.task == task], ROW_TOKENS):
                part = self.divergence(rows.to(self.model.device), teachers) * (len(rows.targets) / tokens)
                part.backward()
                loss += part.item()
        norm = self.update(rate, loss)
        self.step += 1
        self.tokens += tokens
        count = sum(len(group.answers) for group in groups)
        return {
            "step": self.step, "tokens": self.tokens, "learning_rate": rate, "loss": loss, "grad_norm": norm,
            "answer_tokens": tokens / count,
        }  # fmt: skip

    def answer(self, step: int) -> list[Group]:
        """What the student says to the problems of a step: a function of the step and the weights."""
        options = self.plan.options
        group = options["group"]
        count = self.plan.batch_size // group
        if step != self.next:
            stream = problem_stream([Cell(*cell) for cell in options["cells"]], options["seed"])
            self.stream = islice(fitting(self.tokenizer, stream, self.engine.context), step * count, None)
        problems, self.next = list(islice(self.stream, count)), step + 1
        self.model.eval()
        self.engine.forget()
        groups = sample(
            self.engine, self.tokenizer, problems, group, options["max_tokens"], 1.0, options["seed"] << 32 | step
        )
        self.model.train()
        return groups

    def divergence(self, rows: Rows, teachers: Weighed) -> Tensor:
        """The mean of the loss over these rows' answers, with its gradient in the student."""
        limit = min(teacher.config.max_position_embeddings for teacher, _ in teachers)
        longest = int(rows.positions.max()) + 1
        if longest > limit:
            raise InputError(f"an answer ends at {longest} tokens, and a teacher reads {limit}: lower --max-tokens")
        vocabulary = self.tokenizer.vocab_size  # what can be drawn; models differ in how many more rows they have
        with autocast(rows.ids.device, self.plan.precision):
            with torch.no_grad():
                theirs = [(_states(teacher, rows), teacher.head_weight[:vocabulary], w) for teacher, w in teachers]
            return reverse_kl(_states(self.model, rows), self.model.head_weight[:vocabulary], theirs)


def _states(model: Transformer, rows: Rows) -> Tensor:
    """Last states [N, D] where the answers' tokens are predicted. The head makes the logits of a chunk of them."""
    at = replace(model.positions(rows.ids, 0, rows.positions), mask=rows.mask)
    states, _ = model.hidden(rows.ids, at)
    return states.flatten(0, 1)[rows.states]


def on_policy(
    student: str | Path, teachers: dict[str | None, Sequence[str]], out: str | Path, cells: Sequence[Cell], *,
    weights: Sequence[float] | None = None, minutes: float | None = None, steps: int | None = None, seed: int = 0,
    batch: int = 32, group: int = 4, max_tokens: int = 256, learning_rate: float | None = None, lora: int | None = None,
    muon: bool = False, device: str | None = None, started: float | None = None, quiet: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Distil into the model `student` what `teachers` (models, by task; None: for all others) expect of its answers.

    `weights` are those of the teachers under None, equal by default; those of one task always weigh the same. A step
    takes `batch` answers, `group` to a problem. One of `minutes` and `steps` sets the length, 10 minutes if none does;
    the same call again resumes. With `lora`, a rank, only adapters of that rank are trained. InputError for bad input,
    tokenizers that differ first of all.
    """
    learning_rate = learning_rate or (LORA_LEARNING_RATE if lora else LEARNING_RATE)
    if minutes is None and steps is None:
        minutes = 10.0
    if batch % group:
        raise InputError(f"{batch} answers a step are not a multiple of {group} to a problem")
    options = {
        "student": str(student), "teachers": {str(task): [*map(str, named)] for task, named in teachers.items()},
        "weights": list(weights) if weights else None, "cells": [[c.task, c.level, c.language] for c in cells],
        "minutes": minutes, "steps": steps, "seed": seed, "batch": batch, "group": group, "max_tokens": max_tokens,
        "learning_rate": learning_rate, "lora": lora, "muon": muon, "device": device,
    }  # fmt: skip
    source = convert.resolve(student)

    def prepare(folder: Path, plan: Plan | None) -> Prepared:
        target = pick_device(device)
        if not lora:
            convert.require_floats(source)
        tokenizer = convert.load_tokenizer(source)
        loaded: dict[str, Transformer] = {}
        for name in {name: None for named in teachers.values() for name in named}:
            require_one_vocabulary(convert.load_tokenizer(name), tokenizer, name)
            loaded[name], _ = convert.load(name, device=target)
        weighed = {
            task: list(zip((loaded[name] for name in named), _weights(named, None if task else weights), strict=True))
            for task, named in teachers.items()
        }
        if plan is None:
            config = convert.load_config(source)
            plan = Plan(
                stage="on-policy", options=options, config=config.to_dict(), data={},
                context=config.max_position_embeddings, batch_size=batch, micro_batch_size=batch,
                learning_rate=learning_rate, seed=seed, threads=torch.get_num_threads(),
                precision=pick_precision(target), muon=muon, adamw_lr_scale=1.0, weight_decay=0.0,
            )  # fmt: skip

        def make_trainer() -> OnPolicy:
            model, _ = convert.load(source, device=target, dtype=torch.float32)
            if lora:
                attach(model, lora, seed=seed)
            return OnPolicy(model, plan, folder, tokenizer, weighed)

        return Prepared(plan, make_trainer, tokenizer, lambda figures: _about(plan, figures), True)

    return run("on-policy", out, options, prepare, minutes, steps, started, quiet)


def _weights(named: Sequence[str], weights: Sequence[float] | None) -> list[float]:
    """One for each, that sum to one."""
    given = [1.0] * len(named) if weights is None else list(weights)
    if len(given) != len(named) or min(given) <= 0:
        raise InputError(f"{len(given)} weights for {len(named)} teachers: give one above 0 for each")
    return [weight / sum(given) for weight in given]


def _about(plan: Plan, figures: dict[str, Any]) -> dict[str, Any]:
    asked = plan.options
    names, levels, languages = (dict.fromkeys(column) for column in zip(*asked["cells"], strict=True))
    teachers = [
        f"teachers of {'every other task' if task == 'None' else task}: {', '.join(f'`{name}`' for name in named)}"
        for task, named in asked["teachers"].items()
    ]
    return {
        "made": f"Distilled from `{asked['student']}` on its own answers: reverse KL to its teachers over the whole "
        "vocabulary.",
        "parents": [asked["student"]],
        "data": [f"problems of {', '.join(names)}, levels {', '.join(map(str, levels))}", *teachers],
        "languages": languages,
        "measured": {
            "tokens of its answers": figures["tokens"],
            "divergence at the end": f"{figures['loss']} nats a token",
        },
        "limits": "It was taught these tasks alone, and may have become worse at others.",
    }
