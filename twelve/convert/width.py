"""Another width made from a model's own: residual, and heads, latent ranks and feed-forward layers in proportion."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from twelve.config import ModelConfig
from twelve.convert.axis import Axis, chosen, padded, principal, repeated
from twelve.convert.importance import activity, moments
from twelve.model import Transformer


def scaled(config: ModelConfig, width: int) -> ModelConfig:
    """The config of another width: heads, ranks and feed-forward sizes in proportion, the elements of a head as before.
    Query heads that share a key keep their number."""

    def size(old: int | None, whole: int = 32) -> int | None:
        step = math.gcd(old, whole) if old else 1  # what divides the size, up to that, goes on dividing it
        return old and step * max(1, round(old * width / config.hidden_size / step))

    own = config.kv_token_rank if config.kv_token_layer_ids else 0  # tokens keep their part of a latent
    made = size(config.kv_lora_rank and config.kv_lora_rank - own)
    together = 1 if config.is_mla else config.num_attention_heads // config.num_key_value_heads
    heads = size(config.num_attention_heads // together, 1)
    return replace(
        config, hidden_size=width, num_attention_heads=heads * together, num_key_value_heads=heads,
        intermediate_size=size(config.intermediate_size), moe_intermediate_size=size(config.moe_intermediate_size),
        kv_lora_rank=made and made + own, q_lora_rank=size(config.q_lora_rank),
        tie_word_embeddings=config.tie_word_embeddings and width > config.hidden_size,
    )  # fmt: skip


def with_width(model: Transformer, width: int, ids: Tensor, seed: int) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Config and tensors of the model at another `width`.

    Wider: exact but for rounding. Channels of the residual and of latents are copied whole times and filled up with
    zeros, heads and neurons are repeated; readers take shares, and noise that cancels tells copies apart.
    Narrower: the residual and the latents keep their principal directions, over the ids [W, T] int64 that are read, and
    every RMSNorm is scaled by the change of the root mean square; of heads and neurons those stay whose mean |output|
    times the length of what reads it is largest. A tied head becomes a matrix of its own, since it cannot turn with the
    embedding and take the norm's scales in, too.
    Engram's rows keep their width. Wider: SiLU behind its convolution does not commute with a scale, so the residual
    then has none but 1, and where zeros fill it up, norms' weights and rms_norm_eps make up for them. Narrower: a key's
    norm counts what the directions do not hold at its mean, and the convolution, which cannot turn with them, has for
    each the mean of the channels' filters, by their shares in it. Both are only near to what they were.
    """
    return _Change(model, width, ids, seed).result()


class _Change:
    """One change of width, module by module; `state` gathers the new tensors."""

    def __init__(self, model: Transformer, width: int, ids: Tensor, seed: int) -> None:
        self.model, self.old, self.new = model, model.config, scaled(model.config, width)
        self.narrower = width < self.old.hidden_size
        self.shrink = 1.0  # of the residual
        if not self.narrower and self.old.engram_layer_ids and self.old.engram_kernel_size:
            self.shrink = width // self.old.hidden_size * self.old.hidden_size / width
            self.new.rms_norm_eps *= self.shrink
        self.noise = {"draw": torch.Generator().manual_seed(seed), "spread": self.old.initializer_range}
        self.moments = moments(model, ids) if self.narrower else {}
        self.activity = activity(model, ids) if self.narrower else {}
        self.before = model.state_dict()
        self.state: dict[str, Tensor] = {}

    def get(self, name: str) -> Tensor:
        return self.before[name].detach().cpu().double()

    def _weights(self, name: str, *parts: str) -> list[Tensor]:
        return [self.get(f"{name}.{part}.weight") for part in parts]

    def put(self, name: str, tensor: Tensor) -> None:
        self.state[name] = tensor.to(self.before.get(name, self.before["norm.weight"])).contiguous()

    def result(self) -> tuple[ModelConfig, dict[str, Tensor]]:
        model, old = self.model, self.old
        moment = None
        if self.narrower:  # every norm counts alike
            inner = ("_a_layernorm", "hnorm", "key_norm", "conv_norm")
            moment = sum(m for name, m in self.moments.items() if not name.endswith(inner))
        self.stream = self._behind_norm(old.hidden_size, self.new.hidden_size, moment, self.shrink)
        self.longer = 1.0 if self.narrower else self.shrink * self.new.hidden_size / old.hidden_size  # <x, y>
        self.put("embed_tokens.weight", self.stream.rows(self.get("embed_tokens.weight"), 1))
        blocks = [f"layers.{index}" for index in range(len(model.layers))]
        for name in blocks + [f"mtp.{index}.block" for index in range(len(model.mtp))]:
            (self._latent if old.is_mla else self._grouped)(f"{name}.self_attn", f"{name}.input_layernorm")
            self._feed_forward(f"{name}.mlp", f"{name}.post_attention_layernorm")
        for index in old.engram_layer_ids:
            self._engram(f"layers.{index}.engram")
        self._ends()
        return self.new, self.state

    # --- pieces -------------------------------------------------------------------------------------------------------

    def _behind_norm(self, old: int, new: int, moment: Tensor | None, shrink: float = 1.0) -> Axis:
        return principal(moment, new, **self.noise) if self.narrower else padded(old, new, shrink, **self.noise)

    def _units(self, old: int, new: int, score: Tensor | None) -> Axis:
        return chosen(score, new, **self.noise) if self.narrower else repeated(old, new, **self.noise)

    def _read(self, norm: str, axis: Axis, *matrices: Tensor) -> list[Tensor]:
        """The matrices that read from a normed axis, changed on that side; puts the norm's weights."""
        weight = self.get(f"{norm}.weight")
        if not self.narrower:
            self.put(f"{norm}.weight", axis.norm(weight))
            return [axis.columns(matrix) for matrix in matrices]
        self.put(f"{norm}.weight", axis.even(self._shrunk(norm, axis.write)))
        return [axis.columns(matrix * weight) for matrix in matrices]

    def _shrunk(self, norm: str, write: Tensor) -> float:
        """Root mean square of what `write` makes of a norm's input, over that of the input."""
        moment = self.moments[norm]
        return float((torch.einsum("ni,ij,nj->n", write, moment, write).mean() / moment.diagonal().mean()).sqrt())

    def _blocks(self, axis: Axis, matrix: Tensor) -> Tensor:
        """Rows [units * size, ...] of a matrix that writes whole units, such as heads."""
        return axis.rows(matrix.unflatten(0, (axis.write.shape[1], -1))).flatten(0, 1)

    def _put_with_bias(self, name: str, matrix: Tensor, rows) -> None:
        """A projection and its bias, if it has one, with `rows` applied to what they write."""
        self.put(f"{name}.weight", rows(matrix))
        if f"{name}.bias" in self.before:
            self.put(f"{name}.bias", rows(self.get(f"{name}.bias")))

    def _put_output(self, name: str, units: Axis) -> None:
        """A projection from whole units back to the residual."""
        matrix = self.get(f"{name}.weight").unflatten(1, (units.write.shape[1], -1))
        self._put_with_bias(name, units.columns(matrix, 1).flatten(1), self.stream.rows)

    def _score(self, name: str, units: int) -> Tensor | None:
        """Of each unit: mean |output| times the length of the columns that read it."""
        if not self.narrower:
            return None
        return (self.activity[name] * self.get(f"{name}.weight").norm(dim=0)).view(units, -1).sum(1)

    # --- modules ------------------------------------------------------------------------------------------------------

    def _latent(self, name: str, norm: str) -> None:
        old, new = self.old, self.new
        score = self._score(f"{name}.o_proj", old.num_attention_heads)
        heads = self._units(old.num_attention_heads, new.num_attention_heads, score)
        own = self.before[f"{name}.token_latent.weight"].shape[1] if f"{name}.token_latent.weight" in self.before else 0
        made = old.kv_lora_rank - own
        latent = self._behind_norm(made, new.kv_lora_rank - own, self.moments.get(f"{name}.kv_a_layernorm"))
        first = "q_proj" if old.q_lora_rank is None else "q_a_proj"
        query, both = self._read(norm, self.stream, *self._weights(name, first, "kv_a_proj_with_mqa"))
        if old.q_lora_rank is not None:
            inner = self.moments.get(f"{name}.q_a_layernorm")
            queries = self._behind_norm(old.q_lora_rank, new.q_lora_rank, inner)
            self._put_with_bias(f"{name}.q_a_proj", query, queries.rows)
            [query] = self._read(f"{name}.q_a_layernorm", queries, *self._weights(name, "q_b_proj"))
        last = "q_proj" if old.q_lora_rank is None else "q_b_proj"
        self.put(f"{name}.{last}.weight", self._blocks(heads, query))

        def rows(both: Tensor) -> Tensor:
            """The latent, then the shared rotary key, which no width touches."""
            return torch.cat((latent.rows(both[:made]), both[made:]))

        self._put_with_bias(f"{name}.kv_a_proj_with_mqa", both, rows)
        keys_values = self.get(f"{name}.kv_b_proj.weight")
        [of_state] = self._read(f"{name}.kv_a_layernorm", latent, keys_values[:, :made])
        keys_values = torch.cat((of_state, keys_values[:, made:]), dim=1)
        self.put(f"{name}.kv_b_proj.weight", self._blocks(heads, keys_values))
        if own:
            self.put(f"{name}.token_latent.weight", self.get(f"{name}.token_latent.weight"))
        self._put_output(f"{name}.o_proj", heads)

    def _grouped(self, name: str, norm: str) -> None:
        """Key-value heads are the units, each with its query heads."""
        before, after = self.old.num_key_value_heads, self.new.num_key_value_heads
        units = self._units(before, after, self._score(f"{name}.o_proj", before))
        parts = ("q_proj", "k_proj", "v_proj")
        for part, matrix in zip(parts, self._read(norm, self.stream, *self._weights(name, *parts)), strict=True):
            self._put_with_bias(f"{name}.{part}", matrix, lambda rows: self._blocks(units, rows))
        for part in (f"{name}.q_norm.weight", f"{name}.k_norm.weight"):
            if part in self.before:
                self.put(part, self.get(part))
        self._put_output(f"{name}.o_proj", units)

    def _feed_forward(self, name: str, norm: str) -> None:
        if f"{name}.gate.weight" not in self.before:
            self._dense(name, *self._read(norm, self.stream, *self._weights(name, "gate_proj", "up_proj")),
                        self.new.intermediate_size)  # fmt: skip
            return
        shared, bias = f"{name}.shared_experts", f"{name}.gate.e_score_correction_bias"
        dense = self._weights(shared, "gate_proj", "up_proj") if self.old.n_shared_experts else []
        experts = self.get(f"{name}.experts.gate_up_proj")
        router, both, *dense = self._read(norm, self.stream, *self._weights(name, "gate"), experts, *dense)
        self.put(f"{name}.gate.weight", router)
        if bias in self.before:
            self.put(bias, self.get(bias))
        if dense:
            self._dense(shared, *dense, self.new.moe_intermediate_size * self.new.n_shared_experts)
        firsts, seconds = [], []
        for expert, (first, down) in enumerate(zip(both, self.get(f"{name}.experts.down_proj"), strict=True)):
            score = self.activity[f"{name}.experts"][expert] * down.norm(dim=0) if self.narrower else None
            units = self._units(down.shape[1], self.new.moe_intermediate_size, score)
            firsts.append(units.rows(first.unflatten(0, (2, -1)), 1).flatten(0, 1))
            seconds.append(self.stream.rows(units.columns(down)))
        self.put(f"{name}.experts.gate_up_proj", torch.stack(firsts))
        self.put(f"{name}.experts.down_proj", torch.stack(seconds))

    def _dense(self, name: str, gate: Tensor, up: Tensor, size: int) -> None:
        units = self._units(len(gate), size, self._score(f"{name}.down_proj", len(gate)))
        self._put_with_bias(f"{name}.gate_proj", gate, units.rows)
        self._put_with_bias(f"{name}.up_proj", up, units.rows)
        self._put_output(f"{name}.down_proj", units)

    def _engram(self, name: str) -> None:
        """The score is an inner product of two normed vectors over the root of the width."""
        key, value = self._weights(name, "key_proj", "value_proj")
        query_norm, key_norm = self.get(f"{name}.query_norm"), self.get(f"{name}.key_norm")
        write, root = self.stream.write, (self.new.hidden_size / self.old.hidden_size) ** 0.5
        if self.narrower:  # both norms' scales go into the key
            product = query_norm * key_norm
            key = key * product[:, None]
            query_norm = self.stream.even(self._shrunk(f"{name}.query_norm", write))
            key_norm = self.stream.even(self._shrunk(f"{name}.key_norm", write * product))
        else:
            query_norm, key_norm = self.stream.norm(query_norm), self.stream.norm(key_norm)
        self.put(f"{name}.query_norm", query_norm)
        self.put(f"{name}.key_norm", key_norm * root / self.longer)
        self.put(f"{name}.key_proj.weight", self.stream.rows(key))
        self.put(f"{name}.value_proj.weight", self.stream.rows(value))
        if self.old.engram_kernel_size:
            self._convolution(name)

    def _convolution(self, name: str) -> None:
        conv, norm = self.get(f"{name}.conv"), self.get(f"{name}.conv_norm")
        if not self.narrower:
            self.put(f"{name}.conv", torch.stack([self.stream.factors(tap) for tap in conv]))
            self.put(f"{name}.conv_norm", self.stream.norm(norm))
            return
        self.put(f"{name}.conv", (conv * norm) @ (self.stream.write**2).T)
        self.put(f"{name}.conv_norm", self.stream.even(self._shrunk(f"{name}.conv_norm", self.stream.write)))

    def _ends(self) -> None:
        """Final norm and head, and what is around the blocks of MTP modules, which read the states that it leaves."""
        head = "embed_tokens" if self.old.tie_word_embeddings else "lm_head"
        [head] = self._read("norm", self.stream, self.get(f"{head}.weight"))
        if not self.new.tie_word_embeddings:
            self.put("lm_head.weight", head)
        final = "norm"
        for index in range(len(self.model.mtp)):
            name = f"mtp.{index}"
            embedded, hidden = self.get(f"{name}.eh_proj.weight").chunk(2, dim=1)
            if self.narrower:  # the final norm's scales, which the head has taken in
                hidden = hidden * self.get(f"{final}.weight")
            [embedded] = self._read(f"{name}.enorm", self.stream, embedded)
            [hidden] = self._read(f"{name}.hnorm", self.stream, hidden)
            if self.narrower:  # what comes in has the mean square 1, and had another with these scales
                before = (self.get(f"{final}.weight") ** 2 * self.moments[final].diagonal()).mean().sqrt()
                scale = self._shrunk(final, self.stream.write) / before
                self.put(f"{name}.hnorm.weight", scale.expand(self.new.hidden_size))
            self.put(f"{name}.eh_proj.weight", self.stream.rows(torch.cat((embedded, hidden), 1)))
            final = f"{name}.norm"
            self._read(final, self.stream)
        if self.new.tie_word_embeddings:  # the head reads as the embedding writes: the norms make up for it
            for name in ("norm", *(f"mtp.{index}.norm" for index in range(len(self.model.mtp)))):
                weight = self.state[f"{name}.weight"].double()
                self.put(f"{name}.weight", weight / self.longer)
