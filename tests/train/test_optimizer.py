"""Muon and AdamW: what each guarantees."""

from itertools import pairwise

import pytest
import torch

from twelve.config import ModelConfig, small_v3
from twelve.model import Transformer
from twelve.train.optimizer import MuonAdamW, matrix_shapes, orthogonalize
from twelve.train.schedule import learning_rate

CONFIG = small_v3(300, width=64, layers=2, experts=4, experts_per_token=2, mtp=1)


def model_with_gradients(seed: int = 0) -> Transformer:
    model = Transformer(CONFIG).init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("shape", [(32, 64), (64, 32), (3, 16, 48), (48, 48)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrices))
    assert values.min() > 0.3 and values.max() < 1.3
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    cosine = torch.cosine_similarity(orthogonalize(matrices).flatten(), (u @ v).flatten(), dim=0)
    assert cosine > 0.95  # the directions of the nearest orthogonal matrix


def test_every_stack_is_taken_apart_and_the_rest_is_left_to_adamw():
    shapes = matrix_shapes(Transformer(ModelConfig(**{**CONFIG.to_dict(), "num_attention_heads": 4})))
    assert shapes["layers.1.mlp.experts.gate_up_proj"] == (8, 32, 64)  # gate and up of 4 experts
    assert shapes["layers.1.mlp.experts.down_proj"] == (4, 64, 32)
    assert shapes["layers.0.self_attn.q_proj.weight"] == (4, 64, 64)  # heads
    assert shapes["layers.0.self_attn.kv_b_proj.weight"] == (4, 96, 32)
    assert shapes["layers.0.mlp.gate_proj.weight"] == (96, 64)
    assert shapes["mtp.0.eh_proj.weight"] == (64, 128)
    assert not {"embed_tokens.weight", "lm_head.weight", "layers.1.mlp.gate.weight", "norm.weight"} & set(shapes)


def test_a_matrix_moves_by_the_learning_rate_in_adamw_units():
    model = model_with_gradients()
    before = model.layers[0].mlp.gate_proj.weight.detach().clone()
    MuonAdamW(model, weight_decay=0.0).step(0.01)
    moved = model.layers[0].mlp.gate_proj.weight - before
    assert moved.square().mean().sqrt().item() == pytest.approx(0.01 * 0.2, rel=0.25)


def test_the_rest_moves_as_torch_adamw_does():
    ours, theirs = model_with_gradients(), model_with_gradients()
    optimizer = MuonAdamW(ours, muon=False, weight_decay=0.1)
    decayed = [p for p in theirs.parameters() if p.dim() > 1]
    vectors = [p for p in theirs.parameters() if p.dim() == 1]
    reference = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=0.01, betas=(0.9, 0.95), eps=1e-10,
    )  # fmt: skip
    for _ in range(3):
        optimizer.step(0.01)
        reference.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_beside_muon_only_matrices_are_decayed():
    plain, decayed = model_with_gradients(), model_with_gradients()
    MuonAdamW(plain, weight_decay=0.0).step(0.01)
    MuonAdamW(decayed, weight_decay=0.5).step(0.01)
    pairs = zip(plain.named_parameters(), decayed.parameters(), strict=True)
    assert {name for (name, a), b in pairs if not torch.equal(a, b)} == set(matrix_shapes(plain))


def test_a_parameter_without_gradient_stays():
    model = model_with_gradients()
    model.layers[0].mlp.gate_proj.weight.grad = None
    before = model.layers[0].mlp.gate_proj.weight.detach().clone()
    MuonAdamW(model).step(0.01)
    assert torch.equal(model.layers[0].mlp.gate_proj.weight, before)


def test_schedule_rises_holds_and_falls():
    rates = [learning_rate(step, 100, 1.0, warmup=10, decay_share=0.2) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0
    assert set(rates[10:81]) == {1.0}
    assert rates[90] == pytest.approx(0.5) and rates[99] == pytest.approx(0.05)
    assert all(a >= b for a, b in pairwise(rates[80:]))
