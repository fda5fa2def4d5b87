"""How bits per byte and speed grow with size, text and time: the runs that `twelve plan` chooses from.

    python bench/scaling.py TEXT... --held-out ko=ko-val.jsonl en=en-val.jsonl --marks 1 2 4 8 16 --out runs/scaling
    python bench/scaling.py --out runs/scaling --export twelve/plan/scaling.json
    python bench/scaling.py --out runs/scaling --check

A run trains one shape at a constant learning rate. At each mark, in minutes of training, a branch ends: it left the run
after 60% of the mark, with the decay that a training of the mark's length has, is measured on the held-out texts, and
forgotten. So one run gives what trainings of all these lengths would give, and tells the speed, the most memory
held, and how fast this machine was just before. Measuring is not counted; with one thread, neither is what else runs.

A run is a process of its own and leaves its row in rows.jsonl: the same command goes on where it stopped. --threads 1
--workers 2 runs two at a time; rows say how many threads they had. `--check` leaves out each run in turn, and compares
what the law says of it with the mean of its neighbours at the same tokens.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Iterable
from itertools import product
from pathlib import Path

import runs

from twelve.config import small_v3, with_memory
from twelve.data.shards import PackedData
from twelve.data.tokenizer import Tokenizer
from twelve.files import write_json

SHAPES = ("64x2", "128x3", "192x4", "256x4", "320x5", "384x6", "512x7", "640x8")  # width x layers
SETTINGS = ("context", "marks", "limit", "decay_share")
KEYS = ("width", "layers", "experts", "vocabulary", "batch", "rate", "reading", "seed", "threads")
NAME = ("{width}x{layers}, {experts} experts, vocabulary {vocabulary}, {batch} rows, rate {rate:g}, seed {seed}, "
        "{threads} threads")  # fmt: skip
WARM = 3  # steps that tell nothing of the speed


# --- one run ----------------------------------------------------------------------------------------------------------


def run(job: runs.Job, options: argparse.Namespace, folder: Path) -> runs.Row:
    """Train one shape with branches at the marks; what it measures."""
    import torch

    from twelve.heap import keep_freed_memory
    from twelve.model import Transformer
    from twelve.plan import cost
    from twelve.plan.law import work
    from twelve.plan.machine import measure, product_speed
    from twelve.plan.memory import training
    from twelve.posttrain.memory import peak
    from twelve.train.loop import NO_END
    from twelve.train.precision import pick_device, pick_precision

    torch.set_num_threads(job["threads"])
    # what a single thread takes is the same whatever runs beside it
    clock = time.process_time if job["threads"] == 1 else time.monotonic
    machine, gflops = measure(), product_speed(clock)
    keep_freed_memory()
    device = pick_device(options.device)
    tokens = tokens_of(job["vocabulary"], options)
    data, words = PackedData(tokens), Tokenizer.load(tokens)
    context, batch, seed = options.context, job["batch"], job["seed"]
    config = small_v3(words.vocab_size, job["width"], job["layers"], job["experts"], 2, context,
                      **with_memory(text=data.tokens, reading=job["reading"]))  # fmt: skip
    config = runs.with_tokenizer(config, words)
    model = Transformer(config)
    model.memory.use_tokenizer(words)
    model = model.init_weights(seed).to(device)
    trainer = runs.pretraining(
        model, data, folder, context=context, batch=batch, learning_rate=job["rate"], seed=seed,
        threads=job["threads"], precision=pick_precision(device), decay_share=options.decay_share,
    )  # fmt: skip
    plan = trainer.plan
    times: list[float] = []
    marks, held = [], 0
    for mark in sorted(options.marks):
        plan.revisions = [(0, NO_END)]
        while sum(times) < 60 * mark * (1 - plan.decay_share):
            times.append(step(trainer, clock))
        held = held or peak()  # before there are copies
        main, before = sum(times), snapshot(trainer)
        end = max(trainer.step + 1, round(trainer.step / (1 - plan.decay_share)))
        plan.revisions = [(0, end)]
        branch = [step(trainer, clock) for _ in range(end - trainer.step)]
        bits = runs.bits_of(model, words, options.held_out, context, options.limit)
        marks.append({"seconds": round(main + sum(branch), 2), "tokens": trainer.tokens,
                      "bits": {name: round(value, 5) for name, value in bits.items()}})  # fmt: skip
        restore(trainer, before)
    counts = cost.parameters(config)
    middle = statistics.median(times[WARM:] or times)
    return {
        "context": context, "total": counts.total - counts.table,
        "active": counts.active, "outside": counts.embedding + counts.head,
        "flops": cost.causal_flops(config, context), "work": work(config, context, batch),
        "bytes_per_token": round(data.bytes / data.tokens, 4), "processor": machine.processor,
        "gflops": round(gflops, 1), "memory_gb_s": machine.memory_gb_s, "torch": machine.torch,
        "step_seconds": round(middle, 4), "tokens_per_second": round(batch * context / middle, 1),
        "peak_memory": held, "planned_memory": sum(training(config, batch, context, data_tokens=data.tokens).values()),
        "marks": marks,
    }  # fmt: skip


def step(trainer, clock) -> float:
    began = clock()
    trainer.train_step()
    return clock() - began


def snapshot(trainer) -> dict:
    """All that a step changes; a table keeps a journal of what it was."""
    if trainer.optimizer.table is not None:
        trainer.optimizer.table.commit(trainer.step)
    return {
        "model": {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()},
        "optimizer": {name: tensor.clone() for name, tensor in trainer.optimizer.state.items()},
        "steps": (trainer.optimizer.step_count, trainer.step, trainer.tokens),
    }


def restore(trainer, state: dict) -> None:
    table = trainer.optimizer.table
    if table is not None:
        table.rollback(state["steps"][1])
    trainer.model.load_state_dict(state["model"])
    for name, tensor in state["optimizer"].items():
        trainer.optimizer.state[name].copy_(tensor)
    trainer.optimizer.step_count, trainer.step, trainer.tokens = state["steps"]


# --- all of them ------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="*", metavar="TEXT", help="to train on; tokenised once for each vocabulary")
    parser.add_argument("--held-out", nargs="+", type=runs.named, default=[], metavar="NAME=PATH")
    parser.add_argument("--limit", type=int, default=40, help="documents of each that are measured (default: 40)")
    parser.add_argument("--marks", nargs="+", type=float, default=[1, 2, 4, 8, 16], help="minutes of training")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="WxL", help="width x layers")
    parser.add_argument("--experts", nargs="+", type=int, default=[8, 0], help="of a layer; 0: dense (default: 8 0)")
    parser.add_argument("--vocabulary", nargs="+", type=int, default=[8192])
    parser.add_argument("--batch", nargs="+", type=int, default=[8], help="rows a step")
    parser.add_argument("--rate", nargs="+", type=float, default=[4e-3], help="learning rates")
    parser.add_argument("--seed", nargs="+", type=int, default=[0])
    parser.add_argument("--reading", type=int, default=0, metavar="TOKENS",
                        help="that the longest mark will read, for the memory's rows (default: few)")  # fmt: skip
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--decay-share", type=float, default=0.4, help="of a branch (default: 0.4, as pretrain has)")
    parser.add_argument("--threads", type=int, default=1, help="of a run")
    parser.add_argument("--device", help="default: what there is")
    parser.add_argument("--export", type=Path, metavar="JSON", help="write the rows for `twelve plan`")
    parser.add_argument("--check", action="store_true", help="how well the law tells of runs that were left out")
    runs.add_options(parser, "runs/scaling", workers=1)
    options = parser.parse_args()
    if runs.is_one(options, run):
        return
    failed = []
    if options.export:
        export(options)
    elif not options.check:
        if not options.held_out:
            raise SystemExit("name what is measured: --held-out NAME=PATH")
        for vocabulary in options.vocabulary:
            runs.tokenized(options.text, tokens_of(vocabulary, options), vocabulary)
        failed = runs.run_all(jobs(options), NAME, options.out, options.workers)
    if not options.export:
        show(runs.read_rows(options.out))
    if options.check:
        check(runs.read_rows(options.out))
    runs.end(failed)


def tokens_of(vocabulary: int, options: argparse.Namespace) -> Path:
    return options.out / f"tokens-{vocabulary}"


def settings(vocabulary: int, options: argparse.Namespace) -> dict:
    """What makes two rows comparable."""
    held_out = {name: Path(path).name for name, path in options.held_out}
    data = runs.data_hash(tokens_of(vocabulary, options))[:16]
    return {name: getattr(options, name) for name in SETTINGS} | {"held_out": held_out, "data": data}


def jobs(options: argparse.Namespace) -> list[runs.Job]:
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes]
    choices = product(options.seed, options.rate, options.batch, options.vocabulary, options.experts, shapes)
    return [
        dict(zip(KEYS, (*shape, experts, vocabulary, batch, rate, options.reading, seed, options.threads), strict=True))
        | {"settings": settings(vocabulary, options)}
        for seed, rate, batch, vocabulary, experts, shape in choices
    ]


def export(options: argparse.Namespace) -> None:
    """The rows that can be compared with the last one, without what they all share; of the texts those in --held-out,
    if any are named."""
    rows = runs.read_rows(options.out)
    if not rows:
        raise SystemExit(f"{options.out} holds no rows")

    def shared(row: dict) -> dict:  # vocabularies have tokens, and so hashes, of their own
        return {key: value for key, value in row["settings"].items() if key not in ("data", "marks")}

    same = joined(row for row in rows if shared(row) == shared(rows[-1]))
    told = {key: rows[-1][key] for key in ("processor", "torch")} | shared(rows[-1])
    names = dict(options.held_out) or told["held_out"]
    told["held_out"] = {name: file for name, file in told["held_out"].items() if name in names}
    dropped = {"settings", "processor", "torch", "peak_memory", "planned_memory"}
    kept = [{key: value for key, value in row.items() if key not in dropped} for row in same]
    for mark in (mark for row in kept for mark in row["marks"]):
        mark["bits"] = {name: bits for name, bits in mark["bits"].items() if name in names}
    write_json(options.export, {"made": "bench/scaling.py", **told, "rows": kept})
    print(f"{len(kept)} runs, of {len(rows)} rows, in {options.export}")


def joined(rows: Iterable[runs.Row]) -> list[runs.Row]:
    """Runs of the same job as one, with the marks of all and the last one's speed: they took the same steps."""
    found: dict[tuple, runs.Row] = {}
    for row in rows:
        job = tuple(row[key] for key in KEYS)
        marks = row["marks"] + (found[job]["marks"] if job in found else [])
        found[job] = row | {"marks": sorted(marks, key=lambda mark: mark["tokens"])}
    return list(found.values())


# --- what they say ----------------------------------------------------------------------------------------------------


def show(rows: list[dict]) -> None:
    from twelve.plan.law import mean_bits

    for row in rows:
        name = f"{row['width']}x{row['layers']}, {row['experts'] or 'no'} experts, vocabulary {row['vocabulary']}"
        share = row["work"] * row["tokens_per_second"] / row["gflops"] / 1e9
        ends = ", ".join(f"{mark['seconds']:.0f} s {mean_bits(mark):.3f}" for mark in row["marks"])
        print(f"{name}, {row['batch']} rows, rate {row['rate']:g}, {row['threads']} threads: "
              f"{row['active'] / 1e6:.2f}M active, {row['tokens_per_second']:,.0f} tokens/s ({share:.0%} of "
              f"{row['gflops']:.0f} GFLOP/s), {row['peak_memory'] / 2**20:.0f} MiB (planned "
              f"{row['planned_memory'] / 2**20:.0f}); {ends}")  # fmt: skip


def check(rows: list[dict]) -> None:
    """Root mean square errors, in bits per byte, of the law and of interpolation, run by run."""
    from twelve.plan.law import comparable, lasting, left_out

    rows = comparable(joined(rows))
    law, between = [], []
    for row in lasting(rows):
        law += left_out(rows, row)
        between += interpolated([other for other in rows if other is not row], row)
    for name, errors in (("law", law), ("interpolation", [error for error in between if error is not None])):
        if errors:
            print(f"{name}: {math.sqrt(statistics.mean(error**2 for error in errors)):.4f} over {len(errors)} marks")


def interpolated(rows: list[dict], row: dict) -> list[float | None]:
    """Errors of a straight line, in logarithms, between the next smaller and larger run of the same kind, each read at
    the mark's tokens; None where there is no such run, or it did not read so many or so few."""
    import numpy as np

    from twelve.plan.law import mean_bits

    kind = [other for other in rows if (other["experts"] > 0) == (row["experts"] > 0)]
    smaller = max((o for o in kind if o["active"] < row["active"]), key=lambda o: o["active"], default=None)
    larger = min((o for o in kind if o["active"] > row["active"]), key=lambda o: o["active"], default=None)
    if smaller is None or larger is None:
        return [None] * len(row["marks"])

    def read(other: dict, tokens: float) -> float:
        known = [math.log(mark["tokens"]) for mark in other["marks"]]
        return float(np.interp(tokens, known, [mean_bits(mark) for mark in other["marks"]], math.nan, math.nan))

    share = math.log(row["active"] / smaller["active"]) / math.log(larger["active"] / smaller["active"])
    errors: list[float | None] = []
    for mark in row["marks"]:
        tokens = math.log(mark["tokens"])
        error = (1 - share) * read(smaller, tokens) + share * read(larger, tokens) - mean_bits(mark)
        errors.append(None if math.isnan(error) else error)
    return errors


if __name__ == "__main__":
    main()
