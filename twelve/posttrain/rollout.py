"""Rollouts: problems in, groups of answers out, and the rows in which a trainer reads them again.

The answers to one problem share its prompt, so a row holds the prompt once and the answers behind it, without padding.
With a prompt of 70 tokens and 8 answers of 16 that is a third of the arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from twelve.data.tokenizer import Tokenizer
from twelve.engine import Completion, Engine, Request, sub_seed
from twelve.errors import InputError
from twelve.evaluate.accuracy import generate, prompt_ids
from twelve.model import Transformer
from twelve.model.branches import Branches
from twelve.model.layers import linear_logprobs
from twelve.model.moe import Routing
from twelve.tasks import Problem

PATIENCE = 200  # problems in a row that do not fit, after which none is thought to


@dataclass
class Group:
    """A problem, its prompt, and the answers that were sampled for it."""

    problem: Problem
    prompt: list[int]
    answers: list[Completion]
    scores: list[float] = field(default_factory=list)  # what the task says of each answer, 0 to 1
    rewards: list[float] = field(default_factory=list)  # what training makes of that


def sample(
    engine: Engine, tokenizer: Tokenizer, problems: Sequence[Problem], group: int, max_tokens: int,
    temperature: float = 1.0, seed: int | None = None,
) -> list[Group]:  # fmt: skip
    """`group` answers to every problem, with the log-probability of each token. A seed gives the same ones again."""
    prompts = [prompt_ids(tokenizer, problem) for problem in problems]
    requests = [
        Request(prompt, max_tokens, temperature, seed=sub_seed(seed, index * group + one), logprobs=True)
        for index, prompt in enumerate(prompts)
        for one in range(group)
    ]
    answers = generate(engine, tokenizer, requests)
    return [
        Group(problem, prompt, answers[index * group : (index + 1) * group])
        for index, (problem, prompt) in enumerate(zip(problems, prompts, strict=True))
    ]


def fitting(tokenizer: Tokenizer, problems: Iterable[Problem], room: int) -> Iterator[Problem]:
    """Those of the problems whose prompts have fewer than `room` tokens. InputError where hardly any has."""
    missed = 0
    for problem in problems:
        if len(prompt_ids(tokenizer, problem)) < room:
            missed = 0
            yield problem
            continue
        missed += 1
        if missed == PATIENCE:
            raise InputError(
                f"the problems of {problem.task}, level {problem.level} in {problem.language}, are too long: no prompt "
                f"of {PATIENCE} has fewer than {room:,} tokens; choose other levels or a model with a longer context"
            )


# --- reading them again -----------------------------------------------------------------------------------------------


@dataclass
class Rows:
    """One row for a forward pass: a prompt, its answers, which see it and themselves, the next prompt, and so on."""

    ids: Tensor  # [1, T] int64; the last stands for padding
    positions: Tensor  # [1, T] int64; every answer goes on where its prompt ends
    mask: Branches
    states: Tensor  # [N] int64, of T: the states that predict the answers' tokens
    targets: Tensor  # [N] int64, these tokens
    answers: Tensor  # [N] int64, the number of the answer that each belongs to
    sampled: Tensor  # [N] float32, the log-probability with which each was drawn

    def to(self, device: torch.device) -> Rows:
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


Part = tuple[list[int], list[tuple[int, Completion]]]  # a prompt, and answers to it with their numbers


def rows_of(groups: Sequence[Group], tokens: int) -> Iterator[Rows]:
    """The groups' answers, numbered in their order, in rows of at most `tokens` tokens, or of one answer.

    A prompt whose answers do not fit one row comes again in the next.
    """
    row: list[Part] = []
    number, length = 0, 1
    for group in groups:
        answers = list(enumerate(group.answers, start=number))
        number += len(answers)
        part: list[tuple[int, Completion]] = []
        for answer in sorted(answers, key=lambda answer: answer[1].completion_tokens):  # less padding in attention
            more = answer[1].completion_tokens - 1  # the last token predicts nothing
            if row and length + more + (0 if part else len(group.prompt)) > tokens:
                yield _row(row)
                row, part, length = [], [], 1
            if not part:
                row.append((group.prompt, part))
                length += len(group.prompt)
            part.append(answer)
            length += more
    if row:
        yield _row(row)


def logprobs(
    model: Transformer, rows: Rows, vocab_size: int, temperature: float = 1.0
) -> tuple[Tensor, Tensor, list[Routing]]:
    """Log-probability of every answer's token [N], the entropy at each [N], and the routing of every MoE layer.

    `vocab_size` is the tokenizer's: a model may have more rows in its head, which no sampler draws.
    """
    at = replace(model.positions(rows.ids, 0, rows.positions), mask=rows.mask)
    states, routings = model.hidden(rows.ids, at)
    chosen = states.flatten(0, 1)[rows.states]
    return *linear_logprobs(chosen, model.head_weight[:vocab_size], rows.targets, temperature), routings


def _row(parts: list[Part]) -> Rows:
    ids, positions, states, targets, owners, sampled = [], [], [], [], [], []
    for prompt, answers in parts:
        last = len(ids) + len(prompt) - 1
        ids += prompt
        positions += range(len(prompt))
        for number, answer in answers:
            tokens = answer.token_ids
            states += [last, *range(len(ids), len(ids) + len(tokens) - 1)]
            ids += tokens[:-1]
            positions += range(len(prompt), len(prompt) + len(tokens) - 1)
            targets += tokens
            owners += [number] * len(tokens)
            sampled += answer.logprobs
    mask = Branches([(len(prompt), [len(answer.token_ids) - 1 for _, answer in answers]) for prompt, answers in parts])
    flat = (torch.tensor(numbers, dtype=torch.int64) for numbers in (states, targets, owners))
    row = torch.tensor([[*ids, 0], [*positions, 0]])[:, None]
    return Rows(*row, mask, *flat, torch.tensor(sampled, dtype=torch.float32))
