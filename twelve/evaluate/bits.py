"""Bits per byte: how well a model predicts text, whatever its tokenizer."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from twelve.data.corpus import read_documents
from twelve.engine.sampler import NOT_FINITE
from twelve.errors import InputError
from twelve.evaluate.statistics import finite

LOGITS = 2**25  # numbers of one forward pass's logits, at most (unless one window alone has more): 128 MiB in FP32


@dataclass
class BitsPerByte:
    """The measure, and what it was measured on."""

    bits_per_byte: float
    standard_error: float  # of the ratio, documents being the sample; NaN for a single document
    bits: float
    bytes: int  # UTF-8
    tokens: int
    documents: int
    context: int  # tokens of a window
    seconds: float
    document_bits: Tensor = field(repr=False)  # [documents] float64
    document_bytes: Tensor = field(repr=False)  # [documents] float64
    altered: int = 0  # documents that the tokenizer does not give back as they were

    def __str__(self) -> str:
        known = math.isfinite(self.standard_error)  # one document tells nothing of others
        error, of = (f" ± {self.standard_error:.4f}", "documents") if known else ("", "document, so no standard error")
        told = f"{self.bytes:,} bytes, {self.documents:,} {of}, windows of {self.context}"
        if self.altered:  # what it drops costs the model nothing
            told += f"; no true measure: the tokenizer alters {self.altered:,} of them"
        return f"{self.bits_per_byte:.4f}{error} bits a byte ({told})"

    def to_dict(self) -> dict[str, Any]:
        rest = {name: value for name, value in asdict(self).items() if not name.startswith("document_")}
        return {**rest, "standard_error": finite(self.standard_error)}


@dataclass(frozen=True)
class Window:
    """A stretch of a document that fits the context: `ids` [n + 1], of which the last `scored` are counted."""

    document: int
    ids: list[int]
    scored: int


@torch.inference_mode()
def bits_per_byte(
    model, tokenizer, path: str | Path | Sequence[str | Path], context: int | None = None, limit: int | None = None
) -> BitsPerByte:
    """Total negative log2 likelihood of the documents of `path` over their UTF-8 bytes.

    Every token of every document is scored once. A document begins after the tokenizer's `start_ids` and sees nothing
    of other documents; one longer than `context` tokens (default: the model's, at most 2,048) goes through
    windows that overlap by half, so that a token has at least half a context before it. `limit` takes the first
    documents only. InputError for files that hold no text, or a context that the model does not have.
    """
    started = time.monotonic()
    known = model.config.max_position_embeddings
    context = min(known, 2048) if context is None else context
    if not 2 <= context <= known:
        raise InputError(f"--context {context} must lie between 2 and the model's {known} tokens")
    texts = _texts([path] if isinstance(path, str | Path) else path, limit)
    sizes = torch.tensor([len(text.encode()) for text in texts], dtype=torch.float64)
    if not tokenizer.start_ids:
        raise InputError("the tokenizer has no token that begins a document: its first token cannot be scored")
    windows, altered = [], 0
    for document, text in enumerate(texts):
        ids = tokenizer.encode(text, control=False)
        altered += tokenizer.decode(ids).strip() != text.strip()
        windows += split([*tokenizer.start_ids, *ids], context, document)
    bits = torch.zeros(len(texts), dtype=torch.float64)
    with tqdm(total=sum(window.scored for window in windows), unit="tok", unit_scale=True, desc="bits/byte") as bar:
        for batch in batches(windows, model.config.vocab_size):
            for window, loss in zip(batch, _losses(model, batch), strict=True):
                bits[window.document] += loss / math.log(2)
                bar.update(window.scored)
    ratio = float(bits.sum() / sizes.sum())
    return BitsPerByte(
        bits_per_byte=ratio,
        standard_error=ratio_error(bits, sizes, ratio),
        bits=float(bits.sum()),
        bytes=int(sizes.sum()),
        tokens=sum(window.scored for window in windows),
        documents=len(texts),
        context=context,
        seconds=time.monotonic() - started,
        document_bits=bits,
        document_bytes=sizes,
        altered=altered,
    )


def split(ids: list[int], context: int, document: int = 0) -> Iterator[Window]:
    """Cut ids [n + 1] into windows of at most `context` predictions that score each of ids[1:] once."""
    done = 0  # predictions scored so far
    for start in range(0, len(ids) - 1, max(1, context // 2)):
        end = min(start + context, len(ids) - 1)
        yield Window(document, ids[start : end + 1], end - done)
        done = end
        if end == len(ids) - 1:
            return


def batches(windows: list[Window], vocab_size: int) -> Iterator[list[Window]]:
    """Windows of like lengths together, as many as LOGITS allows, longest first (so that memory peaks at once)."""
    batch: list[Window] = []
    for window in sorted(windows, key=lambda window: -len(window.ids)):
        longest = len((batch or [window])[0].ids)
        if batch and (len(batch) + 1) * longest * vocab_size > LOGITS:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def padded(batch: list[Window]) -> tuple[Tensor, Tensor]:
    """(ids, targets) [B, T]: what is not scored has target -100. Padding stands at the right, where causal attention
    cannot see it."""
    length = max(len(window.ids) for window in batch) - 1
    ids = torch.zeros(len(batch), length, dtype=torch.long)
    targets = torch.full((len(batch), length), -100)
    for row, window in enumerate(batch):
        n = len(window.ids) - 1
        ids[row, :n] = torch.tensor(window.ids[:-1])
        targets[row, n - window.scored : n] = torch.tensor(window.ids[1:][n - window.scored :])
    return ids, targets


def _losses(model, batch: list[Window]) -> list[float]:
    """Nats of each window's scored tokens."""
    ids, targets = padded(batch)
    device = next(model.parameters()).device
    logits = model(ids.to(device))  # [B, T, V]
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten().to(device), reduction="none")
    if not torch.isfinite(losses).all():
        raise InputError(NOT_FINITE)
    return losses.view(len(batch), -1).cpu().double().sum(1).tolist()


def _texts(paths: Sequence[str | Path], limit: int | None) -> list[str]:
    """The first `limit` documents, whole: a long one comes in pieces."""
    texts: list[str] = []
    unfinished = False
    for document in read_documents(paths):
        if unfinished:
            texts[-1] += document.text
        elif len(texts) == limit:
            break
        elif document.text:
            texts.append(document.text)
        unfinished = document.more
    if not texts:
        named = ", ".join(map(str, paths))
        raise InputError(f"no text in {named}: bits per byte wants .txt, .md or .jsonl with 'text'")
    return texts


def ratio_error(bits: Tensor, sizes: Tensor, ratio: float) -> float:
    """Standard error of sum(bits) / sum(sizes), by the usual linearisation."""
    n = len(bits)
    if n < 2:
        return math.nan
    spread = ((bits - ratio * sizes) ** 2).sum() / (n - 1)
    return float((n * spread).sqrt() / sizes.sum())
