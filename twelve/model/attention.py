"""Attention, each kind with its cache: multi-head latent (DeepSeek V2, V3) and grouped-query (Llama, Qwen)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twelve.config import ModelConfig
from twelve.model.branches import Branches, branched_attention
from twelve.model.fast import blocked_attention
from twelve.model.layers import RMSNorm
from twelve.model.rope import rotate_halves, rotate_pairs, softmax_scale


@dataclass
class Positions:
    """What attention must know of the tokens of one forward pass; made once, used by every layer."""

    cos: Tensor  # [B, T, 1, R/2]
    sin: Tensor  # [B, T, 1, R/2]
    # [B or 1, 1, T, S] bool, True where a query may look; None: causal, or one query that sees all; Branches: B = 1
    mask: Tensor | Branches | None
    start: int = 0  # tokens already in the cache
    # for Engram, which looks at what precedes a token in its document
    depth: Tensor | None = None  # [B or 1, T] int64: how many tokens precede it; None: a row is all one document
    past: Tensor | None = None  # [B, P] int64: ids of the tokens right before the first, -1 where there is none
    ids: Tensor | None = None  # [B, T] int64: the tokens, for latents that hold a part of their own


class LayerCache:
    """What one layer keeps of past tokens: tensors [B, S, ...] of a fixed length, filled from the front."""

    def __init__(self, batch_size: int, max_length: int, shapes: list[tuple[int, ...]], like: Tensor) -> None:
        self.buffers = [like.new_empty(batch_size, max_length, *shape) for shape in shapes]

    def append(self, start: int, *values: Tensor) -> list[Tensor]:
        """Write values [B, T, ...] at `start`; the views [B, start + T, ...] of all tokens so far."""
        end = start + values[0].shape[1]
        for buffer, value in zip(self.buffers, values, strict=True):
            buffer[:, start:end] = value
        return [buffer[:, :end] for buffer in self.buffers]

    @property
    def bytes_per_token(self) -> int:
        return sum(buffer[0, 0].numel() * buffer.element_size() for buffer in self.buffers)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | Branches | None, scale: float) -> Tensor:
    """Softmax attention, query [B, T, H, K], key [B, S, H or fewer, K], value [B, S, same, V] -> [B, T, H, V].

    Without a mask T == S is causal and T == 1 sees everything.
    """
    if isinstance(mask, Branches):
        if query.device.type == "cpu":
            return branched_attention(query[0], key[0], value[0], mask, scale)[None]
        mask = mask.mask.to(query.device)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if query.requires_grad and query.device.type == "cpu" and query.shape[2] == key.shape[2]:
        repeats = query.shape[1] // key.shape[1]
        if repeats > 1:
            key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        return blocked_attention(query, key, value, mask, scale).transpose(1, 2)
    width = value.shape[-1]
    if width < query.shape[-1]:  # the fused kernels want keys and values of one width
        value = F.pad(value, (0, query.shape[-1] - width))
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None and query.shape[2] > 1, scale=scale,
        enable_gqa=key.shape[1] != query.shape[1],
    )  # fmt: skip
    return out.transpose(1, 2)[..., :width]


class LatentAttention(nn.Module):
    """MLA (arXiv 2405.04434 section 2.1): keys and values from one low-rank latent, positions in a small shared key.

    Expanded form: keys and values of every head are made from the latents; best when there are many queries.
    Absorbed form: W_UK moves into the query and W_UV behind the softmax, so heads attend over the latents themselves
    (multi-query attention of width rank + rope); best when there are few. The cache holds only the normalised latent
    and the rotated shared key.

    With `token_rank` the last elements of the latent are a learned vector of the token, behind the norm: what a token
    says wherever it stands (value embeddings, arXiv 2410.17897), at no arithmetic.
    """

    def __init__(self, config: ModelConfig, token_rank: int = 0) -> None:
        super().__init__()
        self.heads, self.rank = config.num_attention_heads, config.kv_lora_rank
        self.nope, self.rope, self.v_width = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.scale = softmax_scale(config)
        self.rotate = rotate_pairs if config.rope_interleave else rotate_halves
        hidden, bias = config.hidden_size, config.attention_bias
        query_size = self.heads * (self.nope + self.rope)
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, query_size, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank)
            self.q_b_proj = nn.Linear(config.q_lora_rank, query_size, bias=False)
        self.has_q_lora = config.q_lora_rank is not None
        self.made = self.rank - token_rank  # elements of the latent that come from the state
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.made + self.rope, bias=bias)
        self.kv_a_layernorm = RMSNorm(self.made)
        self.token_latent = nn.Embedding(config.vocab_size, token_rank) if token_rank else None
        self.kv_b_proj = nn.Linear(self.rank, self.heads * (self.nope + self.v_width), bias=False)
        self.o_proj = nn.Linear(self.heads * self.v_width, hidden, bias=bias)
        # multiply-adds a query-key pair and head, absorbed less expanded, against those of expanding one key
        extra = (2 * self.rank + self.rope) - (self.nope + self.rope + self.v_width)
        self.absorb_below = self.rank * (self.nope + self.v_width) / extra if extra > 0 else float("inf")

    def cache_shapes(self) -> list[tuple[int, ...]]:
        return [(self.rank + self.rope,)]

    def begin_token_latents(self) -> None:
        """Tokens' vectors are values as they are, head by head and from the start again, and of no key: weights drawn
        at random take hundreds of steps to let them through (docs/lab.md)."""
        own = self.rank - self.made
        values = torch.arange(self.heads * self.v_width)
        weight = self.kv_b_proj.weight.view(self.heads, self.nope + self.v_width, self.rank)
        weight[:, : self.nope, self.made :] = 0
        weight[:, self.nope :, self.made :] = torch.eye(own)[values % own].view(self.heads, self.v_width, own)

    def forward(self, x: Tensor, at: Positions, cache: LayerCache | None = None, absorb: bool | None = None) -> Tensor:
        """x [B, T, D] -> [B, T, D]. `absorb` forces a form; by default the one with less arithmetic runs."""
        batch, length, _ = x.shape
        query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if self.has_q_lora else self.q_proj(x)
        query = query.view(batch, length, self.heads, self.nope + self.rope)
        q_nope, q_rope = query.split((self.nope, self.rope), dim=-1)
        q_rope = self.rotate(q_rope, at.cos, at.sin)

        latent, k_rope = self.kv_a_proj_with_mqa(x).split((self.made, self.rope), dim=-1)
        latent = self.kv_a_layernorm(latent)
        if self.token_latent is not None:
            latent = torch.cat((latent, self.token_latent(at.ids).to(latent.dtype)), dim=-1)
        k_rope = self.rotate(k_rope[:, :, None], at.cos, at.sin)[:, :, 0]
        if cache is not None:
            (entries,) = cache.append(at.start, torch.cat((latent, k_rope), dim=-1))
            latent, k_rope = entries.split((self.rank, self.rope), dim=-1)
            if length < self.absorb_below if absorb is None else absorb:
                return self.o_proj(self._absorbed(q_nope, q_rope, entries, at.mask).flatten(2))
        elif absorb:
            entries = torch.cat((latent, k_rope), dim=-1)
            return self.o_proj(self._absorbed(q_nope, q_rope, entries, at.mask).flatten(2))
        return self.o_proj(self._expanded(q_nope, q_rope, latent, k_rope, at.mask).flatten(2))

    def _expanded(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, mask: Tensor | Branches | None
    ) -> Tensor:
        batch, keys, _ = latent.shape
        expanded = self.kv_b_proj(latent).view(batch, keys, self.heads, self.nope + self.v_width)
        k_nope, value = expanded.split((self.nope, self.v_width), dim=-1)
        key = torch.cat((k_nope, k_rope[:, :, None].expand(-1, -1, self.heads, -1)), dim=-1)
        return attend(torch.cat((q_nope, q_rope), dim=-1), key, value, mask, self.scale)

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, entries: Tensor, mask: Tensor | None) -> Tensor:
        """entries [B, S, rank + rope]; the softmax keeps the expanded form's scale, 1 / sqrt(nope + rope)."""
        batch, length, heads, _ = q_nope.shape
        weight = self.kv_b_proj.weight.view(heads, self.nope + self.v_width, self.rank)
        w_uk, w_uv = weight[:, : self.nope], weight[:, self.nope :]
        q_latent = torch.bmm(q_nope.flatten(0, 1).transpose(0, 1), w_uk).transpose(0, 1)  # [B * T, H, rank]
        query = torch.cat((q_latent, q_rope.flatten(0, 1)), dim=-1).view(batch, length * heads, -1)
        scores = torch.bmm(query, entries.transpose(1, 2)).mul_(self.scale).view(batch, length, heads, -1)
        if mask is None and length > 1:
            mask = torch.ones(length, length, dtype=torch.bool, device=scores.device).tril()[None, None]
        if mask is not None:
            scores = scores.masked_fill(~mask.transpose(1, 2), float("-inf"))
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)
        mixed = torch.bmm(weights.view(batch, length * heads, -1), entries[..., : self.rank])
        mixed = mixed.view(batch * length, heads, self.rank).transpose(0, 1)
        return torch.bmm(mixed, w_uv.transpose(1, 2)).transpose(0, 1).view(batch, length, heads, self.v_width)


class GroupedQueryAttention(nn.Module):
    """GQA (arXiv 2305.13245) as in Llama and Qwen: optional biases, optional RMSNorm on the heads of query and key."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.scale = softmax_scale(config)
        hidden, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(hidden, self.heads * self.width, bias=bias)
        self.k_proj = nn.Linear(hidden, self.kv_heads * self.width, bias=bias)
        self.v_proj = nn.Linear(hidden, self.kv_heads * self.width, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.width, hidden, bias=bias and config.model_type != "qwen2")
        self.has_norm = config.model_type == "qwen3"
        if self.has_norm:
            self.q_norm = RMSNorm(self.width, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.width, config.rms_norm_eps)

    def cache_shapes(self) -> list[tuple[int, ...]]:
        return [(self.kv_heads, self.width)] * 2

    def forward(self, x: Tensor, at: Positions, cache: LayerCache | None = None) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        batch, length, _ = x.shape
        query = self.q_proj(x).view(batch, length, self.heads, self.width)
        key = self.k_proj(x).view(batch, length, self.kv_heads, self.width)
        value = self.v_proj(x).view(batch, length, self.kv_heads, self.width)
        if self.has_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotate_halves(query, at.cos, at.sin), rotate_halves(key, at.cos, at.sin)
        if cache is not None:
            key, value = cache.append(at.start, key, value)
        return self.o_proj(attend(query, key, value, at.mask, self.scale).flatten(2))
