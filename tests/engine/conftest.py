"""A tiny V3-shape model with random weights."""

import pytest

from twelve.config import ModelConfig
from twelve.engine import Engine
from twelve.model import Transformer


@pytest.fixture(scope="session")
def model(tokenizer):
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size + 5, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
        n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_shared_experts=1,
        first_k_dense_replace=1, max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    # float64: a prompt read in other pieces then differs by too little to change a draw
    return Transformer(config).double().init_weights(seed=1)


@pytest.fixture
def engine(model, tokenizer):
    return Engine(model, tokenizer)
