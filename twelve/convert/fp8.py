"""Weights in 8-bit floats with a scale for every block, as DeepSeek-V3 was released (arXiv 2412.19437, section 3.3).

`X.weight` is stored as float8_e4m3fn [R, C], and beside it `X.weight_scale_inv`, whose numbers multiply its blocks, by
rows and columns of `weight_block_size`; the last block of a side may be cut. V3.1's scales are powers of two, stored as
float32 or as exponents alone (float8_e8m0fnu).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from twelve.errors import InputError

METHOD = "fp8"  # quant_method
SCALE = "_scale_inv"  # follows a weight's name
WEIGHTS, EXPONENTS = "F8_E4M3", "F8_E8M0"  # as safetensors calls these types


def block_size(entry: dict[str, Any]) -> tuple[int, int]:
    """Rows and columns of a block, from `quantization_config`. `InputError` for FP8 weights of another kind."""
    if entry.get("fmt", "e4m3") != "e4m3":
        raise InputError(f"config: quantised weights: fp8 numbers of {entry['fmt']!r} are not supported, only 'e4m3'")
    size = entry.get("weight_block_size")
    if not (isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)):
        raise InputError(f"config: quantised weights: fp8 needs weight_block_size, rows and columns, not {size!r}")
    return size[0], size[1]


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Of the scales of a weight [R, C]."""
    return tuple(-(-side // of) for side, of in zip(shape, block, strict=True))


def dequantize(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """Float32 [R, C] of a weight float8 [R, C] and the scales of its blocks. Takes four bytes a weight and no more."""
    out = weight.to(torch.float32)
    high, wide = (min(side, of) for side, of in zip(block, out.shape, strict=True))
    columns = scale.to(torch.float32).repeat_interleave(wide, dim=1)[:, : out.shape[1]]
    for rows, row in zip(out.split(high), columns, strict=True):
        rows *= row
    return out
