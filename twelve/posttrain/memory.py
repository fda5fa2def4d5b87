"""How many bytes reinforcement learning takes, phase by phase, and how to stay below a limit.

Weights, optimiser and gradients are always there. Keys and values exist while answers are sampled, activations while
the trainer reads them again. Where both do not fit beside each other, the keys and values go before the trainer begins.
What is read of a memory's table is not counted: the kernel takes pages of a file back where others need the room.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from twelve.config import ModelConfig
from twelve.errors import InputError
from twelve.model.fast_streams import covers

TOKENS = 2048  # of a batch of rows, where memory does not decide: more are no faster on a CPU
SPARE = 96 * 2**20  # Python, logits, scores of attention, what the allocator holds back


@dataclass(frozen=True)
class Phases:
    """Bytes for keys and values, tokens of a batch of rows, and whether the first must go before the second comes."""

    kv_memory: int
    tokens: int
    apart: bool
    bytes: int  # of the whole process, at its largest


def fit(limit: int | None, fixed: int, page_bytes: int, pages: int, config: ModelConfig, longest: int) -> Phases:
    """Divide what `limit` leaves beside `fixed` bytes. pages: of KV that a step can use; longest: tokens of a row.

    InputError, with what would be enough, when it cannot be done.
    """
    each = activation_bytes(config)
    least_kv, least_tokens = page_bytes * max(1, -(-longest // 64)), longest
    wanted_kv, wanted_tokens = page_bytes * pages, max(TOKENS, longest)
    if limit is None:
        return Phases(wanted_kv, wanted_tokens, False, fixed + SPARE + wanted_kv + wanted_tokens * each)
    free = limit - fixed - SPARE
    if wanted_kv + wanted_tokens * each <= free:
        return Phases(wanted_kv, wanted_tokens, False, fixed + SPARE + wanted_kv + wanted_tokens * each)
    if free < max(least_kv, least_tokens * each):
        enough = fixed + SPARE + max(least_kv, least_tokens * each)
        raise InputError(
            f"{limit / 2**30:.2f} GiB do not hold this run, which needs {enough / 2**30:.2f} GiB: give it that with "
            "--memory, or take fewer --max-tokens, --lora, or a smaller model"
        )
    kv, tokens = min(wanted_kv, free), min(wanted_tokens, free // each)
    return Phases(kv, tokens, True, fixed + SPARE + max(kv, tokens * each))


def activation_bytes(config: ModelConfig) -> int:
    """Bytes that the forward pass keeps of one token for the backward pass, and the gradients in flight. An estimate
    from above: what a layer saves, in float32, and a quarter more."""
    c, hidden = config, config.hidden_size
    if c.is_mla:
        heads = c.num_attention_heads * (2 * (c.qk_nope_head_dim + c.qk_rope_head_dim) + 2 * c.v_head_dim)
        heads += 2 * (c.kv_lora_rank + (c.q_lora_rank or 0))
    else:
        heads = 5 * c.num_attention_heads * c.head_dim
    dense = 4 * c.intermediate_size
    routed = 0
    if c.n_routed_experts:
        routed = 4 * c.moe_intermediate_size * (c.num_experts_per_tok + (c.n_shared_experts or 0))
    layers = sum(routed if c.is_moe_layer(index) else dense for index in range(c.num_hidden_layers))
    layers += c.num_hidden_layers * (6 * hidden + heads) + _of_streams(c) + len(c.engram_layer_ids) * _of_lookup(c)
    return int(1.25 * 4 * (layers + 4 * hidden))


def _of_streams(config: ModelConfig) -> int:
    """Numbers that all hyper-connections keep of a token, and the head's; the twin keeps every step of Sinkhorn's."""
    n, hidden = config.hc_mult, config.hidden_size
    if n == 1:
        return 0
    each = (n + 2) * hidden + 3 * (2 + n) * n
    if not covers(config):
        each += n * hidden + 2 * config.hc_sinkhorn_iters * (n + 1) * n
    return 2 * config.num_hidden_layers * each + 6 * n * hidden


def _of_lookup(config: ModelConfig) -> int:
    """Numbers that a layer of Engram keeps of a token: its rows and their addresses, a value, keys, a convolution."""
    heads, taps = (config.engram_max_ngram_size - 1) * config.engram_n_heads, config.engram_kernel_size
    return heads * (config.engram_head_dim + 2) + ((4 + taps) * config.hc_mult + 1 + taps) * config.hidden_size


def resident() -> int:
    """Bytes of RAM that this process holds now."""
    return _status("VmRSS")


def peak() -> int:
    """The most that it ever held."""
    return _status("VmHWM")


def _status(name: str) -> int:
    try:
        found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(found[1]) * 1024
    except (OSError, TypeError):  # not Linux
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return used * (1 if os.uname().sysname == "Darwin" else 1024)
