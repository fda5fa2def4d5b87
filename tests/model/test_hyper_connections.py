"""Hyper-connections against the plain residual, transformers' module, float64 twins, and what the paper promises."""

from dataclasses import replace

import pytest
import torch
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as theirs

from twelve.config import ModelConfig, small_v3
from twelve.model import Transformer
from twelve.model.fast_streams import fast_read, fast_write, fits, library, rules
from twelve.model.hyper_connections import (
    HyperConnection,
    HyperHead,
    Residual,
    coefficients,
    composite_gain,
    plain_read,
    plain_write,
    sampled_gain,
    sinkhorn,
)
from twelve.train.optimizer import MuonAdamW

ORDERS = ("columns_first", "deepseek_v4")


def config(**changes) -> ModelConfig:
    return ModelConfig(**{"model_type": "twelve", "hidden_size": 32, "num_attention_heads": 4, "hc_mult": 4} | changes)


def draw(*shape, seed=0, std=1.0) -> torch.Tensor:
    return std * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def parameters(c: ModelConfig, std: float = 1.0) -> tuple[torch.Tensor, ...]:
    n = c.hc_mult
    count = (2 + n) * n
    fn = draw(count, n * c.hidden_size, seed=1, std=0.1)
    return fn, draw(count, seed=2, std=std), 1 + draw(3, seed=3, std=0.3)


def models(**changes) -> tuple[Transformer, Transformer]:
    """A plain model and one with streams, of equal weights."""
    shape = small_v3(97, width=64, layers=3, experts=4, experts_per_token=2, mtp=2)
    if changes.pop("gqa", False):
        shape = ModelConfig(
            model_type="llama", vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2,
        )  # fmt: skip
    plain = Transformer(shape).init_weights(3)
    streams = Transformer(replace(shape, **{"model_type": "twelve", "hc_mult": 4} | changes)).init_weights(3)
    return plain, streams


# --- the start --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"gqa": True}, {"hc_mult": 2}, {"hc_mult": 3}, {"hc_constrained": False}, {"hc_tolerance": 1e-3}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_begins_as_the_plain_network(changes, dtype):
    plain, streams = (model.to(dtype).train() for model in models(**changes))
    shared = dict(plain.named_parameters())
    for name, parameter in streams.named_parameters():
        assert "hc" in name or torch.equal(parameter, shared[name]), name
    ids = torch.randint(0, 97, (2, 33))
    losses = [model.losses(ids, ids.roll(-1, 1)) for model in (plain, streams)]
    hidden = [model.hidden(ids, model.positions(ids))[0] for model in (plain, streams)]
    torch.testing.assert_close(hidden[1], hidden[0], atol=4e-6, rtol=0)  # of numbers up to 4
    torch.testing.assert_close(losses[1].total, losses[0].total, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(losses[1].mtp, losses[0].mtp, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("order", ORDERS)
def test_mappings_at_the_start(order):
    for index in range(5):
        module = HyperConnection(config(hc_sinkhorn_order=order), index)
        module.initialise()
        pre, post, comb = coefficients(torch.randn(7, 4, 32), module.fn, module.base, module.scale, module.config)
        assert (post.argmax(-1) == index % 4).all()
        torch.testing.assert_close(pre, torch.full((7, 4), 0.25), atol=1e-5, rtol=0)
        torch.testing.assert_close(post.mean(-1), torch.ones(7), atol=1e-6, rtol=0)
        for dim in (-1, -2):
            torch.testing.assert_close(comb.sum(dim), torch.ones(7, 4), atol=1e-3, rtol=0)
        assert 0.8 < comb.diagonal(dim1=-2, dim2=-1).min() < 0.95


def test_one_stream_is_the_plain_residual():
    block = Transformer(config(hc_mult=1)).layers[0]
    assert isinstance(block.attn_hc, Residual) and isinstance(block.ffn_hc, Residual)
    one = torch.randn(3, 1, 1)  # and of any logits the mapping of one stream is 1
    torch.testing.assert_close(sinkhorn(one, 20), torch.ones(3, 1, 1))


# --- Sinkhorn-Knopp ---------------------------------------------------------------------------------------------------


def test_sinkhorn_in_float64_by_hand():
    logits = draw(6, 4, 4)
    matrix = logits.exp()
    for _ in range(20):
        matrix = matrix / matrix.sum(-2, keepdim=True)
        matrix = matrix / matrix.sum(-1, keepdim=True)
    torch.testing.assert_close(sinkhorn(logits, 20), matrix, atol=1e-14, rtol=1e-12)


@pytest.mark.parametrize("std, other", [(1.0, 1e-3), (6.0, 0.6)])
def test_rows_are_exact_and_columns_near(std, other):
    matrix = sinkhorn(draw(500, 4, 4, std=std).float(), 20)
    assert (matrix.sum(-1) - 1).abs().max() < 1e-5
    assert (matrix.sum(-2) - 1).abs().max() < other
    long = sinkhorn(draw(500, 4, 4, std=std).float(), 1000)
    assert (long.sum(-2) - 1).abs().max() < max(1e-5, other / 10)


def test_sinkhorn_of_huge_logits_is_finite():
    logits = draw(50, 4, 4, std=300).float().requires_grad_()
    matrix = sinkhorn(logits, 20)
    matrix.square().sum().backward()
    assert matrix.isfinite().all() and logits.grad.isfinite().all()
    matrix = sinkhorn(torch.tensor([[[0.0, 0.0], [-200.0, -200.0]]]), 20)  # a row that vanishes
    assert matrix.isfinite().all()


def test_tolerance_stops_each_matrix_by_itself():
    logits = draw(64, 4, 4, std=2.0)
    alone = torch.cat([sinkhorn(one[None], 200, tolerance=1e-4) for one in logits])
    together = sinkhorn(logits, 200, tolerance=1e-4)
    assert torch.equal(alone, together)  # a token's mapping does not depend on its neighbours
    assert (together.sum(-2) - 1).abs().max() <= 1e-4
    assert not torch.equal(together, sinkhorn(logits, 200))
    assert torch.equal(sinkhorn(logits, 3, tolerance=1e-30), sinkhorn(logits, 3))


# --- twins ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [(1, 1), (2, 19), (3, 32)])
def test_equals_transformers(tokens):
    c = config(hc_sinkhorn_order="deepseek_v4")
    v4 = theirs.DeepseekV4Config(hidden_size=32, hc_mult=4, hc_eps=c.hc_eps, rms_norm_eps=c.rms_norm_eps)
    assert v4.hc_sinkhorn_iters == c.hc_sinkhorn_iters
    ours, other = HyperConnection(c, 0), theirs.DeepseekV4HyperConnection(v4)
    head, other_head = HyperHead(c), theirs.DeepseekV4HyperHead(v4)
    for a, b in ((ours, other), (head, other_head)):
        for seed, parameter in enumerate(a.parameters()):
            parameter.data = draw(*parameter.shape, seed=seed, std=0.7).float()
        assert not any(b.load_state_dict(a.state_dict()))
    x, out = draw(*tokens, 4, 32).float(), draw(*tokens, 32, seed=1).float()
    post, comb, collapsed = other(x)
    expected = post[..., None] * out[..., None, :] + comb.mT @ x  # as their decoder layer does
    state, mapping = ours.read(x)
    torch.testing.assert_close(state, collapsed, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.write(x, out, mapping), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(head(x), other_head(x), atol=1e-5, rtol=0)


@pytest.mark.skipif(library() is None, reason="no C++ compiler")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("changes", [{}, {"hc_constrained": False}, {"hc_sinkhorn_iters": 1}])
@pytest.mark.parametrize("n, tokens", [(4, (1, 1)), (4, (2, 19)), (4, (64,)), (2, (3, 7)), (2, (16,))])
def test_fast_path_equals_the_twin_in_float64(n, tokens, order, changes):
    c = config(hc_mult=n, hc_sinkhorn_order=order, **changes)
    inputs = [draw(*tokens, n, 32, seed=5), *parameters(c), draw(*tokens, 32, seed=6)]
    assert fits(inputs[0].float(), inputs[1].float(), c)

    def run(dtype):
        x, fn, base, scale, out = tensors = [tensor.to(dtype).requires_grad_() for tensor in inputs]
        if dtype == torch.float32:
            state, mixed, post, comb = fast_read(x, fn, base, scale, rules(c))
            after = fast_write(mixed, out, post)
        else:
            state, mixed, post, comb = plain_read(x, fn, base, scale, c)
            after = plain_write(mixed, out, post)
        weigh = torch.linspace(-1, 2, after.numel(), dtype=dtype).view(after.shape)
        loss = (after * weigh).sum() + (state * weigh[..., 0, :]).sum()
        return state, after, post, comb, *torch.autograd.grad(loss, tensors)

    for fast, plain in zip(run(torch.float32), run(torch.float64), strict=True):
        torch.testing.assert_close(fast.double(), plain, atol=3e-6 * plain.abs().max().item(), rtol=0)


def test_gradients_of_the_twin():
    c = config(hidden_size=8, num_attention_heads=1, hc_mult=2, hc_sinkhorn_iters=5)
    tensors = [draw(1, 2, 8).requires_grad_(), *(p.requires_grad_() for p in parameters(c))]
    assert torch.autograd.gradcheck(lambda *t: plain_read(*t, c), tensors)


@pytest.mark.skipif(library() is None, reason="no C++ compiler")
def test_several_threads_give_the_same():
    c = config()
    tensors = [draw(3, 111, 4, 32).float().requires_grad_(), *(p.float().requires_grad_() for p in parameters(c))]

    def run(threads):
        torch.set_num_threads(threads)
        try:
            state, mixed, post, _ = fast_read(*tensors, rules(c))
            after = fast_write(mixed, state, post)
            return after, *torch.autograd.grad(after.square().sum(), tensors)
        finally:
            torch.set_num_threads(1)

    one, three, again = run(1), run(3), run(3)
    assert torch.equal(one[0], three[0]) and torch.equal(one[1], three[1])
    for a, b, c in zip(one, three, again, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5 * a.abs().max().item(), rtol=0)
        assert torch.equal(b, c)


@pytest.mark.parametrize("order", ORDERS)
def test_low_precision_keeps_the_mappings_in_float32(order):
    c = config(hc_sinkhorn_order=order)
    module = HyperConnection(c, 1).train()
    for parameter, value in zip(module.parameters(), parameters(c), strict=True):
        parameter.data = value.float()
    x, out = draw(2, 9, 4, 32).float(), draw(2, 9, 32).float()
    exact = module.write(x, out, module.read(x)[1])
    with torch.autocast("cpu", torch.bfloat16):
        state, mapping = module.read(x)
        torch.testing.assert_close(module.write(x, out, mapping), exact)
        assert state.dtype == torch.float32
    module.bfloat16()
    state, mapping = module.read(x.bfloat16())
    after = module.write(x.bfloat16(), out.bfloat16(), mapping)
    assert state.dtype == after.dtype == torch.bfloat16 and module.sampled.dtype == torch.float32
    assert (module.sampled.sum(-1) - 1).abs().max() < 1e-5
    torch.testing.assert_close(after.float(), exact, atol=0.1, rtol=0.02)


# --- training ---------------------------------------------------------------------------------------------------------


def train(model: Transformer, steps: int, rate: float = 4e-3) -> list[float]:
    """Losses on sequences that count on modulo 97, each from a place and by a step of its own."""
    optimizer, losses = MuonAdamW(model.train()), []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        first, by = torch.randint(0, 97, (2, 8, 1), generator=generator)
        ids = (first + by % 7 * torch.arange(33)) % 97
        total = model.losses(ids[:, :-1], ids[:, 1:]).total
        total.backward()
        optimizer.step(rate)
        optimizer.zero_grad()
        losses.append(total.item())
    return losses


def test_mappings_leave_the_identity():
    shape = small_v3(97, width=64, layers=4, experts=0)
    model = Transformer(replace(shape, model_type="twelve", hc_mult=4)).init_weights(0)
    ids = torch.randint(0, 97, (2, 16))
    model.train().losses(ids, ids)
    parts = [part for layer in model.layers for part in (layer.attn_hc, layer.ffn_hc)]
    before = torch.stack([part.sampled for part in parts])
    losses = train(model, 40)
    assert losses[-1] < 0.9 * losses[0]
    after = torch.stack([part.sampled for part in parts])
    assert (after.sum(-1) - 1).abs().max() < 1e-5  # the side normalised last
    assert (after.sum(-2) - 1).abs().max() < 1e-2
    moved = (after - before).abs().amax((-1, -2)).mean(-1)  # a sub-layer's largest change of an entry
    assert moved[1:].min() > 1e-3 and moved.max() > 0.01  # the first mixes streams that are still equal
    assert after.std(1).max() > 5e-3  # and differ between tokens
    assert 0.999 < sampled_gain(model.layers) < 1.01
    streams = model.embed_tokens(ids)[:, :, None].expand(-1, -1, 4, -1)
    for layer in model.layers:
        streams, _ = layer(streams, model.positions(ids))
    assert (streams.std(-2) / streams.std()).mean() > 0.05  # equal streams part


def test_gains():
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(5, 4, 4, generator=generator) for _ in range(60)]
    row, column = composite_gain([sinkhorn(one, 20) for one in logits])
    assert abs(row - 1) < 1e-2 and abs(column - 1) < 1e-2
    assert min(composite_gain([torch.eye(4) + 0.3 * one for one in logits])) > 100
    first, second = torch.tensor([[1.0, -2.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0], [3.0, 0.0]])
    assert composite_gain([first, second]) == (9.0, 7.0)  # second @ first = [[0, 1], [3, -6]]


def test_decoding_equals_the_full_pass():
    _, model = models()
    train(model, 3)
    model = model.double().eval()
    ids = torch.randint(0, 97, (2, 12))
    with torch.no_grad():
        whole, cache = model(ids), model.new_cache(2, 12)
        parts = [model(part, cache) for part in ids.split([5, 1, 4, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-10, rtol=0)
