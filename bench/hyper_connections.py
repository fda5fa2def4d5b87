"""Hyper-connections: what four residual streams cost, and what constraining their mappings does in a deep stack.

    python bench/hyper_connections.py time [--widths 256 512] [--threads 1]
    python bench/hyper_connections.py deep [--steps 250] [--rate 0.02] [--plot docs/hyper_connections.svg]

`time`: training steps (8 rows of 512 tokens, V3 shape, optimiser included) of the plain residual and of n = 4 in turns.
`deep`: 32 narrow layers, 64 sub-layers, on the bytes of this repository's documents at a high learning rate: the plain
residual, unconstrained hyper-connections and manifold-constrained ones, each with the same weights, rows and steps. The
composite gain is the larger of the largest row and column sum of absolute values of the product of all residual
mappings, a mean over eight tokens. Either writes --json FILE.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from twelve.config import ModelConfig, small_v3
from twelve.files import write_json
from twelve.heap import keep_freed_memory
from twelve.model import Transformer
from twelve.model.hyper_connections import sampled_gain
from twelve.train.optimizer import MuonAdamW

ARMS = {  # what differs from the plain residual
    "plain": {},
    "HC": {"model_type": "twelve", "hc_mult": 4, "hc_constrained": False},
    "mHC": {"model_type": "twelve", "hc_mult": 4},
}
COLOURS = {"plain": "#a9b8c6", "HC": "#c0503a", "mHC": "#3b6ea8"}
WARMUP, LAST = 20, 20  # steps; and those whose mean loss is reported


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["time", "deep"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7, help="time: steps of each, after one that is not counted")
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--layers", type=int, default=32, help="deep: decoder layers, of two sub-layers each")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--rate", type=float, default=0.02, help="deep: the learning rate after a warm-up")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="SVG", help="deep: a picture of loss and gain")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    result = times(options) if options.part == "time" else deep(options)
    if options.json:
        write_json(options.json, result)
    if options.plot and options.part == "deep":
        options.plot.write_text(plot(result["arms"]), encoding="utf-8")


# --- step time --------------------------------------------------------------------------------------------------------


def times(options: argparse.Namespace) -> dict:
    found = {}
    for width in options.widths:
        shape = small_v3(4096, width=width, layers=4, experts=8, experts_per_token=2, context=512)
        sides = {name: Training(replace(shape, **ARMS[name]), options.seed) for name in ("plain", "mHC")}
        ids = torch.randint(0, 4096, (8, 513), generator=torch.Generator().manual_seed(0))
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(options.rounds + 1):
            for name, side in sides.items():
                began = time.perf_counter()
                side.step(ids, 1e-4)
                if turn:
                    seconds[name].append(time.perf_counter() - began)
        ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
        middle = {name: statistics.median(values) for name, values in seconds.items()}
        print(f"width {width}: plain {middle['plain']:.3f} s a step, n = 4 {middle['mHC']:.3f} s; ratio of a pair "
              f"{statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}", flush=True)  # fmt: skip
        found[width] = {"seconds": seconds, "ratios": ratios}
    return {"threads": options.threads, "widths": found}


class Training:
    def __init__(self, config: ModelConfig, seed: int) -> None:
        self.model = Transformer(config).init_weights(seed).train()
        self.optimizer = MuonAdamW(self.model)

    def step(self, ids: torch.Tensor, rate: float) -> float:
        """One step on ids [B, T + 1]; the loss in nats a token."""
        losses = self.model.losses(ids[:, :-1], ids[:, 1:])
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step(rate)
        self.optimizer.zero_grad()
        return losses.main.item()


# --- a deep stack -----------------------------------------------------------------------------------------------------


def deep(options: argparse.Namespace) -> dict:
    documents = sorted(Path(__file__).resolve().parents[1].glob("docs/*.md"))
    text = torch.tensor(list(b"\n".join(document.read_bytes() for document in documents)))
    shape = small_v3(256, width=64, layers=options.layers, experts=0, context=128)
    arms: dict[str, dict] = {}
    for name, changes in ARMS.items():
        training, row = Training(replace(shape, **changes), options.seed), {"loss": [], "gain": []}
        began = time.monotonic()
        for step in range(options.steps):
            starts = torch.randint(0, len(text) - 129, (4, 1), generator=torch.Generator().manual_seed(step))
            loss = training.step(text[starts + torch.arange(129)], options.rate * min(1, (step + 1) / WARMUP))
            row["loss"].append(loss)
            gain = sampled_gain(training.model.layers)
            row["gain"].append(1.0 if gain is None else gain)
            if not math.isfinite(loss):
                break
        arms[name] = row | {"seconds": time.monotonic() - began}
        loss = statistics.mean(row["loss"][-LAST:])
        print(f"{name:6} loss {loss:.3f} over the last {LAST} of {len(row['loss'])} steps; gain {row['gain'][-1]:.4g} "
              f"at the end, {max(row['gain']):.4g} at most; {arms[name]['seconds']:.0f} s", flush=True)  # fmt: skip
    kept = {key: getattr(options, key) for key in ("layers", "steps", "rate", "seed", "threads")}
    return {"options": kept, "arms": arms}


def plot(arms: dict[str, dict]) -> str:
    """Loss, and composite gain on a logarithmic axis, by step, as SVG."""
    width, height, left, top = 300, 190, 48, 52
    steps = max(len(row["loss"]) for row in arms.values())
    losses = [loss for row in arms.values() for loss in row["loss"] if math.isfinite(loss)]
    gains = [math.log10(gain) for row in arms.values() for gain in row["gain"] if math.isfinite(gain)]
    panels = [
        ("Loss, nats a byte", "loss", lambda loss: loss, min(losses), min(max(losses), 6.0)),
        ("Composite gain (logarithmic)", "gain", math.log10, min(0.0, *gains), max(1.0, *gains)),
    ]
    parts = []
    for number, (title, key, scale, low, high) in enumerate(panels):
        x0 = left + number * (width + 70)

        def place(step, value, x0=x0, low=low, high=high):
            share = min(max((value - low) / (high - low), 0), 1)
            return f"{x0 + step / max(1, steps - 1) * width:.1f} {top + (1 - share) * height:.1f}"

        parts.append(f'<text x="{x0}" y="{top - 10}" font-weight="bold">{title}</text>'
                     f'<path d="M{x0} {top}v{height}h{width}" stroke="#888" fill="none"/>'
                     f'<text x="{x0}" y="{top + height + 16}">0</text>'
                     f'<text x="{x0 + width}" y="{top + height + 16}" text-anchor="end">step {steps}</text>'
                     )  # fmt: skip
        for value in (low, (low + high) / 2, high):
            label = f"{10**value:.3g}" if key == "gain" else f"{value:.2f}"
            y = float(place(0, value).split()[1]) + 4
            parts.append(f'<text x="{x0 - 5}" y="{y:.1f}" text-anchor="end" font-size="11">{label}</text>')
        for name, row in arms.items():
            points = [place(i, scale(value)) for i, value in enumerate(row[key]) if math.isfinite(value)]
            parts.append(f'<path d="M{"L".join(points)}" fill="none" stroke="{COLOURS[name]}" stroke-width="1.5"/>')
    for number, name in enumerate(arms):
        x = left + number * 90
        parts.append(f'<path d="M{x} 16h20" stroke="{COLOURS[name]}" stroke-width="3"/>'
                     f'<text x="{x + 26}" y="20">{name}</text>')  # fmt: skip
    size = f"{left + 2 * width + 90} {top + height + 30}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" font-family="sans-serif" font-size="13">'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


if __name__ == "__main__":
    main()
