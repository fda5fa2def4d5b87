"""Answers that share a prompt: what the fast path for CPUs computes is attention under the mask."""

import pytest
import torch

from twelve.model import branches as branches_module
from twelve.model.branches import Branches, branched_attention
from twelve.model.fast import plain_attention

GROUPS = [(5, [3, 0, 7, 7]), (1, [4]), (9, [0]), (6, [1, 1, 300]), (2, [])]


def test_mask():
    mask = Branches([(2, [1, 2]), (1, [2])]).mask[0, 0]
    sees = [set(row.nonzero()[:, 0].tolist()) for row in mask]
    assert sees == [{0}, {0, 1}, {0, 1, 2}, {0, 1, 3}, {0, 1, 3, 4}, {5}, {5, 6}, {5, 6, 7}, {8}]


@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("together", [1, 60, 1 << 16])
def test_branched_attention(monkeypatch, heads, together):
    """Values and gradients, with heads that share keys, answers of many lengths, and little or much at a time."""
    monkeypatch.setattr(branches_module, "SCORES", together)
    branches, draw = Branches(GROUPS), torch.Generator().manual_seed(0)
    length, real = branches.length, slice(branches.length - 1)
    assert length == 1 + sum(prompt + sum(answers) for prompt, answers in GROUPS)

    def tensor(*shape):
        return torch.randn(length, *shape, dtype=torch.float64, generator=draw).requires_grad_()

    query, key, value = tensor(heads, 8), tensor(2, 8), tensor(2, 12)
    upstream = torch.randn(length - 1, heads, 12, dtype=torch.float64, generator=draw)
    found = branched_attention(query, key, value, branches, 0.4)[real]
    wide = (x.repeat_interleave(heads // x.shape[1], 1).transpose(0, 1)[None] for x in (query, key, value))
    plain = plain_attention(*wide, branches.mask, 0.4)[0].transpose(0, 1)[real]
    torch.testing.assert_close(found, plain, atol=1e-10, rtol=0)
    mine, theirs = (torch.autograd.grad((out * upstream).sum(), (query, key, value)) for out in (found, plain))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)
    assert not any(gradient[-1].any() for gradient in mine)  # padding gets nothing


def test_branched_attention_does_not_overflow():
    query = torch.full((10, 1, 8), 300.0)
    assert branched_attention(query, query, query, Branches([(2, [3, 4])]), 1.0).isfinite().all()
