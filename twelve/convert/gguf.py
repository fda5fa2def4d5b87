"""GGUF files: the format read from a memory map with every bound checked. What blocks mean: `gguf_blocks.py`."""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twelve.convert.gguf_blocks import BLOCK_TYPES, UNSUPPORTED, BlockType
from twelve.errors import InputError
from twelve.quantize import Packed, pack_bytes

SCALARS = {  # value type: struct code; 8 is a string, 9 an array
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
STRING, ARRAY = 8, 9
CHUNK = 1 << 16  # weights made at a time: they and the temporaries stay in the processor's cache


@dataclass(frozen=True)
class TensorInfo:
    shape: tuple[int, ...]  # outermost first, as torch has it
    type: BlockType
    start: int  # byte offset in the file

    @property
    def nbytes(self) -> int:
        return prod(self.shape) // self.type.size * self.type.layout.itemsize


class GGUFFile:
    """An open GGUF file (versions 2 and 3, little-endian).

    metadata: key -> int, float, bool, str or list of these. tensors: name -> TensorInfo.
    `InputError` when the file is no GGUF, ends early, contradicts itself or holds a tensor type that is not supported.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:  # an empty file cannot be mapped
            raise InputError(f"{path} is empty, not a GGUF file") from None
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from error
        cursor = _Cursor(self._data, self.path)
        if bytes(self._data[:4]) != b"GGUF":
            raise InputError(f"{path} is not a GGUF file: it does not begin with 'GGUF'")
        cursor.position = 4
        version = cursor.scalar("<I")
        if version not in (2, 3):
            raise InputError(f"{path}: GGUF version {version} is not supported, only 2 and 3, little-endian")
        tensor_count, key_count = cursor.scalar("<Q"), cursor.scalar("<Q")
        self.metadata: dict[str, Any] = {}
        for _ in cursor.turns(key_count, smallest=13):
            key = cursor.string()
            if key in self.metadata:
                raise InputError(f"{path} is damaged: the key {key!r} is there twice")
            self.metadata[key] = cursor.value(cursor.scalar("<I"))
        entries = [self._read_entry(cursor) for _ in cursor.turns(tensor_count, smallest=24)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise InputError(f"{path}: general.alignment {alignment!r} is not a power of two")
        base = -(-cursor.position // alignment) * alignment
        self.tensors = {name: self._locate(name, shape, kind, base + offset) for name, shape, kind, offset in entries}
        if len(self.tensors) != len(entries):
            raise InputError(f"{path}: two tensors have the same name")
        self._check_places(base, alignment)

    @staticmethod
    def _read_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
        name = cursor.string()
        dimensions = cursor.scalar("<I")
        if dimensions > 4:
            raise InputError(f"{cursor.path}: tensor {name!r} claims {dimensions} dimensions, at most 4 are allowed")
        shape = tuple(cursor.scalar("<Q") for _ in range(dimensions))[::-1]  # stored innermost first
        if 0 in shape:
            raise InputError(f"{cursor.path} is damaged: tensor {name!r} is {list(shape)}, it has no weights")
        return name, shape, cursor.scalar("<I"), cursor.scalar("<Q")

    def _locate(self, name: str, shape: tuple[int, ...], kind: int, start: int) -> TensorInfo:
        if kind not in BLOCK_TYPES:
            supported = ", ".join(block.name for block in BLOCK_TYPES.values())
            label = UNSUPPORTED.get(kind, f"number {kind}")
            raise InputError(f"{self.path}: tensor {name!r} has type {label}; supported: {supported}")
        block = BLOCK_TYPES[kind]
        row, info = prod(shape[-1:]), TensorInfo(shape, block, start)
        if row % block.size:
            raise InputError(f"{self.path}: tensor {name!r} has rows of {row}, not a multiple of {block.size}")
        if start + info.nbytes > len(self._data):
            raise InputError(f"{self.path} is cut short: tensor {name!r} reaches beyond its end; fetch the file again")
        return info

    def _check_places(self, end: int, alignment: int) -> None:
        """`InputError` for a tensor that shares bytes with another, or begins where none can: it has wrong weights."""
        for name, info in sorted(self.tensors.items(), key=lambda item: item[1].start):
            if info.start < end or info.start % alignment:
                raise InputError(f"{self.path} is damaged: tensor {name!r} cannot begin at byte {info.start}")
            end = info.start + info.nbytes

    def tensor(self, name: str, index: int | None = None) -> Tensor:
        """The tensor, or with `index` one along its first dimension, as float32 in memory of its own."""
        kind, (shape, blocks, start) = self.tensors[name].type, self._part(name, index)
        floats, step = np.empty((len(blocks), kind.size), np.float32), max(1, CHUNK // kind.size)
        for first in range(0, len(blocks), step):
            kind.read(blocks[first : first + step], floats[first : first + step])
        self._forget(start, blocks.nbytes)
        return torch.from_numpy(floats).view(shape)

    def packed(self, name: str, order: np.ndarray | None = None, index: int | None = None) -> Packed:
        """A matrix [N, K] of a type that has a `form`, or with `index` one of a stack, in memory of its own.

        order [N]: of its rows, where it is not the file's.
        """
        info, (shape, blocks, start) = self.tensors[name], self._part(name, index)
        rows = blocks.reshape(shape[0], -1)
        rows = rows if order is None else rows[order]
        if info.type.form.bits == 8:
            numbers = rows["weights"].view(np.uint8) ^ 0x80  # from -128 ... 127 to 0 ... 255
        else:
            numbers = rows["packed"].copy()
        scales = rows["scale"].copy() if info.type.form.symmetric else np.stack((rows["scale"], rows["low"]), axis=-1)
        self._forget(start, blocks.nbytes)
        return pack_bytes(torch.from_numpy(numbers), torch.from_numpy(scales))

    def _part(self, name: str, index: int | None) -> tuple[tuple[int, ...], np.ndarray, int]:
        """The shape of a tensor, or of one along its first dimension, its blocks, and where they begin."""
        info = self.tensors[name]
        shape = info.shape if index is None else info.shape[1:]
        size = prod(shape) // info.type.size
        start = info.start + (index or 0) * size * info.type.layout.itemsize
        return shape, np.frombuffer(self._data, info.type.layout, size, start), start

    def _forget(self, position: int, size: int) -> None:
        """Let go of the pages read, which would count as this process's memory until the file is closed."""
        start = position // mmap.PAGESIZE * mmap.PAGESIZE
        self._data.madvise(mmap.MADV_DONTNEED, start, position + size - start)


class _Cursor:
    """Reads one value after another; a read beyond the end of the file is an `InputError`."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.position = data, path, 0

    def _advance(self, size: int) -> int:
        """Step over `size` bytes and return where they begin."""
        start = self.position
        if size > len(self.data) - start:
            raise InputError(f"{self.path} is cut short or damaged at byte {start}: fetch the file again")
        self.position = start + size
        return start

    def turns(self, count: int, smallest: int) -> range:
        """`range(count)`, when so many items of at least `smallest` bytes can still follow."""
        if count * smallest > len(self.data) - self.position:
            raise InputError(f"{self.path} is cut short or damaged: {count:,} items announced at byte {self.position}")
        return range(count)

    def scalar(self, code: str) -> Any:
        return struct.unpack_from(code, self.data, self._advance(struct.calcsize(code)))[0]

    def string(self) -> str:
        length = self.scalar("<Q")
        start = self._advance(length)
        try:
            return self.data[start : start + length].decode("utf-8")
        except UnicodeDecodeError:
            raise InputError(f"{self.path} is damaged: the text at byte {start} is not UTF-8") from None

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY or depth > 3:
            raise InputError(f"{self.path} is damaged: value type {kind} at byte {self.position}, {depth} arrays deep")
        item, count = self.scalar("<I"), self.scalar("<Q")
        if item in SCALARS:
            layout = np.dtype(SCALARS[item])
            self.turns(count, layout.itemsize)
            return np.frombuffer(self.data, layout, count, self._advance(count * layout.itemsize)).tolist()
        return [self.value(item, depth + 1) for _ in self.turns(count, smallest=8)]
