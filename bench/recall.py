"""Train a small latent-attention model on associative recall, the task on which skipping pages must show.

    python bench/recall.py --out runs/recall [--minutes 10]

A sequence is n pairs (key, value) in random order and then the n keys again in another order, each followed by its
value: the second half can be told from the first alone, from n pairs before on average. Lengths grow as the model
learns.
"""

from __future__ import annotations

import argparse
import time

import torch

from twelve.config import small_v3
from twelve.convert import save
from twelve.heap import keep_freed_memory
from twelve.model import Transformer
from twelve.train.optimizer import MuonAdamW

SYMBOLS = 512  # keys, and as many values
LENGTHS = (8, 16, 32, 64, 128, 256, 512)  # pairs
TOKENS = 8192  # a step
CONTEXT = 4 * LENGTHS[-1]


def recall_batch(rows: int, pairs: int, generator: torch.Generator) -> torch.Tensor:
    """[rows, 4 * pairs] int64: keys from 0, values from SYMBOLS."""
    keys = torch.stack([torch.randperm(SYMBOLS, generator=generator)[:pairs] for _ in range(rows)])
    values = torch.randint(SYMBOLS, 2 * SYMBOLS, (rows, pairs), generator=generator)
    order = torch.stack([torch.randperm(pairs, generator=generator) for _ in range(rows)])
    told = torch.stack((keys, values), -1).flatten(1)
    asked = torch.stack((keys.gather(1, order), values.gather(1, order)), -1).flatten(1)
    return torch.cat((told, asked), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/recall")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    options = parser.parse_args()
    keep_freed_memory()
    config = small_v3(2 * SYMBOLS, width=128, layers=2, experts=0, context=CONTEXT)
    model = Transformer(config).init_weights(0)
    optimizer = MuonAdamW(model, weight_decay=0.01, adamw_lr_scale=3)
    generator = torch.Generator().manual_seed(0)
    started, stage, recent, step = time.monotonic(), 0, [], 0
    while (passed := (time.monotonic() - started) / (60 * options.minutes)) < 1:
        pairs = LENGTHS[stage]
        ids = recall_batch(max(1, TOKENS // (4 * pairs)), pairs, generator)
        targets = torch.full_like(ids, -100)
        targets[:, :-1] = ids[:, 1:]
        targets[:, : 2 * pairs] = -100
        targets[:, 1::2] = -100  # the key that follows is anybody's guess
        loss = model.losses(ids, targets).total
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(options.learning_rate * min(1, (step + 1) / 50, 3 * (1 - passed) + 0.02))
        recent = [*recent[-9:], loss.item()]
        step += 1
        if step % 20 == 0:
            print(f"{passed:4.0%} step {step}, {pairs} pairs, loss {sum(recent) / len(recent):.3f}", flush=True)
        if len(recent) == 10 and sum(recent) < 10 * 0.15 and stage + 1 < len(LENGTHS):
            stage, recent = stage + 1, []
    model.eval()
    with torch.inference_mode():
        ids = recall_batch(4, LENGTHS[-1], generator)
        right = model(ids)[:, :-1].argmax(-1) == ids[:, 1:]
    print(f"recall of {LENGTHS[-1]} pairs: {right[:, 2 * LENGTHS[-1] :: 2].float().mean():.1%} after {step} steps")
    save(model, None, options.out)


if __name__ == "__main__":
    main()
