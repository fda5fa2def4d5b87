"""What the memory holds: recall of invented facts with Engram, with its table zeroed, and of a model without one.

    python bench/facts.py ko-train.jsonl en-train.jsonl --held-out ko=ko-val.jsonl en=en-val.jsonl --out runs/facts

Each seed has its own facts (`twelve.evaluate.facts`), told `--times` times in four wordings among `--megabytes` of
ordinary text, and asked in a fifth, new one as well as in one of the four. Both models are dense and read that once, in
the same order. The one without Engram has wider feed-forward layers, so that a token costs it no less arithmetic. Bits
a byte of held-out text say what else the table holds.

Every run is a process of its own on one thread, `--workers` at a time, and leaves its row in rows.jsonl: the same
command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from random import Random
from statistics import mean, stdev

from twelve import report
from twelve.config import small_v3
from twelve.data.corpus import tokenize
from twelve.data.reader import read_documents
from twelve.data.shards import PackedData
from twelve.data.tokenizer import Tokenizer
from twelve.evaluate.bits import bits_per_byte
from twelve.evaluate.facts import CHOICES, as_told, documents, facts, recall, without_memory

MODELS = ("engram", "plain")
WORDINGS = ("new", "known")  # that facts are asked in
WAYS = {"engram": "memory on", "zeroed": "memory zeroed", "plain": "no memory, wider"}
ENGRAM = {"engram_vocab_size": 16384, "engram_n_heads": 4, "engram_head_dim": 32}
SHAPE = {"width": 128, "layers": 6, "experts": 0, "context": 256}
HELD_OUT = 40  # documents of each text that are measured


# --- data -------------------------------------------------------------------------------------------------------------


def prepare(seed: int, options: argparse.Namespace) -> None:
    """OUT/tokens-SEED: ordinary documents and those of the seed's facts, shuffled. All seeds share a tokenizer."""
    folder, first = options.out / f"tokens-{seed}", options.out / f"tokens-{options.seeds[0]}"
    source = options.out / f"text-{seed}.jsonl"
    if not source.exists():
        texts = documents(facts(seed, options.count), options.times, seed)
        for path in options.text:
            texts += ordinary(path, int(options.megabytes * 1e6 / len(options.text)))
        Random(seed).shuffle(texts)
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        source.write_text("".join(lines), encoding="utf-8")
    tokenize([source], folder, None if folder == first else first, options.vocab_size)


def ordinary(path: str, size: int) -> list[str]:
    """The first documents of a file, about `size` bytes of them."""
    texts = []
    for document in read_documents([path]):
        texts.append(document.text or "")
        size -= len(texts[-1].encode())
        if size < 0:
            break
    return texts


# --- one run ----------------------------------------------------------------------------------------------------------


def shape_of(model: str, vocab_size: int) -> dict:
    """Options of `pretrain`: Engram's dense model, or a dense one whose active parameters are no fewer."""
    from twelve.model import count_parameters

    asked = count_parameters(small_v3(vocab_size, **SHAPE, experts_per_token=2, **ENGRAM))["active"]
    if model == "engram":
        return {**SHAPE, "experts_per_token": 2, "switches": ENGRAM}
    wide = 2  # of feed-forward layers, in halves of the width, less one
    while count_parameters(small_v3(vocab_size, **SHAPE, experts_per_token=wide))["active"] < asked:
        wide += 1
    return {**SHAPE, "experts_per_token": wide}


def run(model: str, seed: int, options: argparse.Namespace) -> dict:
    """The row of one model; trains whatever is not there yet."""
    from twelve.convert import load
    from twelve.model import count_parameters
    from twelve.train.pretrain import pretrain

    tokens, folder = options.out / f"tokens-{seed}", options.out / f"{model}-{seed}"
    words, data = Tokenizer.load(tokens), PackedData(tokens)
    if not (folder / "config.json").exists():
        steps = data.windows(SHAPE["context"]) // options.batch
        shape = shape_of(model, words.vocab_size)
        pretrain([str(tokens)], folder, steps=steps, seed=seed, batch=options.batch, quiet=True, **shape,
                 learning_rate=options.learning_rate)  # fmt: skip
    network, _ = load(folder, device="cpu")
    known = facts(seed, options.count)
    row = {"model": model, "seed": seed, "settings": settings(options), "tokens": data.tokens}
    row |= {**count_parameters(network.config), "ways": {model: measure(network, words, known, options)}}
    if model == "engram":
        with without_memory(network):
            row["ways"]["zeroed"] = measure(network, words, known, options)
    return row


def measure(network, words: Tokenizer, known: list, options: argparse.Namespace) -> dict:
    """Recall in each wording and language, and bits a byte of each held-out text."""
    network.eval()
    bits = {name: bits_per_byte(network, words, path, limit=HELD_OUT).bits_per_byte for name, path in options.held_out}
    recalled = {
        wording: {found.language: found.to_dict() for found in recall(network, words, asked)}
        for wording, asked in zip(WORDINGS, (known, as_told(known)), strict=True)
    }
    return {"recall": recalled, "bits": bits}


# --- all of them ------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="+", metavar="TEXT", help="ordinary text, of each an equal share")
    parser.add_argument("--held-out", nargs="*", type=_named, default=[], metavar="NAME=PATH")
    parser.add_argument("--seeds", nargs="+", type=int, default=[3, 4, 5])
    parser.add_argument("--count", type=int, default=100, help="facts a language (default: 100)")
    parser.add_argument("--times", type=int, default=10, help="that a sentence is read (default: 10)")
    parser.add_argument("--megabytes", type=float, default=6, help="of ordinary text (default: 6)")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/facts"))
    parser.add_argument("--plot", type=Path, metavar="SVG")
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        import torch

        torch.set_num_threads(1)
        row = run(options.one[0], int(options.one[1]), options)
        with open(options.out / "rows.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return
    options.out.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        prepare(seed, options)
    run_all(options)
    rows = read_rows(options)
    print_table(rows)
    shown = []
    for wording in WORDINGS:
        found = shares(rows, wording, "chosen_share")
        bars = {f"{WAYS[way]}, {language}": spread(values) for way, language, values in found}
        shown.append(report.bars(f"Chosen among {CHOICES}, {wording} wording", bars, "± standard error", high=1.0))
    report.write_report(options.out / "report.html", "What the memory holds", [("Recall", shown)])
    if options.plot:
        options.plot.write_text(plot(rows), encoding="utf-8")


def _named(value: str) -> tuple[str, str]:
    name, _, path = value.partition("=")
    if not path:
        raise argparse.ArgumentTypeError(f"{value!r} is not NAME=PATH")
    return name, path


def settings(options: argparse.Namespace) -> dict:
    """What makes two rows comparable."""
    names = ("text", "count", "times", "megabytes", "batch", "vocab_size", "learning_rate")
    return {name: getattr(options, name) for name in names} | {"held_out": dict(options.held_out)}


def run_all(options: argparse.Namespace) -> None:
    done = {(row["model"], row["seed"]) for row in read_rows(options)}

    def start(job: tuple[int, str]) -> None:
        seed, model = job
        if (model, seed) in done:
            return
        command = [sys.executable, __file__, *sys.argv[1:], "--one", model, str(seed)]
        ended = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
        print(f"{model}, seed {seed}: " + (ended.stderr[-300:] if ended.returncode else "done"), flush=True)

    with ThreadPoolExecutor(options.workers) as pool:
        list(pool.map(start, product(options.seeds, MODELS)))


def read_rows(options: argparse.Namespace) -> list[dict]:
    """The rows of runs with these settings."""
    path = options.out / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in rows if row["settings"] == settings(options)]


# --- what they say ----------------------------------------------------------------------------------------------------


def shares(rows: list[dict], wording: str, share: str) -> list[tuple[str, str, list[float]]]:
    """(way, language, its share for every seed)."""
    found = []
    for way, language in product(WAYS, ("ko", "en")):
        values = [row["ways"][way]["recall"][wording][language][share] for row in rows if way in row["ways"]]
        if values:
            found.append((way, language, values))
    return found


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    return mean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def print_table(rows: list[dict]) -> None:
    for model in MODELS:
        for row in [row for row in rows if row["model"] == model][:1]:
            print(f"{model}: {row['total'] / 1e6:.2f}M parameters, {row['table'] / 1e6:.2f}M of them in the table, "
                  f"{row['active'] / 1e6:.2f}M active a token; {row['tokens']:,} tokens")  # fmt: skip
    print(f"\nshare of facts, mean ± standard error over seeds; by chance {1 / CHOICES:.0%} are chosen")
    for wording in WORDINGS:
        written = {(way, language): values for way, language, values in shares(rows, wording, "written_share")}
        for way, language, values in shares(rows, wording, "chosen_share"):
            both = [f"{average:6.1%} ± {error:.1%}" for average, error in map(spread, (values, written[way, language]))]
            print(f"  {wording:4} wording  {WAYS[way]:24} {language}  chosen {both[0]}  written {both[1]}  "
                  f"({len(values)} seeds)")  # fmt: skip
    for way in WAYS:
        told = [row["ways"][way]["bits"] for row in rows if way in row["ways"]]
        for name in told[0] if told else ():
            average, error = spread([bits[name] for bits in told])
            print(f"  {WAYS[way]:24} {name}  {average:.4f} ± {error:.4f} bits a byte of held-out text")


def plot(rows: list[dict]) -> str:
    """Facts chosen, by wording: a bar for each way and language, a whisker of one standard error, a dot a seed."""
    left, width, gap, height = 180, 220, 140, 28
    parts, bottom = [], 0
    for column, wording in enumerate(WORDINGS):
        begin = left + column * (width + gap)
        parts.append(f'<text x="{begin}" y="42">asked in a wording that is {wording}</text>')
        for number, (way, language, values) in enumerate(shares(rows, wording, "chosen_share")):
            (average, error), y = spread(values), 54 + number * height
            fill = "#3b6ea8" if way == "engram" else "#a9b8c6"
            if not column:
                parts.append(f'<text x="{left - 10}" y="{y + 15}" text-anchor="end">{WAYS[way]}, {language}</text>')
            parts.append(
                f'<rect x="{begin}" y="{y}" width="{average * width:.1f}" height="20" fill="{fill}"/>'
                f'<path d="M{begin + (average - error) * width:.1f} {y + 10}h{2 * error * width:.1f}" stroke="#222" '
                f'stroke-width="2"/><text x="{begin + width + 12}" y="{y + 15}">{average:.1%} ± {error:.1%}</text>'
            )
            parts += [f'<circle cx="{begin + one * width:.1f}" cy="{y + 10}" r="2.5" fill="#222"/>' for one in values]
            bottom = max(bottom, y + height)
        parts.append(f'<path d="M{begin + width / CHOICES} 48V{bottom}" stroke="#222" stroke-dasharray="3 3"/>')
    title = f"Invented facts recalled, of {CHOICES} answers each (dashes: chance): mean, standard error, every seed"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + 2 * (width + gap)} {bottom + 6}" '
        f'font-family="sans-serif" font-size="13"><rect width="100%" height="100%" fill="#fff"/>'
        f'<text x="10" y="20" font-weight="bold">{title}</text>{"".join(parts)}</svg>\n'
    )


if __name__ == "__main__":
    main()
