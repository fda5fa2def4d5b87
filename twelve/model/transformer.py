"""The model, top to bottom: embed, blocks, norm, head. DeepSeek V2/V3 and the Llama/Qwen family are one class."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twelve.config import ModelConfig
from twelve.errors import InputError
from twelve.model.attention import GroupedQueryAttention, LatentAttention, LayerCache, Positions
from twelve.model.engram import Engram, EngramMemory
from twelve.model.hyper_connections import HyperConnection, HyperHead, Residual
from twelve.model.layers import MLP, RMSNorm, linear_cross_entropy
from twelve.model.moe import Experts, MoE, Router, Routing
from twelve.model.mtp import MTPModule, shift_targets
from twelve.model.rope import inverse_frequencies

MainLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


class Block(nn.Module):
    """A decoder layer: attention, then a dense or mixture-of-experts feed-forward, each on the normed residual.

    With Engram the layer begins by adding what its memory holds for the last tokens. With hyper-connections the
    residual is several streams, and each part reads one mixture of them and writes to all.
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.engram = Engram(config) if index in config.engram_layer_ids else None
        self.attn_hc = HyperConnection(config, 2 * index) if config.hc_mult > 1 else Residual()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        latent = config.is_mla
        self.self_attn = LatentAttention(config, config.token_rank(index)) if latent else GroupedQueryAttention(config)
        self.ffn_hc = HyperConnection(config, 2 * index + 1) if config.hc_mult > 1 else Residual()
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.is_moe = config.is_moe_layer(index)
        self.mlp = MoE(config) if self.is_moe else MLP(config.hidden_size, config.intermediate_size, config.mlp_bias)

    def forward(
        self, x: Tensor, at: Positions, cache: LayerCache | None = None, found: Tensor | None = None,
        gates: LayerCache | None = None,
    ) -> tuple[Tensor, Routing | None]:  # fmt: skip
        """x [B, T, D], or [B, T, streams, D], -> the same shape, and the routing of an MoE layer in training.

        found: the rows that `EngramMemory` read for this layer; gates: where Engram keeps what its convolution needs.
        """
        if self.engram is not None:
            x = x + self.engram(x, found, at, gates)
        state, mapping = self.attn_hc.read(x)
        x = self.attn_hc.write(x, self.self_attn(self.input_layernorm(state), at, cache), mapping)
        state, mapping = self.ffn_hc.read(x)
        fed = self.mlp(self.post_attention_layernorm(state))
        fed, routing = fed if self.is_moe else (fed, None)
        return self.ffn_hc.write(x, fed, mapping), routing


class Cache:
    """The past of a batch of sequences of equal length: per layer only what its attention needs."""

    def __init__(self, model: Transformer, batch_size: int, max_length: int) -> None:
        like = model.norm.weight
        blocks = [*model.layers, *(module.block for module in model.mtp)]
        self.layers = [LayerCache(batch_size, max_length, b.self_attn.cache_shapes(), like) for b in blocks]
        # of Engram: what its convolutions need, by layer, and the tokens, from which n-grams are made
        self.gates = {
            index: LayerCache(batch_size, max_length, layer.engram.cache_shapes(), like)
            for index, layer in enumerate(model.layers)
            if layer.engram is not None
        }
        self.ids = torch.full((batch_size, max_length if self.gates else 0), -1, device=like.device)
        self.batch_size, self.max_length, self.length = batch_size, max_length, 0
        self.depth = len(model.layers)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token of one sequence takes in the main model's layers (MTP modules add theirs)."""
        return sum(layer.bytes_per_token for layer in (*self.layers[: self.depth], *self.gates.values()))

    def truncate(self, length: int) -> None:
        """Forget all tokens from position `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate a cache of {self.length} tokens to {length}")
        self.length = length


@dataclass
class Losses:
    """What one training forward pass gives; `total` is what to differentiate."""

    total: Tensor
    main: Tensor  # mean next-token cross entropy in nats
    mtp: list[Tensor] = field(default_factory=list)  # the same for each MTP depth
    balance: Tensor | None = None  # mean over MoE layers of the sequence-wise balance loss, without its factor
    loads: list[Tensor] = field(default_factory=list)  # [E] of every MoE layer, in the order of `moe_layers()`


class Transformer(nn.Module):
    """A decoder-only model built from `ModelConfig`. `model(ids)` gives logits."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.num_hidden_layers))
        self.memory = EngramMemory(config) if config.engram_layer_ids else None
        self.hc_head = HyperHead(config) if config.hc_mult > 1 else None
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        depth = config.num_hidden_layers
        self.mtp = nn.ModuleList(
            MTPModule(config, Block(config, depth + k)) for k in range(config.num_nextn_predict_layers)
        )
        self._frequencies: tuple[Tensor, float] | None = None

    @torch.no_grad()
    def init_weights(self, seed: int) -> Transformer:
        """Normal weights, std initializer_range; projections into the residual smaller by 1 / sqrt(2 * layers).

        Modules with initial values of their own draw last, so that the plain parts' do not depend on the switches.
        """
        generator = torch.Generator().manual_seed(seed)
        residual = 1 / math.sqrt(2 * self.config.num_hidden_layers)
        own = tuple(f"{name}." for name, module in self.named_modules() if hasattr(module, "initialise"))
        for name, parameter in sorted(self.named_parameters(), key=lambda item: item[0].startswith(own)):
            if parameter.dim() > 1:
                back = name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj"))
                std = self.config.initializer_range * (residual if back else 1.0)
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))
        for module in self.modules():
            if hasattr(module, "initialise"):
                module.initialise()
        for index in self.config.kv_token_layer_ids:
            self.layers[index].self_attn.begin_token_latents()
        if self.memory is not None and self.memory.table is None:
            self.memory.create()
        return self

    @property
    def head_weight(self) -> Tensor:
        """[V, D]"""
        return self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    def compile_layers(self) -> None:
        """Compile the decoder layers; those of one shape share their code, so time does not grow with depth.

        Raises InputError where torch finds no compiler.
        """
        if self.device.type == "cpu" and not has_compiler():
            raise InputError("--compile needs a C++ compiler (g++) on this machine: install one, or leave it out")
        for layer in self.layers:
            layer.compile()

    def new_cache(self, batch_size: int = 1, max_length: int | None = None) -> Cache:
        return Cache(self, batch_size, max_length or self.config.max_position_embeddings)

    def moe_layers(self) -> list[MoE]:
        """Every mixture-of-experts layer, main model first, then MTP modules."""
        return [module for module in self.modules() if isinstance(module, MoE)]

    def positions(
        self, ids: Tensor, start: int = 0, positions: Tensor | None = None, documents: Tensor | None = None,
        past: Tensor | None = None,
    ) -> Positions:  # fmt: skip
        """Rotations and mask of ids [B, T] that follow `start` cached tokens, the last of which are `past` [B, P]."""
        length, device = ids.shape[1], ids.device
        if self._frequencies is None or self._frequencies[0].device != device:
            frequencies, scale = inverse_frequencies(self.config)
            self._frequencies = frequencies.to(device), scale
        frequencies, scale = self._frequencies
        depth = positions
        if documents is not None and self.memory is not None:
            depth = depth_in(documents)
        if positions is None:
            positions = torch.arange(start, start + length, device=device)[None]
        angles = positions[..., None].float() * frequencies
        dtype = self.norm.weight.dtype  # of a parameter that is never packed
        cos, sin = ((f(angles) * scale).to(dtype)[:, :, None] for f in (torch.cos, torch.sin))
        mask = None
        if documents is not None:
            same = documents[:, :, None] == documents[:, None, :]
            mask = same.tril()[:, None]  # [B, 1, T, T]
        elif start and length > 1:
            mask = torch.ones(length, start + length, dtype=torch.bool, device=device).tril(start)[None, None]
        return Positions(cos, sin, mask, start, depth, past, ids)

    def hidden(self, ids: Tensor, at: Positions, cache: Cache | None = None) -> tuple[Tensor, list[Routing]]:
        """ids [B, T] -> states after the final norm [B, T, D], and the routing of each MoE layer in training."""
        found = self.memory.look_up(ids, at) if self.memory is not None else {}
        x = self.embed_tokens(ids)
        if self.hc_head is not None:
            x = x[:, :, None].expand(-1, -1, self.config.hc_mult, -1)
        routings = []
        for index, layer in enumerate(self.layers):
            kept, gates = (cache.layers[index], cache.gates.get(index)) if cache is not None else (None, None)
            x, routing = layer(x, at, kept, found.get(index), gates)
            if routing is not None:
                routings.append(routing)
        if self.hc_head is not None:
            x = self.hc_head(x)
        return self.norm(x), routings

    def forward(
        self, ids: Tensor, cache: Cache | None = None, documents: Tensor | None = None, positions: Tensor | None = None,
        last_only: bool = False,
    ) -> Tensor:  # fmt: skip
        """Logits [B, T, V] of ids [B, T] int64 ([B, 1, V] with `last_only`).

        With a cache the ids continue what it holds, and are added to it. `documents` [B, T] numbers the documents
        packed into a row (attention stays inside each); `positions` [B, T] then restart with them.
        """
        start = cache.length if cache is not None else 0
        if cache is not None and start + ids.shape[1] > cache.max_length:
            raise ValueError(f"{start} cached and {ids.shape[1]} new tokens do not fit a cache of {cache.max_length}")
        past = None
        if cache is not None and self.memory is not None:
            past = cache.ids[:, max(0, start - self.memory.reach) : start]
            cache.ids[:, start : start + ids.shape[1]] = ids
        x, _ = self.hidden(ids, self.positions(ids, start, positions, documents, past), cache)
        if cache is not None:
            cache.length += ids.shape[1]
        return F.linear(x[:, -1:] if last_only else x, self.head_weight)

    def mtp_logits(self, ids: Tensor) -> list[Tensor]:
        """Logits of each MTP depth k = 1, 2, ...: [B, T - k, V], row i predicting token i + k + 1 of ids [B, T]."""
        states, _ = self.hidden(ids, self.positions(ids))
        out = []
        for k, module in enumerate(self.mtp, start=1):
            following = ids[:, k:]
            states, _ = module(states[:, : following.shape[1]], self.embed_tokens(following), self.positions(following))
            out.append(F.linear(states, self.head_weight))
        return out

    def losses(
        self, ids: Tensor, targets: Tensor, documents: Tensor | None = None, positions: Tensor | None = None,
        mtp_weight: float = 0.3, balance_weight: float = 1e-4, main_loss: MainLoss = linear_cross_entropy,
        mtp_loss: MainLoss = linear_cross_entropy,
    ) -> Losses:  # fmt: skip
        """Training losses of ids [B, T] against next tokens [B, T], negative where there is none.

        total = main + mtp_weight * mean over MTP depths + balance_weight * mean over MoE layers (V3 equations 18, 25).
        main = main_loss(states [B * T, D], head [V, D], targets [B * T]), which distillation replaces; mtp_loss alike.
        """
        at = self.positions(ids, 0, positions, documents)
        states, routings = self.hidden(ids, at)
        losses = Losses(None, main_loss(states.flatten(0, 1), self.head_weight, targets.flatten()))
        losses.total = losses.main
        following = ids
        for module in self.mtp:
            following = torch.cat((following[:, 1:], following[:, -1:]), dim=1)  # the last has no target
            targets = shift_targets(targets, documents)
            states, routing = module(states, self.embed_tokens(following), at)
            losses.mtp.append(mtp_loss(states.flatten(0, 1), self.head_weight, targets.flatten()))
            if routing is not None:
                routings.append(routing)
        if losses.mtp:
            losses.total = losses.total + mtp_weight / len(losses.mtp) * sum(losses.mtp)
        if routings:
            losses.loads = [routing.load for routing in routings]
            losses.balance = torch.stack([routing.balance for routing in routings]).mean()
            losses.total = losses.total + balance_weight * losses.balance
        return losses


def depth_in(documents: Tensor) -> Tensor:
    """How many tokens of the same document precede each, of the numbers [B, T] of documents that follow one another."""
    place = torch.arange(documents.shape[1], device=documents.device)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return place - torch.where(begins, place, 0).cummax(1).values


def has_compiler() -> bool:
    """Whether torch.compile finds a C++ compiler for CPU code; unlike `compiler.cxx` it takes CXX for one word."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def count_parameters(config: ModelConfig, mtp: bool = False) -> dict[str, int]:
    """{"total", "active", "table"}: all parameters of the main model, those that work on one token, and how many of all
    stand in Engram's table.

    MTP modules count if `mtp`. Nothing is allocated. Active parameters include the embedding, the output head, and
    of Engram's table the rows that a token reads.
    """
    with torch.device("meta"):
        model = Transformer(config)
    total = idle = 0
    for name, module in model.named_modules():
        if name.startswith("mtp.") and not mtp:
            continue
        size = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        total += size
        if isinstance(module, Experts):
            idle += size - size * config.num_experts_per_tok // config.n_routed_experts
        elif isinstance(module, Router) and config.topk_method == "noaux_tc":
            total += module.e_score_correction_bias.numel()
    table = 0
    if model.memory is not None:
        table = model.memory.hash.total_rows * config.engram_head_dim
        idle += table - model.memory.hash.primes.size * config.engram_head_dim
    return {"total": total + table, "active": total + table - idle, "table": table}
