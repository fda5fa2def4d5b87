"""Changes to pretraining at equal steps: bits per byte of documents that are held out of the text, and seconds.

    python bench/recipe.py --text ko=ko-train.jsonl.gz en=en-train.jsonl.gz --steps 2000 --seeds 0 1
                           --arms base={} 'rows={"switches": {"engram_vocab_size": 524288}}'
                                  'slower={"learning_rate": 0.003, "plan": {"adamw_lr_scale": 4}}' --out runs/recipe

An arm is a name and what it changes, in JSON: `shape` [width, layers, experts, experts a token], `switches` of
`small_v3`, any keys of the model's `config`, `learning_rate`, `batch` (rows), and of the `plan` what pretraining does
not choose itself (decay_share, weight_decay, drawn, ...). The first arm is what the others are compared with, seed by
seed. Documents are held out as `bench/nanochat.py` does, by the hash of their text, so that no copy stays behind.

Short runs mislead: what differs after 250 steps may not after 2,000, and what does may have been level there. A run is
a process of its own on one thread, `--workers` at a time, and leaves its row in rows.jsonl: the same command goes on
where it stopped. Seconds are the processor's.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean

import runs
from nanochat import prepare

from twelve.config import small_v3, with_memory
from twelve.data.shards import PackedData
from twelve.data.tokenizer import Tokenizer

SHAPE = (128, 3, 8, 2)  # width, layers, experts, experts a token
CONTEXT, BATCH = 512, 8


def run(job: runs.Job, options: argparse.Namespace, folder: Path) -> runs.Row:
    """Train one arm for the steps; what it measures."""
    import torch

    from twelve.heap import keep_freed_memory
    from twelve.model import Transformer

    torch.set_num_threads(1)
    keep_freed_memory()
    changes, steps = job["changes"], job["steps"]
    data, words = PackedData(options.out / "tokens"), Tokenizer.load(options.out / "tokens")
    batch = changes.get("batch", BATCH)
    switches = with_memory(changes.get("switches"), data.tokens, reading=steps * batch * CONTEXT)
    config = small_v3(words.vocab_size, *changes.get("shape", SHAPE), CONTEXT, **switches)
    model = Transformer(replace(runs.with_tokenizer(config, words), **changes.get("config", {})))
    if model.memory is not None:
        model.memory.use_tokenizer(words)
    trainer = runs.pretraining(
        model.init_weights(job["seed"]), data, folder, context=CONTEXT, batch=batch, seed=job["seed"],
        learning_rate=changes.get("learning_rate", 4e-3), **changes.get("plan", {}),
    )  # fmt: skip
    trainer.plan.revisions = [(0, steps)]
    began = time.process_time()
    losses = [trainer.train_step()["loss"] for _ in range(steps)]
    seconds = time.process_time() - began
    texts = [(name, options.out / f"slice-{name}.jsonl") for name in dict(options.text)]
    return {"tokens": trainer.tokens, "seconds": round(seconds), "loss": mean(losses[-100:]),
            "bits": runs.bits_of(model, words, texts, CONTEXT)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", type=runs.named, required=True, metavar="NAME=PATH")
    parser.add_argument("--arms", nargs="+", type=arm, required=True, metavar="NAME=JSON")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    runs.add_options(parser, "runs/recipe")
    options = parser.parse_args()
    if runs.is_one(options, run):
        return
    told = {"data": prepare(options)[:16], "steps": options.steps}
    jobs = [{"arm": name, "changes": changes, "seed": seed} | told
            for seed, (name, changes) in product(options.seeds, options.arms)]  # fmt: skip
    failed = runs.run_all(jobs, "{arm}, seed {seed}", options.out, options.workers)
    show(jobs, runs.read_rows(options.out))
    runs.end(failed)


def arm(value: str) -> tuple[str, dict]:
    """The type of an arm."""
    name, changes = runs.named(value)
    try:
        return name, json.loads(changes)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{name}: {changes!r} is no JSON ({error})") from error


def show(jobs: list[runs.Job], rows: list[runs.Row]) -> None:
    found = {(job["arm"], job["seed"]): row for job in jobs if (row := runs.row_of(job, rows))}
    base = jobs[0]["arm"]
    for name in dict.fromkeys(job["arm"] for job in jobs):
        mine = {seed: row for (arm, seed), row in found.items() if arm == name}
        if not mine:
            continue
        languages = next(iter(mine.values()))["bits"]
        bits = "  ".join(f"{key} {mean(row['bits'][key] for row in mine.values()):.4f}" for key in languages)
        line = f"{name:16} {bits}  {mean(row['seconds'] for row in mine.values()):,.0f} s  {len(mine)} seeds"
        pairs = [(row, found[base, seed]) for seed, row in mine.items() if (base, seed) in found]
        if name != base and pairs:
            changes = {key: [row["bits"][key] - other["bits"][key] for row, other in pairs] for key in languages}
            line += f"  against {base}: " + "  ".join(
                f"{key} {runs.spread(values)[0]:+.4f}" + (f" ± {runs.spread(values)[1]:.4f}" if len(values) > 1 else "")
                for key, values in changes.items()
            )
        print(line)


if __name__ == "__main__":
    main()
