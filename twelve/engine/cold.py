"""A folder of pages in checksummed files, least recently used removed first, shared by any number of processes."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import struct
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from twelve.engine.codec import PageCode
from twelve.errors import InputError
from twelve.files import atomic_write

log = logging.getLogger("twelve.engine")

FLOAT32, EIGHT_BIT = 0, 1  # how a page's payload is coded
# magic, version, coding; digest of model and layout; key; payload's bytes and CRC-32; CRC-32 of all that precedes
HEADER = struct.Struct("<8sHH4x16s16sQII")
_MAGIC, _VERSION = b"12 PAGE\n", 1
# the name and the first line are a standard that makes backup programs pass such a folder over
_TAG = "CACHEDIR.TAG"
_TAG_TEXT = f"Signature: 8a477f597d28d172789f06886806bc55\n# twelve: pages of tokens, {_VERSION}\n"
_LOCK_SECONDS = 10.0  # a write takes milliseconds: whoever holds the lock longer hangs


class Shelf(OrderedDict):
    """Things by key with their sizes, least recently used first; counts its bytes against a budget."""

    def __init__(self, budget: int):
        super().__init__()
        self.budget, self.bytes = budget, 0

    def put(self, key: bytes, size: int, thing: Any = None) -> None:
        self.take(key)
        self[key] = size, thing
        self.bytes += size

    def take(self, key: bytes) -> Any:
        """The thing, no longer here; None if it was not."""
        size, thing = self.pop(key, (0, None))
        self.bytes -= size
        return thing

    def touch(self, key: bytes) -> bool:
        if key in self:
            self.move_to_end(key)
        return key in self

    def make_room(self, size: int) -> list[bytes]:
        """Take out what must go before `size` bytes more fit; its keys."""
        gone = []
        while self and self.bytes + size > self.budget:
            gone.append(next(iter(self)))
            self.take(gone[-1])
        return gone

    def clear(self) -> None:
        super().clear()
        self.bytes = 0


class ColdFolder:
    """Pages as files `folder/<2 hex>/<key>.page`, never more than `budget` bytes of them (the one being written too).

    A file is used only if its checksums, its key and its `digest` (16 bytes: model and layout) are right; else it is
    removed and counted as `damaged`. What cannot be read is a miss. What cannot be written ends the writing, with one
    warning; pages that are there can still be read.

    Raises InputError when `folder` is something else; `write` raises OSError.
    """

    def __init__(self, folder: Path, budget: int, digest: bytes, code: PageCode, exact: bool):
        self.folder, self.digest, self.code = folder, digest, code
        # the sizes that usable files have
        self.sizes = {HEADER.size + 4 * code.floats} | (set() if exact else {HEADER.size + code.bytes})
        self.exact, self.writes = exact, True
        self.written = self.dropped = self.damaged = 0
        self.shelf = Shelf(budget)
        self._mutex = threading.Lock()  # guards the shelf and the counts; never held while a file is read or written
        self._name, self._temporary = os.urandom(16), folder / ".page.tmp"  # whose folder it is: see _locked
        self._open()

    def holds(self, key: bytes) -> bool:
        """Whether a usable file is known; asks memory only."""
        with self._mutex:
            return self.shelf.get(key, (0,))[0] in self.sizes

    def __contains__(self, key: bytes) -> bool:
        """Whether a usable file is there, another process's included; a damaged one is found only by reading it."""
        try:
            return os.stat(self._path(key)).st_size in self.sizes
        except OSError:
            return False

    def read(self, key: bytes, out: np.ndarray) -> bool:
        """Fill `out` [floats] float32; False when the page is not there or was damaged (`out` is undefined then)."""
        path = self._path(key)
        try:
            with open(path, "rb", buffering=0) as file:
                size, header = os.fstat(file.fileno()).st_size, file.read(HEADER.size)
                coding = HEADER.unpack(header)[2] if len(header) == HEADER.size else None
                if coding == EIGHT_BIT and self.exact and size == HEADER.size + self.code.bytes:
                    return False  # whole or not, it is for others
                payload = np.empty(self.code.bytes, np.uint8) if coding == EIGHT_BIT else out
                buffer = memoryview(payload).cast("B")
                whole = size == len(header) + len(buffer) and file.readinto(buffer) == len(buffer)
        except OSError:  # never written, or removed by another process
            with self._mutex:
                self.shelf.take(key)
            return False
        if not whole or header != self._header(key, coding, buffer):
            other = len(header) == HEADER.size and header[:8] == _MAGIC and HEADER.unpack(header)[3] != self.digest
            fault = "belongs to another model" if other else "is damaged or cut short"
            log.warning("%s %s: it was removed, and its tokens are computed anew", path, fault)
            with contextlib.suppress(OSError):
                path.unlink()
            with self._mutex:
                self.shelf.take(key)
                self.damaged += 1
            return False
        if coding == EIGHT_BIT:
            self.code.decode(payload, out)
        self.touch(key)
        return True

    def touch(self, key: bytes) -> None:
        """Mark as just used. The file's time says so, for other processes and the next one."""
        with self._mutex:
            self.shelf.touch(key)
        now = time.time_ns()  # the clock that the kernel stamps files with ticks in milliseconds only
        with contextlib.suppress(OSError):
            os.utime(self._path(key), ns=(now, now))

    def write(self, key: bytes, coding: int, payload: np.ndarray) -> None:
        """Put a page into a file, unless it is in one; the least recently used go first where room is needed."""
        with self._locked():
            if self.holds(key):  # another process was faster
                return
            data, path = memoryview(payload).cast("B"), self._path(key)
            header = self._header(key, coding, data)
            self._make_room(len(header) + len(data))
            try:
                path.parent.mkdir(exist_ok=True)
                with open(self._temporary, "wb", buffering=0, opener=_private) as file:
                    for part in (memoryview(header), data):
                        while part:  # a disk that fills up takes a part first and refuses the rest then
                            part = part[file.write(part) :]
                # Nothing is synced: that would cost more than many a page is worth. A file that a crash of the machine
                # tears is found by its checksum and dropped; a killed process tears only the temporary one.
                os.replace(self._temporary, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    self._temporary.unlink(missing_ok=True)
                raise
            with self._mutex:
                self.shelf.put(key, len(header) + len(data))
                self.written += 1

    def stop(self, error: Exception) -> None:
        """Write no more, and say why, once."""
        with self._mutex:
            first, self.writes = self.writes, False
        if first:
            log.warning("no more pages are written in %s: %s", self.folder, getattr(error, "strerror", None) or error)

    def _open(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            entries = [entry.name for entry in os.scandir(self.folder) if not entry.name.startswith(".")]
            tag = self.folder / _TAG  # read after the listing: whoever starts at the same time writes it first of all
            text = tag.read_text(encoding="utf-8", errors="replace") if tag.exists() else None
        except (FileExistsError, NotADirectoryError) as error:
            raise InputError(f"{self.folder} is not a folder: name one for the pages, or none") from error
        except OSError as error:
            return self.stop(error)
        if text is None and entries:
            raise InputError(f"{self.folder} holds other files ({min(entries)}): name an empty folder for the pages")
        if text not in (None, _TAG_TEXT):
            raise InputError(f"{self.folder} holds something in another format: remove it, or name another folder")
        try:
            if text is None:
                with atomic_write(tag) as temporary:
                    temporary.write_text(_TAG_TEXT, encoding="utf-8")
            with self._locked():
                self._make_room(0)  # the budget may be smaller than the last one was
        except (OSError, InputError) as error:  # InputError: no space left
            self.stop(error)
            with contextlib.suppress(OSError):
                self._list()
        return None

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """The kernel's lock on writing and making room, for one at a time; it ends with its process, however that ends.

        The lock file names its last holder: if that was another one, the folder is listed again, so that the budget
        holds for all together. Its holder owns the only temporary file: one that is there already is a dead process's.
        """
        descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            limit = time.monotonic() + _LOCK_SECONDS
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > limit:
                        raise TimeoutError("another process holds its lock") from None
                    time.sleep(0.002)
            if os.pread(descriptor, 16, 0) != self._name:
                self._temporary.unlink(missing_ok=True)
                self._list()
                os.pwrite(descriptor, self._name, 0)
            yield
        finally:
            os.close(descriptor)

    def _list(self) -> None:
        """Learn from names, sizes and times what the folder holds; no page is opened."""
        found = []
        for group in os.scandir(self.folder):
            if len(group.name) != 2 or not group.is_dir():
                continue
            for entry in os.scandir(group.path):
                stem, dot, suffix = entry.name.partition(".")
                with contextlib.suppress(FileNotFoundError, ValueError):  # gone meanwhile; not one of ours
                    if dot + suffix == ".page":
                        status = entry.stat()
                        found.append((status.st_mtime_ns, bytes.fromhex(stem), status.st_size))
        with self._mutex:
            self.shelf.clear()
            for _, key, size in sorted(found):
                self.shelf.put(key, size)

    def _make_room(self, size: int) -> None:
        with self._mutex:
            dropped = self.shelf.make_room(size)
            self.dropped += len(dropped)
        for key in dropped:
            self._path(key).unlink(missing_ok=True)

    def _header(self, key: bytes, coding: int, payload: memoryview) -> bytes:
        # CRC-32 finds every burst of up to 32 bits and misses one in 4e9 of other damage, at three times the speed of
        # SHA-256 in hardware: it guards against accidents, not against whoever may write in the folder
        fields = (_MAGIC, _VERSION, coding, self.digest, key, len(payload), zlib.crc32(payload))
        return HEADER.pack(*fields, zlib.crc32(HEADER.pack(*fields, 0)[:-4]))

    def _path(self, key: bytes) -> Path:
        return self.folder / key.hex()[:2] / f"{key.hex()}.page"


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)  # pages tell what was asked
