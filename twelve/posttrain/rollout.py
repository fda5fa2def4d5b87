"""Rollouts: problems in, groups of answers out, and the rows in which a trainer reads them again.

The answers to one problem share its prompt, so a row holds the prompt once and several answers behind it; a mask keeps
each answer from seeing the others. With a prompt of 70 tokens and 8 answers of 16 that is a third of the arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from twelve.config import ModelConfig
from twelve.data.tokenizer import Tokenizer
from twelve.engine import Completion, Engine, Request, sub_seed
from twelve.evaluate.accuracy import prompt_ids
from twelve.model import Transformer, count_parameters
from twelve.model.layers import linear_logprobs
from twelve.model.moe import Routing
from twelve.tasks import Problem


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
    answers = engine.generate(requests)
    return [
        Group(problem, prompt, answers[index * group : (index + 1) * group])
        for index, (problem, prompt) in enumerate(zip(problems, prompts, strict=True))
    ]


# --- reading them again -----------------------------------------------------------------------------------------------


@dataclass
class Rows:
    """Rows of a forward pass. Row b: a prompt, then answers that see the prompt and themselves; then padding."""

    ids: Tensor  # [B, T] int64
    positions: Tensor  # [B, T] int64; every answer goes on where the prompt ends
    parts: Tensor  # [B, T] int64: 0 in the prompt, 1, 2, ... in the answers, -1 in the padding
    states: Tensor  # [N] int64, of B * T: the states that predict the answers' tokens
    targets: Tensor  # [N] int64, these tokens
    answers: Tensor  # [N] int64, the number of the answer that each belongs to
    sampled: Tensor  # [N] float32, the log-probability with which each was drawn

    def to(self, device: torch.device) -> Rows:
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in vars(self).items()})

    @property
    def mask(self) -> Tensor:
        """[B, 1, T, T] bool: True where a token may look."""
        parts = self.parts
        seen = (parts[:, :, None] == parts[:, None, :]) | (parts == 0)[:, None, :]
        return seen.tril()[:, None]


def rows_of(groups: Sequence[Group], config: ModelConfig, tokens: int) -> Iterator[Rows]:
    """The groups' answers, numbered in their order, in batches of rows of about `tokens` tokens with their padding.

    Longest rows first, so that a batch that does not fit shows at once.
    """
    rows: list[tuple[list[int], list[tuple[int, Completion]]]] = []
    number = 0
    for group in groups:
        answers = list(enumerate(group.answers, start=number))
        number += len(answers)
        answers.sort(key=lambda answer: answer[1].completion_tokens)  # short ones together: less padding
        mean = sum(answer.completion_tokens for _, answer in answers) / len(answers)
        each = answers_per_row(config, len(group.prompt), mean)
        for start in range(0, len(answers), each):
            row = answers[start : start + each]
            while len(row) > 1 and _length(group.prompt, row) > max(tokens, config.max_position_embeddings):
                rows.append((group.prompt, [row.pop()]))
            rows.append((group.prompt, row))
    rows.sort(key=lambda row: -_length(*row))
    while rows:
        longest = _length(*rows[0])
        count = max(1, tokens // longest)
        yield _stack(rows[:count], longest)
        rows = rows[count:]


def answers_per_row(config: ModelConfig, prompt: int, answer: float, most: int = 64) -> int:
    """How many answers of so many tokens should share a prompt: longer rows compute scores that the mask hides."""
    width = config.qk_nope_head_dim + config.rope_dim + config.v_head_dim if config.is_mla else 2 * config.head_dim
    per_pair = config.num_hidden_layers * config.num_attention_heads * width
    per_token = count_parameters(config)["active"]

    def cost(count: int) -> float:  # of one answer
        length = prompt + count * answer
        return (length * per_token + length**2 / 2 * per_pair) / count

    return min(range(1, most + 1), key=cost)


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


def _length(prompt: list[int], answers: list[tuple[int, Completion]]) -> int:
    # the last token of an answer predicts nothing
    return len(prompt) + sum(answer.completion_tokens - 1 for _, answer in answers)


def _stack(rows: list[tuple[list[int], list[tuple[int, Completion]]]], length: int) -> Rows:
    ids, positions = torch.zeros(2, len(rows), length, dtype=torch.int64)
    parts = torch.full((len(rows), length), -1)
    states, targets, owners, sampled = [], [], [], []
    for index, (prompt, answers) in enumerate(rows):
        end = len(prompt)
        ids[index, :end] = torch.tensor(prompt)
        positions[index, :end] = torch.arange(end)
        parts[index, :end] = 0
        for part, (number, answer) in enumerate(answers, start=1):
            tokens = answer.token_ids
            start, end = end, end + len(tokens) - 1
            ids[index, start:end] = torch.tensor(tokens[:-1])
            positions[index, start:end] = torch.arange(len(prompt), len(prompt) + len(tokens) - 1)
            parts[index, start:end] = part
            states += [index * length + len(prompt) - 1, *range(index * length + start, index * length + end)]
            targets += tokens
            owners += [number] * len(tokens)
            sampled += answer.logprobs
    flat = (torch.tensor(numbers, dtype=torch.int64) for numbers in (states, targets, owners))
    return Rows(ids, positions, parts, *flat, torch.tensor(sampled, dtype=torch.float32))
