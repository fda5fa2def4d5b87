"""Rows of numbers, taken and put by their numbers: of a safetensors file that is changed in place, or of memory.

The file is mapped: the kernel holds in memory what is used, and the file may be larger than that. Rows that change
often can be held in memory instead, if there is so much. Where the process may not have so many addresses (`ulimit -v`)
rows are read and written one after another. The results are the same.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import mmap
import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twelve.errors import InputError
from twelve.files import atomic_write

PAGE = 4096
# safetensors' codes, with what numpy holds them in; it has no bfloat16
DTYPES = {"F32": np.dtype("<f4"), "BF16": np.dtype("<u2"), "I8": np.dtype("i1"), "I32": np.dtype("<i4")}
CODES = {"float32": "F32", "bfloat16": "BF16", "int8": "I8"}  # of what a table's rows may be held in
LONGEST_HEADER = 100 * 10**6  # of the format
SAMPLE = 64  # rows of a batch
COPY_BYTES = 1 << 26


class Rows:
    """`count` rows of `width` numbers, in an array or, without one, at `offset` of an open file."""

    def __init__(
        self, shape: tuple[int, int], dtype: np.dtype, array: np.ndarray | None, descriptor: int = -1, offset: int = 0
    ) -> None:
        self.count, self.width = shape
        self.dtype, self.array, self.descriptor, self.offset = dtype, array, descriptor, offset
        self.row_bytes = self.width * dtype.itemsize
        self._changed: np.ndarray | None = None  # of rows held in memory: [pages] bool, what the file does not have yet

    @staticmethod
    def zeros(shape: tuple[int, int], dtype: np.dtype) -> Rows:
        """In memory, which the kernel gives when a row is first put."""
        return Rows(shape, dtype, np.zeros(shape, dtype))

    @property
    def nbytes(self) -> int:
        return self.count * self.row_bytes

    def take(self, rows: np.ndarray) -> np.ndarray:
        """A copy [n, width] of rows int64 [n]."""
        if self.array is not None:
            return self.array.take(rows, axis=0)
        size = self.row_bytes
        found = bytearray().join([os.pread(self.descriptor, size, self.offset + size * row) for row in rows.tolist()])
        return np.frombuffer(found, self.dtype).reshape(len(rows), self.width)

    def put(self, rows: np.ndarray, values: np.ndarray) -> None:
        """values [n, width] in the place of rows int64 [n], all different."""
        if self.array is not None:
            self.array[rows] = values
            if self._changed is not None:
                places = self.row_bytes * rows
                self._changed[places // PAGE] = self._changed[(places + self.row_bytes - 1) // PAGE] = True
            return
        size = self.row_bytes
        for row, value in zip(rows.tolist(), np.ascontiguousarray(values), strict=True):
            os.pwrite(self.descriptor, value, self.offset + size * row)

    def hold(self) -> None:
        """Read all of the file's rows into memory, and from now on change them there: `write_back` gives them to the
        file. Of a map the kernel writes changed pages whenever it likes, and the next change of each is a fault. Where
        there are no addresses for it the map stays."""
        try:
            memory = mmap.mmap(-1, max(1, self.nbytes))
        except OSError:
            return
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them
                memory.madvise(mmap.MADV_HUGEPAGE)
        done, target = 0, memoryview(memory)
        while done < self.nbytes:  # at most 2 GiB at once
            done += os.preadv(self.descriptor, [target[done : self.nbytes]], self.offset + done)
        self.array = np.frombuffer(memory, self.dtype, self.count * self.width).reshape(self.count, self.width)
        self._changed = np.zeros(-(-self.nbytes // PAGE), bool)

    def write_back(self) -> None:
        """Give the file what changed in memory since the last time."""
        if self._changed is None or not self._changed.any():
            return
        data = memoryview(self.array).cast("B")
        edges = np.flatnonzero(np.diff(self._changed, prepend=False, append=False)) * PAGE
        for start, end in edges.reshape(-1, 2).tolist():
            while start < min(end, self.nbytes):
                start += os.pwrite(self.descriptor, data[start : min(end, self.nbytes)], self.offset + start)
        self._changed[:] = False

    @property
    def is_held(self) -> bool:
        return self._changed is not None

    def warm(self, rows: np.ndarray) -> None:
        """Have the kernel read the pages of rows int64 [n] that are not in memory: all at once, which a disk does many
        times faster than one by one. Where the first few are there, the rest is thought to be."""
        if self.descriptor < 0 or self.is_held or not hasattr(os, "posix_fadvise"):  # macOS
            return
        places = self.offset + self.row_bytes * rows
        if all(self._is_in_memory(place) for place in places[:SAMPLE].tolist()):
            return
        pages = np.unique(np.concatenate((places, places + self.row_bytes - 1)) // PAGE) * PAGE
        for place in pages.tolist():
            os.posix_fadvise(self.descriptor, place, PAGE, os.POSIX_FADV_WILLNEED)

    def _is_in_memory(self, place: int) -> bool:
        try:
            os.preadv(self.descriptor, [bytearray(1)], place, os.RWF_NOWAIT)
        except OSError:  # it would have to wait, or the file system cannot tell
            return False
        return True


class RowFile:
    """A safetensors file whose tensors are `Rows`. InputError when there is none at `path` or it is not whole."""

    def __init__(self, path: Path, writable: bool = False) -> None:
        self.path, self.writable = path, writable
        try:
            self.descriptor = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        except OSError as error:
            raise InputError(f"cannot open {path}: {error.strerror}") from error
        self._map: mmap.mmap | None = None
        try:
            self.size = os.fstat(self.descriptor).st_size
            self._header, self._data = _read_header(self.descriptor, self.size, path)
            self.metadata: dict[str, str] = self._header.pop("__metadata__", {})
            if writable:  # a copy may be sparse
                _allocate(self.descriptor, self.size, path)
            self._map = _map(self.descriptor, self.size, writable)
        except BaseException:
            os.close(self.descriptor)
            raise

    @staticmethod
    def create(
        path: Path, shapes: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str], contents: dict[str, Rows]
    ) -> None:
        """Make a file: name -> (dtype, shape), zeros where `contents` has nothing of that name, from memory.

        Its blocks are taken at once, so that a full disk is seen here (InputError), and not when a row is written to
        the map, which would kill the process.
        """
        header: dict[str, Any] = {"__metadata__": metadata}
        end = 0
        for name, (dtype, shape) in shapes.items():
            start, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-(len(text) + 8) % PAGE)  # rows of 32, 64, ... bytes then lie in one page each
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.flush()
            _allocate(file.fileno(), 8 + len(text) + end, path)
            for name, rows in contents.items():
                file.seek(8 + len(text) + header[name]["data_offsets"][0])
                file.write(rows.array)

    def rows(self, name: str) -> Rows:
        """A tensor [R, width], or [R] as rows of one number. InputError when the file has none of that name."""
        entry = self._header.get(name)
        if entry is None:
            raise InputError(f"{self.path} has no tensor {name!r}: it is no table")
        dtype, offset = DTYPES[entry["dtype"]], self._data + entry["data_offsets"][0]
        shape = (entry["shape"][0], math.prod(entry["shape"][1:]))
        array = None
        if self._map is not None:
            array = np.frombuffer(self._map, dtype, math.prod(shape), offset).reshape(shape)
        return Rows(shape, dtype, array, self.descriptor, offset)

    def code(self, name: str) -> str:
        """The tensor's dtype as safetensors calls it."""
        return self._header[name]["dtype"]

    def flush(self) -> None:
        """Return when all that was put is on the disk."""
        if self._map is not None:
            self._map.flush()
        os.fsync(self.descriptor)

    def close(self) -> None:
        """The rows must not be used after it."""
        self._map = None  # unmapped with the last array of it
        os.close(self.descriptor)


def decode(raw: np.ndarray, scales: np.ndarray | None) -> np.ndarray:
    """float32 [n, width] of rows as they are held: float32, bfloat16 as uint16, or int8 with scales [n, 1]."""
    if raw.dtype == DTYPES["BF16"]:
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw if scales is None else raw * scales


def encode(values: Tensor, dtype: str) -> tuple[np.ndarray, np.ndarray | None]:
    """The inverse of `decode`: values float32 [n, width] rounded to the nearest, ties to even, and int8's scales."""
    if dtype == "bfloat16":
        return values.to(torch.bfloat16).view(torch.uint16).numpy(), None
    if dtype == "int8":
        scales = values.abs().amax(-1, keepdim=True) / 127
        return (values / scales.clamp(min=1e-30)).round().to(torch.int8).numpy(), scales.numpy()
    return values.numpy(), None


def own(path: Path) -> None:
    """Make sure that a file may be changed, and that no other folder's changes with it: a shared one is copied.

    InputError when it is read-only and not shared, even for those whom the kernel would let write.
    """
    status = path.stat()
    if status.st_nlink > 1:
        with atomic_write(path) as temporary:
            copy_file(path, temporary)
    elif not status.st_mode & 0o222:
        raise InputError(f"{path} is read-only, and training changes it: allow writing (chmod u+w), or copy the folder")


def copy_file(source: Path, target: Path) -> None:
    """Copy, in the kernel where that can, so that file systems that know how to share the blocks do."""
    with open(source, "rb") as old, open(target, "wb") as new:
        left = os.fstat(old.fileno()).st_size
        try:
            while left and hasattr(os, "copy_file_range"):
                left -= os.copy_file_range(old.fileno(), new.fileno(), min(left, 1 << 30))
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        old.seek(-left, os.SEEK_END)
        new.seek(0, os.SEEK_END)
        while part := old.read(COPY_BYTES):
            new.write(part)


def _read_header(descriptor: int, size: int, path: Path) -> tuple[dict[str, Any], int]:
    """The header, and where the data begin."""
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if not 2 <= length <= min(size - 8, LONGEST_HEADER):
        raise InputError(f"{path} is not a safetensors file, or cut short in its header: copy it again")
    try:
        header = json.loads(os.pread(descriptor, length, 8))
        end = 0
        for name, entry in header.items():
            if name != "__metadata__":
                (start, stop), shape = entry["data_offsets"], entry["shape"]
                if len(shape) not in (1, 2) or min(shape) < 0 or start < 0:
                    raise ValueError(f"{name} is not made of rows")
                if stop - start != math.prod(shape) * DTYPES[entry["dtype"]].itemsize:
                    raise ValueError(f"{name} does not fill its place")
                end = max(end, stop)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no table: its header is damaged ({error}); copy it again") from error
    if 8 + length + end != size:
        fault = "it is cut short" if size < 8 + length + end else "something was added"
        raise InputError(f"{path} has {size:,} bytes, its header tells of {8 + length + end:,}: {fault}; copy it again")
    return header, 8 + length


def _allocate(descriptor: int, size: int, path: Path) -> None:
    if not hasattr(os, "posix_fallocate"):  # macOS
        os.ftruncate(descriptor, size)
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise InputError(
            f"no space for {path}: it takes {size:,} bytes; free some, or make the table smaller (engram_vocab_size)"
        ) from error


def _map(descriptor: int, size: int, writable: bool) -> mmap.mmap | None:
    """None where the process may not have the addresses, or would have few left."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and 2 * size > limit:
        return None
    try:
        mapped = mmap.mmap(descriptor, size, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ)
    except OSError:
        return None
    # a row needs one page, and its neighbours no sooner than others
    mapped.madvise(mmap.MADV_RANDOM)
    return mapped
