"""Fast CPU paths, each with a plain twin of the same signature that the tests compare it with.

Both work in pieces that stay in a CPU's caches and take no memory that grows with tokens times tokens or tokens times
experts. They are custom operators, so that `torch.compile` treats each as one call.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

QUERY_BLOCK = 128  # queries at a time: a block of scores stays in the cache, and the causal half is skipped
LOWEST = -80.0  # exponent: e to it adds nothing to 1, and torch's exp is many times slower at -inf and at denormals


# --- attention --------------------------------------------------------------------------------------------------------


def plain_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Causal attention of query, key [B, H, T, K] and value [B, H, T, V] -> [B, H, T, V].

    `mask` [B, 1, T, T] is True where a query may look, and already causal; None means plain causal.
    """
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, scale=scale)


def blocked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """As `plain_attention`; keeps no scores for the backward pass but their log-sum (arXiv 2205.14135)."""
    return _attention(query.contiguous(), key.contiguous(), value.contiguous(), mask, scale)[0]


def _blocks(length: int):
    return ((start, min(start + QUERY_BLOCK, length)) for start in range(0, length, QUERY_BLOCK))


def _hide(scores: Tensor, mask: Tensor | None, start: int, end: int, value: float) -> None:
    """Put `value` where the queries start .. end may not look, in scores [B, H, end - start, end]."""
    if mask is None:
        later = torch.ones(end - start, end - start, dtype=torch.bool, device=scores.device).triu_(1)
        scores[..., start:].masked_fill_(later, value)
    else:
        scores.masked_fill_(~mask[:, :, start:end, :end], value)


@custom_op("twelve::blocked_attention", mutates_args=())
def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Output [B, H, T, V] and the scores' log-sum-exp [B, H, T, 1]."""
    batch, heads, length, _ = query.shape
    q, k, v = query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)
    out, log_sum = torch.empty_like(v), query.new_empty(batch, heads, length, 1)
    buffer = query.new_empty(batch * heads * min(QUERY_BLOCK, length) * length)
    for start, end in _blocks(length):
        flat = buffer[: batch * heads * (end - start) * end].view(batch * heads, end - start, end)
        torch.baddbmm(flat, q[:, start:end], k[:, :end].mT, beta=0, alpha=scale, out=flat)
        scores = flat.view(batch, heads, end - start, end)
        _hide(scores, mask, start, end, float("-inf"))
        top = scores.amax(-1, keepdim=True)
        total = scores.sub_(top).clamp_(min=LOWEST).exp_().sum(-1, keepdim=True)
        out[:, start:end] = torch.bmm(flat, v[:, :end]).div_(total.flatten(0, 1))
        log_sum[:, :, start:end] = total.log_().add_(top)
    return out.view(batch, heads, length, -1), log_sum


@_attention.register_fake
def _(query, key, value, mask, scale):
    return torch.empty_like(value), query.new_empty(*query.shape[:3], 1)


@custom_op("twelve::blocked_attention_backward", mutates_args=())
def _attention_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, out: Tensor, log_sum: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, heads, length, _ = query.shape
    q, k, v, grad = (x.flatten(0, 1) for x in (query, key, value, grad_out))
    shift = log_sum.flatten(0, 1).neg()
    row = (grad_out * out).sum(-1, keepdim=True).flatten(0, 1).neg_()  # each row's sum of p * dp, negative
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    buffers = query.new_empty(2, batch * heads * min(QUERY_BLOCK, length) * length)
    for start, end in _blocks(length):
        weights, inner = (b[: batch * heads * (end - start) * end].view(-1, end - start, end) for b in buffers)
        torch.baddbmm(shift[:, start:end], q[:, start:end], k[:, :end].mT, alpha=scale, out=weights).exp_()
        _hide(weights.view(batch, heads, end - start, end), mask, start, end, 0.0)
        # torch multiplies a batch at once only into memory of its own, so products are added afterwards
        grad_v[:, :end] += torch.bmm(weights.mT, grad[:, start:end])
        torch.baddbmm(row[:, start:end], grad[:, start:end], v[:, :end].mT, out=inner)
        inner.mul_(weights)
        grad_q[:, start:end] = torch.bmm(inner, k[:, :end])
        grad_k[:, :end] += torch.bmm(inner.mT, q[:, start:end])
    grad_q.mul_(scale)
    grad_k.mul_(scale)
    return grad_q.view_as(query), grad_k.view_as(key), grad_v.view_as(value)


@_attention_backward.register_fake
def _(grad_out, query, key, value, mask, out, log_sum, scale):
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _keep_attention(ctx, inputs, output) -> None:
    query, key, value, mask, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, mask, *output)


def _attention_gradient(ctx, grad_out: Tensor, _):
    return *_attention_backward(grad_out.contiguous(), *ctx.saved_tensors, ctx.scale), None, None


_attention.register_autograd(_attention_gradient, setup_context=_keep_attention)


# --- routed experts ---------------------------------------------------------------------------------------------------


def plain_experts(x: Tensor, gate_up: Tensor, down: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
    """Sum over the chosen experts of gate * expert(x): every expert on every token, then the chosen ones weighted.

    x [N, D], gate_up [E, 2I, D] (gate rows first), down [E, D, I], chosen [N, k] int64, gates [N, k] -> [N, D].
    """
    gate, up = torch.einsum("nd,ewd->new", x, gate_up).chunk(2, dim=-1)
    every = torch.einsum("new,edw->ned", F.silu(gate) * up, down)
    picked = every.gather(1, chosen[..., None].expand(-1, -1, x.shape[-1]))
    return (picked * gates[..., None]).sum(1)


def sorted_experts(x: Tensor, gate_up: Tensor, down: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
    """As `plain_experts`: sorted by expert, one grouped product a projection, no wait for the host; for CUDA."""
    k = chosen.shape[1]
    order = chosen.flatten().argsort(stable=True)
    counts = chosen.new_zeros(gate_up.shape[0])  # bincount would wait for the device
    ends = counts.scatter_add_(0, chosen.flatten(), torch.ones_like(chosen).flatten()).cumsum(0).to(torch.int32)
    kind = x.device.type
    if torch.is_autocast_enabled(kind):  # which knows nothing of grouped_mm
        x = x.to(torch.get_autocast_dtype(kind))
    rows = x[order // k]
    gate, up = F.grouped_mm(rows, gate_up.to(rows.dtype).transpose(1, 2), offs=ends).chunk(2, dim=-1)
    out = F.grouped_mm(F.silu(gate) * up, down.to(rows.dtype).transpose(1, 2), offs=ends)
    out = out * gates.flatten()[order, None]
    return torch.empty_like(out).index_copy(0, order, out).view(-1, k, x.shape[-1]).sum(1)


def one_token_experts(x: Tensor, gate_up: Tensor, down: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
    """As `plain_experts` for a single token, N = 1, without gradients: a few matrix-vector products and no sorting."""
    weights = gates[0].unbind()
    out = torch.zeros_like(x)
    for weight, expert in zip(weights, chosen[0].tolist(), strict=True):
        gate, up = F.linear(x, gate_up[expert]).chunk(2, dim=-1)
        out.addcmul_(F.linear(F.silu(gate).mul_(up), down[expert]), weight)
    return out


def grouped_experts(x: Tensor, gate_up: Tensor, down: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
    """As `plain_experts`: one expert after another, each on its own tokens; for CPUs, and right on any device."""
    return _experts(x, gate_up, down, chosen, gates)[0]


def _by_expert(counts: list[int]):
    """(expert, its slice of the sorted rows) of every expert that has rows."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
            start += count


@custom_op("twelve::grouped_experts", mutates_args=())
def _experts(
    x: Tensor, gate_up: Tensor, down: Tensor, chosen: Tensor, gates: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output [N, D]; for the backward: gate and up before the activation, order of the rows, counts of the experts."""
    order = chosen.flatten().argsort(stable=True)
    counts = torch.bincount(chosen.flatten(), minlength=gate_up.shape[0])
    tokens, weights = order // chosen.shape[1], gates.flatten().index_select(0, order)[:, None]
    out, hidden = torch.zeros_like(x), x.new_empty(order.shape[0], gate_up.shape[1])
    for expert, part in _by_expert(counts.tolist()):
        rows = tokens[part]
        both = torch.mm(x.index_select(0, rows), gate_up[expert].T, out=hidden[part])
        gate, up = both.chunk(2, dim=-1)
        result = F.silu(gate).mul_(up) @ down[expert].T
        out.index_add_(0, rows, result.mul_(weights[part]))
    return out, hidden, order, counts


@_experts.register_fake
def _(x, gate_up, down, chosen, gates):
    rows, hidden = chosen.numel(), gate_up.shape[1]
    return torch.empty_like(x), x.new_empty(rows, hidden), chosen.new_empty(rows), chosen.new_empty(gate_up.shape[0])


@custom_op("twelve::grouped_experts_backward", mutates_args=())
def _experts_backward(
    grad_out: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, gates: Tensor, hidden: Tensor, order: Tensor,
    counts: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    tokens, weights = order // gates.shape[1], gates.flatten().index_select(0, order)[:, None]
    grad_x, grad_weights = torch.zeros_like(x), torch.empty_like(weights[:, 0])
    grad_gate_up, grad_down = torch.empty_like(gate_up), torch.empty_like(down)
    for expert in (counts == 0).nonzero()[:, 0].tolist():
        grad_gate_up[expert], grad_down[expert] = 0, 0
    for expert, part in _by_expert(counts.tolist()):
        rows = tokens[part]
        gate, up = hidden[part].chunk(2, dim=-1)
        sigmoid = gate.sigmoid()
        silu = gate * sigmoid
        inner = silu * up
        grad = grad_out.index_select(0, rows)
        grad_inner = grad @ down[expert]
        torch.sum(grad_inner * inner, -1, out=grad_weights[part])  # before the gate's weight joins
        torch.mm(grad.T, inner.mul_(weights[part]), out=grad_down[expert])
        grad_inner.mul_(weights[part])
        both = torch.empty_like(hidden[part])
        grad_gate, grad_up = both.chunk(2, dim=-1)
        torch.mul(grad_inner, silu, out=grad_up)
        # d silu = sigmoid + silu * (1 - sigmoid)
        slope = silu.addcmul_(silu, sigmoid, value=-1).add_(sigmoid)
        torch.mul(grad_inner.mul_(up), slope, out=grad_gate)
        torch.mm(both.T, x.index_select(0, rows), out=grad_gate_up[expert])
        grad_x.index_add_(0, rows, both @ gate_up[expert])
    grad_gates = torch.empty_like(grad_weights).index_copy_(0, order, grad_weights).view_as(gates)
    return grad_x, grad_gate_up, grad_down, grad_gates


@_experts_backward.register_fake
def _(grad_out, x, gate_up, down, gates, hidden, order, counts):
    return torch.empty_like(x), torch.empty_like(gate_up), torch.empty_like(down), torch.empty_like(gates)


def _keep_experts(ctx, inputs, output) -> None:
    x, gate_up, down, _, gates = inputs
    _, hidden, order, counts = output
    ctx.save_for_backward(x, gate_up, down, gates, hidden, order, counts)


def _experts_gradient(ctx, grad_out: Tensor, *_):
    grad_x, grad_gate_up, grad_down, grad_gates = _experts_backward(grad_out.contiguous(), *ctx.saved_tensors)
    return grad_x, grad_gate_up, grad_down, None, grad_gates


_experts.register_autograd(_experts_gradient, setup_context=_keep_experts)
