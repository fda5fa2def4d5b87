"""Windows of text in token ids, for what is measured on some of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from twelve.data.corpus import texts as texts_of
from twelve.data.reader import read_documents
from twelve.data.tokenizer import Tokenizer
from twelve.errors import InputError

WINDOWS, WINDOW = 64, 512  # of calibration text at most, and their tokens


def calibration(tokenizer: Tokenizer, paths: Sequence[str | Path], window: int, limit: int | None = None) -> Tensor:
    """Token ids [at most WINDOWS, window] int64 of the first documents, one after the other, each begun as in training.

    `InputError` when the text does not fill one window.
    """
    ids: list[int] = []
    for count, text in enumerate(texts_of(read_documents(paths))):
        if len(ids) >= WINDOWS * window or count == limit:
            break
        ids += [*tokenizer.start_ids, *tokenizer.encode(text, control=False)]
    rows = min(WINDOWS, len(ids) // window)
    if rows == 0:
        raise InputError(f"the calibration text has {len(ids)} tokens, and {window} are the least: give more --text")
    return torch.tensor(ids[: rows * window]).view(rows, window)
