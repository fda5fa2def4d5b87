"""DeepSeekMoE (arXiv 2401.06066; V3 section 2.1.2): shared and routed experts, balance without an auxiliary loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twelve.config import ModelConfig
from twelve.model.fast import grouped_experts, one_token_experts, sorted_experts
from twelve.model.layers import MLP


@dataclass
class Routing:
    """What one MoE layer decided for N tokens, for balancing and for reports."""

    experts: Tensor  # [N, k] int64
    load: Tensor  # [E] tokens sent to each expert, int64
    balance: Tensor  # float32 scalar, 1 when every sequence uses the experts evenly


class Router(nn.Module):
    """Scores, choice and gates. The bias takes part in the choice only, and only `update_bias` changes it.

    `forced` [N, k], when it is not None, takes the place of the choice: training then keeps the routing of a rollout
    (V3.2, arXiv 2512.02556, section 3.1).
    """

    forced: Tensor | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        if config.topk_method == "noaux_tc":
            self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [N, D] -> chosen experts [N, k], their gates [N, k], all scores [N, E]; in float32 or wider."""
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):  # a rounded score flips the choice
                return self.forward(x)
        c = self.config
        wide = torch.promote_types(x.dtype, torch.float32)
        logits = F.linear(x.to(wide), self.weight.to(wide))
        scores = logits.sigmoid() if c.scoring_func == "sigmoid" else logits.softmax(-1)
        chosen = self._choose(scores.detach()) if self.forced is None else self.forced
        gates = scores.gather(1, chosen)
        if c.norm_topk_prob:
            gates = gates / (gates.sum(-1, keepdim=True) + 1e-20)
        return chosen, gates * c.routed_scaling_factor, scores

    def _choose(self, scores: Tensor) -> Tensor:
        """Top-k experts within the top groups; a group counts by its two best (V3) or its best (V2)."""
        c = self.config
        groups, best = c.n_group or 1, 1
        if c.topk_method == "noaux_tc":
            scores, best = scores + self.e_score_correction_bias, 2
        limited = c.topk_method != "greedy" and groups > 1 and (c.topk_group or groups) < groups
        if limited:
            grouped = scores.unflatten(1, (groups, -1))
            rank = grouped.topk(min(best, grouped.shape[-1]), dim=-1).values.sum(-1)  # [N, G]
            kept = torch.zeros_like(rank, dtype=torch.bool).scatter_(1, rank.topk(c.topk_group, dim=-1).indices, True)
            # -inf, not 0: a score with its bias may be negative
            scores = grouped.masked_fill(~kept[..., None], float("-inf")).flatten(1)
        return scores.topk(c.num_experts_per_tok, dim=-1).indices

    @torch.no_grad()
    def update_bias(self, load: Tensor, speed: float) -> None:
        """Once a step: lower the bias of experts above the mean load [E] by `speed`, raise the others (2408.15664)."""
        load = load.to(self.e_score_correction_bias)
        self.e_score_correction_bias += speed * torch.sign(load.mean() - load)


class Experts(nn.Module):
    """All routed experts of a layer: gate and up projections stacked [E, 2I, D], down projections [E, D, I]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, hidden, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, x: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
        """x [N, D], chosen [N, k], gates [N, k] -> sum over the chosen experts of gate * expert(x), [N, D]."""
        if x.device.type == "cuda":
            run = sorted_experts
        else:
            run = one_token_experts if x.shape[0] == 1 and not torch.is_grad_enabled() else grouped_experts
        return run(x, self.gate_up_proj, self.down_proj, chosen, gates)


class MoE(nn.Module):
    """Shared experts plus the chosen routed ones; no token is dropped."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        if config.n_shared_experts:
            self.shared_experts = MLP(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)
        self.has_shared = bool(config.n_shared_experts)

    def forward(self, x: Tensor) -> tuple[Tensor, Routing | None]:
        """x [B, T, D] -> [B, T, D], and in training what was routed where."""
        flat = x.reshape(-1, x.shape[-1])
        chosen, gates, scores = self.gate(flat)
        out = self.experts(flat, chosen, gates.to(x.dtype)).view_as(x)
        if self.has_shared:
            out = out + self.shared_experts(x)
        return out, balance(chosen, scores, x.shape[0]) if self.training else None


def balance(chosen: Tensor, scores: Tensor, batch_size: int) -> Routing:
    """Loads and V3's sequence-wise balance loss (equations 17-20) without its factor alpha; rows count as sequences."""
    experts, k = scores.shape[-1], chosen.shape[-1]
    per_sequence = F.one_hot(chosen.reshape(batch_size, -1), experts).sum(1)  # [B, E]
    tokens = chosen.shape[0] // batch_size
    fraction = per_sequence * (experts / (k * tokens))
    share = (scores / scores.sum(-1, keepdim=True)).view(batch_size, tokens, experts).mean(1)
    return Routing(chosen, per_sequence.sum(0), (fraction * share).sum(-1).mean())
