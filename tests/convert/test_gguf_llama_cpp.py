"""Files of ours in llama.cpp itself, where llama-cpp-python is installed: the same tokens, the same ids."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import twelve
from twelve.config import ModelConfig, small_v3
from twelve.convert.gguf import GGUFFile
from twelve.convert.gguf_export import export
from twelve.convert.gguf_tokenizer import SPLITS, read_tokenizer, tokenizer_metadata
from twelve.convert.gguf_write import write_gguf
from twelve.model.transformer import Transformer

llama_cpp = pytest.importorskip("llama_cpp")
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64,
    "mscale": 0.7, "mscale_all_dim": 0.7,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}  # fmt: skip
LATENT = {
    "query latent": {"q_lora_rank": 32}, "no query latent": {}, "groups": {"n_group": 4, "topk_group": 2},
    "yarn": {"rope_parameters": YARN}, "tied": {"tie_word_embeddings": True}, "wide values": {"v_head_dim": 32},
    "dense": {"n_routed_experts": None}, "softmax": {"model_type": "deepseek_v2", "scoring_func": "softmax",
    "topk_method": "greedy", "norm_topk_prob": False, "routed_scaling_factor": 2.5},
}  # fmt: skip
GROUPED = {
    "llama": {}, "llama3": {"rope_parameters": LLAMA3}, "llama yarn": {"rope_parameters": YARN | {"mscale": None}},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "biases": {"attention_bias": True},
    "qwen2": {"model_type": "qwen2", "attention_bias": True}, "qwen3": {"model_type": "qwen3", "head_dim": 32},
}  # fmt: skip
TEXTS = [
    "배 열두 척이 2024년 3월에!", "it's 1,234.5 — don't\n\n  stop",
    "🙂👍🏽 가족 👨‍👩‍👧 ☃️", "x²½ Ⅳ ٣ 三 ㄱㄴ", "<think>7</think>",
]  # fmt: skip


def config_of(name: str, vocab: int) -> ModelConfig:
    if name in LATENT:
        plain = small_v3(vocab, width=64, layers=3, experts=8, experts_per_token=2, context=256)
        return replace(plain, **LATENT[name])
    shape = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
    values = {"model_type": "llama", "vocab_size": vocab, "intermediate_size": 96, "max_position_embeddings": 256}
    return ModelConfig(**values | shape | GROUPED[name])


@pytest.mark.parametrize("split", SPLITS)
def test_every_known_cutting_is_llama_cpps(split, tokenizer, tmp_path):
    keys = tokenizer_metadata(tokenizer, tokenizer.vocab_size) | {"tokenizer.ggml.pre": split}
    write_gguf(tmp_path / "model.gguf", {"general.architecture": "llama", **keys}, [], [])
    ours = read_tokenizer(GGUFFile(tmp_path / "model.gguf"))
    theirs = llama_cpp.Llama(str(tmp_path / "model.gguf"), vocab_only=True, verbose=False)
    for text in (*TEXTS, " ".join(TEXTS), "\n".join(reversed(TEXTS))):
        assert theirs.tokenize(text.encode(), add_bos=False, special=True) == ours.encode(text), text


@pytest.mark.parametrize("dtype", ["float32", "q8_0"])
@pytest.mark.parametrize("name", [*LATENT, *GROUPED])
def test_greedy_tokens_and_ids_agree(name, dtype, tokenizer, tmp_path):
    model = Transformer(config_of(name, tokenizer.vocab_size)).init_weights(0).eval()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key.endswith(("bias", "correction_bias")):
                tensor.normal_(0, 0.1)
            elif tensor.dim() > 1:
                tensor.mul_(5)
    twelve.save(model, tokenizer, tmp_path)
    export(tmp_path, tmp_path / "model.gguf", dtype)
    model, words = twelve.load(tmp_path / "model.gguf", device="cpu")
    theirs = llama_cpp.Llama(str(tmp_path / "model.gguf"), n_ctx=256, n_threads=1, type_k=0, type_v=0, verbose=False)
    for text in TEXTS:
        assert theirs.tokenize(text.encode(), add_bos=False, special=True) == words.encode(text)
    ids = words.encode(TEXTS[0])
    theirs.eval(ids)
    for _ in range(64 if dtype == "float32" else 1):
        row = llama_cpp.llama_get_logits_ith(theirs.ctx, -1)
        found = np.ctypeslib.as_array(row, shape=(theirs.n_vocab(),)).copy()
        with torch.no_grad():
            wanted = model(torch.tensor([ids]), last_only=True)[0, -1].numpy()
        # llama.cpp also rounds what meets 8-bit weights
        assert np.abs(found - wanted).max() <= (1e-3 if dtype == "float32" else 0.1 * wanted.std())
        ids.append(int(wanted.argmax()))
        theirs.eval(ids[-1:])
