"""decode.cpp against the plain path that it stands in for."""

import pytest
import torch
from test_transformer import CONFIGS, V3, changed, random_ids, random_model

from twelve.model import decode

needs_compiler = pytest.mark.skipif(decode.library() is None, reason="no C++ compiler on this machine")
MANY = {**CONFIGS, "v3-mtp": changed(V3, num_nextn_predict_layers=1),
        "v3-bias": changed(V3, attention_bias=True, q_lora_rank=24),
        "v3-halves": changed(V3, rope_interleave=False), "v3-dense": changed(V3, n_routed_experts=None),
        "v3-no-shared": changed(V3, n_shared_experts=None)}  # fmt: skip


@torch.inference_mode()
def continued(model, ids, native: bool, prompt: int = 9) -> torch.Tensor:
    """Logits of ids [1, T], the prompt at once and the rest token by token."""
    cache = model.new_cache(1, ids.shape[1])
    assert cache.decoder is not None
    if not native:
        cache.decoder = None
    pieces = [model(ids[:, :prompt], cache=cache)]
    pieces += [model(ids[:, i : i + 1], cache=cache) for i in range(prompt, ids.shape[1])]
    return torch.cat(pieces, 1)


@needs_compiler
@pytest.mark.parametrize("name", MANY)
def test_native_decoding_equals_the_plain_path(name):
    model, ids = random_model(MANY[name], torch.float32), random_ids((1, 60))
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):
            torch.nn.init.normal_(module.e_score_correction_bias, std=0.1, generator=torch.Generator().manual_seed(5))
    native, plain = continued(model, ids, True), continued(model, ids, False)
    assert plain.std() > 0.5
    torch.testing.assert_close(native, plain, atol=5e-5, rtol=0)


@needs_compiler
def test_the_number_of_threads_does_not_change_a_bit():
    model, ids, threads = random_model(V3, torch.float32), random_ids((1, 30)), torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(continued(model, ids, True, prompt=1))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@needs_compiler
def test_other_models_and_batches_take_the_plain_path():
    assert random_model(V3, torch.float64).new_cache(1, 4).decoder is None
    assert random_model(V3, torch.bfloat16).new_cache(1, 4).decoder is None
    assert random_model(V3, torch.float32).new_cache(2, 4).decoder is None
    assert random_model(changed(CONFIGS["llama"], mlp_bias=True), torch.float32).new_cache(1, 4).decoder is None


@needs_compiler
def test_weights_changed_in_place_are_seen():
    model, ids = random_model(V3, torch.float32), random_ids((1, 12))
    before = continued(model, ids, True)
    with torch.no_grad():
        model.norm.weight.mul_(2)
    torch.testing.assert_close(continued(model, ids, True), 2 * before, atol=1e-4, rtol=0)


def test_without_a_compiler_the_plain_path_decodes(monkeypatch):
    monkeypatch.setenv("TWELVE_NATIVE", "0")
    decode.library.cache_clear()
    try:
        model, ids = random_model(V3, torch.float32), random_ids((1, 12))
        cache = model.new_cache(1, 12)
        assert cache.decoder is None
        with torch.inference_mode():
            pieces = [model(ids[:, i : i + 1], cache=cache) for i in range(12)]
            torch.testing.assert_close(torch.cat(pieces, 1), model(ids), atol=1e-4, rtol=0)
    finally:
        decode.library.cache_clear()
