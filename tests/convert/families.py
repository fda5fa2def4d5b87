"""Tiny random transformers models of the five families, of odd shapes, and the comparison with ours."""

import torch

YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128,
    "beta_fast": 8, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "original_max_position_embeddings": 32,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip
COMMON = {
    "vocab_size": 1003, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GQA = COMMON | {"num_key_value_heads": 2}
MLA = COMMON | {
    "kv_lora_rank": 20, "q_lora_rank": None, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10,
    "n_routed_experts": 12, "n_shared_experts": 2, "num_experts_per_tok": 3, "moe_intermediate_size": 28,
    "first_k_dense_replace": 1, "routed_scaling_factor": 1.7, "num_nextn_predict_layers": 0,
}  # fmt: skip
V3 = MLA | {"n_group": 1, "topk_group": 1}
V3_GROUPS = MLA | {"n_group": 4, "topk_group": 2, "q_lora_rank": 18, "rope_parameters": YARN}
HALF_YARN = YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}

CASES = {
    "v3-one-group": ("deepseek_v3", V3),
    "v3-groups-qlora-yarn": ("deepseek_v3", V3_GROUPS),
    "v3-tied-bias": ("deepseek_v3", V3 | {"tie_word_embeddings": True, "attention_bias": True}),
    "v3-halves-unnormalised": ("deepseek_v3", V3 | {"rope_interleave": False, "norm_topk_prob": False}),
    "v3-mscales-differ": ("deepseek_v3", V3_GROUPS | {"rope_parameters": YARN | {"mscale_all_dim": 0.6}}),
    "v3-all-dense": ("deepseek_v3", V3 | {"first_k_dense_replace": 3}),
    "v2-greedy": ("deepseek_v2", MLA | {"topk_method": "greedy", "rms_norm_eps": 1e-5}),
    "v2-groups-qlora-yarn": (
        "deepseek_v2",
        MLA | {"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2, "q_lora_rank": 18,
               "rope_parameters": HALF_YARN, "routed_scaling_factor": 16.0},
    ),
    "v2-tied-bias": ("deepseek_v2", MLA | {"tie_word_embeddings": True, "attention_bias": True, "n_shared_experts": 1}),
    "llama-llama3": ("llama", GQA | {"rope_parameters": LLAMA3}),
    "llama-tied-biases": ("llama", GQA | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-linear-head-dim": (
        "llama",
        GQA | {"head_dim": 16, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    ),
    "qwen2": ("qwen2", GQA | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2-tied-mha": ("qwen2", COMMON | {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "qwen3-head-dim": ("qwen3", GQA | {"head_dim": 20, "tie_word_embeddings": True}),
    "qwen3-bias-yarn": ("qwen3", GQA | {"head_dim": 12, "attention_bias": True, "rope_parameters": YARN}),
}  # fmt: skip


def peer(family: str, values: dict, seed: int = 0):
    """A transformers model with weights so large that a wrong formula cannot hide, and router biases that matter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **values)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomise(model)
    return model


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        if "norm" in name and name.endswith("weight"):
            tensor.uniform_(0.5, 1.5)
        else:
            tensor.normal_(0, 0.2)


def random_ids(rows: int = 2, length: int = 40, vocab_size: int = 1003) -> torch.Tensor:
    return torch.randint(0, vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def difference(ours, theirs) -> float:
    """Largest difference of the logits of the same ids."""
    ids = random_ids()
    return (ours(ids) - theirs(ids).logits).abs().max().item()


@torch.no_grad()
def everything(model) -> list[torch.Tensor]:
    """Logits of the same ids, also of our model's MTP modules."""
    ids = random_ids(vocab_size=model.config.vocab_size)
    return [model(ids), *model.mtp_logits(ids)]


def assert_same(ours, theirs, tolerance: float = 1e-9) -> None:
    for one, other in zip(everything(ours), everything(theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
