"""Formulas against what was published, and against models that are built."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twelve.config import ModelConfig, deepseek_v2_lite, deepseek_v3, small_v3
from twelve.model import Transformer, count_parameters
from twelve.model.engram import NGramHash
from twelve.plan import cost
from twelve.train.optimizer import matrix_shapes

V41 = replace(  # what is known of V4.1's memory; the rest is any model
    small_v3(129280, 5120, 40), model_type="twelve", engram_layer_ids=[1, 14], engram_max_ngram_size=4,
    engram_n_heads=8, engram_head_dim=256, engram_vocab_size=16_000_000,
)  # fmt: skip


def test_deepseek_v3():
    v3 = cost.parameters(deepseek_v3())
    assert v3.total == 671_026_419_200
    assert v3.active == 37_552_297_472  # embedding and head counted; README_WEIGHTS says 36.7 billion with both
    assert round((v3.active - v3.embedding) / 1e9, 3) == 36.626
    assert round((v3.active - v3.embedding - v3.head) / 1e9, 3) == 35.699
    assert cost.kv_bytes(deepseek_v3(), 2) == 70_272
    routed = 58 * 256 * 3 * 2048 * 7168
    assert routed == pytest.approx(653.9e9, rel=1e-4) and v3.total - v3.active == routed * 248 // 256


def test_its_prediction_module():
    module, joining = cost.mtp_module(deepseek_v3()), 2 * 7168 * 7168
    assert round(module.total / 1e9, 3) == 11.61 and round((module.total - joining) / 1e9, 3) == 11.507
    shared = 2 * 129280 * 7168  # embedding and head, which are the main model's
    assert round((module.active - joining + shared) / 1e9, 2) == 2.44
    whole = cost.parameters(deepseek_v3(), mtp=True).total + shared  # as on the hub, where they stand twice
    assert whole / 1e9 == pytest.approx(684.5, abs=0.05)


def test_deepseek_v2_lite():
    lite = cost.parameters(deepseek_v2_lite())
    assert lite.total == 15_706_484_224 and lite.active == pytest.approx(2.66e9, rel=1e-3)


def test_v41_memory():
    assert cost.table_rows(V41) == 384_006_168 + 384_016_682 and cost.rows_read(V41) == 48
    assert cost.parameters(V41).table == 196_613_849_600
    assert cost.table_rows(V41) * 264 == 202_758_032_400  # 256 bytes in FP8, 8 of scales


def test_rows_of_an_engram_that_is_gone_do_not_count():
    """As a model counts them after `convert --layers`, whichever of its Engrams had to go."""
    before = small_v3(300, 64, 4, 4, 2, 32, engram_layer_ids=[0, 1, 2], engram_vocab_size=97)
    for hashes in ([0, -1, 2], [-1, 1, 2], [0, 1]):
        config = replace(before, engram_layer_ids=[0, 1], engram_hash_layers=hashes)
        assert cost.table_rows(config) == NGramHash(config).total_rows < cost.table_rows(before)
        assert cost.parameters(config).total == count_parameters(config)["total"]


@pytest.mark.parametrize("size, tokens, named", [(4096, 4096, 1255), (8192, 4096, 1508), (16384, 8192, 2834)])
def test_entries_of_a_sampled_loss(size, tokens, named):
    """`named`: different targets of a step, counted on Korean and English Wikipedia."""
    assert cost.entries(size, tokens) == pytest.approx(named + cost.drawn(size), rel=0.05)
    assert cost.drawn(2048) == 0 and cost.entries(2048, tokens) == 2048
    assert cost.entries(size, 10**6) == size  # nearly all are named


def test_operations_are_palms_and_nanochats():
    """6 for every weight but the embedding, 12 heads x width x context for attention; norms are few."""
    config = ModelConfig(model_type="llama", vocab_size=32000, hidden_size=512, intermediate_size=1408,
                         num_hidden_layers=8, num_attention_heads=8)  # fmt: skip
    weights = cost.parameters(config).active - 32000 * 512 - (2 * 8 + 1) * 512
    assert cost.training_flops(config, 2048) == 6 * weights + 12 * 8 * 512 * 2048
    assert cost.causal_flops(config, 2048) == 6 * weights + 6 * 8 * 512 * 2048
    v3 = cost.training_flops(replace(deepseek_v3(), num_nextn_predict_layers=0), 4096)
    assert v3 == pytest.approx(6 * 36.626e9 + 6 * 61 * 128 * (192 + 128) * 4096, rel=1e-3)


@st.composite
def configs(draw):
    """Small ones of every kind that a model can be built of."""
    layers, mtp = draw(st.integers(1, 4)), draw(st.integers(0, 2))
    experts = draw(st.sampled_from([None, 4, 6]))
    shared = {
        "vocab_size": draw(st.sampled_from([64, 97])), "hidden_size": 48, "intermediate_size": draw(st.integers(8, 40)),
        "num_hidden_layers": layers, "num_attention_heads": 4, "tie_word_embeddings": draw(st.booleans()),
        "attention_bias": draw(st.booleans()), "mlp_bias": draw(st.booleans()),
    }  # fmt: skip
    if draw(st.booleans()):
        family = draw(st.sampled_from(["llama", "qwen2", "qwen3"]))
        return ModelConfig(**shared, model_type=family, num_key_value_heads=draw(st.sampled_from([1, 2, 4])),
                           head_dim=draw(st.sampled_from([8, 12])))  # fmt: skip
    latent = {"kv_lora_rank": 20, "q_lora_rank": draw(st.sampled_from([None, 24])), "qk_nope_head_dim": 6,
              "qk_rope_head_dim": 4, "v_head_dim": draw(st.sampled_from([6, 10]))}  # fmt: skip
    routed = {"n_routed_experts": experts, "n_shared_experts": draw(st.sampled_from([None, 1, 2])),
              "num_experts_per_tok": draw(st.integers(1, 3)), "moe_intermediate_size": 14,
              "first_k_dense_replace": draw(st.integers(0, 2)),
              "topk_method": draw(st.sampled_from(["noaux_tc", "greedy"]))}  # fmt: skip
    switches = {"hc_mult": draw(st.sampled_from([1, 2, 3, 4]))}
    own = draw(st.sets(st.integers(0, layers - 1)))
    if own:
        switches |= {"kv_token_rank": draw(st.integers(1, 19)), "kv_token_layer_ids": sorted(own)}
    if draw(st.booleans()):
        places = draw(st.sets(st.integers(0, layers - 1), min_size=1))
        switches |= {"engram_layer_ids": sorted(places), "engram_max_ngram_size": draw(st.integers(2, 4)),
                     "engram_n_heads": draw(st.integers(1, 3)), "engram_head_dim": draw(st.integers(1, 9)),
                     "engram_vocab_size": draw(st.integers(1, 300)),
                     "engram_kernel_size": draw(st.integers(0, 4))}  # fmt: skip
    plain = switches == {"hc_mult": 1}
    return ModelConfig(**shared, **latent, **(routed if experts else {}), **switches, num_nextn_predict_layers=mtp,
                       model_type="deepseek_v3" if plain else "twelve")  # fmt: skip


@given(configs(), st.booleans())
@settings(max_examples=80, deadline=None)
def test_formulas_are_the_built_models(config, mtp):
    counts, built = cost.parameters(config, mtp), count_parameters(config, mtp)
    assert (counts.total, counts.active, counts.table) == (built["total"], built["active"], built["table"])
    model = Transformer(config)
    assert cost.kv_bytes(config) == model.new_cache(1, 2).bytes_per_token
    if config.engram_layer_ids:
        assert cost.table_rows(config) == NGramHash(config).total_rows
    shapes = matrix_shapes(model)
    found = {}
    for *stack, rows, columns in shapes.values():
        found[rows, columns] = found.get((rows, columns), 0) + (stack[0] if stack else 1)
    assert dict(cost.matrices(config)) == found
