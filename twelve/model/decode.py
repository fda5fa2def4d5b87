"""Build, find and call decode.cpp: one token through a float32 model on a CPU in one call.

The source is compiled on first use (about two seconds) and kept in the user's cache folder. Where there is no compiler,
or the model is of another kind, `make_decoder` gives None and the plain path of `Transformer.forward`, its twin,
decodes.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from twelve.model.rope import inverse_frequencies, softmax_scale

if TYPE_CHECKING:
    from twelve.model.transformer import Cache, Transformer

SOURCE = Path(__file__).with_name("decode.cpp")
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-std=c++17", "-shared", "-fPIC")
SLOTS = (  # parameters of a decoder layer, in the order of decode.cpp's enum; the cache's two buffers follow
    "input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.q_a_proj.weight", "self_attn.q_a_proj.bias",
    "self_attn.q_a_layernorm.weight", "self_attn.q_b_proj.weight", "self_attn.q_proj.weight", "self_attn.q_proj.bias",
    "self_attn.kv_a_proj_with_mqa.weight", "self_attn.kv_a_proj_with_mqa.bias", "self_attn.kv_a_layernorm.weight",
    "self_attn.kv_b_proj.weight", "self_attn.k_proj.weight", "self_attn.k_proj.bias", "self_attn.v_proj.weight",
    "self_attn.v_proj.bias", "self_attn.q_norm.weight", "self_attn.k_norm.weight", "self_attn.o_proj.weight",
    "self_attn.o_proj.bias", "mlp.gate.weight", "mlp.gate.e_score_correction_bias", "mlp.experts.gate_up_proj",
    "mlp.experts.down_proj", "gate_proj.weight", "up_proj.weight", "down_proj.weight",
)  # fmt: skip
INTEGERS = (
    "layers", "hidden", "vocabulary", "threads", "latent", "heads", "kv_heads", "nope", "rope", "v_width", "rank",
    "q_rank", "interleave", "experts", "top_k", "expert_width", "groups", "top_groups", "group_best", "softmax",
    "normalise", "gated_width_max",
)  # fmt: skip
FLOATS = ("norm_eps", "latent_eps", "scale", "rope_scale", "routed_scale")


class Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in INTEGERS] + [(name, ctypes.c_double) for name in FLOATS]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled source, or None where it cannot be compiled. TWELVE_NATIVE=0 in the environment turns it off."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None or os.environ.get("TWELVE_NATIVE") == "0":
        return None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "twelve"
    # -march=native: a home folder may be shared by machines with different processors
    key = hashlib.sha256("\n".join([SOURCE.read_text(), compiler, *FLAGS, _processor()]).encode()).hexdigest()[:16]
    target = cache / f"decode-{key}.so"
    try:
        if not target.exists():
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as folder:
                made = Path(folder) / target.name
                command = [compiler, *FLAGS, str(SOURCE), "-o", str(made)]
                subprocess.run(command, check=True, capture_output=True, timeout=120)
                os.replace(made, target)
        return ctypes.CDLL(str(target))
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    except OSError:
        return platform.processor() + platform.machine()


def make_decoder(model: Transformer, cache: Cache) -> Decoder | None:
    """A decoder for one sequence in `cache`, or None where the model needs the plain path."""
    weight, c = model.embed_tokens.weight, model.config
    plain = weight.device.type != "cpu" or weight.dtype != torch.float32 or c.mlp_bias or cache.batch_size != 1
    return None if plain or library() is None else Decoder(model, cache)


class Decoder:
    """Holds the addresses of a model's weights and of a cache; both must stay where they are while it is used."""

    def __init__(self, model: Transformer, cache: Cache) -> None:
        c = model.config
        rows, widths = [], []
        for layer, kept in zip(model.layers, cache.layers, strict=False):
            tensors = dict(layer.named_parameters()) | dict(layer.named_buffers())
            # a dense layer, or the shared experts beside routed ones
            inside = "mlp.shared_experts." if layer.is_moe else "mlp."
            found = [tensors.get(name, tensors.get(inside + name)) for name in SLOTS]
            buffers = (kept.buffers * 2)[:2]
            rows.append([0 if t is None else t.data_ptr() for t in [*found, *buffers]])
            gate = found[SLOTS.index("gate_proj.weight")]
            widths.append(0 if gate is None else gate.shape[0])
        self.slots = torch.tensor(rows, dtype=torch.int64)
        self.widths = torch.tensor(widths, dtype=torch.int64)
        frequencies, rope_scale = inverse_frequencies(c)
        self.frequencies = frequencies.contiguous()
        groups, choosing = c.n_group or 1, c.topk_method != "greedy"
        self.shape = Shape(
            layers=c.num_hidden_layers, hidden=c.hidden_size, vocabulary=c.vocab_size, latent=c.is_mla,
            heads=c.num_attention_heads, kv_heads=c.num_key_value_heads, nope=c.qk_nope_head_dim if c.is_mla else 0,
            rope=c.rope_dim, v_width=c.v_head_dim if c.is_mla else c.head_dim,
            rank=c.kv_lora_rank or 0, q_rank=c.q_lora_rank or 0, interleave=c.is_mla and c.rope_interleave,
            experts=c.n_routed_experts or 0, top_k=c.num_experts_per_tok or 0,
            expert_width=c.moe_intermediate_size or 0, groups=groups,
            top_groups=(c.topk_group or groups) if choosing else groups,
            group_best=2 if c.topk_method == "noaux_tc" else 1, softmax=c.scoring_func == "softmax",
            normalise=c.norm_topk_prob, gated_width_max=max([c.moe_intermediate_size or 0, *widths]),
            norm_eps=c.rms_norm_eps, latent_eps=1e-6, scale=softmax_scale(c), rope_scale=rope_scale,
            routed_scale=c.routed_scaling_factor,
        )  # fmt: skip
        self.model = model
        # addresses as plain numbers, so that a call makes no new objects
        self.fixed = [t.data_ptr() for t in (self.slots, self.widths, model.embed_tokens.weight, model.norm.weight,
                                             model.head_weight, self.frequencies)]  # fmt: skip
        self.call = library().decode_token
        self.call.argtypes = [ctypes.c_void_p] * 7 + [ctypes.c_int64] * 2 + [ctypes.c_void_p]
        self.call.restype = None

    def __call__(self, token: int, position: int) -> Tensor:
        """Logits [V] float32 after `token`, which goes to `position` of the cache."""
        logits = torch.empty(self.shape.vocabulary)
        self.shape.threads = torch.get_num_threads()
        self.call(ctypes.addressof(self.shape), *self.fixed, token, position, logits.data_ptr())
        return logits
