"""GGUF files of DeepSeek's architecture, in the older and the newer form, as llama.cpp's converter writes them."""

import json

import numpy as np
import pytest
import torch
from test_gguf import BYTES, write

import twelve
from twelve.convert import load_config
from twelve.convert.gguf import GGUFFile
from twelve.convert.gguf_config import config_values
from twelve.engine import make_engine
from twelve.engine.request import Request
from twelve.errors import InputError
from twelve.quantize import forms_of

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
from families import HALF_YARN, MLA, V3, V3_GROUPS, difference, peer  # noqa: E402

TYPES = gguf.GGMLQuantizationType
V2_YARN = MLA | {"topk_method": "greedy", "rope_parameters": HALF_YARN, "q_lora_rank": 18}


def write_latent(path, family: str, theirs, split: bool = True, kind=TYPES.F32, **changed) -> None:
    """A transformers model as llama.cpp's converter has written it since 2025 (`split`), or before."""
    c, tensors = theirs.config, {}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DEEPSEEK2, c.num_hidden_layers)
    for name, tensor in theirs.state_dict().items():
        if name.endswith("kv_b_proj.weight") and split:
            both = tensor.view(c.num_attention_heads, -1, c.kv_lora_rank)
            layer = name.split(".")[2]
            tensors[f"blk.{layer}.attn_k_b.weight"] = both[:, : c.qk_nope_head_dim].transpose(1, 2)
            tensors[f"blk.{layer}.attn_v_b.weight"] = both[:, c.qk_nope_head_dim :]
        elif name.endswith("experts.gate_up_proj"):
            layer = name.split(".")[2]
            gate, up = tensor.chunk(2, dim=1)
            tensors |= {f"blk.{layer}.ffn_gate_exps.weight": gate, f"blk.{layer}.ffn_up_exps.weight": up}
        elif name.endswith("experts.down_proj"):
            tensors[f"blk.{name.split('.')[2]}.ffn_down_exps.weight"] = tensor
        elif name.endswith("e_score_correction_bias"):
            tensors[f"blk.{name.split('.')[2]}.exp_probs_b.bias"] = tensor
        else:
            module, suffix = name.rsplit(".", 1)
            tensors[f"{names.get_name(module)}.{suffix}"] = tensor
    tensors = {name: tensor.contiguous().numpy() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if tensor.ndim > 1 and not name.endswith("ffn_gate_inp.weight"):
            tensors[name] = (tensor, kind if tensor.shape[-1] % 32 == 0 else TYPES.F32)
    rope, width = c.rope_parameters, c.qk_nope_head_dim + c.qk_rope_head_dim
    metadata = {
        "context_length": 512, "block_count": c.num_hidden_layers, "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size, "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": 1 if split else c.num_attention_heads,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps, "attention.q_lora_rank": c.q_lora_rank,
        "attention.kv_lora_rank": c.kv_lora_rank, "rope.dimension_count": c.qk_rope_head_dim,
        "rope.freq_base": float(rope["rope_theta"]), "leading_dense_block_count": c.first_k_dense_replace,
        "expert_count": c.n_routed_experts, "expert_used_count": c.num_experts_per_tok,
        "expert_shared_count": c.n_shared_experts, "expert_feed_forward_length": c.moe_intermediate_size,
        "expert_weights_scale": float(c.routed_scaling_factor), "vocab_size": c.vocab_size,
    }  # fmt: skip
    if split:
        metadata |= {
            "attention.key_length": c.kv_lora_rank + c.qk_rope_head_dim, "attention.value_length": c.kv_lora_rank,
            "attention.key_length_mla": width, "attention.value_length_mla": c.v_head_dim,
        }  # fmt: skip
    else:
        metadata |= {"attention.key_length": width, "attention.value_length": c.v_head_dim}
    if family == "deepseek_v3":
        metadata |= {"expert_gating_func": 2, "expert_weights_norm": c.norm_topk_prob}
    if (c.n_group or 1) > 1:
        metadata |= {"expert_group_count": c.n_group, "expert_group_used_count": c.topk_group}
    if rope["rope_type"] == "yarn":
        metadata |= {
            "rope.scaling.type": "yarn", "rope.scaling.factor": rope["factor"],
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
            "rope.scaling.yarn_beta_fast": float(rope["beta_fast"]), "rope.scaling.yarn_beta_slow": 1.0,
            "rope.scaling.yarn_log_multiplier": 0.1 * rope["mscale_all_dim"],
        }  # fmt: skip
    metadata = {f"deepseek2.{key}": value for key, value in metadata.items()} | {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "deepseek-v3", "tokenizer.ggml.merges": ["t h"],
        "tokenizer.ggml.tokens": [*BYTES, "<|end|>", "th", *(f"[unused{i}]" for i in range(c.vocab_size - 258))],
        "tokenizer.ggml.token_type": [1] * 256 + [3, 1] + [5] * (c.vocab_size - 258),
        "tokenizer.ggml.eos_token_id": 256,
    }  # fmt: skip
    metadata |= changed.pop("metadata", {})
    tensors = {name: tensor for name, tensor in (tensors | changed).items() if tensor is not None}
    write(path, {key: value for key, value in metadata.items() if value is not None}, tensors, "deepseek2")


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize(("family", "values"), [
    ("deepseek_v3", V3), ("deepseek_v3", V3_GROUPS), ("deepseek_v2", V2_YARN),
    ("deepseek_v2", MLA | {"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2}),
])  # fmt: skip
def test_both_forms_equal_transformers(family, values, split, tmp_path):
    theirs = peer(family, values)
    write_latent(tmp_path / "model.gguf", family, theirs, split)
    ours, tokenizer = twelve.load(tmp_path)
    assert difference(ours, theirs) <= 1e-4
    assert load_config(tmp_path / "model.gguf") == ours.config
    assert tokenizer.eos_id == 256 and tokenizer.encode("th<|end|>") == [257, 256]
    # the same config as transformers' own, and a folder of it is the same model for transformers
    theirs.config.save_pretrained(tmp_path / "config")
    wanted = load_config(tmp_path / "config").to_dict()
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "num_key_value_heads"):
        wanted.pop(key)
    found = ours.config.to_dict()
    if values.get("n_group") is None:
        wanted |= {"n_group": 1, "topk_group": 1}
    assert {key: found[key] for key in wanted} == wanted
    twelve.save(ours, tokenizer, tmp_path / "folder")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype=torch.float32)
    assert difference(ours, back) <= 1e-4


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1"])
def test_a_quantised_file_runs_in_the_engine(kind, tmp_path):
    """Projections and experts stay packed where there is a form for them; kv_b_proj and routers become floats."""
    shape = {"hidden_size": 64, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "v_head_dim": 16}
    theirs = peer("deepseek_v3", V3 | shape | {"intermediate_size": 96, "moe_intermediate_size": 32})
    for split in (True, False):
        write_latent(tmp_path / "model.gguf", "deepseek_v3", theirs, split, TYPES[kind])
        packed, floats = (twelve.load(tmp_path, device="cpu", packed=packed) for packed in (True, False))
        forms = forms_of(packed[0])
        assert ("layers.1.self_attn.q_b_proj" in forms) == (kind != "Q5_1")
        assert ("layers.2.mlp.experts" in forms) == (kind != "Q5_1") and "layers.2.mlp.gate" not in forms
        assert not any(name.endswith("kv_b_proj") for name in forms)
        for part in ("gate_up_proj", "down_proj"):
            mine, wanted = (getattr(one[0].layers[2].mlp.experts, part) for one in (packed, floats))
            assert torch.equal(mine, wanted)
        ids = torch.randint(0, 1003, (2, 20))
        with torch.no_grad():
            assert (packed[0](ids) - floats[0](ids)).abs().max() <= 1e-4
        request = Request([5, 6, 7, 8], max_tokens=8, temperature=0, stop_ids=frozenset())
        answers = [make_engine(*both).generate([request])[0].token_ids for both in (packed, floats)]
        assert len(answers[0]) == len(answers[1]) == 8


def test_published_configs_are_read(tmp_path):
    """The metadata of DeepSeek-V3's and V2-Lite's files give the presets, which are the released configs."""
    from twelve.config import deepseek_v2_lite, deepseek_v3
    from twelve.convert.gguf_config import metadata
    from twelve.convert.huggingface import config_from

    for preset in (deepseek_v3(), deepseek_v2_lite()):
        c, tensors = preset, {"output.weight": np.ones((1, 1), np.float32)}
        tensors |= {"blk.0.attn_k_b.weight": np.ones((1, 1, 1), np.float32)}
        tensors |= {"blk.0.attn_q_a.weight": np.ones((1, 1), np.float32)} if c.q_lora_rank else {}
        tensors |= {"blk.3.exp_probs_b.bias": np.ones(1, np.float32)} if c.scoring_func == "sigmoid" else {}
        keys = {key: value for key, value in metadata(c).items() if key != "general.architecture"}
        write(tmp_path / "model.gguf", keys, tensors, "deepseek2")
        found = config_from(config_values(GGUFFile(tmp_path / "model.gguf")))
        left_out = {"num_nextn_predict_layers": 0}
        assert found.to_dict() == c.to_dict() | left_out, json.dumps(found.to_dict())


SMALL = np.ones((4, 20, 6), np.float32)
WRONG = {
    "a part is missing": ({}, {"blk.1.attn_v_b.weight": None}, r"tensor 'blk.1.attn_v_b.weight' is missing"),
    "both parts are missing": (
        {}, {"blk.1.attn_k_b.weight": None, "blk.1.attn_v_b.weight": None}, r"layers.1.self_attn.kv_b_proj.weight'",
    ),
    "a part of another shape": (
        {}, {"blk.1.attn_k_b.weight": SMALL}, r"'blk.1.attn_k_b.weight' is \[4, 20, 6\], the metadata.*\[4, 20, 12\]",
    ),
    "an expert too few": (
        {"deepseek2.expert_count": 13}, {}, r"gate.weight' is \[12, 48\], the config makes it \[13, 48\]",
    ),
    "experts of another number": (
        {}, {"blk.2.ffn_up_exps.weight": np.ones((11, 28, 48), np.float32)}, r"layers.2.mlp.experts.0.up_proj.weight",
    ),
    "experts that are not there": ({}, {"blk.2.ffn_up_exps.weight": None}, r"layers.2.mlp.experts.0.up_proj.weight"),
    "MTP tensors": ({}, {"blk.3.nextn.eh_proj.weight": SMALL}, "unexpected tensor 'blk.3.nextn.eh_proj.weight'"),
    "another architecture's tensors": ({}, {"blk.0.attn_k.weight": SMALL}, "unexpected tensor.*k_proj"),
    "no rank": ({"deepseek2.attention.kv_lora_rank": None}, {}, "deepseek2.attention.kv_lora_rank must be"),
    "no width": ({"deepseek2.attention.key_length_mla": None}, {}, "deepseek2.attention.key_length_mla must be"),
    "all of a head rotated": ({"deepseek2.rope.dimension_count": 20}, {}, "qk_nope_head_dim must be positive"),
    "another routing": ({"deepseek2.expert_gating_func": 4}, {}, "expert_gating_func 4 is not supported"),
    "groups that do not divide": ({"deepseek2.expert_group_count": 5}, {}, "not a multiple of n_group 5"),
    "no number": ({"deepseek2.expert_weights_scale": -1.0}, {}, "expert_weights_scale must be a positive number"),
}  # fmt: skip


@pytest.fixture(scope="module")
def theirs():
    return peer("deepseek_v3", V3)


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_models_are_named(wrong, theirs, tmp_path):
    metadata, tensors, message = WRONG[wrong]
    write_latent(tmp_path / "model.gguf", "deepseek_v3", theirs, metadata=metadata, **tensors)
    with pytest.raises(InputError, match=message) as caught:
        twelve.load(tmp_path)
    assert "\n" not in str(caught.value)
