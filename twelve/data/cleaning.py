"""From a stream of documents to verdicts on them: keep, or drop and why.

A document is judged on its own (`quality`, `language`, `contamination`), by as many processes as one likes, and then
against all that came before it (`dedup`), in order; so the verdicts do not depend on the number of processes. A text
longer than reader.PIECE is judged piece by piece. A conversation is dropped if it is broken, contaminated or the exact
copy of another; what makes prose good says little about talk.
"""

from __future__ import annotations

import gzip
import io
import json
import signal
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from twelve.data.contamination import Contamination
from twelve.data.dedup import NONE, Seen, Signatures, shingles, sign
from twelve.data.language import LANGUAGES, languages
from twelve.data.quality import judge
from twelve.data.reader import Document, batches
from twelve.data.words import read_words
from twelve.errors import InputError
from twelve.files import atomic_write, valid

RULES_VERSION = 2  # of what is kept; shards made under others are made anew
SAID = ("reasoning_content", "content", "tool_calls")  # of a message
EXAMPLES = 4  # of every reason
EXCERPT = 700  # characters
LONGEST = 4 << 20  # characters of a line: read again, it has to be in memory as a whole
GZIP_LEVEL = 3  # a third of the time of 6, for a tenth more bytes


@dataclass(slots=True)
class Verdict:
    """Of one document, or one piece of a long one."""

    document: Document
    text: str  # the document's, or all that a conversation says
    language: str  # of LANGUAGES
    score: float  # from 0 to 1
    reason: str = ""  # of quality.MEANING, or "": keep it
    detail: str = ""  # what was measured, or which document came before


class Cleaner:
    """What is asked of a text. `wanted` are names of LANGUAGES; `against` are evaluation files."""

    def __init__(self, wanted: Sequence[str] = ("ko", "en"), against: Sequence[str | Path] = ()):
        if unknown := sorted(set(wanted) - set(LANGUAGES)):
            raise InputError(f"language {unknown[0]!r} is not one that can be told: {', '.join(LANGUAGES)}")
        self.wanted = [LANGUAGES.index(language) for language in wanted]
        self.contamination = Contamination(against) if against else None

    def verdicts(
        self, documents: Iterable[Document], workers: int = 1, folder: str | Path | None = None
    ) -> Iterator[Verdict]:
        """One for each document, in order, as they come. `folder` is where the file of signatures lies meanwhile."""
        places = _Places()
        with Seen(folder) as seen:
            for batch, texts, found in self._assessed(batches(documents), workers):
                rows = zip(batch, texts, found.language.tolist(), found.scores.tolist(), found.reasons, found.details,
                           strict=True)  # fmt: skip
                verdicts = [
                    Verdict(document, text, LANGUAGES[language], score, reason, detail)
                    for document, text, language, score, reason, detail in rows
                ]
                passed = [verdict for verdict in verdicts if not verdict.reason]
                for verdict in passed:
                    places.add(verdict.document.source)
                for verdict, before, exact, alike in zip(passed, *seen.add(found.signatures), strict=True):
                    if before != NONE and (exact or verdict.document.text is not None):
                        verdict.reason = "duplicate" if exact else "near duplicate"
                        verdict.detail = f"{alike:.0%} like {places.name(int(before))}"
                yield from verdicts

    def assess(self, texts: Sequence[str], talk: Sequence[bool]) -> Assessed:
        """All that can be said of texts by themselves; `talk` says which of them are conversations."""
        words = read_words(texts)
        told = languages(words)
        grams, first = shingles(words, told.code)
        judged = judge(words, told, grams, first, np.array(talk, bool), self.wanted)
        if self.contamination is not None:
            for text, (place, stretch) in self.contamination.first(words).items():
                if not judged.reasons[text]:
                    judged.reasons[text], judged.details[text] = "contaminated", f"{place}: {stretch}"
        passed = np.array([not reason for reason in judged.reasons], bool)
        signatures = sign(words, grams, first).take(passed)
        return Assessed(judged.reasons, judged.details, told.code, judged.scores, signatures)

    def _assessed(
        self, documents: Iterable[list[Document]], workers: int
    ) -> Iterator[tuple[list[Document], list[str], Assessed]]:
        """Every batch with its texts and what is said of them; the next ones are worked on meanwhile."""
        if workers == 1:
            for batch in documents:
                texts = [text_of(document) for document in batch]
                yield batch, texts, self.assess(texts, [document.text is None for document in batch])
            return
        pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin, initargs=(self,))
        try:
            waiting: deque = deque()
            for batch in documents:
                texts = [text_of(document) for document in batch]
                talk = [document.text is None for document in batch]
                waiting.append((batch, texts, pool.submit(_assess, texts, talk)))
                if len(waiting) > workers + 1:
                    batch, texts, found = waiting.popleft()
                    yield batch, texts, found.result()
            for batch, texts, found in waiting:
                yield batch, texts, found.result()
        except BrokenProcessPool as error:
            raise InputError(
                "a process that judged text was killed, most likely for want of memory: free some, and run again"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class Assessed:
    """Of D texts; `signatures` only of those without a reason to drop them."""

    reasons: list[str]
    details: list[str]
    language: np.ndarray  # [D] uint8
    scores: np.ndarray  # [D] float32
    signatures: Signatures


def text_of(document: Document) -> str:
    """A document's text, or all that is said in a conversation, reasoning and calls included."""
    if document.text is not None:
        return document.text
    said = (str(message.get(key) or "") for message in document.messages for key in SAID)
    return valid("\n".join(filter(None, said)))


_cleaner: Cleaner  # of a process of the pool


def _begin(cleaner: Cleaner) -> None:
    global _cleaner
    _cleaner = cleaner
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that reads and writes


def _assess(texts: list[str], talk: list[bool]) -> Assessed:
    return _cleaner.assess(texts, talk)


class _Places:
    """Where documents are, 8 bytes each."""

    def __init__(self) -> None:
        self._files: dict[str, int] = {}
        self._file, self._line = array("I"), array("I")

    def add(self, source: str) -> None:
        file, colon, line = source.rpartition(":")
        if not (colon and line.isdigit()):
            file, line = source, "0"
        self._file.append(self._files.setdefault(file, len(self._files)))
        self._line.append(int(line))

    def name(self, number: int) -> str:
        file = list(self._files)[self._file[number]]
        return f"{file}:{self._line[number]}" if self._line[number] else file


# --- what was done ----------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """Counts of verdicts, and a few of them for people to look at, drawn by a hash of the text."""

    kept: dict[str, list[int]] = field(default_factory=dict)  # language: documents, bytes
    dropped: dict[str, list[int]] = field(default_factory=dict)  # reason: documents, bytes
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # by reason; "" has those that were kept
    _next: tuple[str, int, str] | None = None  # the piece that belongs to the document counted last, and its reason

    def add(self, verdict: Verdict) -> None:
        size = len(verdict.text.encode())
        counts = self.dropped if verdict.reason else self.kept
        count = counts.setdefault(verdict.reason or verdict.language, [0, 0])
        goes_on = (verdict.document.source, verdict.document.piece, verdict.reason)
        count[0] += goes_on != self._next
        count[1] += size
        self._next = (goes_on[0], goes_on[1] + 1, goes_on[2]) if verdict.document.more else None
        shown = self.examples.setdefault(verdict.reason, [])
        rank = zlib.crc32(verdict.text[:EXCERPT].encode())
        known = any(example["rank"] == rank for example in shown)
        if not known and (len(shown) < EXAMPLES or rank < shown[-1]["rank"]):
            shown.append({
                "rank": rank, "source": verdict.document.source, "detail": verdict.detail,
                "score": round(verdict.score, 3), "text": verdict.text[:EXCERPT],
            })  # fmt: skip
            shown.sort(key=lambda example: example["rank"])
            del shown[EXAMPLES:]

    def total(self) -> tuple[int, int]:
        """Documents and bytes of all verdicts."""
        counts = [*self.kept.values(), *self.dropped.values()]
        return sum(count for count, _ in counts), sum(size for _, size in counts)

    def kept_total(self) -> tuple[int, int]:
        return sum(count for count, _ in self.kept.values()), sum(size for _, size in self.kept.values())

    def lines(self) -> list[str]:
        """What was kept and dropped, for people."""
        (documents, size), (kept, kept_size) = self.total(), self.kept_total()
        told = [f"kept {kept:,} of {documents:,} documents, {kept_size:,} of {size:,} bytes"]
        told += [f"  {name}: {count:,} documents, {size:,} bytes" for name, (count, size) in sorted(self.kept.items())]
        by_size = sorted(self.dropped.items(), key=lambda item: -item[1][1])
        return told + [f"dropped as {name}: {count:,} documents, {size:,} bytes" for name, (count, size) in by_size]


@contextmanager
def write_rows(path: Path) -> Iterator[Callable[[Document], None]]:
    """Write documents as lines of a .jsonl or .jsonl.gz file, with the id and title that they came with. Pieces of one
    that follow each other share a line, as long as it can be read again."""
    with atomic_write(path) as temporary, open(temporary, "wb") as raw:
        packed = path.suffix.lower() == ".gz"  # mtime: equal documents make equal files
        binary = gzip.GzipFile("", "wb", GZIP_LEVEL, raw, mtime=0) if packed else raw
        # half a character, which a message may hold, is written as JSON writes it
        with io.TextIOWrapper(binary, encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            rows = _Rows(file)
            yield rows.write
            rows.close()


class _Rows:
    """Lines of a file; that of a long text stays open for its next piece."""

    def __init__(self, file: io.TextIOWrapper):
        self._file, self._size = file, 0
        self._next: tuple[str, int] | None = None  # source and number of the piece that the open line waits for

    def write(self, document: Document) -> None:
        if document.text is None:
            self.close()
            row = document.about | {"messages": document.messages}
            self._file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")  # times, of Parquet
            return
        if (document.source, document.piece) != self._next or self._size > LONGEST:
            self.close()
            self._file.write(json.dumps(document.about | {"text": ""}, ensure_ascii=False)[: -len('"}')])
        self._file.write(json.dumps(document.text, ensure_ascii=False)[1:-1])
        self._size += len(document.text)
        self._next = (document.source, document.piece + 1)
        if not document.more:
            self.close()

    def close(self) -> None:
        if self._next is not None:
            self._file.write('"}\n')
        self._next, self._size = None, 0


def check_out(path: Path) -> None:
    """InputError for a file that `write_rows` cannot write."""
    if not path.name.lower().endswith((".jsonl", ".jsonl.gz")):
        raise InputError(f"{path}: what is kept is written as .jsonl or .jsonl.gz")
    if path.is_dir():
        raise InputError(f"{path} is a folder: name a file in it")
