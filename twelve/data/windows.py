"""Windows of text in token ids, for what is measured on some of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from twelve.data.corpus import texts as texts_of
from twelve.data.reader import find_files, read_documents
from twelve.data.tokenizer import Tokenizer
from twelve.errors import InputError

WINDOWS, WINDOW = 64, 512  # of calibration text at most, and their tokens


def calibration(tokenizer: Tokenizer, paths: Sequence[str | Path], window: int, limit: int | None = None) -> Tensor:
    """Token ids [at most WINDOWS, window] int64 of the first documents of every file in turn, one after the other, each
    begun as in training.

    `InputError` when the text does not fill one window.
    """
    ids: list[int] = []
    for count, text in enumerate(_in_turn(paths)):
        if len(ids) >= WINDOWS * window or count == limit:
            break
        ids += [*tokenizer.start_ids, *tokenizer.encode(text, control=False)]
    rows = min(WINDOWS, len(ids) // window)
    if rows == 0:
        raise InputError(f"the calibration text has {len(ids)} tokens, and {window} are the least: give more --text")
    return torch.tensor(ids[: rows * window]).view(rows, window)


def _in_turn(paths: Sequence[str | Path]) -> Iterator[str]:
    """A document of every file, and again, until all are read: the files may be in different languages."""
    files = find_files(paths)
    waiting = [(file, texts_of(read_documents([file]))) for file in files.train]
    while waiting:
        for file, texts in list(waiting):
            try:
                yield next(texts)
            except StopIteration:
                waiting.remove((file, texts))
            except InputError:  # a folder may hold files without text
                waiting.remove((file, texts))
                if file in files.named or len(files.train) == 1:
                    raise
