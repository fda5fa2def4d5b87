"""What a model takes, by formula from its configuration: parameters, operations a token, bytes of keys and values.

No tensor is made. `twelve.model.count_parameters` counts the same from the built model.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from twelve.config import ModelConfig

NEWTON_SCHULZ_STEPS = 5  # of Muon, which orthogonalises every matrix once a step


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters. `active` work on one token: not the experts and rows that it does not use."""

    total: int
    active: int
    # these three are contained in both of the above, the table as far as it is read
    embedding: int = 0  # and tokens' own parts of latents, looked up like it
    head: int = 0  # 0 where it is the embedding
    table: int = 0  # of Engram, all of it

    def __add__(self, other: Parameters) -> Parameters:
        mine, theirs = (vars(each).values() for each in (self, other))
        return Parameters(*(a + b for a, b in zip(mine, theirs, strict=True)))


def parameters(config: ModelConfig, mtp: bool = False) -> Parameters:
    """Of the main model, and of the MTP modules if `mtp`. Embedding and output head count as active."""
    c = config
    width, vocabulary = c.hidden_size, c.vocab_size
    embedding, head = vocabulary * width, 0 if c.tie_word_embeddings else vocabulary * width
    rows, read = table_rows(c), rows_read(c)
    plain = embedding + head + width + _head_of_streams(c)
    found = Parameters(
        plain + rows * c.engram_head_dim, plain + read * c.engram_head_dim, embedding, head, rows * c.engram_head_dim
    )
    for index in range(c.num_hidden_layers):
        found += _block(c, index)
    for depth in range(c.num_nextn_predict_layers if mtp else 0):
        found += mtp_module(c, depth)
    return found


def mtp_module(config: ModelConfig, depth: int = 0) -> Parameters:
    """Of one MTP module, without the embedding and head that it shares: projection, block, norms."""
    width = config.hidden_size
    joining = 2 * width * width + 3 * width + _head_of_streams(config)
    return Parameters(joining, joining) + _block(config, config.num_hidden_layers + depth)


def _block(c: ModelConfig, index: int) -> Parameters:
    feed, idle = _feed_forward(c, index)
    vectors = 2 * c.hidden_size  # norms
    own = c.vocab_size * c.token_rank(index)
    size = vectors + _attention(c, index) + own + feed + 2 * _hyper_connection(c)
    size += (index in c.engram_layer_ids) * _lookup(c)
    return Parameters(size, size - idle, own)


def _attention(c: ModelConfig, index: int) -> int:
    width, heads = c.hidden_size, c.num_attention_heads
    if not c.is_mla:
        queries, keys = heads * c.head_dim, c.num_key_value_heads * c.head_dim
        biases = queries + 2 * keys + (width if c.model_type != "qwen2" else 0) if c.attention_bias else 0
        return 2 * width * (queries + keys) + biases + (2 * c.head_dim if c.model_type == "qwen3" else 0)
    queries, rank = heads * (c.qk_nope_head_dim + c.qk_rope_head_dim), c.kv_lora_rank
    low = c.q_lora_rank
    size = width * queries if low is None else width * low + low + low * queries
    made = rank - c.token_rank(index)
    size += width * (made + c.qk_rope_head_dim) + made + rank * heads * (c.qk_nope_head_dim + c.v_head_dim)
    size += heads * c.v_head_dim * width
    return size + ((low or 0) + made + c.qk_rope_head_dim + width if c.attention_bias else 0)


def _feed_forward(c: ModelConfig, index: int) -> tuple[int, int]:
    """All, and how many of them do not work on a token."""
    width = c.hidden_size
    if not c.is_moe_layer(index):
        inner = c.intermediate_size
        return 3 * width * inner + (2 * inner + width if c.mlp_bias else 0), 0
    experts, one = c.n_routed_experts, 3 * width * c.moe_intermediate_size
    router = experts * width + (experts if c.topk_method == "noaux_tc" else 0)
    return router + (experts + (c.n_shared_experts or 0)) * one, (experts - c.num_experts_per_tok) * one


def _hyper_connection(c: ModelConfig) -> int:
    n = c.hc_mult
    return (2 + n) * n * (n * c.hidden_size + 1) + 3 if n > 1 else 0


def _head_of_streams(c: ModelConfig) -> int:
    n = c.hc_mult
    return n * (n * c.hidden_size + 1) + 1 if n > 1 else 0


def _lookup(c: ModelConfig) -> int:
    """Of one layer's Engram, without the table."""
    wide = c.hc_mult * c.hidden_size
    kernel = c.engram_kernel_size
    return _read_width(c) * (c.hidden_size + wide) + 2 * wide + (wide * (1 + kernel) if kernel else 0)


def _read_width(c: ModelConfig) -> int:
    return (c.engram_max_ngram_size - 1) * c.engram_n_heads * c.engram_head_dim


def rows_read(config: ModelConfig) -> int:
    """Rows of Engram's table that a token reads, which is also its number of heads in all layers."""
    return len(config.engram_layer_ids) * (config.engram_max_ngram_size - 1) * config.engram_n_heads


def table_rows(config: ModelConfig) -> int:
    """Rows of Engram's table: every head takes the next prime from engram_vocab_size on; those of an Engram that a
    resizing has dropped are left out."""
    layers = config.engram_hash_layers or config.engram_layer_ids
    each = (config.engram_max_ngram_size - 1) * config.engram_n_heads
    rows = _primes(max(2, config.engram_vocab_size), each * len(layers))
    return sum(sum(rows[each * place : each * (place + 1)]) for place, layer in enumerate(layers) if layer >= 0)


@lru_cache
def _primes(number: int, count: int) -> list[int]:
    """The first ones from `number` on."""
    found: list[int] = []
    while len(found) < count:
        if all(number % divisor for divisor in range(2, math.isqrt(number) + 1)):
            found.append(number)
        number += 1
    return found


# --- operations -------------------------------------------------------------------------------------------------------


def training_flops(config: ModelConfig, context: int) -> float:
    """Operations that one token takes in training, forward and backward, in a row of `context` tokens.

    As PaLM (arXiv 2204.02311, appendix B) counts: 6 for every weight that is multiplied with the token, and attention
    to all tokens of the row, whether masked or not. MTP modules with their own pass through the head, Engram and
    hyper-connections count; norms, activations and the look-up of embeddings do not.
    """
    return 6 * (_multiplied(config) + _attended(config) * context)


def causal_flops(config: ModelConfig, context: int) -> float:
    """The same with attention to those tokens only that come before: what must really be computed."""
    return 6 * (_multiplied(config) + _attended(config) * context / 2)


def drawn(vocab_size: int) -> int:
    """Entries of the vocabulary in the loss of a pretraining step on a CPU besides its targets, where that pays: with
    3/16 of them bits per byte are those with all (docs/lab.md). 0: all."""
    return 3 * vocab_size // 16 if vocab_size >= 4096 else 0


def entries(vocab_size: int, tokens: int) -> int:
    """Of the vocabulary, about how many a step of so many tokens has in its loss on a CPU (`sampled_cross_entropy`)."""
    named = 1.7 * tokens**0.62 * vocab_size**0.18  # within 15% for 2,048 to 8,192 tokens of Wikipedia
    some = drawn(vocab_size)
    return round(named + some) if some and vocab_size - named > 2 * some else vocab_size


def optimizer_flops(config: ModelConfig, muon: bool = True) -> float:
    """Operations of an optimiser step: Muon's products; what is done element by element does not count."""
    if not muon:
        return 0.0
    total = 0.0
    for (rows, columns), count in matrices(config).items():
        short, long = sorted((rows, columns))
        total += count * NEWTON_SCHULZ_STEPS * (4 * short * short * long + 2 * short**3)
    return total


def _multiplied(c: ModelConfig) -> int:
    """Multiplications a token that a weight takes part in, or a stream's mixing."""
    width, n = c.hidden_size, c.hc_mult
    mixing = (2 + n) * n * n * width + (n * n + 2 * n) * width if n > 1 else 0
    blocks = 0
    for index in range(c.num_hidden_layers + c.num_nextn_predict_layers):
        feed, idle = _feed_forward(c, index)
        blocks += _attention(c, index) + feed - idle + 2 * mixing
    lookups = len(c.engram_layer_ids) * (_read_width(c) * (1 + n) + (1 + c.engram_kernel_size) * n) * width
    joining = c.num_nextn_predict_layers * 2 * width * width
    return blocks + lookups + joining + (1 + c.num_nextn_predict_layers) * c.vocab_size * width


def _attended(c: ModelConfig) -> int:
    """Multiplications of a token with one other, in all layers."""
    each = c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim if c.is_mla else 2 * c.head_dim
    return (c.num_hidden_layers + c.num_nextn_predict_layers) * c.num_attention_heads * each


def matrices(config: ModelConfig) -> Counter[tuple[int, int]]:
    """How many matrices [rows, columns] of each shape Muon steps, MTP modules included; see train/optimizer.py."""
    c, found = config, Counter()
    width, heads, n = c.hidden_size, c.num_attention_heads, c.hc_mult
    for index in range(c.num_hidden_layers + c.num_nextn_predict_layers):
        if c.is_mla:
            query = c.qk_nope_head_dim + c.qk_rope_head_dim
            if c.q_lora_rank is not None:
                found[c.q_lora_rank, width] += 1
            found[query, c.q_lora_rank or width] += heads
            found[c.kv_lora_rank - c.token_rank(index) + c.qk_rope_head_dim, width] += 1
            found[c.qk_nope_head_dim + c.v_head_dim, c.kv_lora_rank] += heads
            found[width, heads * c.v_head_dim] += 1
        else:
            queries, keys = heads * c.head_dim, c.num_key_value_heads * c.head_dim
            found[queries, width] += 1
            found[keys, width] += 2
            found[width, queries] += 1
        inner, times = c.intermediate_size, 1
        if c.is_moe_layer(index):
            found[c.moe_intermediate_size, width] += 2 * c.n_routed_experts
            found[width, c.moe_intermediate_size] += c.n_routed_experts
            inner, times = c.moe_intermediate_size * (c.n_shared_experts or 0), int(bool(c.n_shared_experts))
        found[inner, width] += 2 * times
        found[width, inner] += times
        if index in c.engram_layer_ids and index < c.num_hidden_layers:
            found[width, _read_width(c)] += 1 + n  # values, and the keys of every stream
    found[width, 2 * width] += c.num_nextn_predict_layers
    return +found


# --- running ----------------------------------------------------------------------------------------------------------


def kv_bytes(config: ModelConfig, element: int = 4) -> int:
    """Bytes that a cache holds of one token in the main model, with `element` bytes a number: MLA keeps the latent and
    the rotated key, Engram one gate a layer and stream where its convolution looks back."""
    c = config
    each = c.kv_lora_rank + c.qk_rope_head_dim if c.is_mla else 2 * c.num_key_value_heads * c.head_dim
    gates = len(c.engram_layer_ids) * c.hc_mult if c.engram_kernel_size > 1 else 0
    return (c.num_hidden_layers * each + gates) * element
