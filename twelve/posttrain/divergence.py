"""Divergences between what two models expect next, from their last states: no more than a chunk of logits at a time.

Both functions make their gradients on the way forward, as `linear_cross_entropy` does; the plain twins say the same in
the obvious way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

LOGITS = 1 << 22  # elements of a chunk of logits; a few chunks exist at once
Teaching = tuple[Tensor, Tensor, float]  # last states [N, D'], head [V, D'], weight


class _ReverseKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, teachings: Sequence[Teaching], chunk: int) -> Tensor:
        gradients = _Gradients(ctx, hidden, weight)
        loss = torch.zeros((), dtype=gradients.wide, device=hidden.device)
        heads = [head.to(states.dtype) for states, head, _ in teachings]
        for part in _parts(hidden, chunk):
            mine = gradients.logits(part).log_softmax(-1)
            apart = torch.zeros_like(mine)  # sum over teachers of weight * log(pi / pi_teacher)
            for (states, _, share), head in zip(teachings, heads, strict=True):
                apart.add_(mine - (states[part] @ head.T).to(mine.dtype).log_softmax(-1), alpha=share)
            mine.exp_()
            divergence = (mine * apart).sum(-1, keepdim=True)
            loss += divergence.sum()
            gradients.add(part, apart.sub_(divergence).mul_(mine))
        return gradients.keep(loss)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return *_scaled(ctx, grad), None, None


def reverse_kl(hidden: Tensor, weight: Tensor, teachings: Sequence[Teaching], chunk: int | None = None) -> Tensor:
    """Mean over N positions of sum_i w_i KL(pi || pi_i) in nats, over the full vocabulary: V4's on-policy distillation.

    The student's distribution pi is softmax(hidden @ weight.T), with hidden [N, D] and weight [V, D]; each teacher
    brings its last states, head and weight w_i. The gradient is exact, and zero where student and teacher agree.
    """
    return _ReverseKL.apply(hidden, weight, teachings, chunk or _chunk(weight))


def plain_reverse_kl(hidden: Tensor, weight: Tensor, teachings: Sequence[Teaching]) -> Tensor:
    """`reverse_kl` with all logits at once."""
    mine = (hidden @ weight.T).log_softmax(-1)
    theirs = [((states @ head.T).log_softmax(-1), share) for states, head, share in teachings]
    return sum(share * (mine.exp() * (mine - other)).sum(-1) for other, share in theirs).mean()


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, targets: Tensor, ids: Tensor, logprobs: Tensor, temperature: float,
        hard: float, chunk: int,
    ) -> Tensor:  # fmt: skip
        gradients = _Gradients(ctx, hidden, weight)
        loss = torch.zeros((), dtype=gradients.wide, device=hidden.device)
        for part in _parts(hidden, chunk):
            logits = gradients.logits(part)
            theirs = logprobs[part].to(logits.dtype).softmax(-1)  # the 16 bits they were stored in do not sum to one
            mine = (logits / temperature).log_softmax(-1)
            outside = mine.scatter(1, ids[part], -torch.inf)  # the bucket of all that the teacher did not name
            log_rest = outside.logsumexp(-1, keepdim=True).clamp(min=torch.finfo(mine.dtype).min)
            buckets = torch.cat((mine.gather(1, ids[part]), log_rest), -1)
            loss += (1 - hard) * temperature**2 * (torch.xlogy(theirs, theirs) - theirs * buckets).sum()
            slope = mine.exp_().scatter_add_(1, ids[part], -theirs[:, :-1])
            slope.sub_(outside.sub_(log_rest).exp_().mul_(theirs[:, -1:])).mul_((1 - hard) * temperature)
            if hard:
                log_p = logits.log_softmax(-1)
                index = targets[part, None]
                loss -= hard * log_p.gather(1, index).sum()
                slope.add_(log_p.exp_(), alpha=hard).scatter_add_(1, index, slope.new_full(index.shape, -hard))
            gradients.add(part, slope)
        return gradients.keep(loss)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return *_scaled(ctx, grad), None, None, None, None, None, None


def soft_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, ids: Tensor, logprobs: Tensor, temperature: float = 1.0,
    hard: float = 0.0, chunk: int | None = None,
) -> Tensor:  # fmt: skip
    """Mean over N positions of hard * cross entropy + (1 - hard) * T^2 * KL(teacher || student), in nats.

    The student's logits are hidden [N, D] @ weight [V, D].T. Of the teacher there are the k likeliest tokens, ids
    [N, k] int64, and logprobs [N, k + 1] of these and of all others together, at temperature T. The divergence is that
    of these k + 1 buckets, and of the whole distribution where k = V; T^2 keeps the size of its gradient (arXiv
    1503.02531). The cross entropy, against targets [N] int64, is at temperature 1.
    """
    chunk = chunk or _chunk(weight)
    return _SoftCrossEntropy.apply(hidden, weight, targets, ids, logprobs, temperature, hard, chunk)


def plain_soft_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, ids: Tensor, logprobs: Tensor, temperature: float = 1.0,
    hard: float = 0.0,
) -> Tensor:  # fmt: skip
    """`soft_cross_entropy` with all logits at once."""
    logits = hidden @ weight.T
    theirs, mine = logprobs.to(logits.dtype).softmax(-1), (logits / temperature).softmax(-1)
    named = mine.gather(1, ids)
    buckets = torch.cat((named, (1 - named.sum(-1, keepdim=True)).clamp(min=1e-30)), -1)  # nothing is left if k = V
    soft = (torch.xlogy(theirs, theirs) - torch.xlogy(theirs, buckets)).sum(-1).mean()
    return hard * F.cross_entropy(logits, targets) + (1 - hard) * temperature**2 * soft


@torch.no_grad()
def top_logprobs(hidden: Tensor, weight: Tensor, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens [N, k] under softmax(hidden @ weight.T / temperature), and log-probabilities [N, k + 1] of
    these and of all others together (-inf where there are none)."""
    ids, logprobs = [], []
    used = weight.to(hidden.dtype)
    for part in _parts(hidden, _chunk(weight)):
        logits = (hidden[part] @ used.T).float().div_(temperature).log_softmax(-1)
        top, index = logits.topk(k)
        rest = logits.scatter_(1, index, -torch.inf).logsumexp(-1, keepdim=True)
        ids.append(index)
        logprobs.append(torch.cat((top, rest), -1))
    return torch.cat(ids), torch.cat(logprobs)


class _Gradients:
    """What a chunked loss gathers: the mean's gradients of hidden [N, D] and weight [V, D], where they are wanted."""

    def __init__(self, ctx, hidden: Tensor, weight: Tensor) -> None:
        self.ctx, self.rows, self.used = ctx, hidden, weight.to(hidden.dtype)
        self.wide = torch.promote_types(hidden.dtype, torch.float32)
        self.hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        self.weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None

    def logits(self, part: slice) -> Tensor:
        return (self.rows[part] @ self.used.T).to(self.wide)

    def add(self, part: slice, slope: Tensor) -> None:
        """`slope` [C, V] is the gradient of the sum with respect to the chunk's logits."""
        slope = slope.div_(len(self.rows)).to(self.rows.dtype)
        if self.hidden is not None:
            torch.mm(slope, self.used, out=self.hidden[part])
        if self.weight is not None:
            self.weight += slope.T @ self.rows[part]

    def keep(self, loss: Tensor) -> Tensor:
        self.ctx.save_for_backward(self.hidden, self.weight)
        return loss / max(1, len(self.rows))


def _scaled(ctx, grad: Tensor) -> list[Tensor | None]:
    return [None if saved is None else saved * grad.to(saved.dtype) for saved in ctx.saved_tensors]


def _chunk(weight: Tensor) -> int:
    return max(16, LOGITS // len(weight))


def _parts(hidden: Tensor, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, len(hidden), chunk)]
