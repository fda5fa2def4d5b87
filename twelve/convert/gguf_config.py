"""An architecture in the two ways of saying it: the metadata of a GGUF file, and the keys of a `config.json`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twelve.config import ModelConfig
from twelve.convert.gguf import GGUFFile
from twelve.errors import InputError
from twelve.model.rope import inverse_frequencies, yarn_mscale

ARCHITECTURES = ("llama", "qwen2", "qwen3", "deepseek2")
SIZES = {
    "max_position_embeddings": "context_length",
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
}
EXPERT_SIZES = {
    "n_routed_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}
SCORING = {"softmax": 1, "sigmoid": 2}  # expert_gating_func
ROPE_FACTORS = "rope_freqs.weight"  # tensor [pairs]: by what Llama 3's scaling divides each frequency
SPECIALS = {"bos": "bos", "eos": "eos", "pad": "padding"}  # ours: tokenizer.ggml.*_token_id
ORIGINAL_CONTEXT = 8192  # of Llama 3, where its factors do not tell


# --- from metadata ----------------------------------------------------------------------------------------------------


class _Keys:
    """The metadata of one architecture, by their names without it; `InputError` for what is missing or no number."""

    def __init__(self, file: GGUFFile, family: str) -> None:
        self.file, self.family = file, family

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self.file.metadata.get(f"{self.family}.{key}", default)
        if type(value) is not int or value < least:
            wanted = "a positive integer" if least else "an integer from 0 on"
            raise InputError(f"{self.file.path}: {self.family}.{key} must be {wanted}, not {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """The shortest decimal that is this float32."""
        value = self.file.metadata.get(f"{self.family}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise InputError(f"{self.file.path}: {self.family}.{key} must be a positive number, not {value!r}")
        return float(str(np.float32(value)))

    def get(self, key: str, default: Any = None) -> Any:
        return self.file.metadata.get(f"{self.family}.{key}", default)


def config_values(file: GGUFFile) -> dict[str, Any]:
    """The keys of a `config.json`. `InputError` for another architecture, a missing key, or what no config can say."""
    data, tensors, path = file.metadata, file.tensors, file.path
    family, parts = data.get("general.architecture"), data.get("split.count", 1)
    if parts not in (0, 1):
        raise InputError(f"{path} is one of {parts} parts of a model: join them first (llama.cpp's gguf-split --merge)")
    if family not in ARCHITECTURES:
        raise InputError(f"{path}: unknown architecture {family!r}; supported in GGUF: {', '.join(ARCHITECTURES)}")
    keys = _Keys(file, family)
    values: dict[str, Any] = {key: keys.integer(stored) for key, stored in SIZES.items()}
    tokens = data.get("tokenizer.ggml.tokens")
    values |= {
        "model_type": family,
        "vocab_size": keys.integer("vocab_size", len(tokens) if isinstance(tokens, list) else None),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon", 1e-6),
        "tie_word_embeddings": "output.weight" not in tensors,
        **{f"{key}_token_id": data.get(f"tokenizer.ggml.{stored}_token_id") for key, stored in SPECIALS.items()},
    }
    if family == "deepseek2":
        return values | _latent(keys) | _experts(keys) | {"rope_parameters": _rope(keys, 0)}
    heads = values["num_attention_heads"]
    width = keys.integer("attention.key_length", values["hidden_size"] // heads)
    if keys.integer("rope.dimension_count", width) != width:
        raise InputError(f"{path}: rotating only a part of each head ({family}.rope.dimension_count) is not supported")
    return values | {
        "num_key_value_heads": keys.integer("attention.head_count_kv", heads),
        "head_dim": width,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "rope_parameters": _rope(keys, width),
    }


def _latent(keys: _Keys) -> dict[str, Any]:
    """Latent attention. Older files have its second projection whole, and the widths of the heads under other keys."""
    tensors, rotated = keys.file.tensors, keys.integer("rope.dimension_count")
    split = "_mla" if "blk.0.attn_k_b.weight" in tensors else ""
    return {
        "q_lora_rank": keys.integer("attention.q_lora_rank") if "blk.0.attn_q_a.weight" in tensors else None,
        "kv_lora_rank": keys.integer("attention.kv_lora_rank"),
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": keys.integer(f"attention.key_length{split}") - rotated,
        "v_head_dim": keys.integer(f"attention.value_length{split}"),
    }


def _experts(keys: _Keys) -> dict[str, Any]:
    path, dense = keys.file.path, keys.integer("leading_dense_block_count", 0, least=0)
    if dense >= keys.integer("block_count") or not keys.integer("expert_count", 0, least=0):
        return {"model_type": "deepseek_v3"}
    scoring = keys.integer("expert_gating_func", SCORING["softmax"])
    if scoring not in SCORING.values():
        raise InputError(f"{path}: deepseek2.expert_gating_func {scoring} is not supported, only 1 and 2")
    sigmoid, groups = scoring == SCORING["sigmoid"], keys.integer("expert_group_count", 1)
    method = "group_limited_greedy" if groups > 1 else "greedy"
    if any(name.endswith(".exp_probs_b.bias") for name in keys.file.tensors):
        method = "noaux_tc"
    return {
        "model_type": "deepseek_v3" if sigmoid or method == "noaux_tc" else "deepseek_v2",
        **{key: keys.integer(stored) for key, stored in EXPERT_SIZES.items()},
        "n_shared_experts": keys.integer("expert_shared_count", 0, least=0),
        "first_k_dense_replace": dense,
        "n_group": groups,
        "topk_group": keys.integer("expert_group_used_count", groups),
        "norm_topk_prob": bool(keys.get("expert_weights_norm", False)),
        "routed_scaling_factor": keys.number("expert_weights_scale", 1.0),
        "scoring_func": "sigmoid" if sigmoid else "softmax",
        "topk_method": method,
    }


def _rope(keys: _Keys, width: int) -> dict[str, Any]:
    """`rope_parameters`; width: of a head that is rotated whole, 0 for latent attention."""
    path, factor = keys.file.path, keys.get("rope.scaling.factor", keys.get("rope.scale_linear"))  # the older name
    kind = keys.get("rope.scaling.type", "linear" if factor else "none")  # as llama.cpp takes it
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base", 10000.0)}
    if ROPE_FACTORS in keys.file.tensors:
        return _llama3(keys, rope, width)
    if kind == "none":
        return rope
    factors = ("attn_factor", "yarn_attn_factor", "yarn_ext_factor")
    own = [key for key in factors if keys.get(f"rope.scaling.{key}", 1.0) != 1.0]
    if kind not in ("linear", "yarn") or own:
        which = f"{kind} with {own[0]}" if own else kind
        raise InputError(f"{path}: scaled rotary positions ({which}) are not supported in GGUF, only linear and yarn")
    rope |= {"rope_type": kind, "factor": keys.number("rope.scaling.factor", factor)}
    if kind == "yarn":
        context = keys.integer("context_length")
        rope["original_max_position_embeddings"] = keys.integer("rope.scaling.original_context_length", context)
        rope["beta_fast"] = keys.number("rope.scaling.yarn_beta_fast", 32.0)
        rope["beta_slow"] = keys.number("rope.scaling.yarn_beta_slow", 1.0)
        if not width and keys.get("rope.scaling.yarn_log_multiplier"):
            mscale = float(f"{10 * keys.number('rope.scaling.yarn_log_multiplier'):.6g}")
            rope |= {"mscale": mscale, "mscale_all_dim": mscale}
    return rope


def _llama3(keys: _Keys, rope: dict[str, Any], width: int) -> dict[str, Any]:
    """Llama 3's scaling, of which a file holds only the resulting factors: those with the bounds that all of its models
    have, 1 and 4, are recognised."""
    factors = keys.file.tensor(ROPE_FACTORS).double().flatten()
    if keys.family == "llama" and len(factors) == width // 2 and ((factors >= 1) & factors.isfinite()).all():
        if (factors == 1).all():
            return rope
        factor, plain = float(f"{factors.max():.6g}"), _frequencies(width, rope).double()
        part = (factors > 1.00001) & (factors < 0.99999 * factor)  # between the bounds: they tell the original context
        kept = (1 / factors[part] - 1 / factor) / (1 - 1 / factor)
        context = round(float((2 * torch.pi / plain[part] * (1 + 3 * kept)).median())) if len(kept) else 0
        scaled = {
            **rope, "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": context or ORIGINAL_CONTEXT,
        }  # fmt: skip
        if torch.allclose(_frequencies(width, scaled).double() * factors, plain, rtol=1e-5, atol=0):
            return scaled
    raise InputError(f"{keys.file.path}: the factors in {ROPE_FACTORS} are not those of Llama 3's scaling")


def _frequencies(width: int, rope: dict[str, Any]) -> Tensor:
    head = ModelConfig(model_type="llama", hidden_size=width, num_attention_heads=1, rope_parameters=rope)
    return inverse_frequencies(head)[0]


# --- to metadata ------------------------------------------------------------------------------------------------------


def family_of(config: ModelConfig) -> str:
    """What llama.cpp calls the architecture. `InputError` for a model that it cannot run as it is."""
    reasons = list(_latent_obstacles(config) if config.is_mla else _grouped_obstacles(config))
    if config.hc_mult > 1:
        reasons.insert(0, "has no hyper-connections (hc_mult)")
    if config.kv_token_layer_ids:
        reasons.insert(0, "has no tokens' own parts of latents (kv_token_layer_ids)")
    if config.engram_layer_ids:
        without = "train a model without one: `twelve pretrain TEXT --engram-vocab-size 0`"
        reasons.insert(0, f"has no Engram memory (engram_layer_ids); {without}")
    if reasons:
        raise InputError(f"this model cannot become a GGUF file: llama.cpp {reasons[0]}")
    return "deepseek2" if config.is_mla else config.model_type


def _latent_obstacles(c: ModelConfig) -> Iterator[str]:
    rope = c.rope_parameters
    mscale, same = rope.get("mscale_all_dim"), rope.get("mscale") == rope.get("mscale_all_dim")
    if c.attention_bias or c.mlp_bias:
        yield "has no biases in deepseek2 (attention_bias, mlp_bias)"
    if not c.rope_interleave:
        yield "rotates adjacent pairs in latent attention, not halves (rope_interleave)"
    if rope["rope_type"] not in ("default", "yarn"):
        yield f"has no {rope['rope_type']} positions in latent attention (rope_type)"
    elif rope["rope_type"] == "yarn" and not (mscale and same and rope.get("attention_factor") is None):
        yield "has YaRN in latent attention only with mscale and mscale_all_dim alike, and no attention_factor"
    if rope.get("truncate", True) is not True:
        yield "rounds YaRN's bounds (truncate)"
    if c.q_lora_rank and (c.num_hidden_layers in (26, 27) or (c.num_hidden_layers, c.vocab_size) == (48, 128256)):
        yield f"takes {c.num_hidden_layers} layers for a model like V2-Lite, without a latent of queries (q_lora_rank)"
    if c.n_routed_experts is None:
        return
    if not c.n_shared_experts:
        yield "wants a shared expert beside the routed ones (n_shared_experts)"
    if _limited(c) and (c.topk_method != "noaux_tc" or c.n_group == c.n_routed_experts):
        yield "ranks groups of experts by their two best, as noaux_tc does (topk_method)"


def _grouped_obstacles(c: ModelConfig) -> Iterator[str]:
    rope = c.rope_parameters
    if c.model_type not in ARCHITECTURES:
        yield f"has no {c.model_type} without latent attention (kv_lora_rank)"
    if c.n_routed_experts is not None:
        yield "has experts only with latent attention (n_routed_experts)"
    if c.model_type != "llama":
        if c.mlp_bias or (c.attention_bias and c.model_type == "qwen3"):
            yield f"has no such biases in {c.model_type} (mlp_bias, attention_bias)"
        if rope["rope_type"] == "llama3":
            yield f"has no llama3 positions in {c.model_type} (rope_type)"
    if rope["rope_type"] == "yarn":
        own = not math.isclose(inverse_frequencies(c)[1], yarn_mscale(rope["factor"], 1.0), rel_tol=1e-6)
        if own or rope.get("truncate", True) is not True:
            yield "knows YaRN with its usual factor only (attention_factor, mscale, truncate)"


def _limited(c: ModelConfig) -> bool:
    """Whether experts are chosen within the best groups only."""
    return c.topk_method != "greedy" and (c.n_group or 1) > 1 and (c.topk_group or c.n_group) < c.n_group


def metadata(config: ModelConfig) -> dict[str, Any]:
    """A GGUF file's keys for this architecture, int for unsigned and float for float32. `InputError` as `family_of`."""
    c, family, rope = config, family_of(config), config.rope_parameters
    values: dict[str, Any] = {stored: getattr(c, key) for key, stored in SIZES.items()}
    values |= {
        "vocab_size": c.vocab_size,
        "attention.head_count_kv": 1 if c.is_mla else c.num_key_value_heads,  # absorbed, all heads read one latent
        "attention.layer_norm_rms_epsilon": float(c.rms_norm_eps),
        "attention.key_length": c.kv_lora_rank + c.qk_rope_head_dim if c.is_mla else c.head_dim,
        "attention.value_length": c.kv_lora_rank if c.is_mla else c.head_dim,
        "rope.dimension_count": c.rope_dim,
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if c.is_mla:
        values |= {
            "attention.q_lora_rank": c.q_lora_rank or 0,
            "attention.kv_lora_rank": c.kv_lora_rank,
            "attention.key_length_mla": c.qk_nope_head_dim + c.qk_rope_head_dim,
            "attention.value_length_mla": c.v_head_dim,
            "leading_dense_block_count": c.num_hidden_layers if c.n_routed_experts is None else c.first_k_dense_replace,
            "expert_feed_forward_length": c.moe_intermediate_size or c.intermediate_size,
            "expert_shared_count": c.n_shared_experts or 0,
        }
    if c.n_routed_experts is not None:
        values |= {stored: getattr(c, key) for key, stored in EXPERT_SIZES.items()}
        values |= {
            "expert_weights_scale": float(c.routed_scaling_factor),
            "expert_weights_norm": bool(c.norm_topk_prob),
            "expert_gating_func": SCORING[c.scoring_func],
        }
        if _limited(c):
            values |= {"expert_group_count": c.n_group, "expert_group_used_count": c.topk_group}
    if rope["rope_type"] in ("linear", "yarn"):
        values |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] == "yarn":
        values |= {
            "rope.scaling.original_context_length": int(rope["original_max_position_embeddings"]),
            "rope.scaling.yarn_beta_fast": float(rope.get("beta_fast") or 32),
            "rope.scaling.yarn_beta_slow": float(rope.get("beta_slow") or 1),
        }
        if c.is_mla:
            values["rope.scaling.yarn_log_multiplier"] = 0.1 * rope["mscale_all_dim"]
    return {"general.architecture": family, **{f"{family}.{key}": value for key, value in values.items()}}


def rope_factors(config: ModelConfig) -> Tensor | None:
    """By what Llama 3's scaling divides each frequency, float32 [pairs]; None without it."""
    if config.rope_parameters["rope_type"] != "llama3":
        return None
    plain = {"rope_theta": config.rope_parameters["rope_theta"]}
    return _frequencies(config.rope_dim, plain) / inverse_frequencies(config)[0]
