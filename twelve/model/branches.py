"""Attention where several answers share a prompt: each sees the prompt and itself, and no other answer.

The tokens of a forward pass are one row without padding: a prompt, its answers, the next prompt, and so on. Only
attention makes a batch of them, answers beside each other, each with the prompt's keys in front of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

QUERIES = 128  # of an answer, at a time
SCORES = 1 << 16  # of a head, about, at a time: they stay in the cache


class Branches:
    """Who sees whom in a row of prompts, answers behind each, and one token at the end that stands for all padding.

    `groups`: tokens of each prompt, 1 or more, and of each of its answers, which may have none.
    """

    def __init__(self, groups: Sequence[tuple[int, Sequence[int]]]) -> None:
        self.groups = groups
        self.length = 1 + sum(prompt + sum(answers) for prompt, answers in groups)

    @cached_property
    def parts(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """What is computed at a time: the places of queries [A, Q], those of their keys [A, S], and what is added to
        the scores [Q, S], 0 or -inf."""
        return list(self._parts())

    def _parts(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for prompt, *answers in self._spans():
            yield from self._together(range(0), [prompt])
            answers = [answer for answer in answers if answer]
            longest = max(map(len, answers), default=1)
            count = max(1, SCORES // (min(longest, QUERIES) * (len(prompt) + longest)))
            for at in range(0, len(answers), count):
                yield from self._together(prompt, answers[at : at + count])

    def _together(self, prompt: range, answers: list[range]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        longest, padding = max(map(len, answers)), self.length - 1
        places = torch.tensor([[*answer, *[padding] * (longest - len(answer))] for answer in answers])
        seen = torch.tensor(prompt, dtype=torch.int64).expand(len(answers), -1)
        for start in range(0, longest, QUERIES):
            end = min(start + QUERIES, longest)
            later = torch.full((end - start, len(prompt) + end), float("-inf")).triu_(len(prompt) + start + 1)
            yield places[:, start:end], torch.cat((seen, places[:, :end]), 1), later

    def _spans(self) -> Iterator[list[range]]:
        """The places of each prompt and of its answers."""
        start = 0
        for prompt, answers in self.groups:
            ends = list(accumulate((prompt, *answers), initial=start))
            yield [range(*span) for span in pairwise(ends)]
            start = ends[-1]

    @cached_property
    def previous(self) -> Tensor:
        """[T] int64: the place of the token before each one in its own branch, -1 where there is none."""
        places = torch.arange(-1, self.length - 1)
        for prompt, *answers in self._spans():
            places[prompt.start] = -1
            for answer in filter(None, answers):
                places[answer.start] = prompt.stop - 1
        places[-1] = -1
        return places

    def before(self, steps: int) -> Tensor:
        """`previous`, that many steps back."""
        places = torch.arange(self.length)
        for _ in range(steps):
            places = self.previous[places]  # the last is padding, which has none before it, as what -1 means
        return places

    @cached_property
    def mask(self) -> Tensor:
        """The same for any attention: [1, 1, T, T] bool, True where a token may look."""
        seen = torch.eye(self.length, dtype=torch.bool)
        for prompt, *answers in self._spans():
            for one in (prompt, *answers):
                seen[one.start : one.stop, prompt.start : prompt.stop] = True
                seen[one.start : one.stop, one.start : one.stop] = True
        return seen.tril_()[None, None]


def branched_attention(query: Tensor, key: Tensor, value: Tensor, branches: Branches, scale: float) -> Tensor:
    """As attention under `branches.mask`, for CPUs: query [T, H, K], key [T, H or fewer, K], value [T, same, V] ->
    [T, H, V]. Keeps no scores for the backward pass."""
    return _BranchedAttention.apply(query, key, value, branches, scale)


class _BranchedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, branches: Branches, scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.branches, ctx.scale, heads = branches, scale, key.shape[1]
        out = value.new_zeros(*query.shape[:2], value.shape[-1])
        for queries, keys, bias in branches.parts:
            weights = _weights(_gather(query, queries, heads), _gather(key, keys, heads), bias, scale)
            _scatter(torch.bmm(weights, _gather(value, keys, heads)), queries, out)
        return out

    @staticmethod
    def backward(ctx, grad_out: Tensor):
        query, key, value = ctx.saved_tensors
        heads, scale = key.shape[1], ctx.scale
        grads = grad_query, grad_key, grad_value = [torch.zeros_like(x) for x in (query, key, value)]
        for queries, keys, bias in ctx.branches.parts:
            q, grad = _gather(query, queries, heads), _gather(grad_out, queries, heads)
            k, v = _gather(key, keys, heads), _gather(value, keys, heads)
            weights = _weights(q, k, bias, scale)
            slope = torch._softmax_backward_data(torch.bmm(grad, v.mT), weights, -1, weights.dtype).mul_(scale)
            _scatter(torch.bmm(slope, k), queries, grad_query)
            _scatter(torch.bmm(slope.mT, q), keys, grad_key, add=True)
            _scatter(torch.bmm(weights.mT, grad), keys, grad_value, add=True)
        return *grads, None, None


def _weights(query: Tensor, key: Tensor, bias: Tensor, scale: float) -> Tensor:
    """[B, Q, S]; the query heads that share a key's stand one after the other in Q."""
    bias = bias.to(query.dtype).repeat(query.shape[1] // len(bias), 1)
    return torch.baddbmm(bias, query, key.mT, alpha=scale).softmax(-1)  # torch's exp alone is slow where it sees -inf


def _gather(x: Tensor, places: Tensor, heads: int) -> Tensor:
    """Rows [A * heads, H / heads * L, K] of x [T, H, K] at the places [A, L]."""
    rows = x.index_select(0, places.flatten()).view(*places.shape, *x.shape[1:])
    return rows.transpose(1, 2).reshape(len(places) * heads, -1, x.shape[-1])


def _scatter(rows: Tensor, places: Tensor, out: Tensor, add: bool = False) -> None:
    """Put such rows in their places in out [T, H, K], or add them to what is there."""
    rows = rows.view(len(places), out.shape[1], places.shape[1], -1).transpose(1, 2).flatten(0, 1)
    (out.index_add_ if add else out.index_copy_)(0, places.flatten(), rows)
