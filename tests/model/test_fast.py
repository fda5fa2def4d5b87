"""The fast paths against their plain twins in float64, values and gradients."""

import pytest
import torch

from twelve.model.fast import (
    blocked_attention,
    grouped_experts,
    one_token_experts,
    plain_attention,
    plain_experts,
    sorted_experts,
)
from twelve.model.layers import linear_cross_entropy, plain_cross_entropy, sampled_cross_entropy


def tensor(*shape, seed=0, grad=True):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_(grad)


def same_with_gradients(fast, plain, inputs, atol=1e-9):
    results = []
    for function in (fast, plain):
        out = function(*inputs)
        weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
        trained = [x for x in inputs if getattr(x, "requires_grad", 0)]
        results.append((out, *torch.autograd.grad((out * weights).sum(), trained)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), atol=atol, rtol=1e-9)


@pytest.mark.parametrize("length", [1, 5, 128, 129, 300])
@pytest.mark.parametrize("packed", [False, True])
def test_blocked_attention(length, packed):
    query, key, value = tensor(2, 3, length, 16), tensor(2, 3, length, 16, seed=1), tensor(2, 3, length, 24, seed=2)
    documents = torch.randint(0, 4, (2, length), generator=torch.Generator().manual_seed(3)).sort(-1).values
    mask = (documents[:, :, None] == documents[:, None, :]).tril()[:, None] if packed else None
    same_with_gradients(
        lambda q, k, v: blocked_attention(q, k, v, mask, 0.4), lambda q, k, v: plain_attention(q, k, v, mask, 0.4),
        (query, key, value),
    )  # fmt: skip


def test_blocked_attention_does_not_overflow():
    query = torch.full((1, 1, 4, 8), 300.0)
    assert blocked_attention(query, query, query, None, 1.0).isfinite().all()


@pytest.mark.parametrize("tokens, experts, k", [(1, 4, 2), (50, 8, 3), (40, 6, 6), (7, 16, 1)])
def test_grouped_experts(tokens, experts, k):
    x, gate_up, down = tensor(tokens, 16), tensor(experts, 24, 16, seed=1), tensor(experts, 16, 12, seed=2)
    chosen = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(3)).topk(k).indices
    gates = torch.rand(tokens, k, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).requires_grad_()

    def run(function):
        return lambda x, gate_up, down, gates: function(x, gate_up, down, chosen, gates)

    same_with_gradients(run(grouped_experts), run(plain_experts), (x, gate_up, down, gates))


def test_one_token_experts():
    x, gate_up, down = (t.detach() for t in (tensor(1, 16), tensor(8, 24, 16, seed=1), tensor(8, 16, 12, seed=2)))
    chosen, gates = torch.tensor([[6, 1, 3]]), torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64)
    torch.testing.assert_close(
        one_token_experts(x, gate_up, down, chosen, gates), plain_experts(x, gate_up, down, chosen, gates)
    )


def test_sorted_experts():
    tensors = (tensor(50, 16), tensor(8, 32, 16, seed=1), tensor(8, 16, 16, seed=2))
    x, gate_up, down = (t.detach().float() for t in tensors)
    chosen = torch.rand(50, 8, generator=torch.Generator().manual_seed(3)).topk(3).indices
    gates = torch.rand(50, 3, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(
        sorted_experts(x, gate_up, down, chosen, gates), plain_experts(x, gate_up, down, chosen, gates),
        atol=1e-4, rtol=1e-5,
    )  # fmt: skip


def test_mixed_precision_reaches_the_products_that_autocast_does_not_know():
    """Both give what they give of inputs in bfloat16, and gradients in float32."""
    rounded, exact = torch.bfloat16, torch.float32
    x, gate_up, down = (tensor(*shape).detach().float() for shape in ((50, 16), (8, 32, 16), (8, 16, 16)))
    chosen = torch.rand(50, 8, generator=torch.Generator().manual_seed(3)).topk(3).indices
    gates, targets = torch.rand(50, 3, generator=torch.Generator().manual_seed(4)), torch.arange(50) % 32
    for function in (
        lambda x: sorted_experts(x, gate_up, down, chosen, gates),
        lambda x: linear_cross_entropy(x, gate_up[0], targets),
        lambda x: sampled_cross_entropy(x, gate_up[0], targets[:10].repeat(5), 5, torch.Generator().manual_seed(5)),
    ):
        x.requires_grad_()
        wanted = function(x.to(rounded))
        with torch.autocast("cpu", dtype=rounded):
            found = function(x)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
        assert found.dtype == exact and not torch.equal(found, function(x))
        assert torch.autograd.grad(found.sum(), x)[0].dtype == exact


@pytest.mark.parametrize("rows", [1, 30, 1000])
def test_linear_cross_entropy(rows):
    hidden, weight = tensor(rows, 16), tensor(97, 16, seed=1)
    targets = torch.randint(0, 97, (rows,), generator=torch.Generator().manual_seed(2))
    targets[::7] = -100
    same_with_gradients(
        lambda h, w: linear_cross_entropy(h, w, targets, chunk=64), lambda h, w: plain_cross_entropy(h, w, targets),
        (hidden, weight), atol=1e-6,
    )  # fmt: skip


def test_a_sampled_loss_is_on_average_the_whole_one():
    """Of 400 draws: the loss a little below, its gradients within four standard errors; others' rows where drawn."""
    hidden, weight = (tensor(30, 8).detach() / 5).requires_grad_(), tensor(120, 8, seed=1)
    targets = torch.randint(0, 20, (30,), generator=torch.Generator().manual_seed(2))
    targets[::7] = -100
    drawn, draw = 25, torch.Generator().manual_seed(3)

    def gradients(loss):
        return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, (hidden, weight))])

    whole = linear_cross_entropy(hidden, weight, targets)
    losses = [sampled_cross_entropy(hidden, weight, targets, drawn, draw) for _ in range(400)]
    found = torch.stack([gradients(loss) for loss in losses])
    error = found.std(0) / 400**0.5
    assert ((found.mean(0) - gradients(whole)).abs() < 5 * error + 1e-6).all()
    mean = torch.stack(losses).mean()
    assert whole - 0.05 < mean < whole
    rows = (found[0, 30 * 8 :].view(120, 8) != 0).any(1).sum()
    assert rows == len(targets[targets >= 0].unique()) + drawn
    again = [sampled_cross_entropy(hidden, weight, targets, drawn, torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*again)
    assert torch.equal(sampled_cross_entropy(hidden, weight, targets, 100, draw), whole)  # few are left: all of them


def test_cross_entropy_of_the_impossible_is_finite_and_teaches():
    hidden, weight = torch.tensor([[200.0]], requires_grad=True), torch.tensor([[1.0], [-1.0]], requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1]))
    loss.backward()
    assert 87 < loss < 88 and weight.grad.tolist() == [[200.0], [-200.0]] and hidden.grad == 2


def test_cross_entropy_without_targets_is_zero():
    hidden = tensor(5, 4)
    loss = linear_cross_entropy(hidden, tensor(7, 4), torch.full((5,), -100))
    loss.backward()
    assert loss == 0 and (hidden.grad == 0).all()
