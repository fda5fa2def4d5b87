"""What rows held before they were changed in place: the way back to the last checkpoint after a kill.

A file of the step of that checkpoint and then batches, each with its length and checksum. A batch is on the disk before
its rows change, so rows that changed are in a whole batch, and a batch that is not whole changed nothing.
"""

from __future__ import annotations

import errno
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from twelve.errors import InputError
from twelve.files import atomic_write, free_bytes

HEAD = struct.Struct("<8sqqI")  # magic, step, bytes of a record, checksum of these
BATCH = struct.Struct("<qI")  # records, checksum of their number and of them
MAGIC = b"12undo\0\1"


class Journal:
    """The file at `path`, begun at `step` if there is none. A record is `record_bytes` long.

    `found`: whether it was there; its batches must then be gone through, and `restart` called, before more are added.
    InputError when it is not a journal of such records.
    """

    def __init__(self, path: Path, step: int, record_bytes: int) -> None:
        self.path, self.record_bytes = path, record_bytes
        self.found = path.exists()
        self._descriptor = -1
        if self.found:
            self._open()
        else:
            self.restart(step)

    def restart(self, step: int) -> None:
        """Forget what there is: the rows are now those of the checkpoint of `step`."""
        head = HEAD.pack(MAGIC, step, self.record_bytes, 0)
        with atomic_write(self.path) as temporary:
            temporary.write_bytes(head[:-4] + struct.pack("<I", zlib.crc32(head[:-4])))
        self._open()

    def _open(self) -> None:
        self.close()
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        head = os.pread(self._descriptor, HEAD.size, 0)
        if len(head) < HEAD.size or zlib.crc32(head[:-4]) != int.from_bytes(head[-4:], "little"):
            raise InputError(f"{self.path} is damaged: remove the folder's training/ to start again")
        magic, self.step, record_bytes, _ = HEAD.unpack(head)
        if magic != MAGIC or record_bytes != self.record_bytes:
            raise InputError(f"{self.path} is of another table: name the folder that the training began in")
        self._end = HEAD.size

    def add(self, records: bytes) -> None:
        """Put a batch on the disk. InputError when that is full; the journal is then as before."""
        count = len(records) // self.record_bytes
        batch = memoryview(BATCH.pack(count, _checksum(count, records)) + records)
        done = 0
        try:
            while done < len(batch):
                done += os.pwrite(self._descriptor, batch[done:], self._end + done)
            self._sync()
        except OSError as error:
            os.ftruncate(self._descriptor, self._end)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise InputError(
                f"no space left to write {self.path} ({free_bytes(self.path):,} bytes free): "
                "free some space, then run the same command again"
            ) from error
        self._end += len(batch)

    def batches(self) -> Iterator[bytes]:
        """The records of each whole batch, in order. InputError when one that is not the last is damaged."""
        at, size = HEAD.size, os.fstat(self._descriptor).st_size
        while at + BATCH.size <= size:
            count, checksum = BATCH.unpack(os.pread(self._descriptor, BATCH.size, at))
            end = at + BATCH.size + count * self.record_bytes
            if count < 0 or end > size:
                return  # cut off: the last one
            records = _read(self._descriptor, end - at - BATCH.size, at + BATCH.size)
            if _checksum(count, records) != checksum:
                if end < size:
                    raise InputError(f"{self.path} is damaged: remove the folder's training/ to start again")
                return
            yield records
            at = end

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _sync(self) -> None:
        getattr(os, "fdatasync", os.fsync)(self._descriptor)


def _checksum(count: int, records: bytes) -> int:
    return zlib.crc32(records, zlib.crc32(count.to_bytes(8, "little")))


def _read(descriptor: int, size: int, offset: int) -> bytes:
    parts = []
    while size:
        part = os.pread(descriptor, size, offset)  # at most 2 GiB at once
        parts.append(part)
        size, offset = size - len(part), offset + len(part)
    return b"".join(parts)
