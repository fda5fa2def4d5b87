"""Where the pages go that the pool has no room for: warm in RAM (8 bit), cold in files."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from twelve.engine.codec import PageCode
from twelve.engine.cold import EIGHT_BIT, FLOAT32, HEADER, ColdFolder, Shelf
from twelve.errors import InputError

_QUEUE_BYTES = 64 << 20  # of pages in RAM that wait to be written


class Tiers:
    """Pages of one model by key (16 bytes), under two budgets. Its methods may be called from any thread.

    Warm pages are in 8 bits, in RAM; a hit takes the page out, as it is in the pool then. Cold pages are files: they
    outlive the process, and any number of processes may share the folder, whose budget it is. In both the least
    recently used goes first. A page may be in both. Beside the warm budget up to 64 MiB of pages (at least one) wait in
    RAM to be written.

    A key must tell the model, its precision and its exactness, not the tokens only: what is computed behind an 8-bit
    page is itself approximate, and cold pages do not remember that.

    Nothing that happens to the folder reaches the callers of `seal`, `evict` and `get`: see ColdFolder.
    """

    def __init__(
        self, identity: bytes, page_bytes: int, segments: Sequence[tuple[int, ...]], *,
        warm_bytes: int = 0, folder: str | Path | None = None, cold_bytes: int = 0,
        exact: bool = False, compact: bool = False,
    ):  # fmt: skip
        """identity: of the model, any bytes. page_bytes: of a page in float32. segments: see PageCode.

        warm_bytes, cold_bytes: the budgets; 0 (or no folder) turns a tier off.
        exact: only bit-equal copies count: nothing goes to warm, and 8-bit files are passed over.
        compact: cold files in 8 bits too: nearly four times as many, none of them exact.

        Raises InputError for a budget smaller than one page and for a folder that is something else.
        """
        self.code = PageCode(segments)
        if page_bytes != 4 * self.code.floats:
            raise ValueError(f"segments of {4 * self.code.floats} bytes do not make a page of {page_bytes}")
        if exact and compact:
            raise ValueError("compact pages are not exact")
        file_bytes = HEADER.size + (self.code.bytes if compact else page_bytes)
        for budget, what, page in ((warm_bytes, "warm", self.code.bytes), (cold_bytes, "cold", file_bytes)):
            if 0 < budget < page:
                raise InputError(f"{budget:,} bytes for {what} pages do not hold one page of {page:,} bytes")
        self.identity, self.exact, self.compact = identity, exact, compact
        self._warm = Shelf(0 if exact else warm_bytes)
        self._cold = None
        if folder is not None and cold_bytes > 0:
            digest = hashlib.blake2b(identity + repr(self.code.layout).encode(), digest_size=16).digest()
            self._cold = ColdFolder(Path(folder), cold_bytes, digest, self.code, exact)
        self._mutex = threading.Lock()  # guards what follows and the warm pages; not held over a file or a coding
        self._counts = dict.fromkeys(("warm_hits", "cold_hits", "misses", "warm_dropped", "skipped"), 0)
        self._pending: dict[bytes, np.ndarray] = {}  # payloads on the way to a file, oldest first
        self._room = max(1, _QUEUE_BYTES // file_bytes)
        self._writer: threading.Thread | None = None
        self._closed = False

    def seal(self, key: bytes, page: np.ndarray) -> None:
        """A page [page_bytes / 4] float32 is full and can be shared: keep a cold copy, written behind.

        The page is copied before this returns. While too many wait to be written it is passed over (`skipped`); `evict`
        offers it again. A page with inf or NaN is not kept in 8 bits.
        """
        if self._closed or self._cold is None or not self._cold.writes or self._cold.holds(key):
            return
        with self._mutex:
            if key in self._pending:
                return
            if len(self._pending) >= self._room:
                self._counts["skipped"] += 1
                return
        payload = self.code.encode(page) if self.compact else page.copy()
        if payload is None:
            return
        with self._mutex:
            self._pending.setdefault(key, payload)
            if self._writer is None:
                # one thread, which ends when nothing is left to write: an engine that nobody closes ends all the same
                self._writer = threading.Thread(target=self._write_behind, name="cold pages", daemon=False)
                try:
                    self._writer.start()
                except RuntimeError as error:  # the interpreter ends, or there are too many threads
                    self._writer = None
                    self._pending.clear()
                    self._cold.stop(error)

    def evict(self, key: bytes, page: np.ndarray) -> None:
        """The pool needs this page's room: keep it warm, and cold if it is not yet."""
        self.seal(key, page)
        with self._mutex:
            if not self._warm.budget or self._warm.touch(key):
                return
        coded = self.code.encode(page)
        if coded is None:
            return
        with self._mutex:
            self._warm.take(key)  # another thread may have been faster
            self._counts["warm_dropped"] += len(self._warm.make_room(coded.nbytes))
            self._warm.put(key, coded.nbytes, coded)

    def get(self, key: bytes, out: np.ndarray) -> bool:
        """Fill `out` [page_bytes / 4] float32, contiguous. False when the page is nowhere; `out` is undefined then."""
        with self._mutex:
            coded, waiting, hit = self._warm.take(key), self._pending.get(key), "cold_hits"
        if coded is not None:
            self.code.decode(coded, out)
            hit = "warm_hits"
        elif waiting is not None and self.compact:
            self.code.decode(waiting, out)
        elif waiting is not None:
            out[:] = waiting
        elif self._cold is None or not self._cold.read(key, out):
            hit = "misses"
        with self._mutex:
            self._counts[hit] += 1
        return hit != "misses"

    def __contains__(self, key: bytes) -> bool:
        """Whether `get` would try; that a file is damaged shows only when it is read."""
        with self._mutex:
            if key in self._warm or key in self._pending:
                return True
        return self._cold is not None and key in self._cold

    def touch(self, keys: Iterable[bytes]) -> None:
        """Mark pages as just used, the first as the latest: the head of a prefix must outlive its tail.

        Pages that still wait to be written come in the order of their writing.
        """
        for key in reversed(list(keys)):
            with self._mutex:
                self._warm.touch(key)
            if self._cold is not None:
                self._cold.touch(key)

    def clear(self) -> None:
        """Forget the warm pages. Cold ones stay."""
        with self._mutex:
            self._warm.clear()

    def flush(self) -> None:
        """Return when every page that waited is in a file, or writing has stopped."""
        while True:
            with self._mutex:
                writer = self._writer
            if writer is None:
                return
            writer.join()

    def close(self) -> None:
        """Flush; from now on nothing is written. Pages can still be read."""
        self.flush()
        self._closed = True
        self.flush()  # what another thread has sealed meanwhile

    @property
    def stats(self) -> dict[str, int]:
        """Pages and bytes held now, and counts since the start.

        dropped: the least recently used, for room. skipped: not written as too many waited. damaged: files that were
        torn, altered or of another model, and were removed.
        """
        cold = self._cold
        with self._mutex:
            return self._counts | {
                "warm_pages": len(self._warm),
                "warm_bytes": self._warm.bytes,
                "cold_pages": len(cold.shelf) if cold else 0,
                "cold_bytes": cold.shelf.bytes if cold else 0,
                "cold_written": cold.written if cold else 0,
                "cold_dropped": cold.dropped if cold else 0,
                "damaged": cold.damaged if cold else 0,
                "pending": len(self._pending),
            }

    def _write_behind(self) -> None:
        coding = EIGHT_BIT if self.compact else FLOAT32
        while True:
            with self._mutex:
                if not self._pending:
                    self._writer = None
                    return
                key, payload = next(iter(self._pending.items()))
            try:
                self._cold.write(key, coding, payload)
            except Exception as error:  # whatever it is, the engine goes on and the queue empties
                self._cold.stop(error)
            with self._mutex:
                self._pending.pop(key, None)
                if not self._cold.writes:
                    self._pending.clear()
