"""What computes a step: the contract of every runner, and the plain one in PyTorch, for any device and precision.

Keys and values live in pages of PAGE tokens. A page is one block of memory for all layers (main layers, then MTP
modules); within it a layer has
    latent attention:         [PAGE, kv_lora_rank + qk_rope_head_dim]: latent, then rotated shared key
    grouped-query attention:  keys, transposed, [kv_heads, head_dim, PAGE]; then values [kv_heads, PAGE, head_dim]
and after all layers
    an Engram layer:          [PAGE, streams]: its gates, if it has a convolution. The rest of what that needs of past
                              tokens follows from their ids, `Step.before`.
(NativeRunner cuts the transposed keys into stretches of 16 tokens: see native.native_page_shape.)
Position p of a sequence is row p % PAGE of its page p // PAGE.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from types import SimpleNamespace
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from twelve.engine.sampler import check_finite, draw, log_probabilities
from twelve.errors import InputError

PAGE = 64  # tokens
TOGETHER = 16  # sequences with at most so many rows run as one batch, padded; longer ones run one by one

LOGIT_ROWS = 64  # at a time: a row has an element for every token of the vocabulary
ROWS_READ = 65_536  # of a table, at a time


@dataclass
class Step:
    """Rows of one forward pass: every sequence's next tokens, one sequence after the other."""

    tokens: np.ndarray  # [R] int64
    starts: np.ndarray  # [S + 1] int64: rows of sequence s are starts[s]:starts[s + 1]
    positions: np.ndarray  # [S] int64: position of each sequence's first row; the rest follow it
    pages: np.ndarray  # [S, P] int32: page ids of each sequence, -1 beyond its last; page i holds positions from 64 i
    drawn: np.ndarray  # [K] int64: rows after which a token is drawn, ascending
    temperature: np.ndarray  # [K] float32; 0 = greedy
    top_p: np.ndarray  # [K] float32
    keys: np.ndarray  # [K, 4] uint32: `sampler.seed_key` of each drawn row's sequence
    logprobs: bool = False
    targets: np.ndarray | None = None  # [K] int64: do not draw; give the log-probability of these tokens
    # [S, reach] int64: the tokens right before each sequence's first row, -1 where there are none
    before: np.ndarray | None = None


class Runner(Protocol):
    page_bytes: int  # of a page as float32; a pool of 16-bit elements takes half
    page_shape: list[tuple[int, ...]]  # the segments of a page, one after the other, as `tiers.Tiers` wants them
    cache_bytes_per_token: int  # of the main model's layers
    reach: int  # tokens that `Step.before` must tell
    gates: np.ndarray | None  # [R] float32 of the last step: mean gate of the memory; None where there is no memory
    exact: bool  # a row's result depends on its own sequence only: not on batch, chunk or draft

    def allocate(self, pages: int) -> None:
        """Make the pool, in place of an earlier one. Memory is touched only as pages are used, where the device can."""

    def page(self, index: int) -> np.ndarray:
        """The page as float32 [elements], to be read at once: a view where the pool is float32 memory, else a copy."""

    def write_page(self, index: int, data: np.ndarray) -> None:
        """Fill a page from float32 [elements]."""

    def step(self, step: Step) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [K] int64 and their log-probabilities [K] (zeros unless asked for).

        The log-probability is that of the raw logits: no temperature, no top_p. InputError when they are not finite.
        """

    def draft(
        self, rows: np.ndarray, following: np.ndarray, drawn: np.ndarray, temperature: np.ndarray, keys: np.ndarray
    ) -> np.ndarray:
        """Guess one token further with the model's MTP module, after `step`.

        `rows` [D], ascending and without gaps in a sequence, are rows of that step whose next tokens, `following` [D],
        are known now. For each of `drawn` [E], indices into `rows`: the guess [E] int64 for the position after
        `following`, drawn with the coins that the target will use there (`temperature` [E], `keys` [E, 4]).
        """

    def reload(self) -> None:
        """The model's weights have changed."""


def page_shape(config, layers: int) -> list[tuple[int, ...]]:
    """(rows, length, ...) of every segment of a page: what differs in magnitude lies in different pieces of a row."""
    if config.is_mla:
        own = config.kv_token_rank
        latent = (config.kv_lora_rank - own, own) if own else (config.kv_lora_rank,)
        return [(PAGE, *latent, config.qk_rope_head_dim)] * layers
    heads, width = config.num_key_value_heads, config.head_dim
    return [(heads * width, PAGE), (heads * PAGE, width)] * layers


def gate_shape(config) -> list[tuple[int, ...]]:
    """The segments of a page that hold Engram's gates. They all lie between 0 and 1: one scale will do."""
    return [(1, PAGE * config.hc_mult)] * (len(config.engram_layer_ids) if config.engram_kernel_size > 1 else 0)


def model_identity(model, runner: Runner, *variants: object) -> bytes:
    """A hash of all that decides what a page holds: weights, architecture, precision, runner and `variants`.

    Reads all weights; of a table in a file only who it is and when it was last changed.
    """
    known = (model.config.to_dict(), type(runner).__name__, getattr(runner, "build", None), *variants)
    digest = blake2b(repr(known).encode(), digest_size=16)
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    if model.memory is not None:
        table = model.memory.table
        digest.update(repr((model.memory.identity, table.dtype, table.count)).encode())
        if table.path is not None:
            digest.update(repr(table.path.stat().st_mtime_ns).encode())
        for start in range(0, table.count if table.path is None else 0, ROWS_READ):
            digest.update(table.read(np.arange(start, min(start + ROWS_READ, table.count))))
    return digest.digest()


def make_runner(model, vocab_size: int, selection: float | None = None) -> Runner:
    """The fastest runner for this model, device and precision. Tokens from `vocab_size` on are never drawn.

    selection: see NativeRunner; InputError where there is only the plain runner.
    """
    from twelve.engine import native

    if native.available(model):
        return native.NativeRunner(model, vocab_size, selection)
    if selection is not None:
        raise InputError("--selection works on a CPU with a C++ compiler (g++) only: leave it out")
    return PlainRunner(model, vocab_size)


def fetch_ahead(memory, step: Step) -> None:
    """Have a thread read what a step needs of a table that may lie on a disk: all of it at once, which a layer that
    goes from row to row would not. memory: the model's; None has nothing to read."""
    if memory is not None and memory.table.is_cold():
        parts = zip(step.before, np.split(step.tokens, step.starts[1:-1]), strict=True)
        ids = np.concatenate([ids for pair in parts for ids in pair])
        memory.prefetch(torch.from_numpy(ids)[None])


class PlainRunner:
    """The model's own modules on paged memory: what faster runners are tested against, and the way on a GPU."""

    exact = False  # a matrix product may sum in another order when it has other neighbours

    def __init__(self, model, vocab_size: int) -> None:
        self.model, self.vocab_size = model, vocab_size
        blocks = [*model.layers, *(module.block for module in model.mtp)]
        self._engrams = {index: layer.engram for index, layer in enumerate(model.layers) if layer.engram is not None}
        caching = [*(block.self_attn for block in blocks), *self._engrams.values()]
        self._shapes = [part.cache_shapes() for part in caching]
        sizes = [sum(int(np.prod(shape)) for shape in shapes) for shapes in self._shapes]  # elements a token
        self._elements = PAGE * sum(sizes)
        own = sum(sizes) - sum(sizes[len(model.layers) : len(blocks)])
        self.cache_bytes_per_token = own * model.embed_tokens.weight.element_size()
        self.page_bytes = 4 * self._elements
        self.page_shape = page_shape(model.config, len(blocks)) + gate_shape(model.config)
        self.reach = model.memory.reach if model.memory is not None else 0
        self.gates = None

    def allocate(self, pages: int) -> None:
        like = self.model.embed_tokens.weight
        if like.device.type == "cpu":  # numpy's zeros take memory only where they are written; torch's take all of it
            pool = np.zeros((pages, self._elements * like.element_size()), np.uint8)
            self._pool = torch.from_numpy(pool).view(like.dtype)
        else:
            self._pool = torch.zeros(pages, self._elements, dtype=like.dtype, device=like.device)
        self._layers, offset = [], 0
        for shapes in self._shapes:
            buffers = []  # views [pages, PAGE, ...], whatever the order within a page
            for index, shape in enumerate(shapes):
                size = PAGE * int(np.prod(shape))
                part = self._pool[:, offset : offset + size]
                if len(shape) == 1:
                    buffers.append(part.view(pages, PAGE, *shape))
                elif index == 0:
                    buffers.append(part.view(pages, *shape, PAGE).movedim(3, 1))
                else:
                    buffers.append(part.view(pages, shape[0], PAGE, shape[1]).movedim(2, 1))
                offset += size
            self._layers.append(buffers)

    def page(self, index: int) -> np.ndarray:
        return self._pool[index].float().cpu().numpy()

    def write_page(self, index: int, data: np.ndarray) -> None:
        self._pool[index] = torch.from_numpy(data).to(self._pool)

    def reload(self) -> None:
        pass  # there is no other copy of them

    @torch.inference_mode()
    def step(self, step: Step) -> tuple[np.ndarray, np.ndarray]:
        model, counts = self.model, np.diff(step.starts)
        fetch_ahead(model.memory, step)
        self._step = step
        self._states = torch.empty(len(step.tokens), model.config.hidden_size, dtype=self._pool.dtype,
                                   device=self._pool.device)  # fmt: skip
        self.gates = np.empty(len(step.tokens), np.float32) if self._engrams else None
        for batch in batches(counts):
            rows = Rows(step, batch, counts, self._pool.device)
            ids = rows.pad(torch.as_tensor(step.tokens, device=self._pool.device))
            layers = [PagedLayer(buffers, rows) for buffers in self._layers]
            gates = dict(zip(self._engrams, layers[len(layers) - len(self._engrams) :], strict=True))
            states, _ = model.hidden(ids, rows.at(model, ids), SimpleNamespace(layers=layers, gates=gates))
            self._states[rows.index] = states[rows.real]
            if self._engrams:
                mean = sum(engram.last_gates.float().mean(-1) for engram in self._engrams.values()) / len(self._engrams)
                self.gates[rows.index.cpu().numpy()] = mean[rows.real].cpu().numpy()
        if not len(step.drawn):
            return np.empty(0, np.int64), np.empty(0)
        sequence = np.searchsorted(step.starts, step.drawn, side="right") - 1
        after = step.positions[sequence] + step.drawn - step.starts[sequence] + 1
        tokens, logprobs = np.empty(len(after), np.int64), np.zeros(len(after))
        for at in range(0, len(after), LOGIT_ROWS):
            part = slice(at, at + LOGIT_ROWS)
            logits = self._logits(self._states[torch.as_tensor(step.drawn[part], device=self._pool.device)])
            check_finite(logits)
            if step.targets is not None:
                tokens[part] = step.targets[part]
            else:
                tokens[part] = draw(logits, after[part], step.temperature[part], step.top_p[part], step.keys[part])
            if step.logprobs or step.targets is not None:
                logprobs[part] = log_probabilities(logits, tokens[part])
        return tokens, logprobs

    @torch.inference_mode()
    def draft(
        self, rows: np.ndarray, following: np.ndarray, drawn: np.ndarray, temperature: np.ndarray, keys: np.ndarray
    ) -> np.ndarray:
        model, step, device = self.model, self._step, self._pool.device
        sequences, first, counts = np.unique(
            np.searchsorted(step.starts, rows, side="right") - 1, return_index=True, return_counts=True
        )
        positions = step.positions[sequences] + rows[first] - step.starts[sequences]
        part = Step(following, np.append(first, len(rows)), positions, step.pages[sequences], drawn, None, None, None)
        states, out = self._states[torch.as_tensor(rows, device=device)], torch.empty_like(self._states[: len(rows)])
        buffers = self._layers[len(model.layers)]
        for batch in batches(counts):
            own = Rows(part, batch, counts, device)
            ids = own.pad(torch.as_tensor(following, device=device))
            guess, _ = model.mtp[0](own.pad(states), model.embed_tokens(ids), own.at(model, ids),
                                    PagedLayer(buffers, own))  # fmt: skip
            out[own.index] = guess[own.real]
        logits = np.nan_to_num(self._logits(out[torch.as_tensor(drawn, device=device)]))  # a bad guess does no harm
        sequence = np.searchsorted(part.starts, drawn, side="right") - 1
        after = positions[sequence] + drawn - part.starts[sequence] + 2
        return draw(logits, after, temperature, np.ones_like(temperature), keys)

    def _logits(self, states: Tensor) -> np.ndarray:
        """[K, D] -> [K, vocab_size]; a model's vocabulary may be padded beyond its tokenizer's."""
        logits = F.linear(states, self.model.head_weight)[:, : self.vocab_size]
        return (logits if logits.dtype == torch.float64 else logits.float()).cpu().numpy()


def batches(counts: np.ndarray) -> Iterator[np.ndarray]:
    """Which sequences run together, given their row counts [S]."""
    few = np.flatnonzero(counts <= TOGETHER)
    if len(few):
        yield few
    for sequence in np.flatnonzero(counts > TOGETHER):
        yield np.array([sequence])


class Rows:
    """The rows of some sequences of a step as a padded batch [B, T], and where their past lies."""

    def __init__(self, step: Step, batch: np.ndarray, counts: np.ndarray, device: torch.device) -> None:
        starts, counts, first = step.starts[batch], counts[batch], step.positions[batch]
        column = np.arange(counts.max())
        real = column < counts[:, None]
        within = np.minimum(column, counts[:, None] - 1)  # padding repeats the last row, and is not kept
        positions = first[:, None] + within
        table = np.maximum(step.pages[batch], 0)[:, : positions.max() // PAGE + 1]
        self._device = device
        self._padded = self._tensor(starts[:, None] + within)
        self.real = self._tensor(real)  # [B, T]
        self.index = self._tensor((starts[:, None] + within)[real])  # [N] rows of the step
        self.page = self._tensor(np.take_along_axis(table, positions // PAGE, axis=1)[real].astype(np.int64))  # [N]
        self.slot = self._tensor((positions % PAGE)[real])  # [N]
        self.table = self._tensor(table.astype(np.int64))  # [B, P]
        self.before = self._tensor(step.before[batch]) if step.before is not None else None  # [B, reach]
        self.positions = self._tensor(positions)  # [B, T]
        key = torch.arange(positions.max() + 1, device=device)
        self.mask = key <= self.positions[:, :, None]  # [B, T, S]
        self.beyond = ~self.mask[:, -1]  # [B, S] positions that a sequence does not have

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.as_tensor(array, device=self._device)

    def pad(self, values: Tensor) -> Tensor:
        """[R, ...] -> [B, T, ...]"""
        return values[self._padded]

    def at(self, model, ids: Tensor):
        """Rotations and mask, and what Engram must know."""
        at = model.positions(ids, positions=self.positions, past=self.before)
        at.mask = self.mask[:, None]
        return at


class PagedLayer:
    """One layer's cache for the rows of a batch; to the layer it is a `model.attention.LayerCache`."""

    def __init__(self, buffers: list[Tensor], rows: Rows) -> None:
        self.buffers, self.rows = buffers, rows  # [pages, PAGE, ...]

    def append(self, start: int, *values: Tensor) -> list[Tensor]:
        """Write values [B, T, ...] at the rows' own positions; all tokens so far [B, S, ...], copied together."""
        rows, past = self.rows, []
        for buffer, value in zip(self.buffers, values, strict=True):
            buffer[rows.page, rows.slot] = value[rows.real].to(buffer.dtype)
            gathered = buffer[rows.table].flatten(1, 2)[:, : rows.beyond.shape[1]]
            gathered[rows.beyond] = 0  # what another sequence left there may be no number, and 0 x NaN is NaN
            past.append(gathered)
        return past
