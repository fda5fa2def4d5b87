"""Whether what a model is tested on stood in what it was trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from twelve.data.contamination import Contamination
from twelve.data.reader import find_files, is_rows, read_objects, read_texts

WORDS = 13  # in a row; see `Contamination`
KEPT = 8  # examples


@dataclass
class Overlap:
    """How much of one evaluation file stands in the training text."""

    path: str
    items: int  # rows of a .jsonl file, paragraphs of a text
    found: int = 0  # of them, those with words in a row that the training text has, too
    examples: list[dict[str, str]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {"share": self.found / self.items, **asdict(self)}

    def __str__(self) -> str:
        share = self.found / self.items
        return f"{self.path}: {self.found:,} of {self.items:,} items ({share:.1%}) stand in the training text"


def overlaps(train: Sequence[str | Path], files: Sequence[str | Path]) -> tuple[list[Overlap], int]:
    """Of every evaluation file; and how many of all items are too short to be told from chance, and count as not found.

    Reads the training text once, as a stream.
    """
    known = Contamination(files, n=WORDS)
    found = known.rows_in(tqdm(_texts(train), desc="contamination", unit="text", leave=False))
    items = Counter(place.rpartition(":")[0] for place in dict.fromkeys(known.places))
    results = {path: Overlap(path, count) for path, count in items.items()}
    for place, words in found.items():
        result = results[place.rpartition(":")[0]]
        result.found += 1
        if len(result.examples) < KEPT:
            result.examples.append({"where": place, "shared": words})
    return list(results.values()), known.short


def _texts(paths: Sequence[str | Path]) -> Iterator[str]:
    """Every text in training files, of whatever kind their rows are: documents, conversations, problems."""
    for path in find_files(paths).train:
        if is_rows(path):
            for _, row in read_objects(path):
                yield from _strings(row)
        else:
            yield from read_texts(path)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)
