"""Packed weights: matrices in 8 or 4 bits, and the modules that hold them in place of a model's own.

A matrix w [N, K] is scale[n, g] * q[n, k] + low[n, g], g = k // group, with q unsigned; symmetric forms have no `low`:
scale * (q - 8) or scale * (q - 128). Rows stand in panels of 16, as kernels read them: `Packed` tells the layout.
The modules here are slow and correct: a use of a matrix makes its floats, which are gone afterwards, so that memory
stays at the packed bytes. How the numbers are chosen: `twelve.gptq`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twelve.errors import InputError
from twelve.model.moe import Experts

PANEL, BLOCK = 16, 32  # rows of a panel, columns of a block
BUFFERS = ("packed_weight", "packed_scales")  # how the names of packed tensors end
KEPT = ("kv_b_proj", "token_latent")  # absorbed attention takes it apart; read where the latent is made


@dataclass(frozen=True)
class Form:
    """How a matrix is packed: `bits` 4 or 8, `group` columns to a scale, `symmetric` without `low`."""

    bits: int = 8
    group: int = 32
    symmetric: bool = True

    def check(self, columns: int, name: str) -> None:
        """`InputError` unless a matrix of so many columns can have this form."""
        if type(self.bits) is not int or self.bits not in (4, 8):
            raise InputError(f"{name}: {self.bits!r} bits are not supported, only 4 and 8")
        if not isinstance(self.group, int) or self.group < BLOCK or self.group % BLOCK:
            raise InputError(f"{name}: a group of {self.group!r} columns is not a multiple of {BLOCK}")
        if columns % self.group:
            raise InputError(f"{name}: a group of {self.group} columns does not divide its {columns} columns")


@dataclass
class Packed:
    """One matrix [rows, columns], or a stack [E, rows, columns] with E in front of both shapes.

    weights: uint8 [panels, columns / 32, 64 * bits]. A block of 8 bits is [8][16][4]: chunk c, row r, j hold column
    32 * block + 4c + j. One of 4 bits is [4][16][4]: byte (c, r, j) has column 4c + j of the block in its low half and
    16 + 4c + j in its high half.
    scales: float16 [panels, columns / group, 16], or with low [panels, columns / group, 2, 16] (scale, then low).
    Rows beyond the last, up to a whole panel, are zero bytes.
    """

    weights: Tensor
    scales: Tensor
    rows: int

    @property
    def bits(self) -> int:
        return self.weights.shape[-1] // 64

    @property
    def columns(self) -> int:
        return self.weights.shape[-2] * BLOCK

    @property
    def has_low(self) -> bool:
        return self.scales.dim() > self.weights.dim()

    @property
    def group(self) -> int:
        return self.columns // self.scales.shape[-3 if self.has_low else -2]

    @property
    def form(self) -> Form:
        return Form(self.bits, self.group, not self.has_low)

    @property
    def nbytes(self) -> int:
        return self.weights.nbytes + self.scales.nbytes

    def __getitem__(self, index: int) -> Packed:
        """Matrix `index` of a stack."""
        return Packed(self.weights[index], self.scales[index], self.rows)

    def _by_chunks(self) -> Tensor:
        return self.weights.view(*self.weights.shape[:-1], -1, PANEL, 4)  # [panels, K/32, chunks, 16, 4]

    def dequantize(self) -> Tensor:
        """float32 [rows, columns], or the stack of them."""
        if self.weights.dim() == 4:
            return torch.stack([self[index].dequantize() for index in range(len(self.weights))])
        packed = self._by_chunks().movedim(3, 1).flatten(0, 1)[: self.rows]
        return _floats(packed, self.scales.movedim(-1, 1).flatten(0, 1)[: self.rows], self.bits)

    def rows_of(self, ids: Tensor) -> Tensor:
        """float32 [*ids.shape, columns] of the rows `ids`, int64; the others are not looked at."""
        panel, row = ids.flatten() // PANEL, ids.flatten() % PANEL
        floats = _floats(self._by_chunks()[panel, :, :, row], self.scales[panel, ..., row], self.bits)
        return floats.view(*ids.shape, self.columns)

    @staticmethod
    def empty(shape: tuple[int, ...], form: Form, device: torch.device | str) -> Packed:
        """A matrix [rows, columns], or a stack of them, of the form, its memory not yet filled."""
        *stack, rows, columns = shape
        panels = -(-rows // PANEL)
        weights = torch.empty(*stack, panels, columns // BLOCK, 64 * form.bits, dtype=torch.uint8, device=device)
        low = () if form.symmetric else (2,)
        scales = torch.empty(*stack, panels, columns // form.group, *low, PANEL, dtype=torch.float16, device=device)
        return Packed(weights, scales, rows)


def _floats(packed: Tensor, scales: Tensor, bits: int) -> Tensor:
    """packed uint8 [N, K/32, chunks, 4], scales float16 [N, K/group] or [N, K/group, 2] -> float32 [N, K]."""
    if bits == 4:
        packed = torch.stack((packed & 15, packed >> 4), dim=2)
    values = packed.reshape(*scales.shape[:2], -1).float()
    scales = scales.float()
    if scales.dim() == 2:
        values.sub_(2 ** (bits - 1)).mul_(scales[..., None])
    else:  # two steps: a fused one would round otherwise than GGUF's readers do
        values.mul_(scales[..., :1]).add_(scales[..., 1:])
    return values.flatten(1)


def pack(q: Tensor, scale: Tensor, low: Tensor | None, bits: int, group: int) -> Packed:
    """q [N, K] of integers from 0 to 2^bits - 1, scale and low [N, K / group] -> Packed.

    `InputError` for bits or a group that the layout does not have.
    """
    Form(bits, group).check(q.shape[1], "pack")
    packed = q.to(torch.uint8).unflatten(1, (-1, 2, 16) if bits == 4 else (-1, 32))
    if bits == 4:
        packed = packed[:, :, 0] | packed[:, :, 1] << 4
    return pack_bytes(packed, scale if low is None else torch.stack((scale, low), -1))


def pack_bytes(packed: Tensor, scales: Tensor) -> Packed:
    """From rows of blocks: packed uint8 [N, K/32, 4 * bits], scales [N, K/group] or [N, K/group, 2].

    A block of 4 bits has its first 16 columns in the low halves and the others in the high halves, as GGUF has them.
    """
    rows = packed.shape[0]
    missing, scales = -rows % PANEL, scales.half()
    if missing:
        packed = F.pad(packed, (0, 0, 0, 0, 0, missing))
        scales = F.pad(scales, (0, 0) * (scales.dim() - 1) + (0, missing))
    packed, scales = packed.unflatten(2, (-1, 4)).unflatten(0, (-1, PANEL)), scales.unflatten(0, (-1, PANEL))
    return Packed(packed.movedim(1, 3).flatten(2).contiguous(), scales.movedim(1, -1).contiguous(), rows)


# --- modules ----------------------------------------------------------------------------------------------------------


class QuantizedLinear(nn.Module):
    """nn.Linear with packed weights; `weight` [out, in] makes the floats, in `dtype`."""

    def __init__(self, packed: Packed, bias: nn.Parameter | None = None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.register_buffer("packed_weight", packed.weights)
        self.register_buffer("packed_scales", packed.scales)
        self.rows, self.dtype, self.bias = packed.rows, dtype, bias

    @property
    def packed(self) -> Packed:
        return Packed(self.packed_weight, self.packed_scales, self.rows)

    @property
    def weight(self) -> Tensor:
        return self.packed.dequantize().to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class QuantizedEmbedding(QuantizedLinear):
    """nn.Embedding with packed rows: a lookup makes floats of the rows asked for only; `weight` is for a tied head."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.packed.rows_of(ids).to(self.dtype)


class QuantizedExperts(Experts):
    """model.moe.Experts with packed weights, expert e at a fixed stride: buffers [E, ...] of `Packed`'s shapes."""

    def __init__(self, gate_up: Packed, down: Packed, dtype: torch.dtype = torch.float32) -> None:
        nn.Module.__init__(self)
        for name, packed in (("gate_up", gate_up), ("down", down)):
            self.register_buffer(f"{name}_packed_weight", packed.weights)
            self.register_buffer(f"{name}_packed_scales", packed.scales)
        self.rows, self.dtype = (gate_up.rows, down.rows), dtype

    @property
    def gate_up(self) -> Packed:
        return Packed(self.gate_up_packed_weight, self.gate_up_packed_scales, self.rows[0])

    @property
    def down(self) -> Packed:
        return Packed(self.down_packed_weight, self.down_packed_scales, self.rows[1])

    @property
    def gate_up_proj(self) -> Tensor:
        return self.gate_up.dequantize().to(self.dtype)

    @property
    def down_proj(self) -> Tensor:
        return self.down.dequantize().to(self.dtype)

    def forward(self, x: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
        """As `Experts.forward`; the floats of one expert at a time."""
        out = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            tokens, slots = (chosen == expert).nonzero(as_tuple=True)
            gate, up = F.linear(x[tokens], self.gate_up[expert].dequantize().to(self.dtype)).chunk(2, dim=-1)
            result = F.linear(F.silu(gate) * up, self.down[expert].dequantize().to(self.dtype))
            out.index_add_(0, tokens, result * gates[tokens, slots, None])
        return out


# --- models -----------------------------------------------------------------------------------------------------------


def packable(model: nn.Module) -> dict[str, nn.Module]:
    """The float modules whose matrices may be packed, by name: all but `KEPT`, routers and norms."""
    found = {}
    for name, module in model.named_modules():
        kind = type(module) is Experts or isinstance(module, nn.Linear | nn.Embedding)
        if kind and not name.endswith(KEPT):
            found[name] = module
    return found


def matrices(module: nn.Module) -> list[Tensor]:
    """A packable module's matrices [N, K], or stacks [E, N, K]."""
    return [module.gate_up_proj, module.down_proj] if isinstance(module, Experts) else [module.weight]


def packs(module: nn.Module) -> list[Packed]:
    """A packed module's own, in the order of `matrices`."""
    return [module.gate_up, module.down] if isinstance(module, QuantizedExperts) else [module.packed]


def replace(model: nn.Module, name: str, packed: list[Packed], dtype: torch.dtype = torch.float32) -> None:
    """Put a packed module in the place of the float one of this name; packed: in the order of `matrices`."""
    old = model.get_submodule(name)
    if isinstance(old, Experts):
        new = QuantizedExperts(*packed, dtype)
    elif isinstance(old, nn.Embedding):
        new = QuantizedEmbedding(packed[0], dtype=dtype)
    else:
        new = QuantizedLinear(packed[0], old.bias, dtype)
    model.set_submodule(name, new.train(old.training))


def swap(model: nn.Module, forms: dict[str, Form], dtype: torch.dtype = torch.float32) -> None:
    """Put packed modules, their memory not yet filled, in the place of those named in `forms`; `dtype` of results."""
    for name, module in packable(model).items():
        if name in forms:
            for matrix in matrices(module):
                forms[name].check(matrix.shape[-1], name)
            replace(model, name, [Packed.empty(m.shape, forms[name], m.device) for m in matrices(module)], dtype)


def forms_of(model: nn.Module) -> dict[str, Form]:
    """Name of every packed module of a model -> its form; empty for a float model."""
    kinds = QuantizedLinear | QuantizedExperts
    return {name: packs(module)[0].form for name, module in model.named_modules() if isinstance(module, kinds)}


@torch.no_grad()
def dequantize(model: nn.Module) -> None:
    """Make all weights of a model floats again, in place, one module at a time."""
    for name in forms_of(model):
        old = model.get_submodule(name)
        if isinstance(old, QuantizedExperts):
            new = Experts.__new__(Experts)
            nn.Module.__init__(new)
            new.gate_up_proj, new.down_proj = nn.Parameter(old.gate_up_proj), nn.Parameter(old.down_proj)
        else:
            weight = nn.Parameter(old.weight)
            if isinstance(old, QuantizedEmbedding):
                new = nn.Embedding(*weight.shape, device="meta")
            else:
                new = nn.Linear(*reversed(weight.shape), bias=old.bias is not None, device="meta")
                new.bias = old.bias
            new.weight = weight
        model.set_submodule(name, new.train(old.training))
