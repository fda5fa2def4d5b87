"""Writing a GGUF file (version 3): what is in it first, then one tensor after another."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor

from twelve.convert.gguf import ARRAY, CHUNK, SCALARS, STRING
from twelve.convert.gguf_blocks import BlockType
from twelve.errors import InputError
from twelve.files import atomic_write, new_folders

ALIGNMENT = 32
UNSIGNED, SIGNED, FLOAT, BOOL = 4, 5, 6, 7  # value types: int32 is for arrays, as llama.cpp wants them
LARGEST = 65504.0  # of float16


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: its shape outermost first, its last dimension a multiple of the type's block."""

    name: str
    shape: tuple[int, ...]
    type: BlockType

    @property
    def nbytes(self) -> int:
        return prod(self.shape) // self.type.size * self.type.layout.itemsize


def write_gguf(path: str | Path, metadata: dict[str, Any], entries: list[Entry], tensors: Iterable[Tensor]) -> None:
    """Write a file atomically; tensors: floats of the shapes in `entries`, in the same order, asked for one by one.

    metadata: bool, int (uint32), float (float32), str, or a list of one of them (int: int32). `InputError` for weights
    and values that their types cannot hold, and a full disk.
    """
    with new_folders(Path(path).parent), atomic_write(path) as temporary, open(temporary, "wb") as file:
        file.write(_header(metadata, entries))
        for entry, tensor in zip(entries, tensors, strict=True):
            _write(file, entry, tensor)


def _header(metadata: dict[str, Any], entries: list[Entry]) -> bytes:
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(entries), len(metadata))]
    for key, value in metadata.items():
        try:
            kind, content = _value(value)
        except (struct.error, OverflowError):
            raise InputError(f"{key} is {value}: a GGUF file has 32 bits for it") from None
        parts += [_string(key), struct.pack("<I", kind), content]
    start = 0
    for entry in entries:
        shape = entry.shape[::-1]  # stored innermost first
        parts += [_string(entry.name), struct.pack(f"<I{len(shape)}Q", len(shape), *shape)]
        parts.append(struct.pack("<IQ", entry.type.code, start))
        start += entry.nbytes + -entry.nbytes % ALIGNMENT
    header = b"".join(parts)
    return header + bytes(-len(header) % ALIGNMENT)


def _string(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content


def _value(value: Any, inside: bool = False) -> tuple[int, bytes]:
    """A value's type and bytes; inside: of an array."""
    if isinstance(value, str):
        return STRING, _string(value)
    if isinstance(value, list):
        items = [_value(item, inside=True) for item in value]
        kind = items[0][0] if items else STRING
        return ARRAY, struct.pack("<IQ", kind, len(items)) + b"".join(content for _, content in items)
    kind = BOOL if isinstance(value, bool) else FLOAT if isinstance(value, float) else SIGNED if inside else UNSIGNED
    return kind, struct.pack(SCALARS[kind], value)


def _write(file: BinaryIO, entry: Entry, tensor: Tensor) -> None:
    """The blocks of one tensor, and what is missing to the alignment."""
    kind = entry.type
    if tuple(tensor.shape) != entry.shape:
        raise ValueError(f"{entry.name} is {list(tensor.shape)}, announced as {list(entry.shape)}")
    least, most = (float(bound) for bound in tensor.detach().aminmax())
    if math.isnan(least):
        raise InputError(f"{entry.name}: some of its weights are no numbers: the model is damaged")
    if kind.name not in ("F32", "BF16") and not (least >= -LARGEST and most <= LARGEST):
        raise InputError(f"{entry.name}: its weights are not all within float16's range: use --dtype float32")
    floats = tensor.detach().float().contiguous().numpy().reshape(-1, kind.size)
    step = max(1, CHUNK // kind.size)
    with np.errstate(over="ignore", invalid="ignore"):  # the inverse of a scale that rounds to 0 anyway
        for first in range(0, len(floats), step):
            file.write(kind.write(floats[first : first + step]))
    file.write(bytes(-entry.nbytes % ALIGNMENT))
