"""From files, folders and standard input to documents, in a stream: memory does not grow with the corpus."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from twelve.data.blocks import Damaged, read_blocks
from twelve.data.chat import check_messages
from twelve.data.encoding import BOM, NOISE, decode, looks_like, no_text
from twelve.data.parquet import check_parquet, read_parquet
from twelve.errors import InputError
from twelve.files import check_name

STDIN = "-"
FORMATS = re.compile(r"(-\d+-of-\d+)?\.((txt|md|jsonl)(\.gz|\.zst)?|parquet)$", re.IGNORECASE)
PACKED = (".gz", ".zst", ".parquet")
SPLIT_NAME = re.compile(r"(.*?)(val|valid|validation|dev|test|eval)", re.IGNORECASE)
PIECE = 1 << 18  # bytes; longer texts come in pieces of at most this many
BATCH_CHARACTERS = 1 << 20
BATCH_DOCUMENTS = 4096
LINE_LIMIT = 64 << 20  # bytes of one line of JSONL, which has to be in memory as a whole
NOISE_AFTER = 4096  # bytes of JSONL that it takes to tell
CONTROL_BYTES = bytes({*range(32), 127} - set(b"\t\n\v\f\r\x1b"))


@dataclass(slots=True)
class Document:
    """A text, or a piece of one, or a conversation."""

    text: str | None
    messages: list[dict[str, Any]] | None
    source: str  # file, and line for JSONL, row for Parquet
    more: bool = False  # the next Document goes on where this text stops: together they are one document
    piece: int = 0  # of them
    about: dict[str, Any] = field(default_factory=dict)  # `id` and `title`, where its row has them


@dataclass
class Report:
    """What was met while reading; the counts grow as documents come."""

    files: int = 0
    documents: int = 0
    empty: int = 0  # documents without any text, skipped
    bad_bytes: int = 0  # bytes that are no UTF-8, skipped
    position: int = 0  # bytes read so far, of the files as they are on disk
    size: int | None = None  # bytes of all files; None with standard input
    held_out: list[str] = field(default_factory=list)  # files left for validation
    damaged: list[str] = field(default_factory=list)  # files of a folder that cannot be unpacked, skipped


@dataclass(frozen=True)
class Files:
    """What paths stand for."""

    train: list[Path]
    held_out: list[Path]  # validation and test parts, beside a training part of the same name
    named: frozenset[Path]  # those of `train` that were asked for by their own names


def find_files(paths: Iterable[str | Path]) -> Files:
    """The files that `paths` stand for, each once: a folder means all text files below it, in the order of their names.

    In a folder, `x-val.jsonl` (or test, dev, ...) is held out where there is an `x-train.jsonl`; the same goes for
    folders. A file that is named itself is always read. InputError for a missing path or an unknown kind of file.
    """
    paths = list(map(Path, paths))
    train: dict[Path, None] = {}
    held_out: dict[Path, None] = {}
    for path in paths:
        if path.is_dir():
            for file, held in _in_folder(path):
                (held_out if held else train)[file] = None
        elif str(path) != STDIN and not path.exists():
            raise InputError(f"{path}: no such file or folder")
        elif str(path) != STDIN and not FORMATS.search(path.name):
            kinds = ".txt, .md, .jsonl, also .gz and .zst; .parquet"
            raise InputError(f"{path}: not a kind of file that can be read ({kinds})")
        else:
            train[path] = None
    for path in (*train, *held_out):
        check_name(path)
    named = frozenset(path for path in paths if not path.is_dir())
    return Files(list(train), [path for path in held_out if path not in train], named)


def _in_folder(folder: Path) -> list[tuple[Path, bool]]:
    found = [path.relative_to(folder) for path in folder.rglob("*") if FORMATS.search(path.name) and path.is_file()]
    files = sorted(path for path in found if not any(part.startswith(".") for part in path.parts))
    names = {_stem(step) for path in files for step in (path, *path.parents)}
    return [(folder / path, any(_is_held_out(step, names) for step in (path, *path.parents))) for path in files]


def _is_held_out(path: Path, names: set[str]) -> bool:
    match = SPLIT_NAME.fullmatch(Path(_stem(path)).name)
    return match is not None and str(path.parent / f"{match[1]}train") in names


def _stem(path: Path) -> str:
    return str(path.parent / FORMATS.sub("", path.name))


def read_documents(paths: Sequence[str | Path], report: Report | None = None) -> Iterator[Document]:
    """All documents of files, folders (see `find_files`) and standard input ("-"), in order.

    A .txt or .md file is one document. Each line of a .jsonl file is one: an object with `text`, or with `messages`;
    so is each row of a .parquet file that has such a column. A text longer than PIECE comes as several Documents with
    `more` set on all but the last. Standard input is JSONL if its first line is a JSON object, else text.

    A packed file of a folder that cannot be unpacked to its end is skipped and named in the report; one that was asked
    for by name is an error. InputError for that, a missing path, a binary file or one in another encoding, a row of the
    wrong shape or above LINE_LIMIT (with its line number), and when there is no text at all.
    """
    report = report if report is not None else Report()
    files = find_files(paths)
    report.held_out = [str(path) for path in files.held_out]
    known = all(str(path) != STDIN for path in files.train)
    report.size = sum(path.stat().st_size for path in files.train) if known else None
    for path in files.train:
        report.files += 1
        if path not in files.named and _is_damaged(path):
            report.damaged.append(str(path))
            report.position += path.stat().st_size
            continue
        for document in _documents(path, report):
            report.documents += not document.more
            yield document
    if not report.documents:
        damaged = f"; damaged: {', '.join(report.damaged)}" if report.damaged else ""
        raise InputError(f"no text in {', '.join(map(str, paths)) or 'nothing'}: the corpus is empty{damaged}")


def batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents that are worked on at once: about BATCH_CHARACTERS, or one document more."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += _characters(document)
        if size >= BATCH_CHARACTERS or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _characters(document: Document) -> int:
    """About how much is to be held while a document is worked on."""
    if document.text is not None:
        return len(document.text)
    return 512 + sum(len(str(value)) for message in document.messages for value in message.values())


def is_rows(path: Path) -> bool:
    """Whether a file holds a document a row, rather than one document."""
    return path.name.lower().removesuffix(".gz").removesuffix(".zst").endswith((".jsonl", ".parquet"))


def read_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each row of a .jsonl or .parquet file is ("file:line"), and all that it holds, whatever that is.

    InputError for a damaged file, and for a line that is no JSON object.
    """
    report = Report()
    if _is_parquet(path):
        return _parquet(path, report, every_column=True)
    return _objects(path, _blocks(path, report), report)


def read_texts(path: Path) -> Iterator[str]:
    """The pieces of a .txt or .md file."""
    report = Report()
    return (document.text or "" for document in _text(path, _blocks(path, report), report))


# --- one file ---------------------------------------------------------------------------------------------------------


def _documents(path: Path, report: Report) -> Iterator[Document]:
    if _is_parquet(path):
        return _rows(_parquet(path, report), report)
    blocks = _blocks(path, report)
    rows = is_rows(path)
    if str(path) == STDIN:
        first = next(blocks, b"")
        rows, blocks = _is_object(first), chain([first], blocks)
    return _rows(_objects(path, blocks, report), report) if rows else _text(path, blocks, report)


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def _is_damaged(path: Path) -> bool:
    """Whether a packed file cannot be unpacked to its end. Reading it twice takes a few hundredths of what follows."""
    try:
        if _is_parquet(path):
            check_parquet(path)
        elif path.suffix.lower() in PACKED:
            for _ in read_blocks(path, PIECE):
                pass
    except Damaged:
        return True
    return False


def _text(path: Path, blocks: Iterator[bytes], report: Report) -> Iterator[Document]:
    """One document; bytes that are no UTF-8 are skipped and counted."""
    total = noise = number = 0
    waiting: str | None = None  # one piece is held back, to know whether another follows
    for number, data in enumerate(_cut(blocks)):
        text, bad = decode(data.removeprefix(BOM) if number == 0 else data)
        report.bad_bytes += bad
        total += len(data)
        noise += bad + len(data) - len(data.translate(None, CONTROL_BYTES))
        if noise > NOISE * total:
            raise no_text(path, noise / total, data)
        if waiting is not None:
            yield Document(waiting, None, str(path), more=True, piece=number - 1)
        waiting = text
    if waiting is None or (total <= PIECE and not waiting.strip()):
        report.empty += 1
    else:
        yield Document(waiting, None, str(path), piece=number)


def _objects(path: Path, blocks: Iterator[bytes], report: Report) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each line is, and its object; bytes that are no UTF-8 are skipped and counted."""
    total = noise = 0
    data = b""
    for number, data in _lines(path, blocks):
        where = f"{path}:{number}"
        text, bad = decode(data.removeprefix(BOM) if number == 1 else data)
        report.bad_bytes += bad
        total, noise = total + len(data), noise + bad
        if total > NOISE_AFTER and noise > NOISE * total:
            raise no_text(path, noise / total, data)
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            if looks_like(data):
                raise no_text(path, noise / total, data) from error
            raise InputError(f"{where}: not a line of JSON ({error})") from error
        if not isinstance(row, dict):
            raise InputError(f"{where}: must be an object with `text` or `messages`, not {type(row).__name__}")
        yield where, row
    if noise > NOISE * total:
        raise no_text(path, noise / total, data)


def _parquet(path: Path, report: Report, every_column: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    before, size = report.position, path.stat().st_size
    for number, (share, row) in enumerate(read_parquet(path, every_column), 1):
        report.position = before + int(share * size)
        yield f"{path}:{number}", row
    report.position = before + size


def _rows(rows: Iterator[tuple[str, dict[str, Any]]], report: Report) -> Iterator[Document]:
    """A document a row."""
    for where, row in rows:
        about = {key: row[key] for key in ("id", "title") if isinstance(row.get(key), str | int)}
        if row.get("messages") is not None:
            yield Document(None, check_messages(row["messages"], f"{where}: messages"), where, about=about)
            continue
        if not isinstance(row.get("text"), str):
            kind = "is missing" if "text" not in row else f"is {type(row['text']).__name__}, not text"
            raise InputError(f"{where}: `text` {kind}, and there are no `messages`")
        data = row["text"].encode("utf-8", "ignore")  # "\\ud800" in JSON is half a character
        report.bad_bytes += len(row["text"].encode("utf-8", "surrogatepass")) - len(data)
        pieces = [piece.decode() for piece in _cut([data])] if row["text"].strip() else []
        report.empty += not pieces
        for index, piece in enumerate(pieces):
            yield Document(piece, None, where, more=index + 1 < len(pieces), piece=index, about=about)


def _cut(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Pieces of at most PIECE bytes, cut after a line, else before a blank, else between characters."""
    held = b""
    for block in blocks:
        held += block
        start = 0
        while len(held) - start > PIECE:
            end = held.rfind(b"\n", start + PIECE // 2, start + PIECE) + 1
            end = end or max(0, held.rfind(b" ", start + PIECE // 2, start + PIECE))
            if not end:
                end = start + PIECE
                while end > start + PIECE - 3 and held[end] & 0xC0 == 0x80:  # inside a character
                    end -= 1
            yield held[start:end]
            start = end
        held = held[start:]
    if held:
        yield held


def _is_object(block: bytes) -> bool:
    """Whether the first line is a JSON object; one that is longer than the block only has to look like it."""
    line, end, _ = block.lstrip(BOM + b" \t\r\n").partition(b"\n")
    if not end and len(block) >= PIECE:
        return line.startswith(b'{"')
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _lines(path: Path, blocks: Iterator[bytes]) -> Iterator[tuple[int, bytes]]:
    """Line number from 1, and the line."""
    number, parts, size = 1, [], 0
    for block in blocks:
        *complete, rest = block.split(b"\n")
        for line in complete:
            yield number, b"".join([*parts, line])
            number, parts, size = number + 1, [], 0
        parts.append(rest)
        size += len(rest)
        if size > LINE_LIMIT:
            raise InputError(f"{path}:{number}: a line above {LINE_LIMIT >> 20} MiB; split it, or store it as .txt")
    if size:
        yield number, b"".join(parts)


def _blocks(path: Path, report: Report) -> Iterator[bytes]:
    before = report.position
    if str(path) == STDIN:
        while block := sys.stdin.buffer.read(PIECE):
            report.position += len(block)
            yield block
        return
    for block, position in read_blocks(path, PIECE):
        report.position = before + position
        yield block


def save_stdin(folder: Path) -> Path:
    """Copy standard input into a file in `folder`, which says by its name how to read it."""
    folder.mkdir(parents=True, exist_ok=True)
    first = sys.stdin.buffer.read(PIECE)
    path = folder / ("stdin.jsonl" if _is_object(first) else "stdin.txt")
    with open(path, "wb") as file:
        file.write(first)
        shutil.copyfileobj(sys.stdin.buffer, file)
    return path
