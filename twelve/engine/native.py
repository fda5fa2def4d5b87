"""Build, find and call kernels/: a whole step of many sequences in one native call, on a CPU.

The source is compiled on first use and kept in the user's cache folder. Where there is no compiler `available` is false
and `runner.PlainRunner`, the twin, computes. TWELVE_NATIVE=0 in the environment turns it off.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import mmap
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from twelve.compiler import compile_library
from twelve.engine.runner import PAGE, Step, gate_shape, page_shape
from twelve.engine.sampler import NOT_FINITE
from twelve.errors import InputError
from twelve.model.fast_streams import rules
from twelve.model.rope import inverse_frequencies, softmax_scale
from twelve.quantize import Packed, QuantizedExperts, QuantizedLinear

SOURCES = Path(__file__).with_name("kernels")
HUGE, LINE = 2**21, 64  # bytes
MOST_ROTATED, MOST_TAPS = 512, 16  # elements of a head, taps of a convolution: as in model.h
NONE, FLOAT32, BFLOAT16, PANELS, PACKED8, PACKED4 = range(6)  # matmul.h's Kind
TABLE_KINDS = {"float32": FLOAT32, "bfloat16": BFLOAT16, "int8": PACKED8}
PANEL = 16  # outputs
# Bytes of float32 matrices up to which a second copy is made, in panels: it multiplies many rows up to twice as fast. A
# large model's single rows are bound by reading every weight once, and would gain nothing for that memory.
MOST_PANELS = 2**26

pointer, integer, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


def address(array: np.ndarray | None) -> int | None:
    return None if array is None else array.ctypes.data


def structure(name: str, *fields: tuple[str, type]) -> type[ctypes.Structure]:
    """A ctypes structure whose fields are given as ("a b c", type)."""
    split = [(one, kind) for names, kind in fields for one in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": split})


Matrix = structure(
    "Matrix", ("weights scales bias", pointer),
    ("kind rows columns group has_low weights_stride scales_stride", integer),
)  # fmt: skip
LAYER_VECTORS = {  # field of step.cpp's Layer: the parameter's name in a block
    "input_norm": "input_layernorm.weight", "post_norm": "post_attention_layernorm.weight",
    "q_a_norm": "self_attn.q_a_layernorm.weight", "kv_a_norm": "self_attn.kv_a_layernorm.weight",
    "q_norm": "self_attn.q_norm.weight", "k_norm": "self_attn.k_norm.weight", "kv_b": "self_attn.kv_b_proj.weight",
    "router_bias": "mlp.gate.e_score_correction_bias",
}  # fmt: skip
LAYER_MATRICES = {  # the module's name; a dense layer's, or that of the shared experts beside routed ones
    "q_a": "self_attn.q_a_proj", "q_b": "self_attn.q_b_proj", "q": "self_attn.q_proj",
    "kv_a": "self_attn.kv_a_proj_with_mqa", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "router": "mlp.gate", "gate": "mlp.gate_proj mlp.shared_experts.gate_proj",
    "up": "mlp.up_proj mlp.shared_experts.up_proj", "down": "mlp.down_proj mlp.shared_experts.down_proj",
}  # fmt: skip
Mixer = structure("Mixer", ("fn", Matrix), ("base scale", pointer))
Recall = structure("Recall", ("key value", Matrix), ("gate_norm conv", pointer), ("index", integer))
Memory = structure(
    "Memory", ("layers grams heads width taps reach pad kind rounded", integer),
    ("primes offsets multipliers compressed rows scales", pointer),
)  # fmt: skip
Layer = structure(
    "Layer", (" ".join(LAYER_VECTORS), pointer), (" ".join(LAYER_MATRICES), Matrix),
    ("expert_gate_up expert_down", Matrix), ("attention_mixer feed_forward_mixer", Mixer), ("recall", pointer),
)  # fmt: skip
Module = structure("Module", ("enorm hnorm norm", pointer), ("eh_proj", Matrix), ("head", Mixer))
Model = structure(
    "Model",
    ("layers modules hidden vocabulary latent heads kv_heads nope rope v_width rank q_rank interleave experts top_k "
     "expert_width groups top_groups group_best softmax normalise streams constrained transposed rounds", integer),
    ("norm_eps latent_eps scale rope_scale routed_scale lift least tolerance", number),
    ("embedding head", Matrix), ("stream_head", Mixer), ("memory", Memory),
    ("final_norm frequencies layer module", pointer),
)  # fmt: skip
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
    found = compile_library("engine", SOURCES / "step.cpp", sorted(SOURCES.glob("*.h")), message)
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


def _panel_bytes(matrices: Tensor) -> int:
    """What float32 matrices [..., rows, columns] take in panels."""
    rows, columns = matrices.shape[-2:]
    return 4 * matrices[..., 0, 0].numel() * -(-rows // PANEL) * PANEL * columns


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
    with contextlib.suppress(OSError, AttributeError):  # glibc keeps what was freed; others have no such call
        ctypes.CDLL(None).malloc_trim(0)


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
        size = sum(_panel_bytes(p) for p in model.parameters() if p.dim() > 1 and p.dtype == torch.float32)
        self._panels = huge_zeros(size) if size <= MOST_PANELS else None
        self.reach, self.gates = model.memory.reach if model.memory is not None else 0, None
        self._engine = None
        self.reload()

    def reload(self) -> None:
        """Read the addresses of the weights anew, and copy what is not used where it lies."""
        model, c = self._model, self._model.config
        self._filled = 0  # bytes of `_panels` that hold one
        self._kept: list[object] = []  # everything that native code holds the address of
        blocks = [*model.layers, *(module.block for module in model.mtp)]
        layers = (Layer * len(blocks))(*(self._layer(index, block) for index, block in enumerate(blocks)))
        modules = (Module * max(1, len(model.mtp)))(*map(self._module, model.mtp))
        frequencies, rope_scale = inverse_frequencies(c)
        embedding, tied = self._matrix(model.embed_tokens, rows=True), c.tie_word_embeddings
        rounds, constrained, transposed = map(int, rules(c)[:3])
        lift, least, _ = rules(c)[3:]
        groups, choosing = c.n_group or 1, c.topk_method != "greedy"
        self._described = Model(
            layers=len(model.layers), modules=len(model.mtp), hidden=c.hidden_size, vocabulary=self._vocab_size,
            latent=c.is_mla, heads=c.num_attention_heads, kv_heads=c.num_key_value_heads,
            nope=c.qk_nope_head_dim if c.is_mla else 0, rope=c.rope_dim,
            v_width=c.v_head_dim if c.is_mla else c.head_dim, rank=c.kv_lora_rank or 0, q_rank=c.q_lora_rank or 0,
            interleave=c.is_mla and c.rope_interleave, experts=c.n_routed_experts or 0,
            top_k=c.num_experts_per_tok or 0, expert_width=c.moe_intermediate_size or 0, groups=groups,
            top_groups=(c.topk_group or groups) if choosing else groups,
            group_best=2 if c.topk_method == "noaux_tc" else 1, softmax=c.scoring_func == "softmax",
            normalise=c.norm_topk_prob, norm_eps=c.rms_norm_eps, latent_eps=1e-6, scale=softmax_scale(c),
            rope_scale=rope_scale, routed_scale=c.routed_scaling_factor, embedding=embedding,
            head=self._matrix(model.embed_tokens if tied else model.lm_head),
            streams=c.hc_mult, rounds=rounds, constrained=constrained, transposed=transposed, lift=lift, least=least,
            tolerance=c.hc_tolerance, stream_head=self._mixer(model.hc_head, "hc_"), memory=self._memory(model),
            final_norm=self._vector(model.norm.weight), frequencies=self._vector(frequencies),
            layer=ctypes.addressof(layers), module=ctypes.addressof(modules),
        )  # fmt: skip
        self._kept += [layers, modules]
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

    # --- describing the weights ---------------------------------------------------------------------------------------

    def _layer(self, index: int, block: nn.Module) -> ctypes.Structure:
        tensors, modules = dict(block.named_parameters()) | dict(block.named_buffers()), dict(block.named_modules())
        layer = Layer(**{field: self._vector(tensors.get(name)) for field, name in LAYER_VECTORS.items()})
        for field, names in LAYER_MATRICES.items():
            found = next((modules[name] for name in names.split() if name in modules), None)
            setattr(layer, field, self._matrix(found, floats=field == "router"))
        if "mlp.experts" in modules:
            experts = modules["mlp.experts"]
            packed = isinstance(experts, QuantizedExperts)
            layer.expert_gate_up = self._packed(experts.gate_up) if packed else self._stack(experts.gate_up_proj)
            layer.expert_down = self._packed(experts.down) if packed else self._stack(experts.down_proj)
        layer.attention_mixer, layer.feed_forward_mixer = self._mixer(block.attn_hc), self._mixer(block.ffn_hc)
        if block.engram is not None:
            layer.recall = self._recall(block.engram, self._model.config.engram_layer_ids.index(index))
        return layer

    def _module(self, module: nn.Module) -> ctypes.Structure:
        norms = (self._vector(norm.weight) for norm in (module.enorm, module.hnorm, module.norm))
        return Module(*norms, self._matrix(module.eh_proj), self._mixer(module.hc_head, "hc_"))

    def _mixer(self, module: nn.Module | None, prefix: str = "") -> ctypes.Structure:
        """Of a HyperConnection or a HyperHead; null where there is one stream."""
        fn, base, scale = (getattr(module, prefix + name, None) for name in ("fn", "base", "scale"))
        return Mixer() if fn is None else Mixer(self._stack(fn[None]), self._vector(base), self._vector(scale))

    def _recall(self, engram: nn.Module, index: int) -> int:
        """The address of what a layer does with the rows that it finds; the weights of norms go into what follows."""
        conv = None
        if engram.taps:
            conv = (engram.conv.float() * engram.conv_norm.float()).unflatten(-1, (engram.streams, -1)).transpose(0, 1)
        recall = Recall(
            self._matrix(engram.key_proj), self._matrix(engram.value_proj),
            self._vector(engram.query_norm.float() * engram.key_norm.float()), self._vector(conv), index,
        )  # fmt: skip
        self._kept.append(recall)
        return ctypes.addressof(recall)

    def _memory(self, model: nn.Module) -> ctypes.Structure:
        if model.memory is None:
            return Memory()
        c, memory, table = model.config, model.memory, model.memory.table
        numbers = (memory.hash.primes, memory.hash.offsets, memory.hash.multipliers)
        arrays = [np.ascontiguousarray(array, np.int64) for array in numbers]
        arrays.append(np.ascontiguousarray(memory.compressed, np.int32))
        self._kept += [*arrays, table]
        projections = (part for layer in model.layers if layer.engram is not None for part in
                       (layer.engram.key_proj, layer.engram.value_proj))  # fmt: skip
        return Memory(
            len(c.engram_layer_ids), c.engram_max_ngram_size, c.engram_n_heads, c.engram_head_dim, c.engram_kernel_size,
            memory.reach, c.engram_pad_id, TABLE_KINDS[table.dtype],
            any(isinstance(one, QuantizedLinear) for one in projections), *map(address, arrays), table.address,
            table.scales_address,
        )  # fmt: skip

    def _vector(self, tensor: Tensor | None) -> int | None:
        """The address of a tensor as float32, copied if it is something else."""
        if tensor is None:
            return None
        kept = tensor.detach().float().contiguous()
        self._kept.append(kept)
        return kept.data_ptr()

    def _matrix(self, module: nn.Module | None, rows: bool = False, floats: bool = False) -> ctypes.Structure:
        """rows: one after the other, never panels. floats: that, in float32."""
        if module is None:
            return Matrix()
        bias = self._vector(getattr(module, "bias", None))
        if isinstance(module, QuantizedLinear):
            matrix = self._packed(module.packed)
        else:
            matrix = self._stack((module.weight.float() if floats else module.weight)[None], rows or floats)
        matrix.bias = bias
        return matrix

    def _stack(self, tensor: Tensor, rows: bool = False) -> ctypes.Structure:
        """Float matrices [E, rows, columns]; in panels where there is room and not `rows`."""
        kept = tensor.detach().contiguous()
        kind = BFLOAT16 if kept.dtype == torch.bfloat16 else FLOAT32
        matrix = Matrix(weights=kept.data_ptr(), kind=kind, rows=kept.shape[1], columns=kept.shape[2],
                        weights_stride=kept[0].nbytes)  # fmt: skip
        size = _panel_bytes(kept)
        if kind == FLOAT32 and not rows and self._panels is not None and self._filled + size <= len(self._panels):
            panels = self._panels.ctypes.data + self._filled
            self._filled += size
            self._library.panels_fill(kept.data_ptr(), *kept.shape, panels)
            matrix.weights, matrix.kind, matrix.weights_stride = panels, PANELS, size // len(kept)
        else:
            self._kept.append(kept)
        return matrix

    def _packed(self, packed: Packed) -> ctypes.Structure:
        weights, scales = packed.weights.contiguous(), packed.scales.contiguous()
        self._kept += [weights, scales]
        return Matrix(
            weights=weights.data_ptr(), scales=scales.data_ptr(), kind=PACKED8 if packed.bits == 8 else PACKED4,
            rows=packed.rows, columns=packed.columns, group=packed.group, has_low=packed.has_low,
            weights_stride=weights[0].nbytes, scales_stride=scales[0].nbytes,
        )  # fmt: skip
