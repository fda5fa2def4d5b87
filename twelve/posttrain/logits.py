"""Distillation from logits, offline: what the teacher expects at every trained token is stored once, its likeliest
tokens only; then the student learns these probabilities instead of single tokens."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from twelve import convert
from twelve.data.shards import Batch, PackedData
from twelve.data.tokenizer import Tokenizer
from twelve.errors import InputError
from twelve.files import read_json, write_json
from twelve.model import Transformer
from twelve.model.transformer import MainLoss
from twelve.posttrain.divergence import soft_cross_entropy, top_logprobs
from twelve.posttrain.teacher import require_one_vocabulary
from twelve.train.loop import Supervised
from twelve.train.plan import Plan
from twelve.train.precision import pick_device

ROWS = 8  # of a forward pass of the teacher
FORMAT = 1


class TeacherLogits:
    """The teacher's k likeliest tokens at every target of a corpus' windows, memory-mapped, in the corpus' order.

    Files: `top.ids` (uint32 [N, k]) and `top.logprobs` (float16 [N, k + 1], the last for all other tokens together):
    6 k + 2 bytes a target. `top.json` says what they were made from.
    """

    def __init__(self, folder: Path, data: PackedData, context: int, k: int) -> None:
        self.folder, self.k = folder, k
        counts = [_targets(data, window, context) for window in range(data.windows(context))]
        self.first = np.cumsum([0, *counts])  # target of each window
        self.names = [(folder / "top.ids", np.uint32, k), (folder / "top.logprobs", np.float16, k + 1)]

    def done(self) -> int:
        """Windows that are stored whole."""
        sizes = [path.stat().st_size // (np.dtype(kind).itemsize * width) if path.exists() else 0
                 for path, kind, width in self.names]  # fmt: skip
        return int(np.searchsorted(self.first, min(sizes), side="right")) - 1

    def append(self, ids: Tensor, logprobs: Tensor) -> None:
        for (path, kind, _), rows in zip(self.names, (ids, logprobs), strict=True):
            try:
                with open(path, "ab") as file:
                    file.write(rows.cpu().numpy().astype(kind).tobytes())
            except OSError as error:
                raise InputError(f"cannot write {path}: {error.strerror}; run again to go on") from error

    def cut(self, windows: int) -> None:
        """Keep only the first windows."""
        for path, kind, width in self.names:
            path.touch()
            os.truncate(path, int(self.first[windows]) * np.dtype(kind).itemsize * width)

    def read(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        """ids [n, k] and log-probabilities [n, k + 1] of a window's targets."""
        part = slice(self.first[window], self.first[window + 1])
        maps = [np.memmap(path, kind, "r", shape=(int(self.first[-1]), width)) for path, kind, width in self.names]
        ids, logprobs = (np.array(mapped[part]) for mapped in maps)
        return ids.astype(np.int64), logprobs


@dataclass
class LogitsLesson:
    """`twelve.train.sft` with the probabilities of `teacher`: mean over targets of hard * cross entropy
    + (1 - hard) * T^2 * KL(teacher || student), the divergence over the k likeliest tokens and the rest as one.
    """

    teacher: str
    k: int = 16
    temperature: float = 1.0
    hard: float = 0.1
    device: str | None = None
    quiet: bool = False
    options: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.options = {"teacher": self.teacher, "k": self.k, "temperature": self.temperature, "hard": self.hard}

    def prepare(self, tokenizer: Tokenizer, data: PackedData, plan: Plan, folder: Path) -> Callable[..., Supervised]:
        """Ask the teacher, or go on asking. InputError when its tokenizer is not the student's."""
        require_one_vocabulary(convert.load_tokenizer(self.teacher), tokenizer, self.teacher)
        vocabulary = tokenizer.vocab_size
        k = min(self.k, vocabulary)
        place = folder / "training" / "logits"
        place.mkdir(parents=True, exist_ok=True)
        made_from = {
            "format": FORMAT, "teacher": self.teacher, "k": k, "temperature": self.temperature,
            "context": plan.context, "sha256": data.sha256,
        }  # fmt: skip
        store = TeacherLogits(place, data, plan.context, k)
        if not (place / "top.json").exists() or read_json(place / "top.json") != made_from:
            store.cut(0)
            write_json(place / "top.json", made_from)
        if store.done() < data.windows(plan.context):
            model, _ = convert.load(self.teacher, device=pick_device(self.device))
            if model.config.max_position_embeddings < plan.context:
                raise InputError(
                    f"{self.teacher} reads {model.config.max_position_embeddings} tokens at once, and the rows have "
                    f"{plan.context}: ask for --context {model.config.max_position_embeddings}"
                )
            ask(model, store, data, plan.context, vocabulary, self.temperature, self.quiet)

        def trainer(model: Transformer, _: Callable, plan: Plan, folder: Path) -> Supervised:
            return Distilled(model, data, store, vocabulary, plan, folder, self.temperature, self.hard)

        return trainer


@torch.inference_mode()
def ask(
    model: Transformer, store: TeacherLogits, data: PackedData, context: int, vocabulary: int, temperature: float,
    quiet: bool = False,
) -> None:  # fmt: skip
    """Store what the model expects at the targets that are not stored yet."""
    done, windows = store.done(), data.windows(context)
    store.cut(done)  # a killed process may have left a part of a window
    head = model.head_weight[:vocabulary]
    with tqdm(total=windows, initial=done, desc="teacher", unit="row", disable=quiet) as bar:
        for start in range(done, windows, ROWS):
            parts = [data.batch(window, 1, context, None) for window in range(start, min(start + ROWS, windows))]
            ids, targets, positions, documents = _stack(parts, model.device)
            states, _ = model.hidden(ids, model.positions(ids, 0, positions, documents))
            store.append(*top_logprobs(states[targets >= 0], head, store.k, temperature))
            bar.update(len(parts))


@dataclass(frozen=True)
class Taught(Batch):
    """Rows with what the teacher expects at their targets, row after row."""

    tops: list[tuple[np.ndarray, np.ndarray]]


class Distilled(Supervised):
    """Fine-tuning against a teacher's stored probabilities."""

    def __init__(
        self, model: Transformer, data: PackedData, store: TeacherLogits, vocabulary: int, plan: Plan, folder: Path,
        temperature: float, hard: float,
    ) -> None:  # fmt: skip
        super().__init__(model, self.taught, plan, folder)
        self.data, self.store, self.vocabulary = data, store, vocabulary
        self.temperature, self.hard = temperature, hard

    def taught(self, step: int) -> Taught:
        plan = self.plan
        asked = step, plan.batch_size, plan.context, plan.seed
        batch, windows = self.data.batch(*asked), self.data.chosen(*asked)
        return Taught(*(getattr(batch, f.name) for f in fields(batch)), [self.store.read(w) for w in windows])

    def main_loss(self, batch: Taught, rows: slice) -> MainLoss:
        ids, logprobs = (torch.from_numpy(np.concatenate(column)) for column in zip(*batch.tops[rows], strict=True))

        def loss(states: Tensor, head: Tensor, targets: Tensor) -> Tensor:
            known = targets >= 0
            # no sampler draws what the tokenizer does not have, and models differ in how many such rows they keep
            return soft_cross_entropy(
                states[known], head[: self.vocabulary], targets[known], ids.to(states.device),
                logprobs.to(states.device), self.temperature, self.hard,
            )  # fmt: skip

        return loss


def _targets(data: PackedData, window: int, context: int) -> int:
    return int((data.batch(window, 1, context, None).targets >= 0).sum())


def _stack(parts: list[Batch], device: torch.device) -> list[Tensor]:
    columns = ([getattr(part, f.name) for part in parts] for f in fields(Batch))
    return [torch.cat(column).to(device) for column in columns]
