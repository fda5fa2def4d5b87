"""Conditional memory (Engram, arXiv 2601.07372): the last tokens, hashed, are addresses in a table of embeddings.

Addresses follow from token ids alone, so the table can lie in host memory or in a file (`twelve.table`), and its rows
be fetched before the forward pass needs them. A layer weighs what it gets against its own state.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twelve.config import ModelConfig
from twelve.errors import InputError
from twelve.model.attention import LayerCache, Positions
from twelve.model.branches import Branches
from twelve.model.compression import Vocabulary, compress
from twelve.rows import RowFile
from twelve.table import Table

LAYER_SEEDS = 10007  # how far the seeds of two layers with neighbouring numbers are apart


class NGramHash:
    """From the last tokens to rows: for each layer L, n = 2 .. N and head K a hash function of its own.

    layers [L]: the numbers that the functions are drawn for, which go along where an Engram moves. primes, offsets
    [L, N - 1, K] int64: how many rows a head has, no two the same number, and where they begin in the one table of all
    layers. multipliers [L, N] int64: odd, and so small that no product with a token overflows.
    """

    def __init__(self, config: ModelConfig) -> None:
        numbers, ngrams = config.engram_hash_layers or config.engram_layer_ids, config.engram_max_ngram_size - 1
        shape = (len(numbers), ngrams, config.engram_n_heads)
        here = np.array(numbers) >= 0
        self.layers = [number for number in numbers if number >= 0]
        self.primes = _primes(config.engram_vocab_size, math.prod(shape)).reshape(shape)[here]
        ends = np.cumsum(self.primes)
        self.offsets = ends.reshape(self.primes.shape) - self.primes
        self.total_rows = int(ends[-1])
        largest = (2**63 - 1) // config.vocab_size
        seeds = (config.engram_seed + LAYER_SEEDS * layer for layer in self.layers)
        drawn = [np.random.Philox(key=seed).random_raw(ngrams + 1) % np.uint64((largest + 1) // 2) for seed in seeds]
        self.multipliers = np.array(drawn).astype(np.int64) * 2 + 1

    def rows(self, window: Sequence[np.ndarray]) -> np.ndarray:
        """Rows of the table, int64 [L, ..., N - 1, K], for compressed tokens: window[i] [...] are those i places back.

        Of n tokens: (XOR over i < n of token i times multiplier i) modulo the head's prime.
        """
        rows = np.empty((len(self.primes), *window[0].shape, *self.primes.shape[1:]), np.int64)
        for layer, multipliers in enumerate(self.multipliers):
            mixed = window[0] * multipliers[0]
            for n in range(1, len(multipliers)):
                mixed = mixed ^ (window[n] * multipliers[n])
                rows[layer, ..., n - 1, :] = mixed[..., None] % self.primes[layer, n - 1] + self.offsets[layer, n - 1]
        return rows


def _described(rows: int, width: int, dtype: str) -> str:
    return f"{rows:,} rows of {width} {dtype}"


def _primes(start: int, count: int) -> np.ndarray:
    """The first `count` primes from `start` on, int64."""
    span = 64 * count
    while True:
        candidates = np.arange(max(start, 2), max(start, 2) + span)
        whole = np.ones(span, bool)
        for divisor in range(2, int(candidates[-1] ** 0.5) + 1):
            first = max(divisor * divisor, -(-candidates[0] // divisor) * divisor)
            whole[first - candidates[0] :: divisor] = False
        if whole.sum() >= count:
            return candidates[whole][:count]
        span *= 2


class EngramMemory(nn.Module):
    """The table of all Engram layers, and what turns a forward pass's tokens into rows of it.

    `compressed` [vocab_size] int32 maps token ids to those that are hashed. `reach`: how many tokens before the first
    new one `look_up` wants to see. The table is None until `create` or `open`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, self.hash = config, NGramHash(config)
        self.compressed = np.arange(config.vocab_size, dtype=np.int32)
        self.table: Table | None = None
        self.reach = config.engram_max_ngram_size - 1 + _span(config)

    def use_tokenizer(self, tokenizer: Vocabulary) -> None:
        """Hash what `compress` makes of this tokenizer's ids. Before there is a table: its rows would lose their sense.

        Ids that the tokenizer does not have stay apart.
        """
        known = compress(tokenizer)
        beyond = np.arange(self.config.vocab_size - len(known), dtype=np.int32)
        self.compressed = np.concatenate((known, known.max(initial=-1) + 1 + beyond))

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides which row belongs to which tokens; a table of another identity means nothing here."""
        config = self.config
        return {
            "layers": self.hash.layers, "max_ngram_size": config.engram_max_ngram_size,
            "heads": config.engram_n_heads, "pad_id": config.engram_pad_id, "seed": config.engram_seed,
            "vocab_size": config.vocab_size, "primes": self.hash.primes.tolist(),
            "multipliers": self.hash.multipliers.tolist(),
            "compressed_ids": hashlib.sha256(self.compressed.astype("<i4").tobytes()).hexdigest(),
        }  # fmt: skip

    def create(self, path: Path | None = None) -> None:
        """Make a table of zeros: in memory, or in the file `path`."""
        config = self.config
        self.table = Table.create(
            path, self.hash.total_rows, config.engram_head_dim, config.engram_dtype, self.identity, self.compressed
        )

    def open(self, path: Path, writable: bool = False) -> None:
        """Read the table from its file, and with it the map of token ids; `writable`: to be trained.

        InputError when it is not a whole table that was made for this configuration.
        """
        file = RowFile(path)
        ids, known = file.rows("compressed_ids"), self.config.vocab_size
        compressed = ids.take(np.arange(ids.count))[:, 0] if file.code("compressed_ids") == "I32" else np.empty(0)
        file.close()
        if len(compressed) != known or compressed.min() < 0 or compressed.max() >= known:  # addresses follow from them
            raise InputError(f"{path}: compressed_ids are not {known} token ids below {known}: copy the file again")
        self.compressed = compressed
        self.table = table = Table.open(path, self.identity, writable)
        found = (table.count, table.width, table.dtype)
        wanted = (self.hash.total_rows, self.config.engram_head_dim, self.config.engram_dtype)
        if found != wanted:
            raise InputError(f"{path} has {_described(*found)}, config.json wants {_described(*wanted)}")

    def adopt(self, other: EngramMemory) -> None:
        """Read the table of `other`, which has all of these hashes, without the rows of those that are not here."""
        self.compressed, self.table = other.compressed, other.table
        places = [other.hash.layers.index(layer) for layer in self.hash.layers]
        if len(places) < len(other.hash.layers):
            starts = other.hash.offsets[places, 0, 0]
            ends = starts + other.hash.primes[places].sum((1, 2))
            self.table = other.table.part(np.stack((starts, ends), 1).tolist(), self.identity)

    def look_up(self, ids: Tensor, at: Positions) -> dict[int, Tensor]:
        """What the table holds for ids [B, T] and for the P tokens of `at.past` in front of them: by layer,
        float32 [B, P + T, (N - 1) * heads * head_dim].

        In training the tensors ask for gradients, which `table.update` takes from `table.pending`.
        """
        found = {}
        learns = self.training and torch.is_grad_enabled() and self.table.trainable
        for layer, rows in zip(self.config.engram_layer_ids, self.addresses(ids, at), strict=True):
            values = torch.from_numpy(self.table.read(rows)).flatten(-3)
            if ids.is_cuda:  # from pinned memory a copy does not hold up what comes before it is needed
                values = values.pin_memory().to(ids.device, non_blocking=True)
            values = values.to(ids.device)
            if learns:
                self.table.pending.append((rows, values.requires_grad_()))
            found[layer] = values
        return found

    def prefetch(self, ids: Tensor) -> None:
        """Have a thread fetch what `look_up` will soon read for ids [B, T], but for the first tokens of documents."""
        if self.table.is_far:
            self.table.prefetch(self.addresses(ids, Positions(ids, ids, None)))

    def addresses(self, ids: Tensor, at: Positions) -> np.ndarray:
        """The rows that `look_up` reads, int64 [L, B, P + T, N - 1, heads]. The first N - 1 of P tokens do not have all
        that precedes them in sight, so their rows mean nothing."""
        pad = self.config.engram_pad_id
        ids = (ids if at.past is None else torch.cat((at.past, ids), dim=1)).cpu().numpy()
        tokens = np.where(ids < 0, pad, self.compressed[ids]).astype(np.int64)
        window = [tokens]
        for back in range(1, self.config.engram_max_ngram_size):
            earlier = np.full_like(tokens, pad)
            if isinstance(at.mask, Branches):
                place = at.mask.before(back).numpy()
                earlier[:, place >= 0] = tokens[:, place[place >= 0]]
            else:
                earlier[:, back:] = tokens[:, :-back]
                if at.depth is not None:
                    new = earlier[:, earlier.shape[1] - at.depth.shape[1] :]
                    new[np.broadcast_to(at.depth.cpu().numpy() < back, new.shape)] = pad
            window.append(earlier)
        return self.hash.rows(window)


class Engram(nn.Module):
    """What a layer makes of the rows e of its last tokens, for every residual stream x.

    k = W_K e and v = W_V e; the gate is alpha = sigmoid(s), s the signed square root of <norm(x), norm(k)> / sqrt(D);
    u = alpha v. To x is added u + SiLU(conv(norm(u))): a causal depth-wise convolution, dilated by N, that begins as
    zero. W_V is shared; streams have keys, norms and convolutions of their own.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.streams, self.width, self.eps = config.hc_mult, config.hidden_size, config.rms_norm_eps
        self.dilation, self.span = config.engram_max_ngram_size, _span(config)
        read = (config.engram_max_ngram_size - 1) * config.engram_n_heads * config.engram_head_dim
        wide = self.streams * self.width
        self.value_proj = nn.Linear(read, self.width, bias=False)
        self.key_proj = nn.Linear(read, wide, bias=False)
        self.query_norm, self.key_norm = nn.Parameter(torch.ones(wide)), nn.Parameter(torch.ones(wide))
        self.taps = config.engram_kernel_size
        if self.taps:
            self.conv_norm = nn.Parameter(torch.ones(wide))
            self.conv = nn.Parameter(torch.zeros(self.taps, wide))
        self.last_gates: Tensor | None = None  # [B, T, streams], of the last pass in eval mode

    def initialise(self) -> None:
        if self.taps:
            nn.init.zeros_(self.conv)

    def cache_shapes(self) -> list[tuple[int, ...]]:
        """Of past tokens the gates are kept: values follow from the token ids."""
        return [(self.streams if self.span else 0,)]

    def forward(self, x: Tensor, found: Tensor, at: Positions, gates: LayerCache | None = None) -> Tensor:
        """x [B, T, D] or [B, T, streams, D], found [B, P + T, E] -> what is to be added to x, of its shape."""
        streams = x.unflatten(-1, (1, -1)) if self.streams == 1 else x
        length, past = x.shape[1], min(found.shape[1] - x.shape[1], self.span)
        found = found[:, found.shape[1] - length - past :].to(x.dtype)
        value = self.value_proj(found)  # [B, past + T, D]
        key = self.key_proj(found[:, past:]).unflatten(-1, (self.streams, -1))
        weight = (self.query_norm * self.key_norm).view(self.streams, -1)
        score = (streams * (key * weight)).sum(-1) * self._scale(streams) * self._scale(key) * self.width**-0.5
        gate = torch.sigmoid(score.abs().clamp(min=1e-6).sqrt() * score.sign())  # [B, T, streams]
        if not self.training:
            self.last_gates = gate.detach()
        if self.span and gates is not None:
            gate = self._with_past(gate, past, at, gates)
        new = slice(gate.shape[1] - length, None)
        out = gate[:, new, :, None] * value[:, new, None]
        if self.taps:  # norm(alpha v) is v times one number a token and stream
            scale = gate * torch.rsqrt(gate.square() * value.square().mean(-1, keepdim=True) + self.eps)
            out = out + F.silu(self._convolve(value, scale, at, length))
        return out.flatten(-2) if self.streams == 1 else out

    def _scale(self, x: Tensor) -> Tensor:
        return torch.rsqrt(x.square().mean(-1) + self.eps)

    def _with_past(self, gate: Tensor, past: int, at: Positions, gates: LayerCache) -> Tensor:
        """Keep the gates of new tokens; [B, past + T, streams] of all that the convolution sees."""
        (every,) = gates.append(at.start, gate)
        first = torch.full((1, 1), at.start, device=gate.device) if at.depth is None else at.depth[:, :1]
        places = first - past + torch.arange(past, device=gate.device)  # below 0 there is no token, and nobody looks
        places = places.clamp(min=0).expand(len(gate), -1)
        return torch.cat((every.gather(1, places[..., None].expand(-1, -1, self.streams)), gate), dim=1)

    def _convolve(self, value: Tensor, scale: Tensor, at: Positions, length: int) -> Tensor:
        """Of scale [B, past + T, streams] times value [B, past + T, D] -> [B, T, streams, D]."""
        kernel = (self.conv * self.conv_norm).unflatten(-1, (self.streams, -1))
        out = None
        for tap, weight in enumerate(kernel.flip(0)):
            steps = tap * self.dilation
            part = _earlier(scale, steps, at, length)
            if at.depth is not None:
                part = part.masked_fill((at.depth < steps)[..., None], 0)
            part = weight * (part[..., None] * _earlier(value, steps, at, length)[:, :, None])
            out = part if out is None else out + part
        return out


def _earlier(x: Tensor, steps: int, at: Positions, length: int) -> Tensor:
    """x [B, S, ...] at the tokens that are `steps` before each of its last `length`; 0 for those before the first."""
    if isinstance(at.mask, Branches):
        place = at.mask.before(steps).to(x.device)
        return x[:, place].masked_fill((place < 0)[:, None], 0)
    start = x.shape[1] - length - steps
    shifted = x[:, max(0, start) : max(0, start + length)]
    return F.pad(shifted, (0, 0, length - shifted.shape[1], 0))


def _span(config: ModelConfig) -> int:
    """How many tokens back the convolution reaches."""
    return max(0, config.engram_kernel_size - 1) * config.engram_max_ngram_size
