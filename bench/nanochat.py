"""Bits per byte after the same minutes on the same cores beside nanochat, which is given the same tokens.

    python bench/nanochat.py --nanochat CHECKOUT --text ko=ko-train.jsonl.gz en=en-train.jsonl.gz
                             --held-out ko=ko-val.jsonl.gz en=en-val.jsonl.gz
                             [--minutes 10] [--seeds 3 4 5] [--ours-minutes 5 15 20] [--out runs/nanochat]

The texts are tokenised once, without one document in SLICE, drawn by the hash of its text: a copy goes with it. Each
side's settings are chosen by the bits per byte of that slice of train, in runs of `--choose-minutes` with another seed:
nanochat's batch, then its depth, then a factor on its learning rates (and with `--compile 1 0` whether its model is
compiled; its optimiser always is); ours among the options of `--ours`, one string each. Then the sides take turns, a
process each on all `--threads`, and the held-out texts are scored, which no choice saw. Every run leaves its row in
rows.jsonl: the same command goes on where it stopped. Time begins with the process, so imports and compilation count,
and every run compiles from an empty cache; tokenising and scoring do not count.

nanochat is its own GPT and optimiser (Muon and AdamW), in float32, as its script for CPUs has it: width 64 a layer,
heads of 64, rows of 512, full attention. The rates, the weight decay and the schedules in steps follow its base_train,
with the number of steps estimated anew before each from the time that is left, and a warm-up of at most a tenth of
them. Its rows are packed from our shards by its rule: each begins with a document, the longest of a thousand waiting
ones that fits comes next, and where none fits the shortest is cut. Documents come in an order drawn from the seed,
since ours are not shuffled on disk as its own data are. Freed memory is kept for it as for ours. Its final weights
need not be saved in time; ours is `twelve pretrain` whole, with its calibration, checkpoints, folder and report.

Both are scored by `twelve.evaluate.bits`: whole documents, every token once, windows of 512 that overlap by half;
nanochat's all begin with the start token, as its rows do.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from bisect import bisect_right, insort
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from zlib import crc32

import runs

from twelve.data.reader import Document, read_documents

ROOT = Path(__file__).resolve().parents[1]
SIZES = ("parameters", "active_parameters", "steps", "tokens", "tokens_per_second", "seconds")
SLICE, CHOICE_SEED = 400, 0
ROWS, WAITING, ROW = 8, 1000, 512  # rows a forward pass at most; documents to choose from; tokens of a row
FAR = 10**9  # steps, before it is known how long one takes
WARMUP, WARMDOWN, LAST_RATE = 40, 0.65, 0.05  # nanochat's: steps, share of the steps, share of the rate
REFERENCE_DEPTH, REFERENCE_BATCH, TOKENS_PER_PARAMETER = 12, 2**19, 12  # where its rates and decay were tuned


# --- nanochat ---------------------------------------------------------------------------------------------------------


def build(depth: int, vocabulary: int):
    """Its model on the meta device, as its script makes it for CPUs."""
    import torch
    from nanochat.gpt import GPT, GPTConfig

    config = GPTConfig(sequence_len=ROW, vocab_size=vocabulary, n_layer=depth, n_head=depth, n_kv_head=depth,
                       n_embd=64 * depth, window_pattern="L")  # fmt: skip
    with torch.device("meta"):
        return GPT(config)


def horizon(model) -> float:
    """Tokens that its script would train this model on, by which it scales the weight decay."""
    sizes = model.num_scaling_params()
    return TOKENS_PER_PARAMETER * (sizes["transformer_matrices"] + sizes["lm_head"])


def optimiser(model, reference_tokens: float, batch: int, factor: float):
    """Its optimiser with base_train's defaults, scaled to the batch as there; and the weight decay of its matrices."""
    scale = math.sqrt(batch / REFERENCE_BATCH)
    decay = 0.28 * scale * reference_tokens / horizon(model)
    rates = {"embedding_lr": 0.3, "unembedding_lr": 0.008, "matrix_lr": 0.02, "scalar_lr": 0.5}
    rates = {name: rate * scale * factor for name, rate in rates.items()}
    return model.setup_optimizer(**rates, weight_decay=decay), decay


def schedule(step: int, steps: float) -> tuple[float, float, float]:
    """Factor of the learning rates, Muon's momentum, factor of its weight decay, in a run of `steps`."""
    left = min(1.0, (steps - step) / (WARMDOWN * steps))  # 1 until the rates go down, 0 at the end
    warmup = min(WARMUP, steps / 10)
    rate = (step + 1) / warmup if step + 1 < warmup else left + (1 - left) * LAST_RATE
    momentum = 0.85 + 0.12 * step / 400 if step < 400 else 0.90 + 0.07 * left
    return rate, momentum, 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))


def packed(folder: Path, seed: int) -> Iterator[list[int]]:
    """Rows of ROW + 1 tokens without end. A document is its start token and its text: the next start ends it."""
    import numpy as np

    from twelve.data.shards import META, Shards
    from twelve.files import read_json

    meta = read_json(folder / META)
    counts = meta["kinds"]["text"]
    shards = Shards(folder, "text", meta["dtype"], counts["documents"], counts["shards"])

    def documents() -> Iterator[list[int]]:
        for epoch in count():
            for number in np.random.default_rng([seed, epoch]).permutation(len(shards.ends)).tolist():
                begin = int(shards.ends[number - 1]) if number else 0
                yield shards.tokens(begin, int(shards.ends[number]) - 1).tolist()

    source, waiting = enumerate(documents()), []  # waiting: (length, number, tokens), sorted
    while True:
        row: list[int] = []
        while (room := ROW + 1 - len(row)) > 0:
            while len(waiting) < WAITING:
                number, tokens = next(source)
                insort(waiting, (len(tokens), number, tokens))
            fits = bisect_right(waiting, room, key=lambda document: document[0])
            row += waiting.pop(max(0, fits - 1))[2][:room]
        yield row


def train_theirs(job: dict, options: argparse.Namespace) -> tuple[dict, object, object]:
    """Train for the job's minutes; figures, and the model and the tokenizer for scoring."""
    import torch

    from twelve.data.tokenizer import Tokenizer
    from twelve.heap import keep_freed_memory

    sys.path.insert(0, str(options.nanochat))  # before this folder, whose nanochat is this file
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    chosen, budget, started = job["settings"], 60 * job["minutes"], float(os.environ["STARTED"])
    words = Tokenizer.load(options.out / "tokens")
    model = build(chosen["depth"], words.vocab_size)
    model.to_empty(device="cpu")
    torch.manual_seed(job["seed"])
    model.init_weights()
    reference = horizon(build(REFERENCE_DEPTH, words.vocab_size))
    optimizer, decay = optimiser(model, reference, chosen["batch"], chosen["rate"])
    running = torch.compile(model, dynamic=False) if chosen["compile"] else model
    rows, parts = packed(options.out / "tokens", job["seed"]), max(1, chosen["batch"] // ROW // ROWS)

    def now() -> float:
        return time.monotonic() - started

    ends, losses = [], []  # of every step
    while True:
        step = len(ends)
        steady = (ends[-1] - ends[0]) / (step - 1) if step > 1 else 0.0  # seconds of a step; the first one compiles
        if now() + steady > budget and step:
            break
        rate, momentum, decaying = schedule(step, step + (budget - now()) / steady if steady else FAR)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate
            if group["kind"] == "muon":
                group["momentum"], group["weight_decay"] = momentum, decay * decaying
        total = 0.0
        for _ in range(parts):
            ids = torch.tensor([next(rows) for _ in range(chosen["batch"] // ROW // parts)])
            loss = running(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()) / parts
            loss.backward()
            total += loss.item()
        optimizer.step()
        model.zero_grad(set_to_none=True)
        ends.append(now())
        losses.append(total)
        if not step:
            gc.collect()
            gc.freeze()
            gc.disable()
    tokens, parameters = chosen["batch"] * len(ends), model.num_scaling_params()["total"]
    figures = {
        "parameters": parameters, "active_parameters": parameters, "steps": len(ends), "tokens": tokens,
        "tokens_per_second": chosen["batch"] * (len(ends) - 1) / (ends[-1] - ends[0]) if len(ends) > 1 else 0.0,
        "seconds": ends[-1], "first_step_ends": ends[0], "loss": mean(losses[-max(1, len(losses) // 50) :]),
    }  # fmt: skip
    return figures, scorable(model.eval(), words.start_ids[0]), words


def scorable(model, start: int):
    """What `bits_per_byte` asks of a model. Windows inside a document begin with its start token, too, as all rows did
    in training; the token that it replaces is not scored there."""
    import torch

    class Scorable(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.config = SimpleNamespace(max_position_embeddings=ROW, vocab_size=model.config.vocab_size)

        def forward(self, ids):
            ids = torch.cat((ids.new_full((len(ids), 1), start), ids[:, 1:]), dim=1)
            if ids.shape[1] == 1:  # its forward pass takes two tokens or more
                return self.model(ids.repeat(1, 2))[:, :1]
            return self.model(ids)

    return Scorable()


# --- ours -------------------------------------------------------------------------------------------------------------


def train_ours(job: dict, options: argparse.Namespace) -> tuple[dict, object, object]:
    """As `train_theirs`, by the verb that a user has."""
    from twelve.convert import load

    with tempfile.TemporaryDirectory(dir=options.out) as folder:
        command = [
            sys.executable, "-m", "twelve", "pretrain", str(options.out / "tokens"), "--out", f"{folder}/model",
            "--minutes", str(job["minutes"]), "--seed", str(job["seed"]), "--threads", str(options.threads), "--json",
            *job["settings"].split(),
        ]  # fmt: skip
        began = time.monotonic()
        ended = subprocess.run(command, stdout=subprocess.PIPE, check=False)
        seconds = time.monotonic() - began
        if ended.returncode:
            sys.exit(ended.returncode)  # it has said why
        found = json.loads(ended.stdout)
        model, words = load(f"{folder}/model", device="cpu")
    keys = ("parameters", "active_parameters", "steps", "tokens", "tokens_per_second", "loss")
    return {key: found[key] for key in keys} | {"seconds": seconds}, model, words


# --- one run ----------------------------------------------------------------------------------------------------------


def run_one(job: dict, options: argparse.Namespace) -> runs.Row:
    """Train a side, score it on the slice of train or on the held-out texts; what it measures."""
    figures, model, words = (train_theirs if job["side"] == "nanochat" else train_ours)(job, options)

    import torch

    torch.set_num_threads(options.threads)
    names = dict(options.held_out)
    texts = names if job["text"] == "held out" else {name: options.out / f"slice-{name}.jsonl" for name in names}
    context = min(ROW, model.config.max_position_embeddings)
    return figures | {"bits": runs.bits_of(model, words, texts.items(), context)}


def run(side: str, seed: int, minutes: float, settings: dict | str, text: str, options: argparse.Namespace) -> runs.Row:
    """The row of a run: from rows.jsonl, or from a process of its own."""
    job = {"side": side, "seed": seed, "minutes": minutes, "settings": settings, "text": text}
    job = {"job": job, "data": options.sha256, "nanochat": options.version, "threads": options.threads}
    if row := runs.row_of(job, runs.read_rows(options.out)):
        return row
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            "TORCHINDUCTOR_CACHE_DIR": cache, "OMP_NUM_THREADS": str(options.threads),
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
            "STARTED": str(time.monotonic()),
        }  # fmt: skip
        name = "{job[side]:9} seed {job[seed]}  {job[minutes]:g} min  {job[settings]}  {job[text]}"
        runs.end(runs.run_all([job], name, options.out, 1, environment))
    row = runs.row_of(job, runs.read_rows(options.out))
    print("  ".join(f"{name} {value:.4f}" for name, value in row["bits"].items()), flush=True)
    return row


def choose(options: argparse.Namespace) -> dict[str, dict | str]:
    """Of each side, the settings with the fewest bits per byte on the slice of train, mean over languages."""

    def cost(side: str, settings: dict | str) -> float:
        row = run(side, CHOICE_SEED, options.choose_minutes or options.minutes, settings, "slice", options)
        return mean(row["bits"].values())

    lists = {"batch": options.batches, "depth": options.depths, "rate": options.rates, "compile": options.compile}
    theirs = {name: values[len(values) // 2 if name in ("batch", "depth") else 0] for name, values in lists.items()}
    for name, values in lists.items():
        tried = [{**theirs, name: value} for value in values]
        theirs = min(tried, key=lambda settings: cost("nanochat", settings)) if len(tried) > 1 else tried[0]
    ours = min(options.ours, key=lambda flags: cost("twelve", flags)) if len(options.ours) > 1 else options.ours[0]
    return {"nanochat": theirs, "twelve": ours}


# --- all of them ------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanochat", type=Path, required=True, metavar="CHECKOUT")
    parser.add_argument("--text", nargs="+", type=runs.named, required=True, metavar="NAME=PATH", help="to train on")
    parser.add_argument("--held-out", nargs="+", type=runs.named, required=True, metavar="NAME=PATH", help="to score")
    parser.add_argument("--minutes", type=float, default=10, help="of a run (default: 10)")
    parser.add_argument("--choose-minutes", type=float, help="of a run that chooses (default: as --minutes)")
    parser.add_argument("--ours-minutes", nargs="+", type=float, default=[], help="of more runs of ours")
    parser.add_argument("--seeds", nargs="+", type=int, default=[3, 4, 5])
    parser.add_argument("--depths", nargs="+", type=int, default=[2, 4, 6], help="of nanochat (default: 2 4 6)")
    parser.add_argument("--batches", nargs="+", type=int, default=[2048, 4096, 8192], help="of nanochat, in tokens")
    parser.add_argument("--rates", nargs="+", type=float, default=[1, 2, 4], help="factors on its learning rates")
    parser.add_argument("--compile", nargs="+", type=int, default=[1], choices=(1, 0), help="its model (default: 1)")
    parser.add_argument("--ours", nargs="+", default=[""], metavar="FLAGS", help="of `twelve pretrain` (default: none)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/nanochat"))
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if job := options.one:
        runs.add_row(options.out, job | run_one(job["job"], options))
        return
    options.sha256 = prepare(options)
    files = sorted((options.nanochat / "nanochat").glob("*.py"))
    options.version = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]
    chosen = choose(options)
    print("chosen:", chosen, flush=True)
    rows: dict[str, list[dict]] = {side: [] for side in chosen}
    for number, seed in enumerate(options.seeds):
        for side in list(chosen)[:: -1 if number % 2 else 1]:
            rows[side].append(run(side, seed, options.minutes, chosen[side], "held out", options))
    sooner = {
        minutes: [run("twelve", seed, minutes, chosen["twelve"], "held out", options) for seed in options.seeds]
        for minutes in sorted(options.ours_minutes)
    }
    print_table(rows, sooner, options)


def prepare(options: argparse.Namespace) -> str:
    """Write the slice of every name, the rest of the text, and its tokens; the SHA-256 of these."""
    from twelve.data.corpus import tokenize
    from twelve.data.shards import META, PackedData

    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "tokens" / META).exists():
        slices: dict[str, dict[str, None]] = {}  # every line once
        with open(out / "rest.jsonl", "w", encoding="utf-8") as rest:
            for name, path in options.text:
                for text in whole(read_documents([path])):
                    line = json.dumps({"text": text}, ensure_ascii=False) + "\n"
                    if crc32(line.encode()) % SLICE:
                        rest.write(line)
                    else:
                        slices.setdefault(name, {})[line] = None
        for name, lines in slices.items():
            (out / f"slice-{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        tokenize([out / "rest.jsonl"], out / "tokens")
    return PackedData(out / "tokens").sha256


def whole(documents: Iterable[Document]) -> Iterator[str]:
    """Their texts: a long one comes in pieces."""
    pieces: list[str] = []
    for document in documents:
        pieces.append(document.text or "")
        if not document.more:
            yield "".join(pieces)
            pieces = []


def print_table(rows: dict[str, list[dict]], sooner: dict[float, list[dict]], options: argparse.Namespace) -> None:
    names = [name for name, _ in options.held_out]
    print(f"\n{options.minutes:g} minutes, {options.threads} threads, seeds {options.seeds}; "
          "bits per byte: mean (lowest-highest)")  # fmt: skip
    for side, mine in [*rows.items(), *((f"twelve, {minutes:g} min", mine) for minutes, mine in sooner.items())]:
        sizes = "  ".join(f"{key.replace('_', ' ')} {mean(row[key] for row in mine):,.0f}" for key in SIZES)
        values = {name: [row["bits"][name] for row in mine] for name in names}
        bits = "  ".join(f"{name} {mean(v):.4f} ({min(v):.4f}-{max(v):.4f})" for name, v in values.items())
        print(f"{side:16} {bits}  {sizes}")
    for name in names:
        pairs = zip(rows["twelve"], rows["nanochat"], strict=True)
        changes = [ours["bits"][name] - theirs["bits"][name] for ours, theirs in pairs]
        average, error = runs.spread(changes)
        sure = f" ± {error:.4f}" if len(changes) > 1 else ""
        print(f"twelve less nanochat, {name}: {average:+.4f}{sure}   {[round(value, 4) for value in changes]}")
        if sooner:
            goal = mean(row["bits"][name] for row in rows["nanochat"])
            ends = {**sooner, options.minutes: rows["twelve"]}
            points = sorted((minutes, mean(row["bits"][name] for row in mine)) for minutes, mine in ends.items())
            print(f"nanochat's {goal:.4f} bits per byte, {name}: ours is there {reached(points, goal)}")


def reached(points: list[tuple[float, float]], goal: float) -> str:
    """When the runs' ends (minutes, bits per byte) pass the goal, on straight lines over the logarithm of time."""
    before = None
    for minutes, bits in points:
        if bits <= goal:
            if before is None:
                return f"in {minutes:g} minutes or fewer"
            share = (before[1] - goal) / (before[1] - bits)
            between = math.exp(math.log(before[0]) + share * math.log(minutes / before[0]))
            return f"in about {between:.1f} minutes (runs of {before[0]:g} and {minutes:g} lie around it)"
        before = minutes, bits
    return f"not in {points[-1][0]:g} minutes"


if __name__ == "__main__":
    main()
