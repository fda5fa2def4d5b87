"""The model against itself: cached decoding against the full pass, documents, losses, published sizes."""

import pytest
import torch

from twelve.config import ModelConfig, deepseek_v2_lite, deepseek_v3, small_v3
from twelve.errors import InputError
from twelve.model import Transformer, count_parameters
from twelve.model.mtp import shift_targets

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.9,
        "original_max_position_embeddings": 16}  # fmt: skip
V3 = small_v3(1003, width=64, layers=3, experts=8, experts_per_token=3, context=64)


def changed(config: ModelConfig, **values) -> ModelConfig:
    return ModelConfig(**{**config.to_dict(), **values})


GQA = {"vocab_size": 1003, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
       "num_key_value_heads": 2}  # fmt: skip
CONFIGS = {
    "v3": V3,
    "v3-q-lora-groups-yarn": changed(V3, q_lora_rank=24, n_group=4, topk_group=2, rope_parameters=YARN),
    "v2-groups": changed(V3, model_type="deepseek_v2", scoring_func="softmax", topk_method="group_limited_greedy",
                         n_group=2, topk_group=1, norm_topk_prob=False, v_head_dim=24),
    "token-latents": small_v3(1003, 64, 3, 8, 3, 64, kv_token_rank=16),
    "llama": ModelConfig(model_type="llama", **GQA),
    "qwen2-tied": ModelConfig(model_type="qwen2", attention_bias=True, tie_word_embeddings=True, **GQA),
    "qwen3": ModelConfig(model_type="qwen3", head_dim=24, **GQA),
}  # fmt: skip


def random_model(config: ModelConfig, dtype=torch.float64, seed: int = 0) -> Transformer:
    """Weights large enough that a wrong formula shows."""
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(config).to(dtype)
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        tensor.copy_(noise * 0.15 if tensor.dim() > 1 else 1 + 0.3 * noise if "norm" in name else 0.1 * noise)
    return model.eval()


def random_ids(shape, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 1003, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("chunk", [1, 7, 33])
def test_cached_chunks_equal_the_full_pass(name, chunk):
    model, ids = random_model(CONFIGS[name]), random_ids((2, 33))
    cache = model.new_cache(2, 40)
    with torch.no_grad():
        full = model(ids)
        pieces = [model(ids[:, i : i + chunk], cache=cache) for i in range(0, 33, chunk)]
    assert cache.length == 33
    torch.testing.assert_close(torch.cat(pieces, 1), full, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", ["v3", "v3-q-lora-groups-yarn", "v2-groups", "token-latents"])
def test_absorbed_form_equals_expanded_form(name):
    attention = random_model(CONFIGS[name]).layers[0].self_attn
    x = torch.randn(2, 19, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    at = random_model(CONFIGS[name]).positions(random_ids((2, 19)))
    expanded, absorbed = attention(x, at, absorb=False), attention(x, at, absorb=True)
    assert expanded.std() > 0.1
    torch.testing.assert_close(absorbed, expanded, atol=1e-10, rtol=0)


def test_tokens_own_latents_are_values_from_the_first_step_on():
    """With a latent from the state of zero, attention is the mean over the past of what its tokens' vectors say."""
    config = small_v3(97, 128, 3, 0, kv_token_rank=64)
    assert config.kv_token_layer_ids == [0, 2] and config.kv_lora_rank == 128
    model, ids = Transformer(config).init_weights(0).double(), torch.arange(9)[None]
    attention = model.layers[0].self_attn
    assert model.layers[1].self_attn.token_latent is None and attention.heads == 2
    with torch.no_grad():
        attention.kv_a_layernorm.weight.zero_()
        attention.kv_a_proj_with_mqa.weight[-config.qk_rope_head_dim :] = 0
        found = attention(torch.randn(1, 9, 128, dtype=torch.float64), model.positions(ids))
    said = attention.token_latent.weight[:9].cumsum(0) / torch.arange(1, 10)[:, None]
    torch.testing.assert_close(found[0], attention.o_proj(said.repeat(1, 2)), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("switches", "said"), [
    ({"kv_token_rank": 200}, "kv_token_rank 200"), ({"kv_token_layer_ids": [3]}, "no layer 3"),
    ({"model_type": "deepseek_v3"}, "model_type 'twelve'"), ({"kv_lora_rank": None, "head_dim": 64}, "need latent"),
])  # fmt: skip
def test_what_token_latents_do_not_go_with(switches, said):
    with pytest.raises(InputError, match=said):
        changed(CONFIGS["token-latents"], **switches)


def test_latent_cache_holds_rank_plus_rope_elements_a_token():
    model = random_model(V3, torch.float32)
    cache = model.new_cache(1, 8)
    model(random_ids((1, 5)), cache=cache)
    assert cache.bytes_per_token == 3 * (V3.kv_lora_rank + V3.qk_rope_head_dim) * 4
    held = sum(b.numel() * b.element_size() for layer in cache.layers for b in layer.buffers)
    assert held == 8 * cache.bytes_per_token


def test_v3_cache_is_70272_bytes_a_token_in_bfloat16():
    with torch.device("meta"):
        model = Transformer(deepseek_v3()).to(torch.bfloat16)
        assert model.new_cache(1, 4).bytes_per_token == 70_272


def test_a_truncated_cache_continues_as_if_the_rest_had_not_been():
    model, ids = random_model(V3), random_ids((1, 20))
    cache = model.new_cache(1, 32)
    with torch.no_grad():
        model(ids, cache=cache)
        cache.truncate(9)
        again = model(ids[:, 9:], cache=cache)
        torch.testing.assert_close(again, model(ids)[:, 9:], atol=1e-10, rtol=0)
    with pytest.raises(ValueError, match="truncate"):
        cache.truncate(21)


def test_published_parameter_counts():
    v3, lite = count_parameters(deepseek_v3()), count_parameters(deepseek_v2_lite())
    assert v3["total"] == 671_026_419_200 and v3["active"] == pytest.approx(37.55e9, rel=1e-3)
    assert lite["total"] == pytest.approx(15.7e9, rel=1e-3) and lite["active"] == pytest.approx(2.66e9, rel=1e-2)
    module = count_parameters(deepseek_v3(), mtp=True)["total"] - v3["total"]
    assert module == pytest.approx(11.61e9, rel=1e-3)  # attention, experts and eh_proj; embedding and head are shared


@pytest.mark.parametrize("name", ["v3", "qwen3"])
@pytest.mark.parametrize("training", [False, True])
def test_attention_does_not_cross_documents(name, training):
    model = random_model(CONFIGS[name]).train(training)
    ids = random_ids((1, 30))
    documents = torch.tensor([[0] * 11 + [1] * 19])
    positions = torch.cat((torch.arange(11), torch.arange(19)))[None]
    with torch.set_grad_enabled(training):
        packed = model(ids, documents=documents, positions=positions)
        apart = torch.cat((model(ids[:, :11]), model(ids[:, 11:])), 1)
    torch.testing.assert_close(packed, apart, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_training_path_equals_inference_path(name):
    model, ids = random_model(CONFIGS[name]), random_ids((2, 150))  # more than one block of queries
    with torch.no_grad():
        expected = model(ids)
    torch.testing.assert_close(model.train()(ids), expected, atol=1e-10, rtol=0)


def test_losses_equal_cross_entropy_of_the_logits():
    config = changed(V3, num_nextn_predict_layers=2)
    model, ids = random_model(config).train(), random_ids((2, 24))
    ids, targets = ids[:, :-1], ids[:, 1:].clone()
    targets[0, 3] = -100
    losses = model.losses(ids, targets, mtp_weight=0.3, balance_weight=0.01)
    entropy = torch.nn.functional.cross_entropy
    expected = entropy(model(ids).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(losses.main.double(), expected, atol=1e-5, rtol=0)
    for k, (loss, logits) in enumerate(zip(losses.mtp, model.mtp_logits(ids), strict=True), start=1):
        expected = entropy(logits.flatten(0, 1), targets[:, k:].flatten())
        torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=0)
    total = losses.main + 0.15 * (losses.mtp[0] + losses.mtp[1]) + 0.01 * losses.balance
    torch.testing.assert_close(losses.total, total)
    assert len(losses.loads) == len(model.moe_layers()) == 4
    assert all(load.sum() == ids.numel() * 3 for load in losses.loads)  # no token dropped
    other = model.losses(ids, targets, mtp_loss=lambda states, head, targets: states.sum() * 0 + len(head))
    assert other.main == losses.main and [loss.item() for loss in other.mtp] == [config.vocab_size] * 2


def test_mtp_targets_stay_in_row_and_document():
    targets = torch.tensor([[1, 2, 3, -100, 5, 6]])
    documents = torch.tensor([[0, 0, 0, 0, 1, 1]])
    assert shift_targets(targets, None).tolist() == [[2, 3, -100, 5, 6, -100]]
    assert shift_targets(targets, documents).tolist() == [[2, 3, -100, -100, 6, -100]]
    assert (shift_targets(torch.ones(1, 9, dtype=torch.long), None) >= 0).sum() == 8


def test_initial_weights_depend_on_the_seed_only():
    a, b, c = (Transformer(V3).init_weights(seed) for seed in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.embed_tokens.weight, c.embed_tokens.weight)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"model_type": "gpt_oss"}, "unknown model_type 'gpt_oss'"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2}}, "rope_type"),
        ({"n_group": 3}, "n_group"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"use_sliding_window": True}, "sliding"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_in_one_line(values, words):
    with pytest.raises(InputError, match=words) as caught:
        ModelConfig.from_dict({**V3.to_dict(), **values})
    assert "\n" not in str(caught.value)


def test_both_spellings_of_rotary_settings_are_read():
    new = ModelConfig.from_dict(changed(V3, rope_parameters=YARN).to_dict())
    values = V3.to_dict()
    del values["rope_parameters"]
    scaling = {key: value for key, value in YARN.items() if key not in ("rope_type", "rope_theta")}
    old = ModelConfig.from_dict({**values, "rope_theta": 1e4, "rope_scaling": {"type": "yarn", **scaling}})
    assert old == new
