"""Plans for named accelerators that are not here: what fits on so many of them, and how long a training would take."""

from __future__ import annotations

import re
from dataclasses import dataclass

from twelve.config import ModelConfig
from twelve.errors import InputError
from twelve.plan import cost
from twelve.plan.memory import kept

TOKENS_A_PARAMETER = 20  # where nothing else is asked for (arXiv 2203.15556)
UTILISATION = 0.4  # of the dense peak; trainings that were published lie at about 0.3 to 0.5
RESERVED = 2 * 10**9  # bytes a device for CUDA, libraries and buffers
ACTIVATIONS = 0.25  # of the state, assumed where no model is named
STATE = 16  # bytes a parameter: weight, gradient and AdamW's two averages in float32


@dataclass(frozen=True)
class Accelerator:
    """Of the maker's datasheet. TFLOPS are of dense matrices, gathered in 32 bits; GB are 1e9 bytes."""

    memory: int  # GB
    bf16: float  # TFLOPS; the T4 has float16 instead
    fp8: float | None
    bandwidth: float  # GB/s
    watts: int  # thermal design power


# consumer cards: NVIDIA's whitepapers; where these leave a card out, its tensor cores times its boost clock
TABLE = {
    "A100-40": Accelerator(40, 312, None, 1555, 400),
    "A100-80": Accelerator(80, 312, None, 2039, 400),
    "H100": Accelerator(80, 989, 1979, 3350, 700),  # SXM
    "H200": Accelerator(141, 989, 1979, 4800, 700),
    "H800": Accelerator(80, 989, 1979, 3350, 700),
    "B200": Accelerator(180, 2250, 4500, 8000, 1000),
    "L4": Accelerator(24, 121, 242, 300, 72),
    "L40S": Accelerator(48, 362, 733, 864, 350),
    "A10": Accelerator(24, 125, None, 600, 150),
    "T4": Accelerator(16, 65, None, 320, 70),
    "RTX3060-12": Accelerator(12, 25.5, None, 360, 170),
    "RTX3090": Accelerator(24, 71, None, 936, 350),
    "RTX4060TI-16": Accelerator(16, 44.1, 88.2, 288, 165),
    "RTX4090": Accelerator(24, 165.2, 330.3, 1008, 450),
    "RTX5090": Accelerator(32, 209.5, 419, 1792, 575),
}


@dataclass(frozen=True)
class Cluster:
    """`count` devices of one kind."""

    name: str
    device: Accelerator
    count: int

    def flops(self, utilisation: float = UTILISATION) -> float:
        """Operations a second of all of them in 16 bits, at this share of the peak."""
        return self.count * self.device.bf16 * 1e12 * utilisation


def read_cluster(text: str) -> Cluster:
    """Of a text like 8xH100 or T4. InputError names what is known."""
    found = re.fullmatch(r"(?:(\d{1,7})\s*[x*]\s*)?(.+)", text.strip(), re.IGNORECASE)
    plain = {_plain(name): name for name in TABLE}
    name = plain.get(_plain(found[2])) if found else None
    if name is None or int(found[1] or 1) < 1:
        raise InputError(f"--gpus {text!r} is not like 8xH100; known: {', '.join(TABLE)}")
    return Cluster(name, TABLE[name], int(found[1] or 1))


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower()).removeprefix("nvidia").removesuffix("gb")


def sharded(parameters: int, count: int, state: int = STATE) -> float:
    """Bytes a device of everything that grows with the parameters, spread over all devices (FSDP, ZeRO-3).

    state: bytes a parameter. V3 kept 12 or 8 beside the weights that it multiplied with: a float32 copy and
    averages in float32 or bfloat16.
    """
    return parameters * state / count


def memory_a_device(config: ModelConfig, cluster: Cluster, context: int, recompute: bool = True) -> dict[str, float]:
    """Bytes by component, one row of `context` tokens a device: mixed precision, AdamW, weights gathered by layer.

    recompute: of the activations only the residual at every layer is kept, and those of one layer at a time.
    """
    counts = cost.parameters(config, mtp=True)
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    each = 2 * context * kept(config)  # bfloat16
    residual = 2 * context * config.hidden_size * config.hc_mult * layers
    logits = (2 + 4) * min(context, 4096) * config.vocab_size
    # the layer at work and the next one, whole; nothing is gathered on a single device
    gathered = 2 * 2 * (counts.total - counts.table) / layers if cluster.count > 1 else 0
    return {
        "weights, gradients, optimiser": sharded(counts.total, cluster.count),
        "gathered weights": gathered,
        "activations": residual + each / layers if recompute else each,
        "logits": logits,
        "reserved": RESERVED,
    }


def largest(cluster: Cluster, seconds: float | None, utilisation: float = UTILISATION) -> int:
    """Parameters of a dense model that fits, and that these seconds train on 20 tokens each (6 N D operations)."""
    fitting = (cluster.device.memory * 1e9 - RESERVED) * cluster.count / STATE / (1 + ACTIVATIONS)
    if seconds is None:
        return int(fitting)
    return int(min(fitting, (cluster.flops(utilisation) * seconds / 6 / TOKENS_A_PARAMETER) ** 0.5))


def reason(cluster: Cluster, seconds: float | None, utilisation: float = UTILISATION) -> str:
    """Which of its two bounds `largest` met."""
    if seconds is not None and largest(cluster, seconds, utilisation) < largest(cluster, None):
        return f"the largest that gets {TOKENS_A_PARAMETER} tokens a parameter in this time"
    return "the largest that fits"
