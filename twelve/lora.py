"""LoRA (arXiv 2106.09685): every projection W becomes W + scale * B A; W itself stands still, in floats or packed.

`attach` puts such modules in the place of a model's own, `merge` puts plain ones back. In between they hold the sum as
their `weight`, where an engine reads it, and `refresh` brings it up to date in place after a step. Or they hold no sum
but make it for each use: less memory, the same numbers, and no engine can run the model. Either way a forward pass is
one product, and no gradient of W is ever made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twelve.errors import InputError
from twelve.model import Transformer
from twelve.model.attention import GroupedQueryAttention, LatentAttention
from twelve.model.layers import MLP
from twelve.model.moe import Experts
from twelve.quantize import Packed, QuantizedExperts, QuantizedLinear, dequantize

PARENTS = {LatentAttention: "attention", GroupedQueryAttention: "attention", MLP: "mlp"}


class LowRank(nn.Module):
    """A matrix [out, in], or a stack [E, out, in], as frozen + scale * B A: A [r, in] drawn, B [out, r] zero."""

    def __init__(self, frozen: Tensor | Packed, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        self.frozen, self.scale = frozen, scale  # a plain attribute: neither trained nor saved nor moved
        if isinstance(frozen, Packed):
            shape, like = (*frozen.weights.shape[:-3], frozen.rows, frozen.columns), frozen.scales.float()
        else:
            shape, like = tuple(frozen.shape), frozen
        *stack, rows, columns = shape
        drawn = torch.empty(*stack, rank, columns).uniform_(-1, 1, generator=generator) / columns**0.5
        self.A = nn.Parameter(drawn.to(like))
        self.B = nn.Parameter(like.new_zeros(*stack, rows, rank))

    @torch.no_grad()
    def floats(self, out: Tensor | None = None) -> Tensor:
        """The sum, in `out` or in new memory."""
        base = self.frozen.dequantize() if isinstance(self.frozen, Packed) else self.frozen
        add = torch.addmm if base.dim() == 2 else torch.baddbmm
        return add(base, self.B, self.A, alpha=self.scale, out=out)


def _gradients(x: Tensor, grad: Tensor, a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Of A and B, from rows x [N, in] of the input and grad [N, out] of the product with the sum."""
    return (grad @ b.to(grad.dtype)).mul_(scale).T @ x, grad.T @ (x @ a.to(x.dtype).T).mul_(scale)


class LoRALinear(nn.Linear):
    """nn.Linear whose `weight` is the sum of `lora`; without `merged` there is no `weight`."""

    def __init__(self, lora: LowRank, bias: nn.Parameter | None, merged: bool) -> None:
        nn.Module.__init__(self)
        self.lora, self.bias, self.merged = lora, bias, merged
        self.out_features, self.in_features = lora.B.shape[0], lora.A.shape[1]
        if merged:
            self.weight = nn.Parameter(lora.floats(), requires_grad=False)

    def pairs(self) -> list[LowRank]:
        return [self.lora]

    def sums(self) -> list[Tensor]:
        return [self.weight if self.merged else self.lora.floats()]

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return self.forward(x.to(torch.get_autocast_dtype(kind)))
        return _Linear.apply(x, self.lora.A, self.lora.B, self)


class _Linear(torch.autograd.Function):
    """The module is an argument of its own, so that a sum made for the forward pass is not kept for the backward."""

    @staticmethod
    def forward(ctx, x: Tensor, a: Tensor, b: Tensor, module: LoRALinear) -> Tensor:
        ctx.save_for_backward(x, a, b)
        ctx.module = module
        (weight,) = module.sums()
        bias = None if module.bias is None else module.bias.to(x.dtype)
        return F.linear(x, weight.to(x.dtype), bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, a, b = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            (weight,) = ctx.module.sums()
            grad_x = grad @ weight.to(grad.dtype)
        grad_a, grad_b = _gradients(x.flatten(0, -2), grad.flatten(0, -2), a, b, ctx.module.lora.scale)
        return grad_x, grad_a, grad_b, None


class LoRAExperts(Experts):
    """Experts whose stacks `gate_up_proj` and `down_proj` are the sums of `gate_up` and `down`, a pair an expert."""

    def __init__(self, gate_up: LowRank, down: LowRank, merged: bool) -> None:
        nn.Module.__init__(self)
        self.gate_up, self.down, self.merged = gate_up, down, merged
        if merged:
            self.gate_up_proj = nn.Parameter(gate_up.floats(), requires_grad=False)
            self.down_proj = nn.Parameter(down.floats(), requires_grad=False)

    def pairs(self) -> list[LowRank]:
        return [self.gate_up, self.down]

    def sums(self) -> list[Tensor]:
        return [self.gate_up_proj, self.down_proj] if self.merged else [self.gate_up.floats(), self.down.floats()]

    def forward(self, x: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
        if self.merged and not torch.is_grad_enabled():
            return super().forward(x, chosen, gates)
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            with torch.autocast(kind, enabled=False):
                return self.forward(x.to(dtype), chosen, gates.to(dtype))
        pairs = self.gate_up.A, self.gate_up.B, self.down.A, self.down.B
        return _Experts.apply(x, gates, *pairs, chosen, self)


class _Experts(torch.autograd.Function):
    """One expert after another, each on its own tokens, as `model.fast.grouped_experts`, whose forward pass it is."""

    @staticmethod
    def forward(ctx, x: Tensor, gates: Tensor, *rest) -> Tensor:
        *pairs, chosen, module = rest
        gate_up, down = (stack.to(x.dtype) for stack in module.sums())
        out, hidden, order, counts = torch.ops.twelve.grouped_experts(x, gate_up, down, chosen, gates)
        ctx.save_for_backward(x, gates, *pairs, hidden, order, counts)
        ctx.module = module
        return out

    @staticmethod
    def backward(ctx, grad_out: Tensor):
        x, gates, gate_up_a, gate_up_b, down_a, down_b, hidden, order, counts = ctx.saved_tensors
        module = ctx.module
        gate_up, down = (stack.to(x.dtype) for stack in module.sums())
        pair_gradients = [torch.zeros_like(p) for p in (gate_up_a, gate_up_b, down_a, down_b)]
        grad_x, grad_weights = torch.zeros_like(x), torch.empty_like(gates).flatten()
        counts = counts.tolist()
        for expert, (places, both) in enumerate(zip(order.split(counts), hidden.split(counts), strict=True)):
            if not len(places):
                continue
            tokens, weights = places // gates.shape[1], gates.flatten()[places, None]
            (gate, up), rows, grad = both.chunk(2, dim=-1), x[tokens], grad_out[tokens]
            silu = F.silu(gate)
            inner, grad_inner = silu * up, grad @ down[expert]
            grad_weights[places] = (grad_inner * inner).sum(-1)
            grad, grad_inner = grad * weights, grad_inner * weights
            grad_gate = torch.ops.aten.silu_backward(grad_inner * up, gate)
            grad_both = torch.cat((grad_gate, grad_inner * silu), dim=-1)
            grad_x.index_add_(0, tokens, grad_both @ gate_up[expert])
            of_gate_up = _gradients(rows, grad_both, gate_up_a[expert], gate_up_b[expert], module.gate_up.scale)
            of_down = _gradients(inner, grad, down_a[expert], down_b[expert], module.down.scale)
            for total, own in zip(pair_gradients, (*of_gate_up, *of_down), strict=True):
                total[expert] = own
        return grad_x, grad_weights.view_as(gates), *pair_gradients, None, None


# --- models -----------------------------------------------------------------------------------------------------------


def attach(
    model: Transformer, rank: int = 16, alpha: float = 32.0, targets: tuple[str, ...] = ("attention", "mlp", "experts"),
    seed: int = 0, merged: bool = True,
) -> Transformer:  # fmt: skip
    """Give the projections of the `targets` pairs A, B of that rank, in place, and freeze everything else.

    scale = alpha / rank, with one alpha for all ranks: the best learning rate then hardly depends on the rank (Schulman
    et al., LoRA Without Regret, 2025). The model computes what it did before, until a step changes B. With `merged` all
    its weights become floats, the frozen ones of adapted modules staying beside as they were; without, packed ones stay
    packed, and the model is for training only. Do this on the device to train on, and before an engine is made.
    `InputError` for a rank below 1, unknown targets, none in this model, or a model that has adapters.
    """
    if rank < 1:
        raise InputError(f"a LoRA rank of {rank} is not possible: choose 1 or more")
    unknown = set(targets) - {*PARENTS.values(), "experts"}
    if unknown:
        raise InputError(f"unknown LoRA target {min(unknown)!r}: choose among attention, mlp and experts")
    if adapters(model):
        raise InputError("the model has LoRA adapters already: merge them first")
    found = [(name, module) for target, name, module in _projections(model) if target in targets]
    if not found:
        raise InputError(f"the model has nothing to adapt among {', '.join(targets)}")
    generator = torch.Generator().manual_seed(seed)
    for name, old in found:
        scale = alpha / rank
        if isinstance(old, Experts):
            packed = isinstance(old, QuantizedExperts)
            stacks = (old.gate_up, old.down) if packed else (old.gate_up_proj.detach(), old.down_proj.detach())
            new = LoRAExperts(*(LowRank(stack, rank, scale, generator) for stack in stacks), merged)
        else:
            frozen = old.packed if isinstance(old, QuantizedLinear) else old.weight.detach()
            new = LoRALinear(LowRank(frozen, rank, scale, generator), old.bias, merged)
        model.set_submodule(name, new.train(old.training))
    if merged:
        dequantize(model)
    model.requires_grad_(False)
    for parameter in adapter_state(model).values():
        parameter.requires_grad_(True)
    return model


def _projections(model: Transformer) -> Iterator[tuple[str, str, nn.Module]]:
    """(target, name, module) of all that can be adapted."""
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            yield "experts", name, module
        for child, part in module.named_children() if type(module) in PARENTS else ():
            if isinstance(part, nn.Linear | QuantizedLinear):
                yield PARENTS[type(module)], f"{name}.{child}", part


def adapters(model: nn.Module) -> dict[str, LoRALinear | LoRAExperts]:
    """The adapted modules by name; empty for a model without."""
    return {name: part for name, part in model.named_modules() if isinstance(part, LoRALinear | LoRAExperts)}


def adapter_state(model: nn.Module) -> dict[str, nn.Parameter]:
    """All A and B by their names in the model."""
    pairs = {name: module for name, module in model.named_modules() if isinstance(module, LowRank)}
    return {f"{name}.{key}": getattr(module, key) for name, module in pairs.items() for key in ("A", "B")}


def trainable(model: nn.Module) -> int:
    """How many numbers training changes."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def refresh(model: nn.Module) -> None:
    """A or B have changed: bring the sums up to date, in place. Nothing to do for a model without adapters."""
    for module in adapters(model).values():
        if module.merged:
            for total, pair in zip(module.sums(), module.pairs(), strict=True):
                pair.floats(out=total)


@contextmanager
def bare(model: Transformer) -> Iterator[Transformer]:
    """The model as it was before any step, for as long as the context lasts."""
    scales = {pair: pair.scale for module in adapters(model).values() for pair in module.pairs()}
    try:
        for pair in scales:
            pair.scale = 0.0
        refresh(model)
        yield model
    finally:
        for pair, scale in scales.items():
            pair.scale = scale
        refresh(model)


@torch.no_grad()
def merge(model: Transformer) -> Transformer:
    """Make a plain model of floats, all of it trainable, of one with adapters, in place, one module at a time."""
    refresh(model)
    for name, old in adapters(model).items():
        sums = [nn.Parameter(tensor) for tensor in old.sums()]
        if isinstance(old, LoRAExperts):
            new = Experts.__new__(Experts)
            nn.Module.__init__(new)
            new.gate_up_proj, new.down_proj = sums
        else:
            new = nn.Linear(old.in_features, old.out_features, bias=old.bias is not None, device="meta")
            new.weight, new.bias = *sums, old.bias
        model.set_submodule(name, new.train(old.training))
    dequantize(model)
    return model.requires_grad_(True)
