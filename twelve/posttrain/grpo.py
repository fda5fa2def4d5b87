"""GRPO: group relative policy optimisation (arXiv 2402.03300), with the stabilisers of V3.2 (arXiv 2512.02556, 3.1).

Several answers to one question are compared with each other: what is better than its group becomes likelier, what is
worse less likely. There is no value network. Everything here is a function of tensors; sampling is rollout.py's, the
steps are rl.py's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from twelve.errors import InputError

METHODS = ("grpo", "rejection")
LOSSES = ("token", "sequence", "constant")
NORMALISATIONS = ("std", "mean")
KL_FORMS = ("unbiased", "k3")


@dataclass(frozen=True)
class Objective:
    """What is maximised. InputError for an unknown name."""

    # rejection: no comparison; only right answers are learnt from, as they are drawn (RAFT, arXiv 2304.06767): SFT on
    # what passes the checker, and the control of every claim about RL here
    method: str = "grpo"
    # token: the mean over all tokens of the step (DAPO, arXiv 2503.14476): long answers count for their length.
    # sequence: the mean within an answer, then over answers (DeepSeekMath): long wrong answers are punished less.
    # constant: the sum of an answer over the most tokens it may have (Dr. GRPO, arXiv 2503.20783): neither bias.
    loss: str = "token"
    normalise: str = "std"  # std: (r - mean) / std, as R1; mean: r - mean, as Dr. GRPO
    clip_low: float = 0.2  # R1 clips sequences at 10; for single tokens of small models that is no clip at all
    clip_high: float = 0.28  # higher, so that unlikely tokens can still gain (DAPO)
    kl: float = 0.0  # factor of the divergence from the reference; R1 0.001
    kl_form: str = "unbiased"  # V3.2's ratio-corrected k3; k3: DeepSeekMath's, whose gradient is biased
    # an answer cut off by its limit teaches nothing (DAPO): for limits that are a matter of cost, as in long reasoning;
    # a short limit is a part of the task, and a cut answer a wrong one
    mask_overlong: bool = False
    off_policy: float | None = None  # V3.2's delta, nats a token: bad answers that the policy has left do not count

    def __post_init__(self) -> None:
        names = {"method": METHODS, "loss": LOSSES, "normalise": NORMALISATIONS, "kl_form": KL_FORMS}
        for name, known in names.items():
            if getattr(self, name) not in known:
                raise InputError(f"{name} {getattr(self, name)!r} is not one of {', '.join(known)}")


def advantages(rewards: Tensor, normalise: str = "std") -> Tensor:
    """rewards [P, G] -> advantages [P, G]: exactly zero in a group whose rewards are equal."""
    kind, rewards = rewards.dtype, rewards.double()
    centred = rewards - rewards.mean(1, keepdim=True)
    if normalise == "std":
        centred = centred / (rewards.std(1, correction=0, keepdim=True) + 1e-6)
    equal = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    return centred.masked_fill(equal, 0.0).to(kind)  # the mean of equal numbers may be rounded


def answer_weights(lengths: Tensor, counted: Tensor, loss: str, max_tokens: int) -> Tensor:
    """What a token of each answer counts: lengths [A] in tokens, counted [A] bool -> [A], zero where it does not."""
    counted = counted.to(torch.float32)
    answers = counted.sum().clamp(min=1)
    if loss == "token":
        return counted / (counted * lengths).sum().clamp(min=1)
    if loss == "sequence":
        return counted / (answers * lengths.clamp(min=1))
    return counted / (answers * max_tokens)


def divergence(logprobs: Tensor, reference: Tensor, ratio: Tensor, form: str) -> Tensor:
    """An estimate of KL(policy || reference) at each token [N], drawn from the policy before the step.

    k3 = r - log r - 1, r = reference / policy: never negative, right in the mean, but not its gradient. Times `ratio`
    (policy / policy before the step, with its gradient) that is right too (V3.2, section 3.1).
    """
    log_r = reference - logprobs
    k3 = log_r.exp() - log_r - 1
    return ratio * k3 if form == "unbiased" else k3


def off_policy_mask(advantage: Tensor, drift: Tensor, delta: float | None) -> Tensor:
    """1 where an answer counts: 0 for those of negative advantage [A] whose mean log(sampler / policy) [A] exceeds
    delta (V3.2's off-policy sequence masking)."""
    if delta is None:
        return torch.ones_like(advantage)
    return 1.0 - ((advantage < 0) & (drift > delta)).to(advantage.dtype)


@dataclass
class Terms:
    """What `policy_loss` gives: the loss to differentiate, a part of the step's, and sums over its tokens."""

    loss: Tensor
    clipped: float  # tokens whose ratio was cut
    kl: float
    masked: float  # answers that the off-policy mask took out


def policy_loss(
    logprobs: Tensor, old: Tensor, sampled: Tensor, reference: Tensor | None, answers: Tensor, advantage: Tensor,
    weights: Tensor, objective: Objective,
) -> Terms:  # fmt: skip
    """The part of the step's loss that tokens [N] make; whole answers only.

    logprobs of the policy, old: before the step, by the trainer (so that their ratio begins at exactly 1), sampled: by
    the engine, reference or None; answers [N]: which answer a token is of, into advantage [A] and weights [A].
    """
    ratio = (logprobs - old).exp()
    gain = advantage[answers]
    cut = ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high)
    surrogate = torch.minimum(ratio * gain, cut * gain)
    lengths = torch.bincount(answers, minlength=len(advantage)).clamp(min=1)
    drift = torch.zeros_like(advantage).index_add(0, answers, sampled - logprobs.detach()) / lengths
    kept = off_policy_mask(advantage, drift, objective.off_policy)
    loss = -surrogate * kept[answers]
    kl = 0.0
    if reference is not None:
        terms = divergence(logprobs, reference, ratio, objective.kl_form)
        loss = loss + objective.kl * terms
        kl = terms.detach().sum().item()
    clipped = (cut * gain < ratio * gain).sum().item()
    return Terms((loss * weights[answers]).sum(), clipped, kl, (1 - kept).sum().item())
