"""Choosing packed weights: a search of scales, and error-compensated rounding (GPTQ, arXiv 2210.17323).

Rounding a weight makes an error in the layer's output; GPTQ rounds column by column and moves the columns that are
still to come so that they take the error back, as far as the inputs seen in calibration text let them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twelve.errors import InputError
from twelve.model.moe import Experts
from twelve.quantize import Form, Packed, pack

DAMPING = 0.01  # of the mean of the Hessian's diagonal, added to it (the paper's)
STEPS = 8  # scales tried for a group of 4 bits
ROWS = 4096  # rounded at a time where columns do not wait for each other
BORROWED = 0.1  # weight of a token that an expert would not have seen: enough to know the directions
LARGEST = 65504.0  # of float16


# --- one matrix -------------------------------------------------------------------------------------------------------


def fit(w: Tensor, form: Form, importance: Tensor) -> tuple[Tensor, Tensor | None]:
    """Scale and low (None if symmetric) of groups w [..., group], both [...], rounded to float16.

    8 bits and symmetric forms span the group. With low and 4 bits several spans are tried: each gives numbers q, for
    which weighted least squares gives the best scale and low; what has the least squared error, weighted by
    `importance` [group], wins, as in llama.cpp's search. On SmolLM2 this took a third off the output error, with GPTQ
    or without; more than 8 spans took another hundredth.
    """
    levels = 2**form.bits - 1
    if form.symmetric:
        return _half(w.abs().amax(-1) / (levels // 2)), None
    least, most = w.amin(-1), w.amax(-1)
    best = _half((most - least) / levels), _half(least)
    if form.bits == 8:
        return best
    error = _error(w, *best, form, importance)
    total = importance.sum()
    mean = (w * importance).sum(-1) / total
    for step in range(STEPS):
        span = levels - 0.9 + 1.8 * step / (STEPS - 1)  # levels - 0.9 ... levels + 0.9 steps from least to most
        q = ((w - least[..., None]) * (span / (most - least).clamp(min=1e-30))[..., None]).round_().clamp_(0, levels)
        q_mean = (q * importance).sum(-1) / total
        spread = q - q_mean[..., None]
        variance = (spread.square() * importance).sum(-1)
        scale = (spread * w * importance).sum(-1) / variance.clamp(min=1e-30)
        scale, low = _half(scale), _half(mean - scale * q_mean)
        new = _error(w, scale, low, form, importance)
        better = new < error
        error = torch.where(better, new, error)
        best = torch.where(better, scale, best[0]), torch.where(better, low, best[1])
    return best


def _half(values: Tensor) -> Tensor:
    """As float16 will store them; a group whose weights are out of its reach is refused beforehand."""
    return values.clamp(-LARGEST, LARGEST).half().to(values.dtype)


def nearest(w: Tensor, scale: Tensor, low: Tensor | None, form: Form) -> Tensor:
    """The numbers q, in w's dtype, whose values lie nearest to w [...]; scale and low [...] fit it by broadcasting."""
    zero = 2 ** (form.bits - 1)
    steps = w if low is None else w - low
    q = torch.where(scale == 0, torch.zeros_like(steps), steps / scale).round_()
    return q.add_(zero if low is None else 0).clamp_(0, 2 * zero - 1)


def values(q: Tensor, scale: Tensor, low: Tensor | None, form: Form) -> Tensor:
    return scale * (q - 2 ** (form.bits - 1)) if low is None else scale * q + low


def _error(w: Tensor, scale: Tensor, low: Tensor, form: Form, importance: Tensor) -> Tensor:
    scale, low = scale[..., None], low[..., None]
    difference = values(nearest(w, scale, low, form), scale, low, form) - w
    return difference.square_().mul_(importance).sum(-1)


@torch.no_grad()
def round_plainly(weight: Tensor, form: Form) -> Packed:
    """weight [N, K], each number to the nearest that its group's searched scale has."""
    parts = []
    for rows in weight.split(ROWS):
        groups = rows.float().unflatten(1, (-1, form.group))
        scale, low = fit(groups, form, torch.ones(form.group))
        q = nearest(groups, scale[..., None], None if low is None else low[..., None], form).to(torch.uint8)
        parts.append((q.flatten(1), scale, low))
    q, scale = (torch.cat([part[index] for part in parts]) for index in (0, 1))
    low = None if form.symmetric else torch.cat([part[2] for part in parts])
    return pack(q, scale, low, form.bits, form.group)


@torch.no_grad()
def gptq(weight: Tensor, hessian: Tensor, form: Form) -> Packed:
    """weight [N, K], rounded for inputs x with hessian [K, K] = sum of x x^T, of which any multiple does as well.

    Works in the Hessian's dtype, and group by group: within one, every column's error goes at once into the columns to
    come; beyond, all of the group's errors go in one product. The plain twin, in the tests, does it column by column.
    """
    w = weight.to(hessian.dtype).T.contiguous()  # [K, N]: a column is contiguous
    root = inverse_root(hessian)
    q, scales, lows = torch.empty(w.shape, dtype=torch.uint8), [], []
    for start in range(0, len(w), form.group):
        end = start + form.group
        scale, low = fit(w[start:end].T, form, root.diagonal()[start:end] ** -2)  # the loss of an error, eq. 2
        errors = torch.empty_like(w[start:end])
        for index, column in enumerate(range(start, end)):
            numbers = nearest(w[column], scale, low, form)
            q[column] = numbers.to(torch.uint8)
            errors[index] = (w[column] - values(numbers, scale, low, form)) / root[column, column]
            w[column + 1 : end].addr_(root[column, column + 1 : end], errors[index], alpha=-1)
        w[end:].addmm_(root[start:end, end:].T, errors, alpha=-1)
        scales.append(scale)
        lows.append(low)
    low = None if form.symmetric else torch.stack(lows, 1)
    return pack(q.T, torch.stack(scales, 1), low, form.bits, form.group)


def inverse_root(hessian: Tensor) -> Tensor:
    """Upper triangular U [K, K] with U^T U the inverse of the damped Hessian; computed in float64."""
    wide = hessian.double()
    diagonal = wide.diagonal().clone()
    unseen = diagonal == 0  # an input that is always 0: its weights matter to nothing, and are rounded plainly
    damping = DAMPING * diagonal.mean()
    for _ in range(6):
        damped = wide + torch.diag(damping.expand_as(diagonal) + unseen)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            root, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and root.isfinite().all():
            return root.to(hessian.dtype)
        damping = damping * 10
    raise InputError("the calibration text gives activations that are not numbers: the model is damaged or diverged")


# --- one layer's inputs -----------------------------------------------------------------------------------------------


class Inputs:
    """What the packable modules of one layer see: sums of x x^T of the linear ones, all inputs of the experts."""

    def __init__(self) -> None:
        self.hessians: dict[nn.Module, Tensor] = {}
        self.routed: list[tuple[Tensor, Tensor]] = []
        self._last: tuple[nn.Module | None, Tensor | None] = None, None

    @contextmanager
    def watch(self, modules: list[nn.Module]) -> Iterator[None]:
        hooks = [module.register_forward_pre_hook(self._see) for module in modules]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._last = None, None

    def _see(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        x = arguments[0]
        if isinstance(module, Experts):
            self.routed.append((x, arguments[1]))
            return
        last, seen = self._last
        if x is seen:  # query, key and value, or gate and up, have one Hessian
            self.hessians[module] = self.hessians[last]
            return
        flat = x.flatten(0, -2)
        hessian = self.hessians.setdefault(module, flat.new_zeros(flat.shape[1], flat.shape[1]))
        hessian.addmm_(flat.T, flat)
        self._last = module, x


def gptq_experts(experts: Experts, routed: list[tuple[Tensor, Tensor]], form: Form) -> list[Packed]:
    """Both stacks, each expert by the tokens routed to it; routed: (x [N, D], chosen [N, k]) of every batch.

    An expert that saw fewer tokens than it has inputs borrows others, at a lower weight.
    """
    x, chosen = (torch.cat(parts) for parts in zip(*routed, strict=True))
    made: tuple[list[Packed], list[Packed]] = [], []
    for expert, (gate_up, down) in enumerate(zip(experts.gate_up_proj, experts.down_proj, strict=True)):
        own = (chosen == expert).any(1)
        others = x[~own][: max(0, max(x.shape[1], down.shape[1]) - int(own.sum()))]
        rows = torch.cat((x[own], others))
        share = torch.cat((torch.ones(int(own.sum())), torch.full((len(others),), BORROWED)))[:, None]
        made[0].append(gptq(gate_up, rows.T @ (rows * share), form))
        gate, up = F.linear(rows, made[0][-1].dequantize()).chunk(2, dim=-1)
        hidden = F.silu(gate) * up
        made[1].append(gptq(down, hidden.T @ (hidden * share), form))
    return [stacked(part) for part in made]


def stacked(parts: list[Packed]) -> Packed:
    return Packed(
        torch.stack([part.weights for part in parts]), torch.stack([part.scales for part in parts]), parts[0].rows
    )
