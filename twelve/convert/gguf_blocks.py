"""The block types of GGUF tensors: stored records into floats, and floats into records.

A block is a run of weights of one row with its scales. Every sum and product here is of two float32 numbers, in the
order in which llama.cpp takes them, so that the same bytes give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from twelve.quantize import Form

UNSUPPORTED = {
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip


@dataclass(frozen=True)
class BlockType:
    """How a tensor type is stored: `size` weights in one `layout` record.

    read(records [n], out float32 [n, size]) fills `out`. write(floats [n, size]) gives the records, as llama.cpp's own
    rounding does; None for the types that are only read.
    """

    name: str
    code: int
    size: int
    layout: np.dtype
    read: Callable[[np.ndarray, np.ndarray], None]
    write: Callable[[np.ndarray], np.ndarray] | None = None
    form: Form | None = None  # of those that can stay packed, bit for bit


# --- reading ----------------------------------------------------------------------------------------------------------


def _column(halves: np.ndarray) -> np.ndarray:
    return halves.astype(np.float32)[:, None]


def _read_f32(x: np.ndarray, out: np.ndarray) -> None:
    out[:, 0] = x


def _read_bf16(x: np.ndarray, out: np.ndarray) -> None:
    out[:, 0] = (x.astype(np.uint32) << 16).view(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """[n, 16] bytes to [n, 32]: the low halves are the first 16 weights, the high halves the last 16."""
    return np.concatenate((packed & 15, packed >> 4), axis=1)


def _five_bits(x: np.ndarray) -> np.ndarray:
    """Nibbles, and the fifth bits of 32 weights in 4 bytes: [n, 32] of 0 to 31."""
    return _nibbles(x["packed"]) | np.unpackbits(x["high"], axis=1, bitorder="little") << 4


def _read_q4_0(x: np.ndarray, out: np.ndarray) -> None:
    np.subtract(_nibbles(x["packed"]), np.float32(8), out=out)
    out *= _column(x["scale"])


def _read_q4_1(x: np.ndarray, out: np.ndarray) -> None:
    np.multiply(_nibbles(x["packed"]), _column(x["scale"]), out=out)
    out += _column(x["low"])


def _read_q5_0(x: np.ndarray, out: np.ndarray) -> None:
    np.subtract(_five_bits(x), np.float32(16), out=out)
    out *= _column(x["scale"])


def _read_q5_1(x: np.ndarray, out: np.ndarray) -> None:
    np.multiply(_five_bits(x), _column(x["scale"]), out=out)
    out += _column(x["low"])


def _read_q8_0(x: np.ndarray, out: np.ndarray) -> None:
    np.multiply(x["weights"], _column(x["scale"]), out=out)


def _scales_and_lows(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [n, 8, 1] each. A block has 8 scales and 8 lows of 6 bits in 12 bytes: those of the first four in the low
    six bits of bytes 0-3 and 4-7, those of the others in the halves of bytes 8-11 and the top two bits before."""
    packed = x["scales"]
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate((first & 63, third & 15 | first >> 6 << 4), axis=1)
    lows = np.concatenate((second & 63, third >> 4 | second >> 6 << 4), axis=1)
    return (_column(x["scale"]) * scales)[..., None], (_column(x["low"]) * lows)[..., None]


def _read_q4_k(x: np.ndarray, out: np.ndarray) -> None:
    scales, lows = _scales_and_lows(x)
    packed, pairs = x["packed"].reshape(-1, 4, 32), out.reshape(-1, 4, 2, 32)
    pairs[:, :, 0] = packed & 15
    pairs[:, :, 1] = packed >> 4
    groups = out.reshape(-1, 8, 32)
    groups *= scales
    groups -= lows


def _read_q5_k(x: np.ndarray, out: np.ndarray) -> None:
    scales, lows = _scales_and_lows(x)
    packed, groups = x["packed"].reshape(-1, 4, 32), out.reshape(-1, 8, 32)
    for group in range(8):  # bit g of byte j is the fifth bit of weight j of group g
        nibble = packed[:, group // 2] >> 4 if group % 2 else packed[:, group // 2] & 15
        groups[:, group] = nibble | (x["high"] >> group & 1) << 4
    groups *= scales
    groups -= lows


def _read_q6_k(x: np.ndarray, out: np.ndarray) -> None:
    packed, high = x["packed"].reshape(-1, 2, 2, 32), x["high"].reshape(-1, 2, 32)
    quarters = out.reshape(-1, 2, 4, 32)  # of a half block: two of low nibbles, then two of high ones
    for quarter in range(4):
        nibble = packed[:, :, quarter % 2] >> 4 if quarter > 1 else packed[:, :, quarter % 2] & 15
        quarters[:, :, quarter] = nibble | (high >> 2 * quarter & 3) << 4
    out -= np.float32(32)
    groups = out.reshape(-1, 16, 16)
    groups *= (_column(x["scale"]) * x["scales"])[..., None]


# --- writing ----------------------------------------------------------------------------------------------------------


def _write_bf16(floats: np.ndarray) -> np.ndarray:
    bits = floats[:, 0].view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)  # to the nearest, ties to even


def _inverse(scale: np.ndarray) -> np.ndarray:
    return np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)


def _write_q8_0(floats: np.ndarray) -> np.ndarray:
    scale = np.abs(floats).max(axis=1, keepdims=True) / np.float32(127)
    scaled = floats * _inverse(scale)
    size = np.abs(scaled)
    whole = np.floor(size)
    whole += size - whole >= 0.5  # ties away from zero
    return _records(Q8_0, scale, weights=np.copysign(whole, scaled).astype(np.int8))


def _write_q4_0(floats: np.ndarray) -> np.ndarray:
    largest = np.take_along_axis(floats, np.abs(floats).argmax(axis=1, keepdims=True), axis=1)
    scale = largest / np.float32(-8)
    numbers = (floats * _inverse(scale) + np.float32(8.5)).astype(np.uint8).clip(0, 15)
    return _records(Q4_0, scale, packed=numbers[:, :16] | numbers[:, 16:] << 4)


def _records(layout: np.dtype, scale: np.ndarray, **fields: np.ndarray) -> np.ndarray:
    records = np.empty(len(scale), layout)
    records["scale"] = scale[:, 0]
    for name, values in fields.items():
        records[name] = values
    return records


# --- the types --------------------------------------------------------------------------------------------------------

Q4_0 = np.dtype([("scale", "<f2"), ("packed", "u1", 16)])
Q8_0 = np.dtype([("scale", "<f2"), ("weights", "i1", 32)])
K_HEAD = [("scale", "<f2"), ("low", "<f2"), ("scales", "u1", 12)]
Q4_1 = np.dtype([("scale", "<f2"), ("low", "<f2"), ("packed", "u1", 16)])
Q5_0 = np.dtype([("scale", "<f2"), ("high", "u1", 4), ("packed", "u1", 16)])
Q5_1 = np.dtype([("scale", "<f2"), ("low", "<f2"), ("high", "u1", 4), ("packed", "u1", 16)])
Q4_K = np.dtype([*K_HEAD, ("packed", "u1", 128)])
Q5_K = np.dtype([*K_HEAD, ("high", "u1", 32), ("packed", "u1", 128)])
Q6_K = np.dtype([("packed", "u1", 128), ("high", "u1", 64), ("scales", "i1", 16), ("scale", "<f2")])
F32, F16, BF16 = np.dtype("<f4"), np.dtype("<f2"), np.dtype("<u2")

BLOCK_TYPES = {
    block.code: block
    for block in (
        BlockType("F32", 0, 1, F32, _read_f32, lambda floats: floats[:, 0]),
        BlockType("F16", 1, 1, F16, _read_f32, lambda floats: floats[:, 0].astype(np.float16)),
        BlockType("Q4_0", 2, 32, Q4_0, _read_q4_0, _write_q4_0, Form(4, 32, symmetric=True)),
        BlockType("Q4_1", 3, 32, Q4_1, _read_q4_1, None, Form(4, 32, symmetric=False)),
        BlockType("Q5_0", 6, 32, Q5_0, _read_q5_0),
        BlockType("Q5_1", 7, 32, Q5_1, _read_q5_1),
        BlockType("Q8_0", 8, 32, Q8_0, _read_q8_0, _write_q8_0, Form(8, 32, symmetric=True)),
        BlockType("Q4_K", 12, 256, Q4_K, _read_q4_k),
        BlockType("Q5_K", 13, 256, Q5_K, _read_q5_k),
        BlockType("Q6_K", 14, 256, Q6_K, _read_q6_k),
        BlockType("BF16", 30, 1, BF16, _read_bf16, _write_bf16),
    )
}
