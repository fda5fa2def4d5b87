"""A memory's table by itself: what its size costs, and what it costs to be larger than the memory.

    python bench/table.py size FOLDER [--rows 64000000] [--data TOKENS]
    python bench/table.py tight FOLDER [--rows 64000000] [--data TOKENS]
    both: [--rounds 5] [--steps 4] [--threads N] [--json FILE]

`size`: the same model without memory, with one of about 1,000 rows and with one of --rows; a round is --steps training
steps, then tokens decoded, of each. `tight`: the large one in processes of their own that may use half the table's
bytes, as addresses (RLIMIT_AS) or as memory (cgroup, where this user may make one), beside one that may use all.

The table is made in FOLDER, which should be on the disk that is meant, and removed at the end. TOKENS is a folder that
`twelve tokenize` wrote; without it tokens are drawn by Zipf's law, each by itself, so that more n-grams are new than in
text. What is decoded at random weights is nearly uniform: almost every row is one that was not read before.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from engine import Bare, decoding, interleave, perform, random_prompts, shared_options, show, spread

from twelve.config import ModelConfig, small_v3
from twelve.data.shards import Batch, PackedData
from twelve.engine import make_engine
from twelve.errors import InputError
from twelve.model import Transformer
from twelve.plan.memory import TablePlan
from twelve.table import Table
from twelve.train.loop import Supervised
from twelve.train.plan import Plan

VOCABULARY, BATCH, CONTEXT = 8192, 8, 512
KV_MEMORY = 1 << 26  # where addresses are few
LAYERS, HEADS = [1, 3], 4
COLUMNS = len(LAYERS) * 2 * HEADS  # heads of all layers and n: rows a token reads


def main() -> None:
    common = shared_options()
    common.add_argument("folder", metavar="FOLDER")
    common.add_argument("--rows", type=int, default=64_000_000)
    common.add_argument("--data", metavar="TOKENS")
    common.add_argument("--steps", type=int, default=4, help="training steps of a round")
    common.add_argument("--tokens", type=int, default=128, help="decoded in a round")
    common.add_argument("--width", type=int, default=512)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    tables = parser.add_subparsers(dest="table", required=True, metavar="TABLE")
    for run in (size, tight, one):
        extra = {} if run is one else {"help": run.__doc__.splitlines()[0]}
        made = tables.add_parser(run.__name__, parents=[common], **extra)
        made.set_defaults(run=run)
        if run is one:
            made.add_argument("--addresses", type=int)
    options = parser.parse_args()
    perform(parser, options, options.run)


def configuration(options: argparse.Namespace, rows: int) -> ModelConfig:
    switches = {}
    if rows:
        switches = {"engram_layer_ids": LAYERS, "engram_n_heads": HEADS, "engram_head_dim": 32,
                    "engram_vocab_size": max(2, rows // COLUMNS - 32 * (rows < 10**5)),  # the next primes: more, if few
                    "engram_dtype": "bfloat16"}  # fmt: skip
    return small_v3(VOCABULARY, options.width, layers=4, experts=8, experts_per_token=2, context=CONTEXT, **switches)


def make_trainer(options: argparse.Namespace, rows: int) -> Supervised:
    """Its table, if it has one, in a folder of its own."""
    config, folder = configuration(options, rows), Path(options.folder) / f"bench-{rows}"
    model = Transformer(config)
    (folder / "training").mkdir(parents=True, exist_ok=True)
    if rows:
        path = folder / "engram.safetensors"
        model.memory.open(path, writable=True) if path.exists() else model.memory.create(path)
    model.init_weights(0)
    plan = Plan(
        stage="pretrain", options={}, config=config.to_dict(), data={}, context=CONTEXT, batch_size=BATCH,
        micro_batch_size=BATCH, learning_rate=4e-3, seed=0, threads=options.threads, precision="float32",
        revisions=[(0, 10**6)],
    )  # fmt: skip
    trainer = Supervised(model, batches(options.data), plan, folder)
    trainer.restore()
    return trainer


def batches(data: str | None) -> Callable[[int], Batch]:
    if data is not None:
        packed = PackedData(Path(data))
        return lambda step: packed.batch(step, BATCH, CONTEXT, 0)
    chances = 1 / np.arange(1, VOCABULARY + 1)
    chances /= chances.sum()
    place = torch.arange(CONTEXT).expand(BATCH, -1)

    def batch(step: int) -> Batch:
        drawn = np.random.default_rng(step).choice(VOCABULARY, (BATCH, CONTEXT + 1), p=chances)
        ids = torch.from_numpy(drawn)
        return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), place, torch.zeros_like(place).int())

    return batch


def train(trainer: Supervised, steps: int) -> dict[str, float]:
    began = time.perf_counter()
    for _ in range(steps):
        trainer.train_step()
    return {"seconds": (time.perf_counter() - began) / steps}


def resident() -> int:
    """Bytes of this process in memory, mapped files among them."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def everything(table: Table) -> None:
    """Have all of a table in memory, with its optimiser's state."""
    for start in range(0, table.count, 1 << 20):
        rows = np.arange(start, min(start + (1 << 20), table.count))
        table._take(rows)
        table._squares.take(rows)


# --- the tables -------------------------------------------------------------------------------------------------------


def size(options: argparse.Namespace) -> dict:
    """a large table against a small one and none: training, decoding, memory"""
    names = {"no memory": 0, "1,000 rows": 1000, f"{options.rows:,} rows": options.rows}
    none, small, large = names
    with cleared(Path(options.folder)):
        trainers, grown = {}, {}
        for name, rows in names.items():
            before, began = resident(), time.perf_counter()
            trainers[name] = make_trainer(options, rows)
            if rows:
                everything(trainers[name].model.memory.table)
            grown[name], loading = resident() - before, time.perf_counter() - began
        table = trainers[large].model.memory.table
        filled = grown[large] - grown[small]  # the same model is in both
        planned = TablePlan(configuration(options, options.rows), table.count)
        planned = planned.table_bytes + planned.state_bytes
        print(f"\n{table.count:,} rows of {table.row_bytes} bytes with their state: {filled / 1e9:.3f} GB resident, "
              f"{planned / 1e9:.3f} planned ({filled / planned - 1:+.1%}); made in {loading:.1f} s")  # fmt: skip
        steps = {name: lambda name=name: train(trainers[name], options.steps) for name in names}
        training = interleave(steps, options.rounds)
        saving = {}
        for name, trainer in trainers.items():
            with open(trainer.metrics, "w", encoding="utf-8") as log:
                began = time.perf_counter()
                trainer.save(log)
                saving[name] = time.perf_counter() - began
        engines = {name: make_engine(trainer.model.eval(), Bare(VOCABULARY), speculation="off")
                   for name, trainer in trainers.items()}  # fmt: skip
        decode = {name: lambda name=name: {"rate": rate(engines[name], options.tokens)} for name in names}
        speeds = interleave(decode, options.rounds)
        for runs, key in ((training, "seconds"), (speeds, "rate")):
            lines = [
                [name, spread(runs[name], key, ".3f" if key == "seconds" else ",.0f"),
                 *(ratio(runs[name], runs[base], key) for base in (small, none))] for name in names
            ]  # fmt: skip
            title = "training, seconds a step" if key == "seconds" else f"decoding {options.tokens} tokens, tokens/s"
            show(title, ["median (range)", "by 1,000 rows", "by no memory"], lines)
        show("a checkpoint, table on the disk", ["seconds"], [[name, f"{value:.2f}"] for name, value in saving.items()])
        engines.clear()  # before their files go
        trainers.clear()
    return {"training": training, "decoding": speeds, "saving": saving, "resident": filled, "planned": planned}


def rate(engine, tokens: int) -> float:
    return decoding(engine, random_prompts(VOCABULARY, 1, 16), tokens)


def ratio(runs: list[dict], base: list[dict], key: str) -> str:
    """Of the same round's: median and range."""
    values = [run[key] / other[key] for run, other in zip(runs, base, strict=True)]
    return f"{statistics.median(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def tight(options: argparse.Namespace) -> dict:
    """a table twice as large as what the process may have"""
    with cleared(Path(options.folder)):
        trainer = make_trainer(options, options.rows)
        half, path = trainer.model.memory.table.nbytes // 2, trainer.model.memory.table.path
        del trainer
        gc.collect()
        limits = {"no limit": {}, f"{half / 1e9:.2f} GB of addresses": {"addresses": half}}
        if (group := control_group(half)) is not None:
            limits[f"{half / 1e9:.2f} GB of memory"] = {"group": group}
        try:
            runs = interleave({name: lambda how=how: child(options, path, **how) for name, how in limits.items()},
                              options.rounds, warm=False)  # fmt: skip
        finally:
            if group is not None:
                group.parent.rmdir()
    rows = [[name, spread(found, "seconds", ".3f"), ratio(found, runs["no limit"], "seconds"),
             spread(found, "rate"), f"{max(run['peak'] for run in found) / 1e9:.2f}",
             "mapped" if found[0]["mapped"] else "row by row"] for name, found in runs.items()]  # fmt: skip
    show("twice the memory allowed", ["seconds a step", "by no limit", "tokens/s", "GB resident", "read"], rows)
    same = {name: {run["rows"] for run in found} for name, found in runs.items()}
    print("the same rows after training:", "yes" if len(set.union(*same.values())) == 1 else f"NO {same}")
    return {"runs": runs}


def control_group(most: int) -> Path | None:
    """The file that takes the numbers of processes that may use `most` bytes of memory; None where that cannot be."""
    root = Path("/sys/fs/cgroup")
    old = (root / "memory").is_dir()
    folder = (root / "memory" if old else root) / f"bench-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / ("memory.limit_in_bytes" if old else "memory.max")).write_text(str(most))
    except OSError:
        if folder.exists():
            folder.rmdir()
        return None
    return folder / "cgroup.procs"


def child(
    options: argparse.Namespace, path: Path, addresses: int | None = None, group: Path | None = None
) -> dict[str, float]:
    """What `one` measures in a process of its own. The table's pages are first dropped, lest others' memory pay."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    result = Path(options.folder) / "one.json"
    given = {"rows": options.rows, "data": options.data, "steps": options.steps, "tokens": options.tokens,
             "width": options.width, "threads": options.threads, "json": result, "addresses": addresses}  # fmt: skip
    line = [sys.executable, __file__, "one", options.folder]
    for name, value in given.items():
        line += [f"--{name}", str(value)] if value is not None else []
    if group is not None:
        line = ["sh", "-c", f'echo $$ > {group}; exec "$@"', "sh", *line]
    done = subprocess.run(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise InputError(f"the process ended with {done.returncode}: {done.stdout.strip().splitlines()[-1:]}")
    return json.loads(result.read_text())


def one(options: argparse.Namespace) -> dict:
    """Training steps from the table's beginning, then decoding."""
    if options.addresses:
        resource.setrlimit(resource.RLIMIT_AS, (options.addresses, options.addresses))
    trainer = make_trainer(options, options.rows)  # rolls back what an earlier one did
    table = trainer.model.memory.table
    trainer.train_step()
    seconds = train(trainer, options.steps)["seconds"]
    peak = resident()
    ids = trainer.batches(1).ids
    touched = table.read(trainer.model.memory.addresses(ids, trainer.model.positions(ids)))
    engine = make_engine(trainer.model.eval(), Bare(VOCABULARY), speculation="off", kv_memory=KV_MEMORY)
    speed = rate(engine, options.tokens)
    return {"seconds": seconds, "rate": speed, "peak": peak, "mapped": table.address is not None,
            "rows": float(abs(touched).sum(dtype=np.float64))}  # fmt: skip


@contextmanager
def cleared(folder: Path) -> Iterator[None]:
    """What the run leaves in the folder goes with it."""
    try:
        yield
    finally:
        for path in folder.glob("bench-*"):
            shutil.rmtree(path)
        (folder / "one.json").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
