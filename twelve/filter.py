"""The verb `filter`: text in, the part of it that is worth learning from out, and a report on the rest."""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from twelve import report as html
from twelve.data.cleaning import Cleaner, Tally, Verdict, check_out, text_of, write_rows
from twelve.data.language import LANGUAGES
from twelve.data.quality import MEANING
from twelve.data.reader import STDIN, Document, Report, batches, find_files, read_documents
from twelve.data.selection import Coverage, Quota, budgets
from twelve.data.words import read_words
from twelve.errors import InputError
from twelve.files import command

SMALL = 16 << 20  # bytes of input that one process has done before others have started
MOST_WORKERS = 8  # what one process can read and write for


def filter_text(
    paths: Sequence[str | Path], out: str | Path, *, against: Sequence[str | Path] = (),
    languages: Sequence[str] = ("ko", "en"), budget: int | float | None = None,
    weights: Mapping[str, float] | None = None, temperature: float | None = None, report: str | Path | None = None,
    workers: int | None = None, quiet: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Write the documents of `paths` that are worth learning from into `out` (.jsonl or .jsonl.gz).

    What breaks a rule of `twelve.data.quality`, is in another language, came before, or has words in common with the
    files `against` is dropped. `budget`, bytes (int) or a share of what is clean (float), chooses among the rest;
    `weights` by path and `temperature` say how the paths share it, or without it how much of each is kept. `report`
    names an HTML file. Streams: memory grows by some 130 bytes a document, with a choice by 13 more.

    Returns the counts. Raises InputError for bad input, and when nothing is left; then `out` stays as it was.
    """
    started = time.monotonic()
    out, names = Path(out), [str(path) for path in paths]
    check_out(out)
    chosen = budget is not None or bool(weights) or temperature is not None
    if unknown := [name for name in weights or () if name not in names]:
        raise InputError(f"--weight {unknown[0]}: not one of the paths ({', '.join(names)})")
    if chosen and STDIN in names:
        raise InputError("a choice reads its input three times, and standard input can be read once: save it in a file")
    if STDIN in map(str, against):
        raise InputError("--against -: evaluation files are told by their kind: save it in a file")
    files, tests = find_files(paths).train, find_files(against)
    taken = {path.resolve() for path in (*files, *tests.train, *tests.held_out)}
    for option, path in (("--out", out), ("--report", report)):
        if path is not None and Path(path).resolve() in taken:
            raise InputError(f"{option} {path} is one of the files to read: write to another")
    if report is not None and (Path(report).is_dir() or Path(report).resolve() == out.resolve()):
        raise InputError(f"--report {report}: name a file of its own")
    cleaner = Cleaner(languages, against)
    out.parent.mkdir(parents=True, exist_ok=True)
    workers = workers or _workers(files)
    met, tally = Report(), Tally()

    def verdicts(label: str) -> Iterator[Verdict]:
        documents = _shown(read_documents(paths, met), met, label, quiet)
        return cleaner.verdicts(documents, workers, out.parent)

    def again(label: str) -> Iterator[Document]:
        second = Report()
        return _shown(read_documents(paths, second), second, label, quiet)

    with write_rows(out) as write:
        if chosen:
            choice = _Choice(names, weights or {}, temperature or 1.0)
            for verdict in verdicts("judge"):
                choice.add(verdict)
                if verdict.reason:
                    tally.add(verdict)
            choice.plan(budget)
            choice.count(again("count"))
            for verdict in choice.verdicts(again("choose")):
                tally.add(verdict)
                if not verdict.reason:
                    write(verdict.document)
        else:
            for verdict in verdicts("filter"):
                tally.add(verdict)
                if not verdict.reason:
                    write(verdict.document)
        if not tally.kept:
            told = ", ".join(f"{count:,} as {name}" for name, (count, _) in tally.dropped.items())
            raise InputError(f"nothing is left of {', '.join(names)}: dropped {told}")
    seconds = time.monotonic() - started
    result = _result(out, tally, met, cleaner, seconds)
    if report:
        write_report(Path(report), result, tally, names)
        result["report"] = str(report)
    if not quiet:
        for line in tally.lines():
            print(line, flush=True)
    return result


class _Choice:
    """What the first reading found, 13 bytes a document, and what the next two make of it."""

    def __init__(self, names: Sequence[str], weights: Mapping[str, float], temperature: float):
        self.weights, self.temperature = [weights.get(name, 1.0) for name in names], temperature
        # the first path that holds a file, but sooner one that names it than a folder
        last_first = sorted(enumerate(names), key=lambda numbered: (Path(numbered[1]).is_file(), -numbered[0]))
        self._sources = {str(path): number for number, name in last_first for path in find_files([name]).train}
        self._names, self._coverage = names, Coverage()
        self._kept, self._groups = array("B"), array("I")  # a group is a source and a language
        self._sizes, self._scores = array("I"), array("f")

    def add(self, verdict: Verdict) -> None:
        source = verdict.document.source
        if source not in self._sources:
            source = source.rpartition(":")[0]
        self._kept.append(not verdict.reason)
        self._groups.append(self._sources[source] * len(LANGUAGES) + LANGUAGES.index(verdict.language))
        self._sizes.append(len(verdict.text.encode()))
        self._scores.append(verdict.score)

    def plan(self, budget: int | float | None) -> None:
        """Fix how much of each group is taken."""
        groups, kept = np.array(self._groups), np.array(self._kept, bool)
        sizes = np.bincount(groups[kept], np.array(self._sizes)[kept], len(self._names) * len(LANGUAGES))
        of_source = [int(size) for size in sizes.reshape(-1, len(LANGUAGES)).sum(1)]
        total = round(budget * sum(of_source)) if isinstance(budget, float) else budget
        self.budgets = budgets(of_source, self.weights, self.temperature, total)
        portions = [taken / max(1, size) for taken, size in zip(self.budgets, of_source, strict=True)]
        self._quota = Quota([portion for portion in portions for _ in LANGUAGES])

    def count(self, documents: Iterable[Document]) -> None:
        for batch, _ in self._batches(documents):
            self._coverage.count(read_words([text_of(document) for document in batch]))

    def verdicts(self, documents: Iterable[Document]) -> Iterator[Verdict]:
        """On every document that the first reading kept: whether it is chosen."""
        for batch, numbers in self._batches(documents):
            texts = [text_of(document) for document in batch]
            groups, sizes, scores = (
                np.array([column[number] for number in numbers]) for column in (self._groups, self._sizes, self._scores)
            )
            taken = self._coverage.choose(read_words(texts), sizes, groups, scores, self._quota)
            for document, text, group, score, take in zip(batch, texts, groups, scores, taken, strict=True):
                language = LANGUAGES[group % len(LANGUAGES)]
                yield Verdict(document, text, language, float(score), "" if take else "budget")

    def _batches(self, documents: Iterable[Document]) -> Iterator[tuple[list[Document], list[int]]]:
        """Those kept, with their numbers among all."""
        seen = 0
        for batch in batches(documents):
            numbers = [seen + at for at in range(len(batch))]
            seen += len(batch)
            if seen > len(self._kept):
                break
            numbers = [number for number in numbers if self._kept[number]]
            if numbers:
                first = seen - len(batch)
                yield [batch[number - first] for number in numbers], numbers
        if seen != len(self._kept):
            raise InputError("the files changed while they were read: run again")


def _workers(files: Sequence[Path]) -> int:
    known = all(str(path) != STDIN for path in files)
    if known and sum(path.stat().st_size for path in files) < SMALL:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_WORKERS, cores)


def _shown(documents: Iterable[Document], met: Report, label: str, quiet: bool) -> Iterator[Document]:
    """The documents, with a progress bar over the files' bytes."""
    with tqdm(desc=label, unit="B", unit_scale=True, disable=quiet) as bar:
        for document in documents:
            bar.total = met.size
            bar.update(met.position - bar.n)
            yield document


# --- what it says -----------------------------------------------------------------------------------------------------


def _result(out: Path, tally: Tally, met: Report, cleaner: Cleaner, seconds: float) -> dict[str, Any]:
    (documents, size), (kept, kept_size) = tally.total(), tally.kept_total()
    result: dict[str, Any] = {
        "file": str(out), "documents": documents, "bytes": size, "kept": kept, "kept_bytes": kept_size,
        "kept_share": kept_size / max(1, size),
        "languages": {name: _counts(count) for name, count in tally.kept.items()},
        "dropped": {name: _counts(count) for name, count in tally.dropped.items()},
        "bad_bytes": met.bad_bytes, "held_out": met.held_out,
        "damaged_files": len(met.damaged), "damaged": met.damaged,
        "seconds": seconds, "megabytes_per_second": size / 1e6 / seconds,
    }  # fmt: skip
    if cleaner.contamination is not None:
        result |= {"evaluation_rows": cleaner.contamination.rows, "too_short_rows": cleaner.contamination.short}
    return result | {"next": command("twelve", "pretrain", out)}


def _counts(count: Sequence[int]) -> dict[str, int]:
    return {"documents": count[0], "bytes": count[1]}


def write_report(path: Path, result: Mapping[str, Any], tally: Tally, names: Sequence[str]) -> None:
    """What was kept, what was dropped, and examples of both, as one HTML file."""
    size = max(1, result["bytes"])
    rows = [{"reason": name, "documents": count, "bytes": dropped, "share of bytes": f"{dropped / size:.2%}",
             "meaning": MEANING[name]} for name, (count, dropped) in
            sorted(tally.dropped.items(), key=lambda item: -item[1][1])]  # fmt: skip
    kept = [{"language": name, "documents": count, "bytes": taken, "share of bytes": f"{taken / size:.2%}"}
            for name, (count, taken) in sorted(tally.kept.items())]  # fmt: skip
    sections = [
        ("Result", [
            html.tiles({"documents": result["documents"], "kept": result["kept"],
                        "of the bytes": f"{result['kept_share']:.1%}", "seconds": round(result["seconds"], 1)}),
            html.table(kept, "Kept"), html.table(rows, "Dropped, by the first reason that holds"),
        ]),
        *((f"Dropped: {name}" if name else "Kept", [_examples(tally, name)]) for name in
          ["", *(row["reason"] for row in rows)]),
    ]  # fmt: skip
    if result["damaged"]:
        sections.append(("Skipped files", [html.text(f"Damaged: {', '.join(result['damaged'])}")]))
    html.write_report(path, "What was kept, and what was dropped", sections, ", ".join(names))


def _examples(tally: Tally, reason: str) -> str:
    return html.samples([
        {"note": " · ".join(filter(None, [example["source"], example["detail"], f"score {example['score']:.2f}"])),
         "text": example["text"]} for example in tally.examples[reason]
    ])  # fmt: skip
