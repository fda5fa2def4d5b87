"""Training speed beside transformers' DeepseekV3ForCausalLM: one configuration, one machine, in turns.

    python bench/train.py [--rounds 5] [--json FILE]

Both sides: the same weights' shapes (about 16M parameters, 16 experts, 4 a token, width 256), 8 rows of 512 tokens,
torch's fused AdamW, gradient clipping, float32 on CPU. transformers runs as it comes (SDPA attention, its default and
its grouped expert implementation, the faster counts). Ours runs eager and compiled; compile time is told, not counted.
The share of the peak counts model FLOPs only, against the best of three square products in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from twelve.config import small_v3
from twelve.convert.huggingface import config_values
from twelve.heap import keep_freed_memory
from twelve.model import Transformer, count_parameters

ROWS, CONTEXT, VOCABULARY = 8, 512, 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # for both sides alike

    config = small_v3(VOCABULARY, width=256, layers=8, experts=16, experts_per_token=4, context=CONTEXT)
    counts = count_parameters(config)
    # 2 a multiply-add, 3 for forward and backward; attention sees half of the tokens on average
    head = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    attention = config.num_hidden_layers * config.num_attention_heads * head * CONTEXT / 2
    flops = 6 * (counts["active"] - VOCABULARY * config.hidden_size + attention)
    print(f"{counts['total']:,} parameters, {counts['active']:,} active; {flops / 1e6:.1f} MFLOP a token; "
          f"{options.threads} threads, torch {torch.__version__}")  # fmt: skip

    ids = torch.randint(0, VOCABULARY, (ROWS, CONTEXT), generator=torch.Generator().manual_seed(0))
    sides = {"twelve, eager": OursTraining(config), "twelve, compiled": OursTraining(config, compile=True)}
    for experts in ("eager", "grouped_mm"):
        sides[f"transformers, experts {experts}"] = TheirsTraining(config, experts)
    first = {name: seconds(lambda side=side: side.step(ids)) for name, side in sides.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    peaks = []
    for _ in range(options.rounds):
        peaks.append(peak())
        for name, side in sides.items():
            side.step(ids)  # after another side's turn the caches are cold
            times[name].append(seconds(lambda side=side: side.step(ids)))
    theirs = min(statistics.median(t) for name, t in times.items() if name.startswith("transformers"))
    result: dict = {"peak_gflops": max(peaks), "train": {}}
    print(f"peak {max(peaks):.0f} GFLOP/s\n{'training':32}{'tokens/s':>10}{'spread':>16}"
          f"{'of peak':>9}{'ratio':>7}{'first step':>12}")  # fmt: skip
    for name, runs in times.items():
        middle, size = statistics.median(runs), ids.numel()
        row = {
            "tokens_per_second": size / middle, "slowest": size / max(runs), "fastest": size / min(runs),
            "share_of_peak": flops * size / middle / 1e9 / max(peaks), "ratio": theirs / middle,
            "first_step": first[name],
        }  # fmt: skip
        result["train"][name] = row
        print(f"{name:32}{row['tokens_per_second']:10,.0f}{row['slowest']:8,.0f}-{row['fastest']:<7,.0f}"
              f"{row['share_of_peak']:9.0%}{row['ratio']:7.2f}{row['first_step']:10.1f} s")  # fmt: skip

    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=2)


class OursTraining:
    def __init__(self, config, compile: bool = False) -> None:
        self.model = Transformer(config).init_weights(0).train()
        if compile:
            self.model.compile_layers()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)

    def step(self, ids: torch.Tensor) -> None:
        targets = torch.cat((ids[:, 1:], torch.full_like(ids[:, :1], -100)), dim=1)
        self.model.losses(ids, targets).total.backward()
        update(self.model, self.optimizer)


class TheirsTraining:
    def __init__(self, config, experts: str) -> None:
        self.model = DeepseekV3ForCausalLM(DeepseekV3Config(**theirs(config))).train()
        self.model.set_experts_implementation(experts)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)

    def step(self, ids: torch.Tensor) -> None:
        self.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        update(self.model, self.optimizer)


def theirs(config) -> dict:
    values = config_values(config, torch.float32)
    return {key: value for key, value in values.items() if key not in ("model_type", "architectures")}


def update(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def seconds(run) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def peak(size: int = 4096) -> float:
    """GFLOP/s of one square float32 product, the best of three."""
    a = torch.randn(size, size)
    return max(2 * size**3 / seconds(lambda: a @ a) / 1e9 for _ in range(3))


if __name__ == "__main__":
    main()
