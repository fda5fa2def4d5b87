"""From text and messages to token shards: `tokenize` writes what `PackedData` reads."""

from __future__ import annotations

import errno
import hashlib
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from twelve.data import chat
from twelve.data.cleaning import RULES_VERSION, Cleaner, Tally, write_rows
from twelve.data.reader import PACKED, STDIN, Document, Report, batches, find_files, read_documents, save_stdin
from twelve.data.shards import FORMAT, KINDS, META, Batch, PackedData, Writer
from twelve.data.tokenizer import Tokenizer, check_vocab_size
from twelve.errors import InputError
from twelve.files import FolderLock, command, free_bytes, read_json, sha256, write_json

__all__ = ["Batch", "Document", "PackedData", "Report", "find_files", "read_documents", "texts", "tokenize"]

SHARD_TOKENS = 1 << 28


def tokenize(
    paths: Sequence[str | Path],
    out: str | Path,
    tokenizer: Tokenizer | str | Path | None = None,
    vocab_size: int | None = None,
    *,
    filter: bool = False,
    progress: bool = True,
    shard_tokens: int = SHARD_TOKENS,
) -> dict[str, Any]:
    """Write the documents of `paths` and their tokenizer into the folder `out`; what there is to say of them.

    The tokenizer is the one given (or that of a folder), else one of `vocab_size` entries (None: by the size of the
    corpus) trained on these texts. `filter` first drops what `twelve.data.quality` finds wrong, by way of a temporary
    copy of the rest in `out`. `PackedData(out)` and `Tokenizer.load(out)` read what is written.

    Streams: memory holds a few batches of documents, and a tokenizer's sample. The folder is valid only once
    meta.json is there, which comes last; a run that was stopped leaves nothing that `PackedData` opens. What is there
    already is used again if it was made from the same files in the same way.

    InputError for what `read_documents` refuses, messages that the chat template cannot write, a vocabulary too small,
    a full disk, or nothing to learn from.
    """
    started = time.monotonic()
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: name a folder for the shards")
    if vocab_size is not None:
        check_vocab_size(vocab_size)  # before reading for minutes
    if isinstance(tokenizer, str | Path):
        tokenizer = Tokenizer.load(tokenizer)
    find_files(paths)  # a wrong path makes no folder
    with FolderLock(out), _full_disk_told(out), _stdin_as_file(paths, out) as paths:
        request = {
            "format": FORMAT,
            "tokenizer": None if tokenizer is None else tokenizer.fingerprint,
            "vocab_size": (vocab_size or _vocab_size_for(paths)) if tokenizer is None else None,
            "filter": RULES_VERSION if filter else None,
            "sources": [_source(path) for path in find_files(paths).train],
        }
        data = _made_before(out, request)
        if data is None:
            _check_place(out)
            _clear(out)
            try:
                with _filtered(paths, out, progress) if filter else nullcontext((paths, {})) as (texts_from, told):
                    tokenizer = tokenizer or _trained(texts_from, request["vocab_size"], progress)
                    meta = _write(texts_from, tokenizer, out, progress, shard_tokens) | told
                for source in request["sources"]:
                    source["sha256"] = sha256(source["path"])
                tokenizer.save(out)
                write_json(out / META, meta | {"request": request})
            except BaseException:
                _clear(out)
                raise
            data = PackedData(out)
            if progress:
                _tell(data.meta)
    return {
        "folder": str(out),
        "vocabulary": data.meta["vocabulary"],
        "documents": data.documents,
        "tokens": data.tokens,
        "bytes": data.bytes,
        "bytes_per_token": data.bytes / data.tokens,
        **{count: data.meta[count] for count in ("empty", "unanswered", "bad_bytes", "held_out", "damaged", "dropped")
           if count in data.meta},
        "seconds": time.monotonic() - started,
        "next": command("twelve", "pretrain", out),
    }


def _tell(meta: dict[str, Any]) -> None:
    """What was left out, on standard error."""
    if meta["held_out"]:
        print(f"held out for validation: {', '.join(meta['held_out'])}", file=sys.stderr)
    if meta["damaged"]:
        print(f"skipped {len(meta['damaged'])} damaged files: {', '.join(meta['damaged'])}", file=sys.stderr)
    if meta["bad_bytes"]:
        print(f"skipped {meta['bad_bytes']:,} bytes that are no UTF-8", file=sys.stderr)
    if meta["unanswered"]:
        print(f"left out {meta['unanswered']:,} conversations in which no assistant says anything", file=sys.stderr)


def texts(documents: Iterable[Document]) -> Iterator[str]:
    """What a tokenizer is trained on: the texts, and conversations as our own template writes them."""
    for document in documents:
        yield document.text if document.text is not None else chat.render_own(document.messages)


def _trained(paths: Sequence[str | Path], vocab_size: int, progress: bool) -> Tokenizer:
    return Tokenizer.train(texts(read_documents(paths)), vocab_size, progress=progress)


def _vocab_size_for(paths: Sequence[str | Path]) -> int:
    """By the bytes of text, compressed ones counted threefold: every entry is to be seen often enough to be learnt."""
    size = sum(path.stat().st_size * (3 if path.suffix in PACKED else 1) for path in find_files(paths).train)
    return 4096 if size < 8e6 else 8192 if size < 1e9 else 16384 if size < 1e10 else 32768


@contextmanager
def _full_disk_told(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(f"no space left to write {out} ({free_bytes(out):,} bytes free)") from error


# --- what is there already --------------------------------------------------------------------------------------------


@contextmanager
def _stdin_as_file(paths: Sequence[str | Path], out: Path) -> Iterator[list[str | Path]]:
    """`paths`, with a copy in place of standard input, which can be read only once; it lasts as long as the block."""
    folder = out / ".stdin"
    try:
        yield [save_stdin(folder) if str(path) == STDIN else path for path in paths]
    except InputError as error:  # the copy will be gone when the message is read
        raise InputError(re.sub(re.escape(str(folder)) + r"/stdin\.\w+", "standard input", str(error))) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _filtered(
    paths: Sequence[str | Path], out: Path, progress: bool
) -> Iterator[tuple[list[str | Path], dict[str, Any]]]:
    """A copy of what is worth keeping of `paths`, which lasts as long as the block, and what there is to say of it."""
    folder = out / ".filtered"
    report, tally = Report(), Tally()
    try:
        with write_rows(folder / "text.jsonl") as write, _Bar(report, progress, "filter") as bar:
            size = 0
            for verdict in Cleaner().verdicts(read_documents(paths, report), folder=folder):
                tally.add(verdict)
                size += len(verdict.text)
                bar.show(size)
                if not verdict.reason:
                    write(verdict.document)
        if not tally.kept:
            raise InputError(f"the filter leaves nothing: {'; '.join(tally.lines())}")
        if progress:
            print("\n".join(tally.lines()), file=sys.stderr)
        told = {name: getattr(report, name) for name in ("held_out", "damaged", "bad_bytes")}
        told["dropped"] = {reason: count for reason, (count, _) in tally.dropped.items()}
        yield [folder / "text.jsonl"], told
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _source(path: Path) -> dict[str, Any]:
    status = path.stat()
    return {"path": str(path), "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _made_before(out: Path, request: dict[str, Any]) -> PackedData | None:
    """The shards in `out`, if they are whole and are what this request would make."""
    try:
        made = read_json(out / META)["request"]
        same = all(made.get(key) == request[key] for key in ("format", "tokenizer", "vocab_size", "filter"))
        pairs = zip(made["sources"], request["sources"], strict=True)
        if same and all(_is_same(old, new) for old, new in pairs):
            Tokenizer.load(out)
            return PackedData(out)
    except (InputError, KeyError, TypeError, ValueError):
        pass  # absent, damaged or of another version: make it anew
    return None


def _is_same(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Same path, size and time, or else (a copy, a fresh checkout) same content."""
    if old["size"] != new["size"]:
        return False
    untouched = (old["path"], old["mtime_ns"]) == (new["path"], new["mtime_ns"])
    return untouched or old["sha256"] == sha256(new["path"])


def _check_place(out: Path) -> None:
    """InputError for a folder with a model, whose tokenizer would be replaced, or with files of another kind."""
    if (out / "config.json").exists() or any(path.suffix in (".safetensors", ".gguf") for path in out.iterdir()):
        raise InputError(f"{out} holds a model: name another folder with --out")
    values = {"request": None}
    with suppress(InputError):  # ours, but damaged
        values = read_json(out / META)
    if not isinstance(values, dict) or "request" not in values:
        raise InputError(f"{out} holds a {META} that is not of shards: name another folder with --out")


def _clear(out: Path) -> None:
    """Remove what a former or stopped run left; meta.json first, so that no half of it looks whole."""
    (out / META).unlink(missing_ok=True)
    for kind in KINDS:
        for path in [*out.glob(f"{kind}-*.tokens"), *out.glob(f"{kind}-*.mask"), *out.glob(f"{kind}.ends")]:
            path.unlink()


# --- writing ----------------------------------------------------------------------------------------------------------


def _write(
    paths: Sequence[str | Path], tokenizer: Tokenizer, out: Path, progress: bool, shard_tokens: int
) -> dict[str, Any]:
    """Write all shards; the content of meta.json but for the request.

    Text is `start_ids`, its tokens, `end_id`; control tokens that it spells out stay text. A conversation is what the
    chat template writes, up to the last token that the assistant says; one without an answer is left out and counted.
    """
    report, digest, unanswered = Report(), hashlib.sha256(), 0
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    end = [] if tokenizer.end_id is None else [tokenizer.end_id]
    with ExitStack() as stack:
        text, talk = (stack.enter_context(Writer(out, kind, dtype, shard_tokens, digest)) for kind in KINDS)
        bar = stack.enter_context(_Bar(report, progress))
        start = tokenizer.start_ids  # before a document, not before its later pieces
        for batch in batches(read_documents(paths, report)):
            pieces = [document for document in batch if document.text is not None]
            for piece, ids in zip(pieces, tokenizer.encode_batch([p.text for p in pieces], control=False), strict=True):
                text.add([*start, *ids, *([] if piece.more else end)], len(piece.text.encode()))
                start = [] if piece.more else tokenizer.start_ids
                if not piece.more:
                    text.end_document()
            for ids, mask, size in _conversations([d for d in batch if d.text is None], tokenizer):
                unanswered += not ids
                if ids:
                    talk.add(ids, size, mask)
                    talk.end_document()
            bar.show(text.bytes + talk.bytes)
    if not text.tokens + talk.tokens:
        raise InputError(f"nothing to learn from: {unanswered} conversations, in which no assistant says anything")
    return {
        "format": FORMAT,
        "dtype": dtype,
        "vocabulary": tokenizer.vocab_size,
        "tokenizer": tokenizer.fingerprint,
        "pad": next((index for index in (tokenizer.pad_id, tokenizer.end_id) if index is not None), 0),
        "kinds": {writer.kind: writer.counts() for writer in (text, talk)},
        "empty": report.empty,
        "unanswered": unanswered,
        "bad_bytes": report.bad_bytes,
        "held_out": report.held_out,
        "damaged": report.damaged,
        "sha256": digest.hexdigest(),
    }


def _conversations(documents: list[Document], tokenizer: Tokenizer) -> Iterator[tuple[list[int], list[int], int]]:
    """The tokens of each conversation up to the last that the assistant says, their mask, and the bytes of their text.

    All are encoded in one call. Nothing but empty lists where the assistant says nothing.
    """
    parts = []
    for document in documents:
        try:
            parts.append(chat.segments(tokenizer, document.messages))
        except InputError as error:
            raise InputError(f"{document.source}: {error}") from error
        while parts[-1] and not parts[-1][-1][1]:
            parts[-1].pop()
    encoded = iter(tokenizer.encode_batch([text for segments in parts for text, _ in segments]))
    for segments in parts:
        ids, mask, size = [], [], 0
        for text, spoken in segments:
            ids += (tokens := next(encoded))
            mask += [spoken] * len(tokens)
            size += len(text.encode("utf-8", "replace"))
        yield ids, mask, size


class _Bar:
    """Context manager: a progress bar over the files' bytes, with the speed in text and the time left."""

    def __init__(self, report: Report, progress: bool, label: str = "tokenize"):
        self.report, self.started = report, time.monotonic()
        self.bar = tqdm(
            desc=label, unit="B", unit_scale=True, disable=not progress,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        )  # fmt: skip

    def show(self, text_bytes: int) -> None:
        self.bar.total = self.report.size
        speed = text_bytes / (time.monotonic() - self.started) / 1e6
        self.bar.set_postfix_str(f"{speed:.1f} MB/s of text", refresh=False)
        self.bar.update(self.report.position - self.bar.n)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()
