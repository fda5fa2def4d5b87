"""Hyper-connections: the residual as n streams that every sub-layer reads, writes and mixes (mHC, arXiv 2512.24880).

A sub-layer F turns the streams x [n, D] of a token into x_i = sum_j comb[i, j] x_j + post[i] * F(sum_j pre[j] x_j). The
three mappings depend on the token. `comb` is doubly stochastic, so that neither signals nor gradients grow over depth
however many mappings follow one another; unconstrained (HC, arXiv 2409.19606) they may.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twelve.config import ModelConfig
from twelve.model.fast_streams import LEAST, fast_read, fast_write, fits, rules

# Weight with which a sub-layer first writes to a stream of its own; the others share the rest of n. Were all equal, the
# streams would hold the same, no mapping but post would have a gradient, and after 40 steps they had hardly parted.
FAVOURED = 1.6
# Logit of comb's diagonal at first: e^3 / (e^3 + 3) = 0.87 for 4 streams. Half of what sets a stream apart is left four
# sub-layers on. A slope is as large as its entry: at 8, where others begin, those beside the diagonal have a 130th of
# this one, and mappings were seen to stay the identity; at 4 they move half as far in as many steps.
DIAGONAL = 3.0
SAMPLED = 8  # tokens whose mappings are kept for `composite_gain`

Mapping = tuple[Tensor, Tensor]  # comb applied to the streams [..., n, D], and post [..., n]


class Residual(nn.Module):
    """The plain residual connection, in the shape of a hyper-connection."""

    sampled = None

    def read(self, x: Tensor) -> tuple[Tensor, None]:
        return x, None

    def write(self, x: Tensor, out: Tensor, mapping: None) -> Tensor:
        return x + out


class HyperConnection(nn.Module):
    """Sub-layer `index`'s mappings; parameters as transformers' deepseek_v4: pre, post, comb one after the other."""

    sampled: Tensor | None = None  # [up to SAMPLED, n, n]: comb of some tokens of the last training pass

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        n = config.hc_mult
        self.config, self.index, self.rules = config, index, rules(config)
        self.fn = nn.Parameter(torch.empty((2 + n) * n, n * config.hidden_size))
        self.base = nn.Parameter(torch.empty((2 + n) * n))
        self.scale = nn.Parameter(torch.empty(3))

    @torch.no_grad()
    def initialise(self) -> None:
        """Begin as the plain residual: a sub-layer reads the streams' mean, which mixing keeps, and adds its output.

        Each favours another stream when it writes, so they differ from the start. Unconstrained mappings begin as HC's:
        one stream read, all written alike, none mixed.
        """
        n = self.config.hc_mult
        self.fn.zero_()
        self.scale.fill_(0.01)
        pre, post, comb = self.base.split((n, n, n * n))
        if self.config.hc_constrained:
            pre.fill_(_logit(1 / n))
            post.fill_(_logit((n - FAVOURED) / (n - 1) / 2))[self.index % n] = _logit(FAVOURED / 2)
            comb.copy_(DIAGONAL * torch.eye(n).flatten())
        else:
            pre.zero_()[self.index % n] = 1.0
            post.fill_(1.0)
            comb.copy_(torch.eye(n).flatten())

    def read(self, x: Tensor) -> tuple[Tensor, Mapping]:
        """Streams x [B, T, n, D] -> the sub-layer's input [B, T, D], and what `write` needs."""
        if fits(x, self.fn, self.config):
            state, mixed, post, comb = fast_read(x, self.fn, self.base, self.scale, self.rules)
        else:
            state, mixed, post, comb = plain_read(x, self.fn, self.base, self.scale, self.config)
        if self.training:
            every = comb.detach().flatten(0, -3)
            self.sampled = every[:: max(1, len(every) // SAMPLED)][:SAMPLED].clone()
        return state, (mixed, post)

    def write(self, x: Tensor, out: Tensor, mapping: Mapping) -> Tensor:
        """The sub-layer's output [B, T, D] to all streams -> [B, T, n, D]."""
        mixed, post = mapping
        if mixed.dtype == out.dtype and fits(x, self.fn, self.config):
            return fast_write(mixed, out, post)
        return plain_write(mixed, out, post).to(x.dtype)


class HyperHead(nn.Module):
    """The streams' weighted sum after the last layer; parameters as transformers' deepseek_v4."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        n = config.hc_mult
        self.config = config
        self.hc_fn = nn.Parameter(torch.empty(n, n * config.hidden_size))
        self.hc_base = nn.Parameter(torch.empty(n))
        self.hc_scale = nn.Parameter(torch.empty(1))

    @torch.no_grad()
    def initialise(self) -> None:
        self.hc_fn.zero_()
        self.hc_scale.fill_(0.01)
        self.hc_base.fill_(_logit(1 / self.config.hc_mult))

    def forward(self, x: Tensor) -> Tensor:
        """Streams [B, T, n, D] -> [B, T, D]."""
        raw = _project(x, self.hc_fn, self.config)
        weights = (self.hc_scale.to(raw) * raw + self.hc_base.to(raw)).sigmoid() + _lift(self.config)
        return _weighted_sum(weights, x)


def _logit(share: float) -> float:
    return math.log(share / (1 - share))


def _lift(config: ModelConfig) -> float:
    """What deepseek_v4 adds to keep its weights and sums above zero."""
    return config.hc_eps if config.hc_sinkhorn_order == "deepseek_v4" else 0.0


def _project(x: Tensor, fn: Tensor, config: ModelConfig) -> Tensor:
    """fn times the normed streams [..., n, D], in float32 or wider: rounded mappings would not sum to 1."""
    with torch.autocast(x.device.type, enabled=False):
        flat = x.flatten(-2).to(torch.promote_types(x.dtype, torch.float32))
        return F.linear(F.rms_norm(flat, flat.shape[-1:], eps=config.rms_norm_eps), fn.to(flat))


def _weighted_sum(weights: Tensor, x: Tensor) -> Tensor:
    """weights [..., n], streams [..., n, D] -> [..., D] in the streams' type."""
    with torch.autocast(x.device.type, enabled=False):
        return (weights[..., None, :] @ x.to(weights)).squeeze(-2).to(x.dtype)


def plain_read(
    x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, config: ModelConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Streams x [..., n, D] -> state [..., D], streams after comb [..., n, D], post [..., n] and comb [..., n, n].

    All but the state are in float32 or wider.
    """
    pre, post, comb = coefficients(x, fn, base, scale, config)
    with torch.autocast(x.device.type, enabled=False):
        return _weighted_sum(pre, x), comb @ x.to(comb), post, comb


def plain_write(mixed: Tensor, out: Tensor, post: Tensor) -> Tensor:
    """Mixed streams [..., n, D] plus post [..., n] times the output [..., D]."""
    return mixed + post[..., None] * out[..., None, :]


def coefficients(
    x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, config: ModelConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """pre, post [..., n] and comb [..., n, n] of streams x [..., n, D], in float32 or wider (section 4.2).

    comb's rows are the streams written, its columns those read. deepseek_v4 applies its comb transposed, and writes it
    so in its parameters.
    """
    raw = _project(x, fn, config)
    n = config.hc_mult
    if not config.hc_constrained:
        raw = raw.tanh()
    sizes = (n, n, n * n)
    parts = zip(raw.split(sizes, -1), base.to(raw).split(sizes), scale.to(raw), strict=True)
    pre, post, comb = (factor * part + static for part, static, factor in parts)
    comb = comb.unflatten(-1, (n, n))
    if config.hc_sinkhorn_order == "deepseek_v4":
        comb = comb.mT
    if config.hc_constrained:
        pre, post = pre.sigmoid() + _lift(config), 2 * post.sigmoid()
        comb = sinkhorn(comb, config.hc_sinkhorn_iters, _lift(config), config.hc_tolerance)
    return pre, post, comb


def sinkhorn(logits: Tensor, iterations: int, lift: float = 0.0, tolerance: float = 0.0) -> Tensor:
    """Positive matrices [..., n, n] from logits, nearly doubly stochastic: columns, then rows, so many times.

    Rows end with a sum of 1, columns near it. The first step is a softmax, which takes each column's maximum away.
    `lift` is added after it, and to every sum. With a `tolerance` a matrix whose columns are that close is left alone.
    """

    def normalise(matrices: Tensor, dim: int) -> Tensor:
        return matrices / (matrices.sum(dim, keepdim=True) + lift)

    matrices = normalise(logits.softmax(-2).clamp(min=LEAST) + lift, -1)
    for _ in range(iterations - 1):
        after = normalise(normalise(matrices, -2), -1)
        if tolerance:
            done = ((matrices.sum(-2) - 1).abs().amax(-1) <= tolerance)[..., None, None]
            after = torch.where(done, matrices, after)
            if done.all():
                break
        matrices = after
    return matrices


def composite_gain(matrices: Sequence[Tensor]) -> tuple[float, float]:
    """How much the product over depth of residual mappings [..., n, n], the first sub-layer's first, can amplify.

    The largest row sum (forward) and the largest column sum (backward) of absolute values, each a mean over tokens.
    """
    product = matrices[0]
    for matrix in matrices[1:]:
        product = matrix @ product
    sizes = product.abs()
    return sizes.sum(-1).amax(-1).mean().item(), sizes.sum(-2).amax(-1).mean().item()


def sampled_gain(layers: Iterable[nn.Module]) -> float | None:
    """The larger `composite_gain` of decoder layers, for tokens of the last training pass; None if none were kept."""
    matrices = [part.sampled for layer in layers for part in (layer.attn_hc, layer.ffn_hc)]
    return max(composite_gain(matrices)) if matrices[0] is not None else None
