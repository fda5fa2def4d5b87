"""Routing: what the facts of V2 and V3 say of scores, groups, gates, bias and balance."""

import pytest
import torch
from test_transformer import V3, changed

from twelve.model.moe import Router, balance


def router(**values) -> Router:
    made = Router(changed(V3, **{"n_routed_experts": 8, "num_experts_per_tok": 3, **values}))
    torch.nn.init.normal_(made.weight, generator=torch.Generator().manual_seed(0))
    return made


X = torch.randn(200, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_normalised_gates_sum_to_the_scale(scale):
    _, gates, _ = router(routed_scaling_factor=scale, norm_topk_prob=True)(X)
    torch.testing.assert_close(gates.sum(-1), torch.full((200,), scale))


def test_bias_changes_the_choice_and_never_a_gate():
    gate = router(norm_topk_prob=False)
    before = gate(X)
    gate.e_score_correction_bias[5] = 3.0
    chosen, gates, scores = gate(X)
    assert (chosen == 5).any(-1).all() and not (before[0] == 5).any(-1).all()
    torch.testing.assert_close(gates, scores.gather(1, chosen))
    torch.testing.assert_close(scores, before[2])


def test_only_the_best_groups_are_used_even_with_negative_scores():
    gate = router(n_routed_experts=16, n_group=4, topk_group=2, num_experts_per_tok=4)
    gate.e_score_correction_bias.fill_(-5.0)  # scores with bias are negative: a mask of zeros would let all others in
    chosen, _, scores = gate(X)
    groups = chosen // 4
    assert all(len(set(row.tolist())) <= 2 for row in groups)
    best = scores.view(200, 4, 4).topk(2).values.sum(-1).topk(2).indices
    assert all(set(row.tolist()) <= set(allowed.tolist()) for row, allowed in zip(groups, best, strict=True))


def test_v2_ranks_groups_by_their_best_expert():
    gate = router(model_type="deepseek_v2", scoring_func="softmax", topk_method="group_limited_greedy",
                  n_routed_experts=16, n_group=4, topk_group=1, norm_topk_prob=False)  # fmt: skip
    chosen, gates, scores = gate(X)
    torch.testing.assert_close(scores.sum(-1), torch.ones(200))
    assert torch.equal(chosen // 4, (scores.argmax(-1) // 4)[:, None].expand(-1, 3))
    torch.testing.assert_close(gates, scores.gather(1, chosen))


def test_bias_moves_by_the_speed_against_the_load():
    gate = router()
    gate.update_bias(torch.tensor([10, 20, 30, 20, 20, 20, 20, 20]), 0.01)
    assert gate.e_score_correction_bias.tolist() == pytest.approx([0.01, 0, -0.01, 0, 0, 0, 0, 0])


def test_bias_is_no_parameter_and_gets_no_gradient():
    assert [name for name, _ in router().named_parameters()] == ["weight"]
    assert "e_score_correction_bias" in router().state_dict()


def test_even_use_gives_balance_one_and_collapse_more():
    even = torch.arange(24).view(8, 3) % 8
    assert balance(even, torch.full((8, 8), 0.3), 1).balance.item() == pytest.approx(1.0)
    scores = torch.full((8, 8), 0.01)
    scores[:, :3] = 0.9
    assert balance(torch.arange(3).repeat(8, 1), scores, 2).balance.item() > 2.5


def test_scores_are_float32_in_a_bfloat16_model():
    gate = router().to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, gates, scores = gate(X.to(torch.bfloat16))
    assert scores.dtype == gates.dtype == torch.float32
