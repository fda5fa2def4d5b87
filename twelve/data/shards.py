"""Token shards on disk, and the batches that training takes from them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from twelve.errors import InputError
from twelve.files import read_json

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1  # of a folder of shards; a reader refuses others
KINDS = ("text", "chat")
META = "meta.json"  # written last: without it a folder holds nothing
NO_LOSS = -100


@dataclass(frozen=True)
class Batch:
    """Rows of packed documents."""

    ids: Tensor  # [B, T] int64
    targets: Tensor  # [B, T] int64: the next token, or -100 for no loss
    positions: Tensor  # [B, T] int64: from 0 in every document
    documents: Tensor  # [B, T] int32: number of the document inside its row, which attention must not leave


class Shards:
    """The tokens of one kind of document, memory-mapped: shards of tokens, (for chats) of the loss mask, and an index.

    Files: `text-00000.tokens` (uint16 or uint32), `chat-00000.mask` (uint8), `text.ends` (int64, where each document
    ends among all tokens).
    """

    def __init__(self, folder: Path, kind: str, dtype: str, documents: int, sizes: Sequence[int]):
        self.ends = _mapped(folder / f"{kind}.ends", np.int64, documents)
        self.first = np.cumsum([0, *sizes])  # of each shard, and the number of all tokens
        shards = [(folder / f"{kind}-{number:05}", size) for number, size in enumerate(sizes)]
        self._tokens = [_mapped(path.with_suffix(".tokens"), dtype, size) for path, size in shards]
        self._masks = [_mapped(path.with_suffix(".mask"), np.uint8, size) for path, size in shards if kind == "chat"]

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [stop - start] int64; fewer at the end of the corpus."""
        return self._read(self._tokens, start, stop).astype(np.int64)

    def mask(self, start: int, stop: int) -> np.ndarray:
        return self._read(self._masks, start, stop)

    def _read(self, maps: list[np.ndarray], start: int, stop: int) -> np.ndarray:
        first = int(np.searchsorted(self.first, start, side="right")) - 1
        parts = []
        for shard in range(first, len(maps)):
            if (begin := int(self.first[shard])) >= stop:
                break
            parts.append(maps[shard][max(0, start - begin) : stop - begin])
        return np.concatenate(parts)


class Writer:
    """Context manager: appends documents of one kind to its shards. Files are made when there is something to write."""

    def __init__(self, folder: Path, kind: str, dtype: str, shard_tokens: int, digest):
        self.folder, self.kind, self.dtype, self.shard_tokens, self.digest = folder, kind, dtype, shard_tokens, digest
        self.documents = self.tokens = self.bytes = 0
        self._sizes: list[int] = []  # tokens of each shard
        self._files: dict[str, BinaryIO] = {}

    def add(self, ids: list[int], size: int, mask: list[int] | None = None) -> None:
        """Append tokens that stand for `size` bytes of text; chats say with `mask` which of them are to be learnt."""
        if not self._sizes or self._sizes[-1] >= self.shard_tokens:
            self._close("tokens", "mask")
            self._sizes.append(0)
        shard = f"{self.kind}-{len(self._sizes) - 1:05}"
        self._append("tokens", shard, np.array(ids, self.dtype))
        if mask is not None:
            self._append("mask", shard, np.array(mask, np.uint8))
        self._sizes[-1] += len(ids)
        self.tokens += len(ids)
        self.bytes += size

    def end_document(self) -> None:
        self.documents += 1
        self._append("ends", self.kind, np.array([self.tokens], np.int64))

    def counts(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "documents": self.documents, "bytes": self.bytes, "shards": self._sizes}

    def _append(self, suffix: str, stem: str, content: np.ndarray) -> None:
        if suffix not in self._files:
            self._files[suffix] = open(self.folder / f"{stem}.{suffix}", "wb")  # noqa: SIM115 closed in _close
        data = content.tobytes()
        self._files[suffix].write(data)
        self.digest.update(data)

    def _close(self, *suffixes: str) -> None:
        for suffix in suffixes:
            if file := self._files.pop(suffix, None):
                with file:
                    file.flush()
                    os.fsync(file.fileno())  # meta.json, written later, vouches for it

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exception: object) -> None:
        self._close("tokens", "mask", "ends")


class PackedData:
    """A tokenised corpus, cut into windows of `seq_len` predictions.

    Text is one long stream, cut evenly: a window may begin in the middle of a document. Conversations stay whole: each
    window holds as many as fit, and one longer than a window loses its end. Windows are padded where needed (token
    `pad`, no loss, a document of its own).
    """

    def __init__(self, folder: str | Path):
        """InputError for a folder that holds no finished corpus, or a damaged one."""
        self.folder = Path(folder)
        if not (self.folder / META).is_file():
            raise InputError(f"{folder} holds no tokenised corpus (or one that was not finished): no {META}")
        self.meta: dict[str, Any] = read_json(self.folder / META)
        if not isinstance(self.meta, dict) or self.meta.get("format") != FORMAT:
            raise InputError(f"{self.folder / META} is not that of a corpus in format {FORMAT}: tokenise again")
        self._kinds = {
            kind: Shards(self.folder, kind, self.meta["dtype"], counts["documents"], counts["shards"])
            for kind, counts in self.meta["kinds"].items()
            if counts["tokens"]
        }
        self._bins: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # seq_len -> how conversations are packed

    @property
    def tokens(self) -> int:
        return self._sum("tokens")

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the text, which bits per byte divide by."""
        return self._sum("bytes")

    @property
    def sha256(self) -> str:
        """Of all tokens, masks and ends, in the order they were written."""
        return self.meta["sha256"]

    @property
    def documents(self) -> int:
        return self._sum("documents")

    @property
    def conversations(self) -> int:
        """Those of the documents that are conversations."""
        return self.meta["kinds"]["chat"]["documents"] if "chat" in self._kinds else 0

    def windows(self, seq_len: int) -> int:
        """Rows in an epoch."""
        return self._text_windows(seq_len) + len(self._packing(seq_len)[1]) - 1

    def batch(self, index: int, batch_size: int, seq_len: int, seed: int | None) -> Batch:
        """Batch number `index` of an endless stream: a pure function, so a resume needs only the step number.

        An epoch visits every window once, in an order drawn from `seed` and the epoch; None keeps the corpus' order.
        """
        import torch

        rows = [self._row(window, seq_len) for window in self.chosen(index, batch_size, seq_len, seed)]
        ids, targets, positions, documents = (torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True))
        return Batch(ids, targets, positions, documents.int())

    def chosen(self, index: int, batch_size: int, seq_len: int, seed: int | None) -> list[int]:
        """The windows that batch number `index` is made of."""
        windows = self.windows(seq_len)
        return [_window(row, windows, seed) for row in range(index * batch_size, (index + 1) * batch_size)]

    def cut(self, seq_len: int) -> tuple[int, int]:
        """How many conversations are longer than a row of `seq_len`, and in how many of these it leaves no target."""
        if "chat" not in self._kinds:
            return 0, 0
        shards = self._kinds["chat"]
        starts = np.concatenate([[0], shards.ends[:-1]])
        longer = np.flatnonzero(shards.ends - starts - 1 > seq_len)
        silent = sum(not shards.mask(int(starts[one]) + 1, int(starts[one]) + seq_len + 1).any() for one in longer)
        return len(longer), silent

    def _sum(self, count: str) -> int:
        return sum(counts[count] for counts in self.meta["kinds"].values())

    def _text_windows(self, seq_len: int) -> int:
        tokens = int(self._kinds["text"].first[-1]) if "text" in self._kinds else 0
        return -(-(tokens - 1) // seq_len) if tokens else 0  # the first token of all is not predicted

    def _packing(self, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        if seq_len not in self._bins:
            ends = self._kinds["chat"].ends if "chat" in self._kinds else np.zeros(0, np.int64)
            # the last token of a conversation is only predicted, and needs no place
            self._bins[seq_len] = pack(np.minimum(np.diff(ends, prepend=0) - 1, seq_len), seq_len)
        return self._bins[seq_len]

    def _row(self, window: int, seq_len: int) -> tuple[np.ndarray, ...]:
        """ids, targets, positions, documents, each [T] int64."""
        if window < self._text_windows(seq_len):
            pieces = self._text_pieces(window, seq_len)
        else:
            pieces = self._chat_pieces(window - self._text_windows(seq_len), seq_len)
        ids = np.full(seq_len, self.meta["pad"])
        targets = np.full(seq_len, NO_LOSS)
        positions = np.arange(seq_len)
        documents = np.full(seq_len, len(pieces))  # padding counts as the last document
        at = 0
        for number, (inputs, outputs) in enumerate(pieces):
            here = slice(at, at + len(inputs))
            ids[here], targets[here], documents[here] = inputs, outputs, number
            at += len(inputs)
            positions[at:] = np.arange(seq_len - at)
        return ids, targets, positions, documents

    def _text_pieces(self, window: int, seq_len: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """What each document has in this window, as (inputs, targets)."""
        shards, start = self._kinds["text"], window * seq_len
        tokens = shards.tokens(start, start + seq_len + 1)
        size = len(tokens) - 1
        low, high = np.searchsorted(shards.ends, (start, start + size), side="right")
        ends = (shards.ends[low:high] - start).tolist()  # of documents that end in this window
        pieces = []
        for begin, end in pairwise(sorted({0, *ends, size})):
            outputs = tokens[begin + 1 : end + 1].copy()
            if end in ends:
                outputs[-1] = NO_LOSS  # the next document does not follow from this one
            pieces.append((tokens[begin:end], outputs))
        return pieces

    def _chat_pieces(self, window: int, seq_len: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Whole conversations, as (inputs, targets): only what the assistant says is a target."""
        order, first = self._packing(seq_len)
        shards, pieces = self._kinds["chat"], []
        for document in order[first[window] : first[window + 1]]:
            start = int(shards.ends[document - 1]) if document else 0
            stop = min(int(shards.ends[document]), start + seq_len + 1)
            tokens, mask = shards.tokens(start, stop), shards.mask(start + 1, stop)
            pieces.append((tokens[:-1], np.where(mask, tokens[1:], NO_LOSS)))
        return pieces


def pack(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Best fit, longest first: (order, first), where bin b holds the documents order[first[b] : first[b + 1]].

    `lengths` [N] are at most `capacity`. A document goes where it leaves the least room.
    """
    bins: list[list[int]] = []
    open_bins: list[list[int]] = [[] for _ in range(capacity + 1)]  # by the room they have
    rooms = 0  # bit r is set where open_bins[r] is not empty
    for document in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[document])
        if fitting := rooms >> length:
            room = length + (fitting & -fitting).bit_length() - 1
            chosen = open_bins[room].pop()
            rooms ^= (not open_bins[room]) << room
        else:
            room, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(document)
        if left := room - length:
            open_bins[left].append(chosen)
            rooms |= 1 << left
    order = np.array([document for packed in bins for document in packed], np.int64)
    return order, np.cumsum([0, *map(len, bins)])


def _window(row: int, windows: int, seed: int | None) -> int:
    epoch, step = divmod(row, windows)
    return step if seed is None else int(_order(windows, seed, epoch)[step])


@lru_cache(maxsize=2)  # a batch may lie in two epochs
def _order(windows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(windows)


def _mapped(path: Path, dtype: Any, size: int) -> np.ndarray:
    try:
        content = np.asarray(np.memmap(path, dtype, mode="r"))  # a plain array: slices of a memmap are slow
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged or missing: tokenise again") from error
    if len(content) != size:
        raise InputError(f"{path} holds {len(content)} numbers instead of {size}: tokenise again")
    return content
