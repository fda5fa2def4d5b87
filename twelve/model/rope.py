"""Rotary positions: frequencies (plain, linear, Llama 3, YaRN), the temperature YaRN adds, and the two rotations."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from twelve.config import ModelConfig


def inverse_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Angle per position of each rotated pair, [rope_dim / 2] float32, and the factor on cos and sin.

    YaRN is arXiv 2309.00071: slow dimensions are interpolated by `factor`, fast ones kept, a ramp between them.
    """
    rope, dim = config.rope_parameters, config.rope_dim
    theta = rope["rope_theta"]
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
    frequencies = 1.0 / theta**exponents
    kind = rope["rope_type"]
    if kind == "default":
        return frequencies, 1.0
    factor = rope["factor"]
    if kind == "linear":
        return frequencies / factor, 1.0
    original = rope["original_max_position_embeddings"]
    if kind == "llama3":
        wavelength = 2 * math.pi / frequencies
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((original / wavelength - low) / (high - low)).clamp(0, 1)
        return frequencies / factor * (1 - keep) + frequencies * keep, 1.0

    def dimension_of(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(dimension_of(rope.get("beta_fast") or 32), 0)
    high = min(dimension_of(rope.get("beta_slow") or 1), dim - 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    ramp = (torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / max(high - low, 0.001)
    keep = 1 - ramp.clamp(0, 1)
    mscale, mscale_all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    scale = rope.get("attention_factor")
    if scale is None:
        both = mscale and mscale_all_dim
        scale = yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim) if both else yarn_mscale(factor, 1.0)
    return frequencies / factor * (1 - keep) + frequencies * keep, float(scale)


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's temperature: 0.1 * mscale * ln(factor) + 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def softmax_scale(config: ModelConfig) -> float:
    """1 / sqrt(query-key width), times mscale^2 where MLA puts YaRN's temperature into the softmax (V3 section 4.3)."""
    if not config.is_mla:
        return config.head_dim**-0.5
    scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    rope = config.rope_parameters
    if rope["rope_type"] != "default" and rope.get("mscale_all_dim"):
        scale *= yarn_mscale(rope["factor"], rope["mscale_all_dim"]) ** 2
    return scale


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate adjacent pairs of x [B, T, H, R] by cos, sin [B, T, 1, R/2]; halves come out split, as in transformers."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat((even * cos - odd * sin, odd * cos + even * sin), dim=-1)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + R/2) of x [B, T, H, R] by angles with cos, sin [B, T, 1, R/2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
