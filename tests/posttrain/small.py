"""Tiny models that reckon a little, and folders of them."""

from dataclasses import replace

import numpy as np
import torch

from twelve import convert
from twelve.config import ModelConfig
from twelve.model import Transformer

LETTERS = '''
"""Write letters: the share of them is the score, which a random model can already raise."""
MAX_TOKENS = 6
LANGUAGES = ("en",)

def generate(seed):
    return {"question": f"Write {seed % 50}.", "answer": "letters"}

def score(problem, text):
    return min(1, 2 * sum(letter.isalpha() for letter in text) / max(6, len(text)))
'''
SMALL = {"prompts": 4, "group": 4, "problems": 8, "quiet": True}  # options of `rl` for them


def v3(tokenizer, layers=2, **changes) -> ModelConfig:
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size + 5, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
        n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_shared_experts=1,
        first_k_dense_replace=1, max_position_embeddings=256, initializer_range=0.2,
    )  # fmt: skip
    return replace(config, **changes)


def llama(tokenizer, layers=2, **changes) -> ModelConfig:
    config = ModelConfig(
        model_type="llama", vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        initializer_range=0.2, tie_word_embeddings=True,
    )  # fmt: skip
    return replace(config, **changes)


SWITCHES = {"model_type": "twelve", "hc_mult": 4, "engram_layer_ids": [1], "engram_vocab_size": 97,
            "engram_n_heads": 2, "engram_head_dim": 8}  # fmt: skip


def model(config: ModelConfig, seed: int = 0) -> Transformer:
    """With random weights and, with Engram, a table of random rows."""
    made = Transformer(config).init_weights(seed).eval()
    if made.memory is not None:
        made.memory.create()
        table = made.memory.table
        leaf = torch.zeros(table.count, table.width, requires_grad=True)
        leaf.grad = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(seed))
        table.pending.append((np.arange(table.count), leaf))
        table.update(1.0)
    return made


def folder(path, tokenizer, config: ModelConfig, seed: int = 0) -> str:
    convert.save(model(config, seed), tokenizer, path)
    return str(path)


def gradients(loss, *tensors) -> list[torch.Tensor]:
    return [gradient.double() for gradient in torch.autograd.grad(loss, tensors)]
