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
from itertools import product
from pathlib import Path
from random import Random

import runs

from twelve import report
from twelve.config import small_v3
from twelve.data.corpus import tokenize
from twelve.data.reader import read_documents
from twelve.data.shards import PackedData
from twelve.data.tokenizer import Tokenizer
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
    return {**SHAPE, "experts_per_token": wide, "switches": {"engram_vocab_size": 0}}


def run(model: str, seed: int, options: argparse.Namespace) -> runs.Row:
    """What one model measures; trains whatever is not there yet."""
    import torch

    from twelve.convert import load
    from twelve.model import count_parameters
    from twelve.train.pretrain import pretrain

    torch.set_num_threads(1)
    tokens, folder = options.out / f"tokens-{seed}", options.out / f"{model}-{seed}"
    words, data = Tokenizer.load(tokens), PackedData(tokens)
    if not (folder / "config.json").exists():
        steps = data.windows(SHAPE["context"]) // options.batch
        shape = shape_of(model, words.vocab_size)
        pretrain([str(tokens)], folder, steps=steps, seed=seed, batch=options.batch, quiet=True, **shape,
                 learning_rate=options.learning_rate)  # fmt: skip
    network, _ = load(folder, device="cpu")
    known = facts(seed, options.count)
    ways = {model: measure(network, words, known, options)}
    if model == "engram":
        with without_memory(network):
            ways["zeroed"] = measure(network, words, known, options)
    return {"tokens": data.tokens, **count_parameters(network.config), "ways": ways}


def measure(network, words: Tokenizer, known: list, options: argparse.Namespace) -> dict:
    """Recall in each wording and language, and bits a byte of each held-out text."""
    network.eval()
    bits = runs.bits_of(network, words, options.held_out, limit=HELD_OUT)
    recalled = {
        wording: {found.language: found.to_dict() for found in recall(network, words, asked)}
        for wording, asked in zip(WORDINGS, (known, as_told(known)), strict=True)
    }
    return {"recall": recalled, "bits": bits}


# --- all of them ------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="+", metavar="TEXT", help="ordinary text, of each an equal share")
    parser.add_argument("--held-out", nargs="*", type=runs.named, default=[], metavar="NAME=PATH")
    parser.add_argument("--seeds", nargs="+", type=int, default=[3, 4, 5])
    parser.add_argument("--count", type=int, default=100, help="facts a language (default: 100)")
    parser.add_argument("--times", type=int, default=10, help="that a sentence is read (default: 10)")
    parser.add_argument("--megabytes", type=float, default=6, help="of ordinary text (default: 6)")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--plot", type=Path, metavar="SVG")
    runs.add_options(parser, "runs/facts")
    options = parser.parse_args()
    if job := options.one:
        runs.add_row(options.out, job | run(job["model"], job["seed"], options))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        prepare(seed, options)
    failed = runs.run_all(jobs(options), "{model}, seed {seed}", options.out, options.workers)
    rows = runs.read_rows(options.out, settings(options))
    print_table(rows)
    shown = []
    for wording in WORDINGS:
        found = shares(rows, wording, "chosen_share")
        bars = {f"{WAYS[way]}, {language}": runs.spread(values, 0.0) for way, language, values in found}
        shown.append(report.bars(f"Chosen among {CHOICES}, {wording} wording", bars, "± standard error", high=1.0))
    report.write_report(options.out / "report.html", "What the memory holds", [("Recall", shown)])
    if options.plot:
        options.plot.write_text(plot(rows), encoding="utf-8")
    runs.end(failed)


def settings(options: argparse.Namespace) -> dict:
    """What makes two rows comparable."""
    names = ("text", "count", "times", "megabytes", "batch", "vocab_size", "learning_rate")
    return {name: getattr(options, name) for name in names} | {"held_out": dict(options.held_out)}


def jobs(options: argparse.Namespace) -> list[runs.Job]:
    same = settings(options)
    return [{"model": model, "seed": seed, "settings": same} for seed, model in product(options.seeds, MODELS)]


# --- what they say ----------------------------------------------------------------------------------------------------


def shares(rows: list[dict], wording: str, share: str) -> list[tuple[str, str, list[float]]]:
    """(way, language, its share for every seed)."""
    found = []
    for way, language in product(WAYS, ("ko", "en")):
        values = [row["ways"][way]["recall"][wording][language][share] for row in rows if way in row["ways"]]
        if values:
            found.append((way, language, values))
    return found


def print_table(rows: list[dict]) -> None:
    for model in MODELS:
        for row in [row for row in rows if row["model"] == model][:1]:
            print(f"{model}: {row['total'] / 1e6:.2f}M parameters, {row['table'] / 1e6:.2f}M of them in the table, "
                  f"{row['active'] / 1e6:.2f}M active a token; {row['tokens']:,} tokens")  # fmt: skip
    print(f"\nshare of facts, mean ± standard error over seeds; by chance {1 / CHOICES:.0%} are chosen")
    for wording in WORDINGS:
        written = {(way, language): values for way, language, values in shares(rows, wording, "written_share")}
        for way, language, values in shares(rows, wording, "chosen_share"):
            print(f"  {wording:4} wording  {WAYS[way]:24} {language}  chosen {_shown(values)}  "
                  f"written {_shown(written[way, language])}  ({len(values)} seeds)")  # fmt: skip
    for way in WAYS:
        told = [row["ways"][way]["bits"] for row in rows if way in row["ways"]]
        for name in told[0] if told else ():
            average, error = runs.spread([bits[name] for bits in told], 0.0)
            print(f"  {WAYS[way]:24} {name}  {average:.4f} ± {error:.4f} bits a byte of held-out text")


def _shown(values: list[float]) -> str:
    return "{:6.1%} ± {:.1%}".format(*runs.spread(values, 0.0))


def plot(rows: list[dict]) -> str:
    """Facts chosen, by wording: a bar for each way and language, a whisker of one standard error, a dot a seed."""
    left, width, gap, height = 180, 220, 140, 28
    parts, bottom = [], 0
    for column, wording in enumerate(WORDINGS):
        begin = left + column * (width + gap)
        parts.append(f'<text x="{begin}" y="42">asked in a wording that is {wording}</text>')
        for number, (way, language, values) in enumerate(shares(rows, wording, "chosen_share")):
            y = 54 + number * height
            if not column:
                parts.append(runs.label(left - 10, y, f"{WAYS[way]}, {language}", "end"))
            parts.append(runs.bar(begin, y, width, values, "#3b6ea8" if way == "engram" else "#a9b8c6"))
            parts.append(runs.label(begin + width + 12, y, _shown(values)))
            bottom = max(bottom, y + height)
        parts.append(f'<path d="M{begin + width / CHOICES} 48V{bottom}" stroke="#222" stroke-dasharray="3 3"/>')
    title = f"Invented facts recalled, of {CHOICES} answers each (dashes: chance): mean, standard error, every seed"
    return runs.svg(title, left + 2 * (width + gap), bottom + 6, parts)


if __name__ == "__main__":
    main()
