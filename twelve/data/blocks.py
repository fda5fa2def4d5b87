"""The bytes of a file in blocks, decompressed on the way."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from twelve.errors import InputError


class Damaged(InputError):
    """A file whose content cannot be unpacked to its end."""


def read_blocks(path: Path, size: int) -> Iterator[tuple[bytes, int]]:
    """Blocks of about `size` bytes, decompressed by the file's suffix (.gz, .zst), and how far into the file as it is
    stored each of them reaches, in bytes. Damaged for a file that is, InputError for one that cannot be read."""
    try:
        with open(path, "rb") as raw:
            for block in _decompressed(raw, path.suffix.lower(), size):
                yield block, raw.tell()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise Damaged(f"{path} is damaged or cut short ({error}): fetch it again") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error


def _decompressed(raw: BinaryIO, suffix: str, size: int) -> Iterator[bytes]:
    if suffix == ".zst":
        yield from _zstd(raw, size)
        return
    file = gzip.GzipFile(fileobj=raw) if suffix == ".gz" else raw
    while block := file.read(size):
        yield block


def _zstd(raw: BinaryIO, size: int) -> Iterator[bytes]:
    """EOFError for a file that is cut short, or is no zstd at all."""
    try:
        from compression import zstd  # Python 3.14 and later
    except ImportError:
        yield from _zstandard(raw, size)
        return
    try:
        with zstd.open(raw) as file:
            while block := file.read(size):
                yield block
    except zstd.ZstdError as error:
        raise EOFError(error) from error


def _zstandard(raw: BinaryIO, size: int) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise InputError(f"{raw.name}: reading .zst needs a package: pip install 'twelve[zst]'") from error
    # frame by frame: the package's own file objects take a file that is cut short for a whole one
    decompressor, frame, parts = zstandard.ZstdDecompressor(), None, []
    try:
        while chunk := raw.read(4096):  # small, since there is no other limit to what comes out at once
            while chunk:
                frame = frame or decompressor.decompressobj()
                parts.append(frame.decompress(chunk))
                chunk, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
            if sum(map(len, parts)) >= size:
                yield b"".join(parts)
                parts = []
    except zstandard.ZstdError as error:
        raise EOFError(error) from error
    if frame is not None:
        raise EOFError("the last frame has no end")
    yield b"".join(parts)
