"""The table of a conditional memory: rows that lie in host memory or in one mapped file, read and trained by number.

Only rows that a batch touches cost anything. In training they are changed in place, of the file's map or, where memory
can hold all of them, of a copy that checkpoints write back; `twelve.journal` is the way back to the last checkpoint, so
that a kill at any moment loses no more than the steps since.
"""

from __future__ import annotations

import json
import resource
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from twelve.errors import InputError
from twelve.files import atomic_write
from twelve.heap import memory
from twelve.journal import Journal
from twelve.rows import CODES, DTYPES, RowFile, Rows, copy_file, decode, encode, own

STATE = "engram-state.safetensors"  # beside the journal
EPS = 1e-10
MANY = 256  # rows of a read, from which it pays to ask for all before the first is waited for
PATIENCE = 64
FAR_BYTES = 1 << 26  # smaller tables stay in memory by being used


class Table:
    """`rows` [count, width] in float32, bfloat16 or int8 with a float32 scale a row; made by `create` or `open`.

    In training a look-up appends (row numbers [...], leaf tensor [..., width]) to `pending`, and `update` applies the
    gradients. `asynchronous`: updates are applied in a thread while the next step runs. What is read may then lack the
    last update, never more and never part of one, and runs are not repeated bit by bit. It is off by default.
    """

    def __init__(self, rows: Rows, scales: Rows | None, dtype: str, identity: dict, compressed: np.ndarray) -> None:
        self.dtype, self.identity, self.compressed = dtype, identity, compressed
        self.asynchronous = False
        self.trainable = True
        self.pending: list[tuple[np.ndarray, Tensor]] = []
        self.path: Path | None = None
        self._rows, self._scales = rows, scales
        self._file: RowFile | None = None
        self._squares: Rows | None = None  # of gradients, summed: the optimiser's state
        self._state: RowFile | None = None
        self._journal: Journal | None = None
        self._kept: np.ndarray | None = None  # [count] bool: whether the journal holds what the row was
        self._changed = False
        self._faults, self._patience = -1, 0  # the first steps count as cold
        self._lock = threading.Lock()  # between those who read and those who put
        self._reader = ThreadPoolExecutor(1, "table-reader")
        self._reading: list[Future] = []
        self._writer = ThreadPoolExecutor(1, "table-writer")
        self._writing: Future | None = None

    @staticmethod
    def create(
        path: str | Path | None, rows: int, width: int, dtype: str, identity: dict[str, Any], compressed: np.ndarray
    ) -> Table:
        """A table of zeros that can be trained, in the new file `path` or, for None, in memory.

        identity: what a row's number means, as JSON; compressed [V] int32: the map of token ids that goes with it.
        InputError when there is a file already, or no room for this one: all its blocks are taken at once.
        """
        code = CODES[dtype]
        if path is None:
            scales = Rows.zeros((rows, 1), DTYPES["F32"]) if dtype == "int8" else None
            table = Table(Rows.zeros((rows, width), DTYPES[code]), scales, dtype, identity, compressed)
            table._squares = Rows.zeros((rows, 1), DTYPES["F32"])
            return table
        if Path(path).exists():
            raise InputError(f"{path} is there already: remove it, or name another folder")
        _create(Path(path), rows, width, dtype, identity, compressed, {})
        return Table.open(path, identity, writable=True)

    @staticmethod
    def open(path: str | Path, identity: dict[str, Any], writable: bool = False) -> Table:
        """The table in a file; `writable`: to be trained. A file that other folders share is first copied then.

        InputError when the file is not a whole table of this identity, or cannot be written.
        """
        path = Path(path)
        file = RowFile(path)
        _check_identity(path, file.metadata.get("identity"), identity)
        if writable:
            file.close()
            own(path)
            file = RowFile(path, writable=True)
        rows, code = file.rows("rows"), file.code("rows")
        dtype = next((name for name, known in CODES.items() if known == code), None)
        if dtype is None:
            raise InputError(f"{path}: rows in {code} are not supported, only {', '.join(CODES.values())}")
        scales = file.rows("scales") if dtype == "int8" else None
        if scales is not None and (scales.count, scales.width, file.code("scales")) != (rows.count, 1, "F32"):
            raise InputError(
                f"{path} has {rows.count:,} rows, but scales of {scales.count:,} x {scales.width} in "
                f"{file.code('scales')}: copy it again"
            )
        ids = file.rows("compressed_ids")
        table = Table(rows, scales, dtype, identity, ids.take(np.arange(ids.count))[:, 0])
        table._file, table.path, table.trainable = file, path, writable
        return table

    @property
    def count(self) -> int:
        return self._rows.count

    @property
    def width(self) -> int:
        return self._rows.width

    @property
    def nbytes(self) -> int:
        """Of all rows with their scales."""
        return self.count * self.row_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of a row with its scale."""
        return self._rows.row_bytes + (self._scales.row_bytes if self._scales else 0)

    @property
    def address(self) -> int | None:
        """Of the first row in this process; None where the file is not mapped, and only `read` gets at it."""
        return None if self._rows.array is None else self._rows.array.ctypes.data

    @property
    def scales_address(self) -> int | None:
        """Of the first row's scale, as `address`; None also where rows have none."""
        return None if self._scales is None or self._scales.array is None else self._scales.array.ctypes.data

    @property
    def is_far(self) -> bool:
        """Whether rows may have to come from a disk, so that `prefetch` can pay."""
        return self._file is not None and not self._rows.is_held and self.nbytes >= FAR_BYTES

    def is_cold(self) -> bool:
        """Whether this process had to wait for a disk during one of the last PATIENCE calls: then to prefetch pays even
        for a few rows, where to find them takes longer than to read them from memory."""
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
        self._patience = PATIENCE if faults != self._faults else self._patience - 1
        self._faults = faults
        return self.is_far and self._patience > 0

    def read(self, rows: np.ndarray) -> np.ndarray:
        """float32 [..., width] of row numbers int64 [...]."""
        flat = rows.reshape(-1)
        if self.is_far and len(flat) >= MANY:
            self._warm(flat)
        with self._lock:
            raw, scales = self._take(flat)
        return decode(raw, scales).reshape(*rows.shape, self.width)

    def prefetch(self, rows: np.ndarray) -> None:
        """Have a thread see to it that these rows, soon to be read, come into memory. It changes no result.

        Nothing is begun while two earlier calls are not done.
        """
        self._reading = [reading for reading in self._reading if not reading.done()]
        if len(self._reading) < 2:
            self._reading.append(self._reader.submit(self._warm, rows.reshape(-1)))

    def _warm(self, rows: np.ndarray) -> None:
        for part in self._parts():
            part.warm(rows)

    # training

    def begin(self, journal: str | Path, step: int = 0) -> None:
        """Before the first update: bring up the optimiser's state and the file `journal`, which are made at `step` when
        this is the run's beginning. After a kill they are there, and `rollback` must come next.

        A table in memory has no journal. InputError when only a part is there, or it is not this table's.
        """
        if self._file is None:
            return
        self._settle()
        journal, state = Path(journal), Path(journal).with_name(STATE)
        if not journal.exists():
            state.unlink(missing_ok=True)
            RowFile.create(state, {"squares": ("F32", (self.count,))}, {}, {})
        self._state = RowFile(state, writable=True)
        self._squares = self._state.rows("squares")
        if self._squares.count != self.count:
            raise InputError(f"{state} is of another table: name the folder that the training began in")
        if self.address is not None and self.nbytes + self._squares.nbytes <= memory()[1] // 2:
            for part in self._parts():
                part.hold()
        self._journal = Journal(journal, step, 8 + self.row_bytes + self._squares.row_bytes)
        self._kept = np.zeros(self.count, bool)

    @torch.no_grad()
    def update(self, lr: float) -> None:
        """Apply the gradients of `pending`, and forget them: with g the sum of a row's gradients in the order they were
        looked up, s += mean(g^2) and row -= lr g / sqrt(s + 1e-10), row-wise Adagrad.

        Rows in bfloat16 or int8 are rounded to the nearest, so that changes of less than half a step are lost.
        InputError, rows untouched, when the journal finds no space.
        """
        looked = [(rows.reshape(-1), leaf.grad) for rows, leaf in self.pending if leaf.grad is not None]
        self.pending.clear()
        self._settle()
        if not looked:
            return
        if self._squares is None:
            raise RuntimeError("a table in a file needs begin() before update()")
        rows = np.concatenate([rows for rows, _ in looked])
        grads = torch.cat([grad.reshape(-1, self.width).float().cpu() for _, grad in looked])
        if self.asynchronous:
            self._writing = self._writer.submit(self._apply, rows, grads, lr)
        else:
            self._apply(rows, grads, lr)

    def _apply(self, rows: np.ndarray, grads: Tensor, lr: float) -> None:
        keys = np.sort(rows * len(rows) + np.arange(len(rows)))  # by row, then in order: faster than a stable sort
        order, rows = keys % len(rows), keys // len(rows)
        starts = np.flatnonzero(np.append(True, rows[1:] != rows[:-1]))
        rows = rows[starts]
        grads = F.embedding_bag(torch.from_numpy(order), grads, torch.from_numpy(starts), mode="sum")
        raw, scales = self._take(rows)
        squares = self._squares.take(rows)
        self._keep(rows, raw, scales, squares)
        squares = torch.from_numpy(squares[:, 0]) + grads.square().mean(-1)
        values = torch.from_numpy(decode(raw, scales)) - lr * grads / (squares + EPS).sqrt()[:, None]
        raw, scales = encode(values, self.dtype)
        with self._lock:
            self._put(rows, raw, scales, squares[:, None].numpy())
        self._changed = True

    def _keep(self, rows: np.ndarray, *parts: np.ndarray | None) -> None:
        """Write what rows are to the journal, if they change for the first time since the checkpoint."""
        if self._journal is None:
            return
        if self._journal.found:
            raise RuntimeError("there is a journal: rollback() comes before update()")
        new = ~self._kept[rows]
        columns = [rows[:, None], *(part for part in parts if part is not None)]
        records = np.concatenate([column[new].view(np.uint8) for column in columns], axis=1)
        if len(records):
            self._journal.add(records.tobytes())
            self._kept[rows[new]] = True

    def flush(self) -> None:
        """Return when all updates are on the disk: before the checkpoint that goes with them is."""
        self._settle()
        if self._journal is not None:
            for part in self._parts():
                part.write_back()
            self._file.flush()
            self._state.flush()

    def commit(self, step: int) -> None:
        """The checkpoint of `step` is in its place: what came before cannot be asked for any more."""
        self._settle()
        if self._journal is not None:
            self._journal.restart(step)
            self._kept[:] = False

    def rollback(self, step: int) -> None:
        """Make rows and state what they were at the checkpoint of `step`, 0 without one.

        InputError when that cannot be: the journal is gone or later, or the table was in memory.
        """
        self._settle()
        if self._journal is None:
            if step or self._changed:
                raise InputError("a table in memory does not outlive its run: start again, or give it a file")
            return
        if self._journal.step > step or (not self._journal.found and self._journal.step != step):
            raise InputError(
                f"{self.path} cannot go back to step {step}: its journal {self._journal.path} is gone or of a later "
                "step; remove the folder to start again"
            )
        if self._journal.step == step:  # an older one was the way back to an older checkpoint
            for records in self._journal.batches():
                self._put(*self._parse(records))
            self.flush()
        self.commit(step)
        self._journal.found = False

    def end(self) -> None:
        """Training is over: remove its state and its journal."""
        self._settle()
        self.trainable = False
        if self._journal is not None:
            self._journal.close()
            self._state.close()
            self._journal.path.unlink(missing_ok=True)
            self._state.path.unlink(missing_ok=True)
        self._journal = self._state = self._squares = self._kept = None

    def save_as(self, path: str | Path) -> None:
        """Write the table to `path`. A file that nobody may train through this table is linked where that can be."""
        self._settle()
        path = Path(path)
        if self._file is None:
            held = {"rows": self._rows} | ({"scales": self._scales} if self._scales else {})
            _create(path, self.count, self.width, self.dtype, self.identity, self.compressed, held)
            return
        self._rows.write_back()
        if self._scales:
            self._scales.write_back()
        if path.exists() and path.samefile(self.path):
            self._file.flush()
            return
        with atomic_write(path) as temporary:
            if not self._file.writable:
                try:
                    temporary.hardlink_to(self.path)
                    return
                except OSError:  # another file system, or one without links
                    pass
            copy_file(self.path, temporary)

    def part(self, spans: Sequence[tuple[int, int]], identity: dict[str, Any]) -> Table:
        """A table of the rows [start, end) of these spans alone, one after the other, for reading and saving. Those of
        a single span are read where they lie, so that they may be more than the memory holds; others are copied."""
        self._settle()

        def of(rows: Rows) -> Rows:
            pieces = [rows.array[a:b] if rows.array is not None else rows.take(np.arange(a, b)) for a, b in spans]
            array = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
            return Rows(array.shape, rows.dtype, array)

        part = Table(of(self._rows), self._scales and of(self._scales), self.dtype, identity, self.compressed)
        part.trainable = False
        return part

    def close(self) -> None:
        """End its threads and let go of its files. Rows must not be read after it."""
        self._reader.shutdown(cancel_futures=True)
        self._settle()
        self._writer.shutdown()
        if self._journal is not None:
            self._journal.close()
            self._state.close()
        if self._file is not None:
            self._file.close()

    def _settle(self) -> None:
        """Wait for an update in its thread, and raise what it raised."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _parts(self) -> list[Rows]:
        return [part for part in (self._rows, self._scales, self._squares) if part is not None]

    def _take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        return self._rows.take(rows), self._scales.take(rows) if self._scales else None

    def _put(self, rows: np.ndarray, raw: np.ndarray, scales: np.ndarray | None, squares: np.ndarray) -> None:
        self._rows.put(rows, raw)
        if self._scales:
            self._scales.put(rows, scales)
        self._squares.put(rows, squares)

    def _parse(self, records: bytes) -> list[np.ndarray | None]:
        """Row numbers, rows, scales and state of the journal's records."""
        raw = np.frombuffer(records, np.uint8).reshape(-1, self._journal.record_bytes)
        parts, at = [], 8
        for part in (self._rows, self._scales, self._squares):
            size = part.row_bytes if part else 0
            parts.append(np.ascontiguousarray(raw[:, at : at + size]).view(part.dtype) if part else None)
            at += size
        return [np.ascontiguousarray(raw[:, :8]).view(np.int64)[:, 0], *parts]


def _create(
    path: Path, rows: int, width: int, dtype: str, identity: dict, compressed: np.ndarray, contents: dict[str, Rows]
) -> None:
    """The file, of zeros but for `contents`."""
    shapes = {"rows": (CODES[dtype], (rows, width))}
    if dtype == "int8":
        shapes["scales"] = ("F32", (rows,))
    shapes["compressed_ids"] = ("I32", compressed.shape)
    ids = Rows((len(compressed), 1), DTYPES["I32"], compressed.astype("<i4"))
    RowFile.create(path, shapes, {"identity": json.dumps(identity)}, {**contents, "compressed_ids": ids})


def _check_identity(path: Path, text: str | None, identity: dict[str, Any]) -> None:
    """InputError, naming what differs, when a table means other tokens by its rows."""
    try:
        found = json.loads(text)
    except (TypeError, ValueError):
        raise InputError(f"{path} is no table: it does not say which tokens its rows are for") from None
    wanted = json.loads(json.dumps(identity))
    if found != wanted:
        keys = ", ".join(key for key in {**wanted, **found} if wanted.get(key) != found.get(key))
        raise InputError(f"{path} is the table of another model or tokenizer ({keys} differ): use the one it came with")
