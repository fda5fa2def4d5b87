"""The objective against plain float64 twins and against what is known exactly."""

import pytest
import torch

from twelve.errors import InputError
from twelve.posttrain.grpo import Objective, advantages, answer_weights, divergence, off_policy_mask, policy_loss


def test_a_group_of_equal_rewards_has_exactly_no_advantage():
    rewards = torch.tensor([[0.1] * 7, [0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.30001], [1.0, 0, 0, 0, 0, 0, 0]])
    for normalise in ("std", "mean"):
        gains = advantages(rewards, normalise)
        assert (gains[0] == 0).all() and (gains[1:] != 0).all()
        assert gains.sum(1).abs().max() < 1e-5


def test_advantages_are_r1s_and_dr_grpos():
    rewards = torch.rand(5, 8)
    centred = rewards - rewards.mean(1, keepdim=True)
    assert torch.allclose(advantages(rewards, "mean"), centred)
    assert torch.allclose(advantages(rewards, "std"), centred / rewards.std(1, correction=0, keepdim=True), atol=1e-3)


def test_what_a_token_counts():
    lengths, counted = torch.tensor([10, 30, 5]), torch.tensor([True, True, False])
    token, sequence, constant = (answer_weights(lengths, counted, how, 40) for how in ("token", "sequence", "constant"))
    assert torch.allclose(token, torch.tensor([1, 1, 0.0]) / 40)
    assert torch.allclose(sequence, torch.tensor([1 / 20, 1 / 60, 0]))
    assert torch.allclose(constant, torch.tensor([1, 1, 0.0]) / 80)
    for weights in (token, sequence):
        assert float((weights * lengths).sum()) == pytest.approx(1)
    assert (answer_weights(lengths, torch.zeros(3, dtype=torch.bool), "token", 40) == 0).all()


def arguments(tokens=40, answers=6, drift=0.0, seed=0):
    draw = torch.Generator().manual_seed(seed)
    now = -torch.rand(tokens, generator=draw, dtype=torch.float64) - 0.1
    old = now + drift * torch.randn(tokens, generator=draw, dtype=torch.float64)
    owner = torch.arange(tokens) % answers
    gain = torch.randn(answers, generator=draw, dtype=torch.float64)
    weights = torch.rand(answers, generator=draw, dtype=torch.float64)
    return now.requires_grad_(), old, owner, gain, weights


def test_the_first_step_is_the_plain_policy_gradient():
    now, _, owner, gain, weights = arguments()
    terms = policy_loss(now, now.detach(), now.detach(), None, owner, gain, weights, Objective())
    terms.loss.backward()
    assert torch.allclose(now.grad, -gain[owner] * weights[owner])  # d/dlogp of ratio * gain, at ratio 1
    assert terms.clipped == 0


def test_no_advantage_no_gradient():
    now, old, owner, gain, weights = arguments(drift=0.3)
    policy_loss(now, old, old, None, owner, torch.zeros_like(gain), weights, Objective()).loss.backward()
    assert (now.grad == 0).all()


def test_clipping_stops_what_has_gone_far_enough_and_only_that():
    now, old, owner, gain, weights = arguments(drift=0.5)
    objective = Objective(clip_low=0.2, clip_high=0.3)
    terms = policy_loss(now, old, old, None, owner, gain, weights, objective)
    terms.loss.backward()
    ratio = (now - old).exp().detach()
    stopped = ((gain[owner] > 0) & (ratio > 1.3)) | ((gain[owner] < 0) & (ratio < 0.8))
    assert 3 < stopped.sum() < 35 and terms.clipped == stopped.sum()
    assert ((now.grad == 0) == stopped).all()
    plain = -(torch.minimum(ratio * gain[owner], ratio.clamp(0.8, 1.3) * gain[owner]) * weights[owner]).sum()
    assert terms.loss.item() == pytest.approx(plain.item())


def test_the_unbiased_divergence_has_the_true_gradient_and_k3_has_not():
    draw = torch.Generator().manual_seed(3)
    logits = torch.randn(7, generator=draw, dtype=torch.float64).requires_grad_()
    old, reference = (torch.randn(7, generator=draw, dtype=torch.float64).log_softmax(0) for _ in range(2))

    def expected(form, sampler):  # the mean over tokens that `sampler` draws
        policy = logits.log_softmax(0)
        return (sampler.exp() * divergence(policy, reference, (policy - sampler).exp(), form)).sum()

    policy = logits.log_softmax(0)
    (true,) = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits)
    for sampler in (old, policy.detach()):  # off and on policy
        assert torch.allclose(torch.autograd.grad(expected("unbiased", sampler), logits)[0], true)
        assert not torch.allclose(torch.autograd.grad(expected("k3", sampler), logits)[0], true, rtol=0.1)
    assert expected("unbiased", old).item() == pytest.approx((policy.exp() * (policy - reference)).sum().item())
    assert (divergence(policy, reference, torch.ones(7), "k3") >= 0).all()


def test_the_divergence_joins_the_loss():
    now, old, owner, gain, weights = arguments()
    reference = old - 0.3
    without = policy_loss(now, old, old, None, owner, gain, weights, Objective()).loss
    terms = policy_loss(now, old, old, reference, owner, gain, weights, Objective(kl=0.5))
    k3 = divergence(now, reference, (now - old).exp(), "unbiased")
    assert terms.loss.item() == pytest.approx((without + 0.5 * (k3 * weights[owner]).sum()).item())
    assert terms.kl == pytest.approx(k3.sum().item())


def test_masking_touches_only_worse_answers_that_the_policy_has_left():
    gain = torch.tensor([-1.0, -1.0, 1.0, 1.0, 0.0])
    drift = torch.tensor([0.5, 0.1, 0.5, 0.1, 0.5])
    assert off_policy_mask(gain, drift, 0.2).tolist() == [0, 1, 1, 1, 1]
    assert off_policy_mask(gain, drift, None).tolist() == [1] * 5

    now, _, owner, _, weights = arguments(answers=4)
    gain = torch.tensor([-1.0, 1.0, -1.0, 1.0], dtype=torch.float64)
    sampled = now.detach() + torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)[owner]  # answers 0 and 1 drifted
    terms = policy_loss(now, now.detach(), sampled, None, owner, gain, weights, Objective(off_policy=0.5))
    terms.loss.backward()
    assert terms.masked == 1
    assert ((now.grad == 0) == (owner == 0)).all()


def test_unknown_names_are_said():
    with pytest.raises(InputError, match="loss 'words' is not one of token, sequence, constant"):
        Objective(loss="words")
