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
from twelve.data.cleaning import Cleaner
from twelve.data.corpus import texts
from twelve.data.reader import STDIN, Report, find_files, read_documents
from twelve.data.shards import META, PackedData
from twelve.data.tokenizer import SAMPLE_BYTES_PER_ENTRY, Tokenizer
from twelve.errors import InputError
from twelve.files import read_json, write_json

SAMPLED = 4 << 20  # bytes of text that are looked at
TRIED = 4  # one in so many of the documents is tokenised
FILES = 8  # the largest of them, that are
TRIAL_VOCABULARY = 2048  # of a tokenizer that is trained on the sample, to see how long that takes
PASSES = 2  # a tokenizer's sample is drawn from all of the text; then all of it is encoded
KEPT = 50  # surveys in the cache


@dataclass(frozen=True)
class Survey:
    """Speeds are in seconds a byte of text; what need not be done takes none."""

    text_bytes: int | None  # about; None where there is no telling (standard input), or no text yet
    tokens: int | None = None  # of shards, which are tokens already
    vocabulary: int | None = None  # of a tokenizer that exists
    bytes_per_token: float | None = None
    reading: float = 0.0
    encoding: float = 0.0
    learning: float = 0.0  # a tokenizer, for a byte of what it is trained on
    filtering: float = 0.0

    def preparing(self, vocabulary: int) -> float:
        """Seconds until the corpus is shards, with a tokenizer of so many entries."""
        text = self.text_bytes or 0
        passes = PASSES if self.vocabulary is None else 1
        return text * (self.filtering + passes * self.reading + self.encoding) + self.sample(vocabulary) * self.learning

    def sample(self, vocabulary: int) -> int:
        """Bytes of text that a tokenizer of so many entries is trained on; none where there is one."""
        return min(self.text_bytes or 0, SAMPLE_BYTES_PER_ENTRY * vocabulary) if self.vocabulary is None else 0


def holds_tokens(paths: Sequence[str | Path], **given: Any) -> bool:
    """Whether `paths` are a folder that `tokenize` wrote. InputError for what is `given` and comes too late then."""
    if len(paths) != 1 or not (Path(paths[0]) / META).exists():
        return False
    for name, value in given.items():
        if value:
            option = f"--{name.replace('_', '-')}"
            raise InputError(f"{paths[0]} holds tokens and their tokenizer: leave out {option}, or name its text")
    return True


def survey(paths: Sequence[str | Path], tokenizer: str | Path | None = None, filter: bool = False) -> Survey:
    """Look at the files of `paths` that `tokenize` takes, some seconds at most; InputError where nothing is text.

    A file that cannot be read is left for `tokenize` to name. What was seen is kept in the user's cache, so that files
    that did not change give the same again.
    """
    if holds_tokens(paths, tokenizer=tokenizer, filter=filter):
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
    key = hashlib.sha256(json.dumps([stats, words and words.fingerprint, cores, filter]).encode()).hexdigest()
    known = _read(cache)
    if key not in known:
        known[key] = asdict(_look(files, words, filter))
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


def _look(files: Sequence[Path], words: Tokenizer | None, filter: bool) -> Survey:
    sizes = {path: path.stat().st_size for path in files}
    largest = sorted(files, key=lambda path: -sizes[path])[:FILES]
    sample, text, stored, began, fault = [], 0.0, 0, time.perf_counter(), None
    for path in largest:
        try:
            found, ratio = _begin(path, SAMPLED // len(largest))
        except InputError as error:
            fault = error
            continue
        sample += found
        text += ratio * sizes[path]
        stored += sizes[path]
    reading = time.perf_counter() - began
    if not sample:
        raise fault or InputError(f"no text in {', '.join(map(str, files)) or 'nothing'}: the corpus is empty")
    reading /= _bytes(sample)
    sample, learning = sample[::TRIED], 0.0
    seen, trial = _bytes(sample), words
    if trial is None:
        began = time.perf_counter()
        trial = Tokenizer.train(sample, TRIAL_VOCABULARY)
        learning = time.perf_counter() - began
    began = time.perf_counter()
    tokens = sum(map(len, trial.encode_batch(sample, control=False)))
    encoding = time.perf_counter() - began
    filtering = 0.0
    if filter:
        began = time.perf_counter()
        Cleaner().assess(sample, [False] * len(sample))
        filtering = reading + (time.perf_counter() - began) / seen
    return Survey(
        text_bytes=round(text / max(1, stored) * sum(sizes.values())), vocabulary=words and words.vocab_size,
        bytes_per_token=seen / max(1, tokens) if words else None,
        reading=reading, encoding=encoding / seen, learning=learning / seen, filtering=filtering,
    )  # fmt: skip


def _begin(path: Path, wanted: int) -> tuple[list[str], float]:
    """The first documents of a file, and bytes of text for a byte of it on the disk.

    Files are read in blocks: where one begins, all text before it is of the bytes before it, or of a fixed number more.
    """
    report, found, size, position = Report(), [], 0, 0
    begun: list[tuple[int, int]] = []  # text, place in the file
    for document in read_documents([path], report):
        if report.position != position:
            begun += [(size, position)] if size else []
            position = report.position
            if size >= wanted and len(begun) > 1:
                (text, place), (more, further) = begun[0], begun[-1]
                return found, (more - text) / (further - place)
        found += texts([document])
        size += _bytes(found[-1:])
    return found, size / max(1, path.stat().st_size)


def _bytes(sample: Sequence[str]) -> int:
    return sum(len(text.encode("utf-8", "replace")) for text in sample)
