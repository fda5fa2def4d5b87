"""What native code is told of a model: structures of addresses and sizes, as kernels/matmul.h and model.h have them."""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor, nn

from twelve.config import ModelConfig
from twelve.model.fast_streams import rules
from twelve.model.rope import inverse_frequencies, softmax_scale
from twelve.quantize import Packed, QuantizedExperts, QuantizedLinear

NONE, FLOAT32, BFLOAT16, PANELS, PACKED8, PACKED4 = range(6)  # matmul.h's Kind
TABLE_KINDS = {"float32": FLOAT32, "bfloat16": BFLOAT16, "int8": PACKED8}
PANEL = 16  # outputs
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
    "token_latent": "self_attn.token_latent.weight", "router_bias": "mlp.gate.e_score_correction_bias",
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
    ("layers modules hidden vocabulary latent heads kv_heads nope rope v_width rank token_rank q_rank interleave "
     "experts top_k expert_width groups top_groups group_best softmax normalise streams constrained transposed "
     "rounds", integer),
    ("norm_eps latent_eps scale rope_scale routed_scale lift least tolerance", number),
    ("embedding head", Matrix), ("stream_head", Mixer), ("memory", Memory),
    ("final_norm frequencies layer module", pointer),
)  # fmt: skip


def panel_bytes(matrices: Tensor) -> int:
    """What float32 matrices [..., rows, columns] take in panels."""
    rows, columns = matrices.shape[-2:]
    return 4 * matrices[..., 0, 0].numel() * -(-rows // PANEL) * PANEL * columns


class Weights:
    """Describes a model, and keeps alive what native code holds the address of.

    Weights are described where they lie. Float32 matrices are copied into `panels`, memory for some of them or None, as
    long as there is room; so is what must be float32 and is not.
    """

    def __init__(self, library: ctypes.CDLL, panels: np.ndarray | None) -> None:
        self._library, self._panels = library, panels
        self._filled = 0  # bytes of `panels` that hold one
        self._kept: list[object] = []

    def model(self, model: nn.Module, vocab_size: int) -> ctypes.Structure:
        """The whole of a Transformer; tokens from `vocab_size` on are never drawn."""
        c = model.config
        blocks = [*model.layers, *(module.block for module in model.mtp)]
        layers = (Layer * len(blocks))(*(self._layer(c, index, block) for index, block in enumerate(blocks)))
        modules = (Module * max(1, len(model.mtp)))(*map(self._module, model.mtp))
        frequencies, rope_scale = inverse_frequencies(c)
        embedding, tied = self.matrix(model.embed_tokens, rows=True), c.tie_word_embeddings
        rounds, constrained, transposed = map(int, rules(c)[:3])
        lift, least, _ = rules(c)[3:]
        groups, choosing = c.n_group or 1, c.topk_method != "greedy"
        described = Model(
            layers=len(model.layers), modules=len(model.mtp), hidden=c.hidden_size, vocabulary=vocab_size,
            latent=c.is_mla, heads=c.num_attention_heads, kv_heads=c.num_key_value_heads,
            nope=c.qk_nope_head_dim if c.is_mla else 0, rope=c.rope_dim,
            v_width=c.v_head_dim if c.is_mla else c.head_dim, rank=c.kv_lora_rank or 0, token_rank=c.kv_token_rank,
            q_rank=c.q_lora_rank or 0,
            interleave=c.is_mla and c.rope_interleave, experts=c.n_routed_experts or 0,
            top_k=c.num_experts_per_tok or 0, expert_width=c.moe_intermediate_size or 0, groups=groups,
            top_groups=(c.topk_group or groups) if choosing else groups,
            group_best=2 if c.topk_method == "noaux_tc" else 1, softmax=c.scoring_func == "softmax",
            normalise=c.norm_topk_prob, norm_eps=c.rms_norm_eps, latent_eps=1e-6, scale=softmax_scale(c),
            rope_scale=rope_scale, routed_scale=c.routed_scaling_factor, embedding=embedding,
            head=self.matrix(model.embed_tokens if tied else model.lm_head),
            streams=c.hc_mult, rounds=rounds, constrained=constrained, transposed=transposed, lift=lift, least=least,
            tolerance=c.hc_tolerance, stream_head=self._mixer(model.hc_head, "hc_"), memory=self._memory(model),
            final_norm=self._vector(model.norm.weight), frequencies=self._vector(frequencies),
            layer=ctypes.addressof(layers), module=ctypes.addressof(modules),
        )  # fmt: skip
        self._kept += [layers, modules]
        return described

    def matrix(self, module: nn.Module | None, rows: bool = False, floats: bool = False) -> ctypes.Structure:
        """Of a linear layer or an embedding. rows: one after the other, never panels. floats: that, in float32."""
        if module is None:
            return Matrix()
        bias = self._vector(getattr(module, "bias", None))
        if isinstance(module, QuantizedLinear):
            matrix = self.packed(module.packed)
        else:
            matrix = self._stack((module.weight.float() if floats else module.weight)[None], rows or floats)
        matrix.bias = bias
        return matrix

    def packed(self, packed: Packed) -> ctypes.Structure:
        weights, scales = packed.weights.contiguous(), packed.scales.contiguous()
        self._kept += [weights, scales]
        return Matrix(
            weights=weights.data_ptr(), scales=scales.data_ptr(), kind=PACKED8 if packed.bits == 8 else PACKED4,
            rows=packed.rows, columns=packed.columns, group=packed.group, has_low=packed.has_low,
            weights_stride=weights[0].nbytes, scales_stride=scales[0].nbytes,
        )  # fmt: skip

    def _layer(self, config: ModelConfig, index: int, block: nn.Module) -> ctypes.Structure:
        tensors, modules = dict(block.named_parameters()) | dict(block.named_buffers()), dict(block.named_modules())
        layer = Layer(**{field: self._vector(tensors.get(name)) for field, name in LAYER_VECTORS.items()})
        for field, names in LAYER_MATRICES.items():
            found = next((modules[name] for name in names.split() if name in modules), None)
            setattr(layer, field, self.matrix(found, floats=field == "router"))
        if "mlp.experts" in modules:
            experts = modules["mlp.experts"]
            packed = isinstance(experts, QuantizedExperts)
            layer.expert_gate_up = self.packed(experts.gate_up) if packed else self._stack(experts.gate_up_proj)
            layer.expert_down = self.packed(experts.down) if packed else self._stack(experts.down_proj)
        layer.attention_mixer, layer.feed_forward_mixer = self._mixer(block.attn_hc), self._mixer(block.ffn_hc)
        if block.engram is not None:
            layer.recall = self._recall(block.engram, config.engram_layer_ids.index(index))
        return layer

    def _module(self, module: nn.Module) -> ctypes.Structure:
        norms = (self._vector(norm.weight) for norm in (module.enorm, module.hnorm, module.norm))
        return Module(*norms, self.matrix(module.eh_proj), self._mixer(module.hc_head, "hc_"))

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
            self.matrix(engram.key_proj), self.matrix(engram.value_proj),
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

    def _stack(self, tensor: Tensor, rows: bool = False) -> ctypes.Structure:
        """Float matrices [E, rows, columns]; in panels where there is room and not `rows`."""
        kept = tensor.detach().contiguous()
        kind = BFLOAT16 if kept.dtype == torch.bfloat16 else FLOAT32
        matrix = Matrix(weights=kept.data_ptr(), kind=kind, rows=kept.shape[1], columns=kept.shape[2],
                        weights_stride=kept[0].nbytes)  # fmt: skip
        size = panel_bytes(kept)
        if kind == FLOAT32 and not rows and self._panels is not None and self._filled + size <= len(self._panels):
            panels = self._panels.ctypes.data + self._filled
            self._filled += size
            self._library.panels_fill(kept.data_ptr(), *kept.shape, panels)
            matrix.weights, matrix.kind, matrix.weights_stride = panels, PANELS, size // len(kept)
        else:
            self._kept.append(kept)
        return matrix
