"""Build, find and call kernels/: a whole step of many sequences in one native call, on a CPU.

The source is compiled on first use and kept in the user's cache folder. Where there is no compiler `available` is false
and `runner.PlainRunner`, the twin, computes. TWELVE_NATIVE=0 in the environment turns it off.
"""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
from pathlib import Path

import numpy as np
import torch

from twelve.compiler import compile_library
from twelve.engine.describe import PANEL, Weights, address, integer, number, panel_bytes, pointer, structure
from twelve.engine.runner import PAGE, Step, fetch_ahead, gate_shape, page_shape
from twelve.engine.sampler import NOT_FINITE
from twelve.errors import InputError
from twelve.heap import give_back
from twelve.model.fast_streams import VECTORS

SOURCES = Path(__file__).with_name("kernels")
HUGE, LINE = 2**21, 64  # bytes
MOST_ROTATED, MOST_TAPS = 512, 16  # elements of a head, taps of a convolution: as in model.h
# Bytes of float32 matrices up to which a second copy is made, in panels: it multiplies many rows up to twice as fast. A
# large model's single rows are bound by reading every weight once, and would gain nothing for that memory.
MOST_PANELS = 2**26

Batch = structure(
    "Batch", ("rows sequences page_slots", integer), ("tokens starts positions pages before gates", pointer)
)
Draws = structure(
    "Draws", ("count want_logprobs", integer), ("row target temperature top_p keys tokens logprobs logits", pointer)
)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled source, or None where it cannot be compiled."""
    message = "compiling the engine for this processor, once (10 to 30 seconds)"
    found = compile_library("engine", SOURCES / "step.cpp", [VECTORS, *sorted(SOURCES.glob("*.h"))], message)
    if found is None:
        return None
    found.engine_new.restype, found.engine_new.argtypes = pointer, [pointer]
    found.engine_free.argtypes = [pointer]
    found.engine_pool.argtypes = [pointer, pointer, pointer, number]
    found.engine_bound_floats.restype, found.engine_bound_floats.argtypes = integer, [pointer]
    found.engine_bound.argtypes = [pointer, integer]
    found.engine_pages.argtypes = [pointer, pointer, pointer]
    found.engine_step.argtypes = [pointer, pointer, pointer, integer]
    found.engine_draft.argtypes = [pointer, pointer, pointer, pointer, integer]
    found.panels_fill.argtypes = [pointer, integer, integer, integer, pointer]
    found.matrix_product.argtypes = [pointer, pointer, integer, pointer, integer]
    return found


def available(model) -> bool:
    """Whether `NativeRunner` can run this model here: on the CPU, in float32, bfloat16 or packed weights, and with its
    memory's table, if it has one, at an address."""
    weight = model.norm.weight
    fits = weight.dtype in (torch.float32, torch.bfloat16) and model.config.rope_dim <= MOST_ROTATED
    if model.memory is not None:
        fits = fits and model.config.engram_kernel_size <= MOST_TAPS and model.memory.table.address is not None
    return weight.device.type == "cpu" and fits and library() is not None


def huge_zeros(size: int) -> np.ndarray:
    """Zeroed memory, uint8 [size], in pages of 2 MiB where the system has them.

    Decoding reads every weight once a token; looking up a small page's address every 4 KiB halves that speed on a
    virtual machine. Memory is taken as it is written.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.zeros(size, np.uint8)
    memory = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel built without them
        pass
    whole = np.frombuffer(memory, np.uint8)
    start = -whole.ctypes.data % HUGE
    return whole[start : start + size]


@torch.no_grad()
def settle(model) -> None:
    """Move a model's weights into one stretch of huge pages, one tensor after the other; they stay the model's own."""
    tensors = [t for t in dict.fromkeys([*model.parameters(), *model.buffers()]) if not hasattr(t, "settled")]
    offsets = np.cumsum([0, *(-(-t.nbytes // LINE) * LINE for t in tensors)])
    memory = torch.from_numpy(huge_zeros(int(offsets[-1])))
    for tensor, start in zip(tensors, offsets, strict=False):
        place = memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        tensor.data = place.copy_(tensor)
        tensor.settled = True
    give_back()


def native_page_shape(config, layers: int) -> list[tuple[int, ...]]:
    """`runner.page_shape` of a NativeRunner's pages.

    Keys of grouped-query attention lie as [kv_heads, PAGE / 16, head_dim, 16]: sixteen tokens' keys are one stretch of
    memory, transposed.
    """
    if config.is_mla:
        return page_shape(config, layers)
    heads, width = config.num_key_value_heads, config.head_dim
    return [(heads * (PAGE // PANEL) * width, PANEL), (heads * PAGE, width)] * layers


class NativeRunner:
    """A `runner.Runner` that reads the model's own weights where they lie, as floats or packed; a small model's float32
    matrices from a copy in panels (see MOST_PANELS).

    A row's result depends on its own sequence only, to the last bit: every output is one sum in one fixed order,
    whichever rows, chunks or threads surround it. Latent attention always runs absorbed; keys are read page by page.
    Activations are rounded to 8 bits a block of 32 before they meet packed weights, and only there.
    """

    exact = True

    def __init__(self, model, vocab_size: int, selection: float | None = None) -> None:
        """selection: the share of a long past's pages that each head reads for a token; None reads all.

        Of the pages between the first and the last few those are read whose keys, by their bounds, could match the
        query best (as Quest, arXiv 2406.10774). InputError for a share that is none.
        """
        if selection is not None and not 0 < selection <= 1:
            raise InputError(f"selection {selection} is not a share: choose above 0 and at most 1")
        self._model, self._vocab_size, self._selection = model, vocab_size, selection
        self._library = library()
        settle(model)
        blocks = [*model.layers, *(module.block for module in model.mtp)]
        sizes = [sum(int(np.prod(shape)) for shape in block.self_attn.cache_shapes()) for block in blocks]
        gates = gate_shape(model.config)
        self.page_shape = native_page_shape(model.config, len(blocks)) + gates
        self.page_bytes = 4 * sum(count * sum(lengths) for count, *lengths in self.page_shape)
        self.build = Path(self._library._name).stem  # another compiler's or processor's sums may round otherwise
        self.cache_bytes_per_token = sum(sizes[: len(model.layers)]) * 4 + 4 * sum(map(math.prod, gates)) // PAGE
        # one stretch for good, filled anew by each `reload`
        size = sum(panel_bytes(p) for p in model.parameters() if p.dim() > 1 and p.dtype == torch.float32)
        self._panels = huge_zeros(size) if size <= MOST_PANELS else None
        self.reach, self.gates = model.memory.reach if model.memory is not None else 0, None
        self._engine = None
        self.reload()

    def reload(self) -> None:
        """Read the addresses of the weights anew, and copy what is not used where it lies."""
        self.weights = Weights(self._library, self._panels)
        self._described = self.weights.model(self._model, self._vocab_size)
        if self._engine is not None:
            self._library.engine_free(self._engine)
        self._engine = self._library.engine_new(ctypes.addressof(self._described))
        if hasattr(self, "_pool"):
            self._use_pool()

    def __del__(self) -> None:
        if getattr(self, "_engine", None) is not None:
            self._library.engine_free(self._engine)

    # --- the pool -----------------------------------------------------------------------------------------------------

    def allocate(self, pages: int) -> None:
        # untouched zeros take no memory; kernels may read, not use, a few numbers beyond the last page
        self._pool = huge_zeros(pages * self.page_bytes + 4 * PAGE).view(np.float32)
        size = self._library.engine_bound_floats(self._engine) if self._selection is not None else 0
        self._bounds = huge_zeros(4 * pages * size)
        self._use_pool()

    def _use_pool(self) -> None:
        selecting = self._selection is not None
        bounds = self._bounds.ctypes.data if selecting else None
        self._library.engine_pool(self._engine, self._pool.ctypes.data, bounds, self._selection if selecting else 1.0)

    @property
    def pages_read(self) -> tuple[int, int]:
        """With selection: pages read, and pages of the past, over all layers, heads and rows since the last look."""
        counts = (integer * 2)()
        at = ctypes.addressof(counts)
        self._library.engine_pages(self._engine, at, at + 8)
        return counts[0], counts[1]

    def page(self, index: int) -> np.ndarray:
        size = self.page_bytes // 4
        return self._pool[index * size : (index + 1) * size]

    def write_page(self, index: int, data: np.ndarray) -> None:
        page = self.page(index)
        if not np.shares_memory(page, data):
            page[:] = data
        if self._selection is not None:
            self._library.engine_bound(self._engine, index)

    # --- running ------------------------------------------------------------------------------------------------------

    def step(self, step: Step) -> tuple[np.ndarray, np.ndarray]:
        self._step = step
        return self._run(step, step.drawn, step.temperature, step.top_p, step.keys, step.logprobs, step.targets)

    def logits(self, step: Step) -> np.ndarray:
        """Run a step for the logits [K, V] float32 after its drawn rows."""
        out = np.empty((len(step.drawn), self._vocab_size), np.float32)
        self._run(step, step.drawn, step.temperature, step.top_p, step.keys, logits=out)
        return out

    def draft(
        self, rows: np.ndarray, following: np.ndarray, drawn: np.ndarray, temperature: np.ndarray, keys: np.ndarray
    ) -> np.ndarray:
        step = self._step
        within = np.searchsorted(step.starts, rows, side="right") - 1
        sequences, first = np.unique(within, return_index=True)
        positions = step.positions[sequences] + rows[first] - step.starts[sequences]
        part = Step(following, np.append(first, len(rows)), positions, step.pages[sequences], drawn, None, None, None)
        rows = np.ascontiguousarray(rows, np.int64)
        tokens, _ = self._run(part, drawn, temperature, np.ones_like(temperature), keys, rows=rows)
        return np.maximum(tokens, 0)  # a bad guess does no harm

    def _run(
        self, step: Step, drawn, temperature, top_p, keys, want_logprobs=False, targets=None, logits=None, rows=None
    ) -> tuple[np.ndarray, np.ndarray]:
        kept = [
            np.ascontiguousarray(array, kind)
            for array, kind in (
                (step.tokens, np.int64), (step.starts, np.int64), (step.positions, np.int64), (step.pages, np.int32),
                (drawn, np.int64), (temperature, np.float32), (top_p, np.float32), (keys, np.uint32),
            )
        ]  # fmt: skip
        before = gates = None
        if self.reach and rows is None:
            before = np.ascontiguousarray(step.before, np.int64).reshape(len(step.positions), self.reach)
            gates = self.gates = np.zeros(len(step.tokens), np.float32)
            fetch_ahead(self._model.memory, step)
        tokens, logprobs = np.empty(len(drawn), np.int64), np.empty(len(drawn), np.float32)
        targets = None if targets is None else np.ascontiguousarray(targets, np.int64)
        at = [array.ctypes.data for array in kept]
        batch = Batch(len(kept[0]), len(kept[2]), kept[3].shape[1], *at[:4], address(before), address(gates))
        draws = Draws(
            len(drawn), want_logprobs or targets is not None, at[4], address(targets), *at[5:], address(tokens),
            address(logprobs), address(logits),
        )  # fmt: skip
        threads = torch.get_num_threads()
        if rows is None:
            self._library.engine_step(self._engine, ctypes.addressof(batch), ctypes.addressof(draws), threads)
            if (tokens < 0).any():
                raise InputError(NOT_FINITE)
        else:
            self._library.engine_draft(
                self._engine, ctypes.addressof(batch), rows.ctypes.data, ctypes.addressof(draws), threads
            )
        return tokens, logprobs
