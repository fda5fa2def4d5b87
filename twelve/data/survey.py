"""A look at a corpus before it is read: how much text there is, and how long it takes to make tokens of it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from twelve.compiler import cache_folder
from twelve.data.corpus import texts
from twelve.data.reader import STDIN, Report, find_files, read_documents
from twelve.data.shards import META, PackedData
from twelve.data.tokenizer import SAMPLE_BYTES_PER_ENTRY, Tokenizer
from twelve.errors import InputError
from twelve.files import read_json, write_json

SAMPLED = 2 << 20  # bytes of text that are looked at
FILES = 8  # the largest of them, that are
TRIAL_VOCABULARY = 2048  # of a tokenizer that is trained on the sample, to see how long that takes
PASSES = 2  # a tokenizer's sample is drawn from all of the text; then all of it is encoded
KEPT = 50  # surveys in the cache


@dataclass(frozen=True)
class Survey:
    """Speeds are in seconds a byte of text; what need not be done takes none."""

    text_bytes: int | None  # about; None where there is no telling (standard input)
    tokens: int | None = None  # of shards, which are tokens already
    vocabulary: int | None = None  # of a tokenizer that exists
    bytes_per_token: float | None = None
    reading: float = 0.0
    encoding: float = 0.0
    learning: float = 0.0  # a tokenizer, for a byte of what it is trained on

    def preparing(self, vocabulary: int) -> float:
        """Seconds until the corpus is shards, with a tokenizer of so many entries."""
        text = self.text_bytes or 0
        sample = min(text, SAMPLE_BYTES_PER_ENTRY * vocabulary)
        passes = PASSES if self.vocabulary is None else 1
        return text * (passes * self.reading + self.encoding) + sample * self.learning


def survey(paths: Sequence[str | Path], tokenizer: str | Path | None = None) -> Survey:
    """Look at the files of `paths` (as `tokenize` takes them), some seconds at most; InputError where nothing is text.

    A file that cannot be read is left for `tokenize` to name. What was seen is kept in the user's cache, so that files
    that did not change give the same again.
    """
    if len(paths) == 1 and (Path(paths[0]) / META).exists():
        data = PackedData(paths[0])
        vocabulary = Tokenizer.load(paths[0]).vocab_size
        return Survey(data.bytes, data.tokens, vocabulary, data.bytes / data.tokens)
    words = Tokenizer.load(tokenizer) if tokenizer is not None else None
    files = find_files(paths).train
    if any(str(path) == STDIN for path in files):
        return Survey(None, vocabulary=words and words.vocab_size)
    cache = cache_folder() / "surveys.json"
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    key = hashlib.sha256(json.dumps([stats, words and words.fingerprint, cores]).encode()).hexdigest()
    known = _read(cache)
    if key not in known:
        known[key] = asdict(_look(files, words))
        with contextlib.suppress(OSError, InputError):
            write_json(cache, dict(list(known.items())[-KEPT:]))
    return Survey(**known[key])


def _read(cache: Path) -> dict[str, dict[str, Any]]:
    try:
        found = read_json(cache)
        names = set(Survey.__dataclass_fields__)
        return {key: values for key, values in found.items() if set(values) == names}
    except (InputError, AttributeError, TypeError):
        return {}


def _look(files: Sequence[Path], words: Tokenizer | None) -> Survey:
    size = sum(path.stat().st_size for path in files)
    largest = sorted(files, key=lambda path: -path.stat().st_size)[:FILES]
    sample, read, began, fault = [], 0, time.perf_counter(), None
    for path in largest:
        try:
            found, position = _begin(path, SAMPLED // len(largest))
        except InputError as error:
            fault = error
            continue
        sample += found
        read += position
    reading = time.perf_counter() - began
    if not sample:
        raise fault or InputError(f"no text in {', '.join(map(str, files)) or 'nothing'}: the corpus is empty")
    seen = sum(len(text.encode("utf-8", "replace")) for text in sample)
    began, learning = time.perf_counter(), 0.0
    trial = words
    if trial is None:
        trial = Tokenizer.train(sample, TRIAL_VOCABULARY)
        learning = time.perf_counter() - began
    began = time.perf_counter()
    tokens = sum(map(len, trial.encode_batch(sample, control=False)))
    encoding = time.perf_counter() - began
    return Survey(
        text_bytes=round(size * seen / max(1, read)), vocabulary=words and words.vocab_size,
        bytes_per_token=seen / max(1, tokens) if words else None,
        reading=reading / seen, encoding=encoding / seen, learning=learning / seen,
    )  # fmt: skip


def _begin(path: Path, wanted: int) -> tuple[list[str], int]:
    """The first documents of a file, and how many of its bytes on the disk they take."""
    report, found, size = Report(), [], 0
    for document in read_documents([path], report):
        found += texts([document])
        size += len(found[-1])
        if size >= wanted:
            break
    return found, min(report.position, path.stat().st_size)
