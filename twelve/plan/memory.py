"""What a run holds in memory, by formula: an Engram table; training at its peak; the phases of reinforcement learning.

All is in float32 on a CPU. The formulas count what autograd keeps and what optimisers hold; the constants were set by
comparing the sum with the most that short runs held (bench/plan_check.py does it again).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from twelve.config import ModelConfig
from twelve.plan import cost

STATE_BYTES = 4  # of the optimiser, a row
JOURNAL_BYTES = 8  # a row that a step changes: its number; its bytes and its state come on top
FLOAT = 4
RUNTIME = 330 << 20  # Python, torch, tokenizers and their threads, before there is a model
ROUTING = 30 << 20  # what the libraries load and keep when experts are used
ROOM = 1.05  # of activations, for what lies between their pieces
COMPILER = 110 << 20  # what torch.compile keeps, besides
LOGIT_ROWS, QUERY_BLOCK = 512, 128  # of two chunks of logits (model/layers.py) and of scores (model/fast.py)
SAMPLE = 22  # bytes for a byte of text that a tokenizer is trained on
PAGE = 64  # tokens of a page of keys and values


@dataclass
class TablePlan:
    """Sizes of a table of `rows` rows, all heads of all layers together."""

    config: ModelConfig
    rows: int

    @property
    def row_bytes(self) -> int:
        width = self.config.engram_head_dim
        return {"float32": 4 * width, "bfloat16": 2 * width, "int8": width + 4}[self.config.engram_dtype]

    @property
    def heads(self) -> int:
        """All of them: how many rows a token reads."""
        config = self.config
        return len(config.engram_layer_ids) * (config.engram_max_ngram_size - 1) * config.engram_n_heads

    @property
    def table_bytes(self) -> int:
        return self.rows * self.row_bytes

    @property
    def state_bytes(self) -> int:
        return self.rows * STATE_BYTES

    def journal_bytes(self, tokens: int) -> int:
        """Most that a step of so many tokens writes to be able to take itself back."""
        return min(self.rows, tokens * self.heads) * (self.row_bytes + STATE_BYTES + JOURNAL_BYTES)

    def lines(self, tokens: int, distinct: dict[int, int], sample: int) -> dict[str, str]:
        """To be printed; tokens a step, and of each n how many distinct n-grams a sample of tokens has."""
        config, head = self.config, self.rows / self.heads
        shared = ", ".join(
            f"{share_of_collisions(count, head):.0%} of {count:,} distinct {n}-grams" for n, count in distinct.items()
        )
        return {
            "memory": f"{self.rows:,} rows of {config.engram_head_dim} {config.engram_dtype}: {_size(self.table_bytes)}"
            f" and {_size(self.state_bytes)} for the optimiser; a token reads {self.heads} rows"
            f" ({_size(self.heads * self.row_bytes)}); journal up to {_size(self.journal_bytes(tokens))} a step",
            "sharing": f"expected to share a head's row with another: {shared} in {sample:,} tokens",
        }


def share_of_collisions(distinct: int, rows: float) -> float:
    """The expected share of so many distinct n-grams whose row, of one head, another one has too."""
    return -float(np.expm1((distinct - 1) * np.log1p(-1 / rows))) if distinct > 1 and rows > 1 else float(distinct > 1)


def distinct_ngrams(ids: np.ndarray, documents: np.ndarray, n: int) -> int:
    """How many different runs of n tokens ids [B, T] have inside the documents [B, T] packed into their rows."""
    length = ids.shape[1] - n + 1
    windows = np.stack([ids[:, at : at + length] for at in range(n)], axis=-1)
    return len(np.unique(windows[documents[:, :length] == documents[:, n - 1 :]], axis=0))


def _size(count: int) -> str:
    for unit in ("bytes", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


# --- training ---------------------------------------------------------------------------------------------------------


def training(
    config: ModelConfig, rows: int, context: int, *, data_tokens: int = 0, muon: bool = True, compiled: bool = False
) -> dict[str, int]:
    """Bytes by component at the fullest moment of training with micro-batches of `rows` x `context` tokens.

    Activations are gone when the optimiser steps, but its copies were not seen to find their room, nor gradients: all
    count. data_tokens: of the corpus, whose file is mapped. A table counts as if all of it were read, which the kernel
    takes back where there is no room.
    """
    tokens = rows * context
    counts = cost.parameters(config, mtp=True)
    trained = counts.total - counts.table
    matrices = sum(count * r * c for (r, c), count in cost.matrices(config).items()) if muon else 0
    routing = ROUTING if config.n_routed_experts else 0
    streams = FLOAT * tokens * _of_streams(config)
    parts = {
        "python and torch": RUNTIME + routing + (COMPILER if compiled else 0),
        "data": 2 * data_tokens,
        "weights": FLOAT * trained,
        "optimiser": FLOAT * (matrices + 2 * (trained - matrices)),
        "table": TablePlan(config, cost.table_rows(config)).table_bytes if config.engram_layer_ids else 0,
        "activations": int(ROOM * (FLOAT * tokens * kept(config) - streams)),
        "streams": int(ROOM * streams),
        "logits and scores": FLOAT * (LOGIT_ROWS * config.vocab_size + _scores(config, rows, context)),
        "gradients": FLOAT * (trained + 2 * config.vocab_size * config.hidden_size),  # the head's are made twice more
        "orthogonalising": FLOAT * _orthogonalising(config) if muon else 0,
    }
    return {name: size for name, size in parts.items() if size}


def tokenizing(sample: int) -> dict[str, int]:
    """Bytes by component while a tokenizer is trained on so many bytes of text."""
    return {"python and torch": RUNTIME, "training the tokenizer": SAMPLE * sample}


def kept(config: ModelConfig) -> int:
    """Numbers that the forward pass keeps of one token for the backward pass."""
    c, width = config, config.hidden_size
    layers = range(c.num_hidden_layers + c.num_nextn_predict_layers)
    total = sum(_attention(c) + _feed_forward(c, index) for index in layers) + 4 * width
    total += c.num_nextn_predict_layers * 9 * width
    return total + _of_streams(c) + len(c.engram_layer_ids) * _of_lookup(c)


def _attention(c: ModelConfig) -> int:
    """With the norm before it: the residual, the normed one before and after its weight; what the kernel reads."""
    heads, width = c.num_attention_heads, c.hidden_size
    if c.is_mla:
        query, latent = c.qk_nope_head_dim + c.qk_rope_head_dim, 3 * c.kv_lora_rank + c.qk_rope_head_dim
        return 3 * width + heads * (2 * query + 3 * c.v_head_dim + 1) + latent + 3 * (c.q_lora_rank or 0)
    return 3 * width + heads * (5 * c.head_dim + 1) + (4 * heads * c.head_dim if c.model_type == "qwen3" else 0)


def _feed_forward(c: ModelConfig, index: int) -> int:
    if not c.is_moe_layer(index):
        return 3 * c.hidden_size + 4 * c.intermediate_size
    chosen, inner = c.num_experts_per_tok, c.moe_intermediate_size
    routing = 4 * c.n_routed_experts + 8 * chosen
    return 3 * c.hidden_size + routing + inner * (2 * chosen + 4 * (c.n_shared_experts or 0))


def _of_streams(c: ModelConfig) -> int:
    """Of all hyper-connections and the head's."""
    n, width = c.hc_mult, c.hidden_size
    layers = c.num_hidden_layers + c.num_nextn_predict_layers
    if n == 1:
        return 0
    each = (n + 1) * width + (2 + n) * n + 8
    if n not in (2, 4):  # the plain twin keeps every step of Sinkhorn-Knopp
        each += n * width + 2 * c.hc_sinkhorn_iters * (n + 1) * n
    return 2 * layers * each + 2 * n * width


def _of_lookup(c: ModelConfig) -> int:
    """Of a layer of Engram: its rows and their addresses, a value, keys, a convolution."""
    heads, taps = (c.engram_max_ngram_size - 1) * c.engram_n_heads, c.engram_kernel_size
    return heads * (c.engram_head_dim + 2) + ((4 + taps) * c.hc_mult + 1 + taps) * c.hidden_size


def _scores(c: ModelConfig, rows: int, context: int) -> int:
    """Numbers of two blocks of attention scores."""
    return 2 * rows * c.num_attention_heads * min(QUERY_BLOCK, context) * context


def _orthogonalising(config: ModelConfig) -> int:
    """Numbers of the copies in which Muon multiplies: all matrices' updates, and the largest batch of one shape."""
    found = cost.matrices(config)
    each = [count * rows * columns for (rows, columns), count in found.items()]
    return sum(each) + 6 * max(each, default=0)


# --- reinforcement learning -------------------------------------------------------------------------------------------


def reinforcement(
    config: ModelConfig, answers: int, length: int, *, trained: int | None = None, tokens: int = 2048
) -> dict[str, dict[str, int]]:
    """Bytes by component in each phase of a step of RL: sampling `answers` of up to `length` tokens with their prompt,
    scoring them again, and the update. trained: parameters of adapters; all of the model's by default.

    See posttrain/memory.py, which keeps a run below a limit.
    """
    counts = cost.parameters(config, mtp=True)
    total = counts.total - counts.table
    trained = total if trained is None else trained
    table = TablePlan(config, cost.table_rows(config)).table_bytes if config.engram_layer_ids else 0
    fixed = {"python and torch": RUNTIME, "weights": FLOAT * (total + (trained if trained < total else 0)),
             "optimiser": 2 * FLOAT * trained, "table": table}  # fmt: skip
    pages = answers * -(-length // PAGE) * PAGE
    passes = FLOAT * max(tokens, length) * kept(config)
    logits = {"logits and scores": FLOAT * (LOGIT_ROWS * config.vocab_size + _scores(config, 1, max(tokens, length)))}
    phases = {
        "sampling": {"keys and values": pages * cost.kv_bytes(config)},
        "scoring": {"activations": passes // (config.num_hidden_layers or 1), **logits},
        "update": {"activations": passes, "gradients": FLOAT * trained, **logits},
    }
    return {name: {key: size for key, size in (fixed | phase).items() if size} for name, phase in phases.items()}
