"""Multi-token prediction (V3 section 2.2): modules that continue the causal chain one token further each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from twelve.config import ModelConfig
from twelve.model.attention import LayerCache, Positions
from twelve.model.hyper_connections import HyperHead
from twelve.model.layers import RMSNorm
from twelve.model.moe import Routing


class MTPModule(nn.Module):
    """h' = W [norm(embedding of the next token); norm(h)], a decoder block, a norm; embedding and head are the model's.

    As in V3's weights and transformers: `h` is the state after the final norm (after this norm, for a further module),
    and the embedding comes first in the concatenation. With hyper-connections the block has its own streams, which
    begin as copies of the joined state.
    """

    def __init__(self, config: ModelConfig, block: nn.Module) -> None:
        super().__init__()
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.block = block
        self.streams = config.hc_mult
        self.hc_head = HyperHead(config) if config.hc_mult > 1 else None
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, hidden: Tensor, embedded: Tensor, at: Positions, cache: LayerCache | None = None
    ) -> tuple[Tensor, Routing | None]:
        """hidden [B, T, D] of tokens up to i, embedded [B, T, D] of tokens i + 1 -> normed state to predict i + 2."""
        joined = self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(hidden)), dim=-1))
        if self.hc_head is not None:
            joined = joined[:, :, None].expand(-1, -1, self.streams, -1)
        out, routing = self.block(joined, at, cache)
        if self.hc_head is not None:
            out = self.hc_head(out)
        return self.norm(out), routing


def shift_targets(targets: Tensor, documents: Tensor | None) -> Tensor:
    """Targets [B, T] one token further, negative where that leaves the row or the token's own document [B, T]."""
    shifted = torch.full_like(targets, -100)
    shifted[:, :-1] = targets[:, 1:]
    if documents is not None:
        shifted[:, :-1].masked_fill_(documents[:, 1:] != documents[:, :-1], -100)
    return shifted
