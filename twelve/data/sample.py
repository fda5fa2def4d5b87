"""An even sample of a stream of text."""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Iterable, Iterator

from tqdm import tqdm

from twelve.files import valid

PIECE = 1 << 14  # characters; the unit of sampling


def sample(texts: Iterable[str], limit: int, outside: Collection[str] = (), progress: bool = False) -> list[str]:
    """An even, repeatable sample of at most `limit` UTF-8 bytes, without the tokens `outside`, which divide it.

    Every piece gets a random rank; whenever the pieces kept outgrow the limit, those of high rank go. So any part of
    a stream of unknown length is as likely kept as any other, and memory stays bounded.
    """
    draw = random.Random(0).random
    divider = any_of(outside)
    kept: list[tuple[float, int, str]] = []  # rank, bytes, text
    highest, total = 1.0, 0
    with tqdm(desc="read for the tokenizer", unit="B", unit_scale=True, disable=not progress) as bar:
        for text in texts:
            for piece in _pieces(valid(text), divider):
                size = len(piece.encode())
                bar.update(size)
                rank = draw()
                if rank >= highest:
                    continue
                kept.append((rank, size, piece))
                total += size
                while total > limit:
                    highest *= 0.8
                    kept = [entry for entry in kept if entry[0] < highest]
                    total = sum(entry[1] for entry in kept)
    return [piece for _, _, piece in kept]


def _pieces(text: str, divider: re.Pattern[str]) -> Iterator[str]:
    for part in divider.split(text):
        yield from (part[at : at + PIECE] for at in range(0, len(part), PIECE))


def any_of(words: Collection[str]) -> re.Pattern[str]:
    """Finds any of the words, the longest where several begin at one place."""
    longest_first = sorted(words, key=lambda word: (-len(word), word))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
