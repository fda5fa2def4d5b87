"""Rows of a Parquet file, a batch at a time; needs pyarrow, which only this file imports."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from twelve.data.blocks import Damaged
from twelve.errors import InputError

BATCH = 256  # rows; of long documents these are a few megabytes
COLUMNS = ("id", "title", "text", "messages")


def read_parquet(path: Path, every_column: bool = False) -> Iterator[tuple[float, dict[str, Any]]]:
    """The share of the file that was read, and a row: of its COLUMNS, or of all.

    Streams: memory holds one row group's column as it is stored, and BATCH rows.

    InputError without pyarrow, Damaged for a damaged file, InputError for one that has neither `text` nor `messages`.
    """
    for share, batch in _batches(path, every_column):
        for row in batch.to_pylist():
            yield share, _tidy(row)


def check_parquet(path: Path) -> None:
    """Damaged for a file that cannot be read to its end."""
    for _ in _batches(path, every_column=True):
        pass


def _batches(path: Path, every_column: bool) -> Iterator[tuple[float, Any]]:
    """The share of the file that was read before, and a record batch, whose text is UTF-8."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise InputError(f"{path}: reading .parquet needs a package: pip install 'twelve[parquet]'") from error
    try:
        with parquet.ParquetFile(path) as file:
            columns = None if every_column else _columns(path, file.schema_arrow.names)
            total, read = max(1, file.metadata.num_rows), 0
            for batch in file.iter_batches(BATCH, columns=columns):
                batch.validate(full=True)
                yield read / total, batch
                read += len(batch)
    except (ArrowException, OSError) as error:
        raise Damaged(f"{path} is damaged or no Parquet file ({_first_line(error)}): fetch it again") from error


def _columns(path: Path, names: Sequence[str]) -> list[str]:
    if "text" not in names and "messages" not in names:
        raise InputError(f"{path}: no column `text` or `messages`, only {', '.join(names) or 'none'}")
    return [name for name in COLUMNS if name in names]


def _tidy(row: dict[str, Any]) -> dict[str, Any]:
    """Here every message has every key that any of them has, mostly with nothing in it."""
    messages = row.get("messages")
    if isinstance(messages, list) and all(isinstance(message, dict) for message in messages):
        row["messages"] = [{key: value for key, value in one.items() if value is not None} for one in messages]
    return row


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")
