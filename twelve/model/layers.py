"""The small parts: RMSNorm, the SwiGLU layer, and a loss that never holds all the logits."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TINY = torch.finfo(torch.float32).tiny


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class MLP(nn.Module):
    """SwiGLU: W_down(silu(W_gate x) * W_up x)."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and gradients chunk by chunk: a chunk of logits stays in the cache, and none is kept for the backward."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int) -> Tensor:
        valid = targets >= 0
        index = targets.clamp(min=0)[:, None]
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        with_gradient = any(ctx.needs_input_grad)
        grad_hidden = torch.empty_like(hidden) if with_gradient else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        weight_used = weight.to(hidden.dtype)
        counted = hidden * valid[:, None]
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            logits = hidden[part] @ weight_used.T
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            if bias is not None:
                logits += bias
            # one pass, a row at a time; logsumexp would be five over the chunk
            probabilities = torch.softmax(logits, -1, out=logits if logits.device.type == "cpu" else None)
            wanted = probabilities.gather(1, index[part]).clamp_(min=TINY)
            loss -= (wanted.log_()[:, 0] * valid[part]).sum()
            if with_gradient:
                slope = probabilities.scatter_add_(1, index[part], torch.full_like(wanted, -1.0)).to(hidden.dtype)
                torch.mm(slope, weight_used, out=grad_hidden[part])
                if grad_weight is None:
                    continue
                if slope.dtype == grad_weight.dtype:
                    grad_weight.addmm_(slope.T, counted[part])
                else:  # bfloat16 products, gathered in the weight's float32
                    grad_weight += slope.T @ counted[part]
        count = valid.sum().clamp(min=1)
        if with_gradient:
            ctx.save_for_backward(grad_hidden.mul_(valid[:, None]), grad_weight, count)
        return loss / count

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        grad_hidden, grad_weight, count = ctx.saved_tensors
        grad_loss = grad_loss / count
        if grad_weight is not None:
            grad_weight = grad_weight * grad_loss.to(grad_weight.dtype)
        return grad_hidden * grad_loss.to(grad_hidden.dtype), grad_weight, None, None, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = 256) -> Tensor:
    """Mean cross entropy in nats of logits hidden @ weight.T against targets; the plain twin is `plain_cross_entropy`.

    hidden [N, D], weight [V, D], targets [N] int64, negative where there is no target. Returns a float32 scalar, zero
    when nothing has a target. Probabilities below 1.2e-38 (87 nats) count as that.
    """
    return _LinearCrossEntropy.apply(_for_products(hidden), weight, None, targets, chunk)


def sampled_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, drawn: int, draw: torch.Generator, chunk: int = 256
) -> Tensor:
    """`linear_cross_entropy` over a part of the vocabulary: what the targets name, and `drawn` of the other entries,
    each of which stands for (others / drawn) in the softmax's sum (importance sampling; Bengio and Senecal 2008).

    An estimate, a little too low, at a share of the arithmetic; over all entries where few are others. `draw` is a
    generator on the CPU.
    """
    named = torch.zeros(len(weight), dtype=torch.bool, device=weight.device)
    named[targets[targets >= 0]] = True
    others = (~named).nonzero()[:, 0]
    if len(others) <= 2 * drawn:
        return linear_cross_entropy(hidden, weight, targets, chunk)
    others_drawn = others[torch.randperm(len(others), generator=draw)[:drawn].to(others.device)]
    entries = torch.cat((named.nonzero()[:, 0], others_drawn))
    bias = torch.zeros(len(entries), device=weight.device)
    bias[-drawn:] = math.log(len(others) / drawn)
    place = torch.full((len(weight),), -1, device=weight.device)
    place[entries] = torch.arange(len(entries), device=weight.device)
    targets = torch.where(targets >= 0, place[targets.clamp(min=0)], -1)
    return _LinearCrossEntropy.apply(_for_products(hidden), weight.index_select(0, entries), bias, targets, chunk)


def _for_products(hidden: Tensor) -> Tensor:
    """In the type of autocast, which does not reach all products of a loss that writes its own backward."""
    kind = hidden.device.type
    return hidden.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else hidden


def plain_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The same in the obvious way."""
    loss = F.cross_entropy((hidden @ weight.T).double(), targets.clamp(min=-1), ignore_index=-1, reduction="sum")
    return loss / (targets >= 0).sum().clamp(min=1)


class _LinearLogProbs(torch.autograd.Function):
    """Log-probabilities and entropies chunk by chunk; the backward makes the logits of a chunk again."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk: int):
        ctx.temperature, ctx.chunk = temperature, chunk
        used = weight.to(hidden.dtype)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logprobs, entropies, log_sums = (hidden.new_empty(len(hidden), dtype=wide) for _ in range(3))
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits = (hidden[part] / temperature @ used.T).to(wide)
            every = logits.log_softmax(-1)
            logprobs[part] = every.gather(1, targets[part, None])[:, 0]
            log_sums[part] = logits.gather(1, targets[part, None])[:, 0] - logprobs[part]
            entropies[part] = -torch.linalg.vecdot(every.exp(), every)
        ctx.save_for_backward(hidden, weight, targets, log_sums)
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx, grad: Tensor, _):
        hidden, weight, targets, log_sums = ctx.saved_tensors
        used = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        grad = grad / ctx.temperature
        for start in range(0, len(hidden), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            logits = (hidden[part] / ctx.temperature @ used.T).to(grad.dtype)
            slope = logits.sub_(log_sums[part, None]).exp_().mul_(-grad[part, None])
            slope = slope.scatter_add_(1, targets[part, None], grad[part, None]).to(hidden.dtype)
            torch.mm(slope, used, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight += slope.T @ hidden[part]
        return grad_hidden, grad_weight, None, None, None


LOGITS, ROWS = 1 << 23, 256  # most elements (32 MiB) and rows of a chunk of logits: small ones stay in the cache


def linear_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probability (natural) of each target under softmax(hidden @ weight.T / temperature), and the entropy there.

    hidden [N, D], weight [V, D], targets [N] int64 -> two float32 [N]; only the first has a gradient. No more than
    LOGITS logits exist at a time.
    """
    chunk = chunk or max(16, min(ROWS, LOGITS // len(weight)))
    return _LinearLogProbs.apply(hidden, weight, targets, temperature, chunk)
