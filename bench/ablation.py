"""What each part is worth at equal tokens and at equal seconds: plain, +MTP, +Engram, +mHC, all, +experts.

    python bench/ablation.py TEXT... --held-out ko=ko-val.jsonl en=en-val.jsonl --seeds 3 4 5 --out runs/ablation

A run is a process of its own on one thread, `--workers` at a time, and leaves its row in rows.jsonl: the same command
goes on where it stopped. With one seed all arms read the same batches in the same order, for the same seconds of
training that the processor worked for them; measuring is not counted. Where other work slows the memory down, run all
arms at a time, even on one core: it then slows them alike.

Bits a byte of the held-out texts are measured at token marks that all arms share, and at the end. Equal seconds
compares the ends. Equal tokens compares the last mark that the arm's runs and plain's all passed before their learning
rate began to fall: at later ones they are at different points of the schedule.

Parameters are those of the model that is kept, so without MTP modules; the table's count among all, and the rows that a
token reads among the active ones. +experts is plain with as many more parameters in routed experts as the table has, so
with the same arithmetic a token. Several learning rates give a row each, and the verdict takes every arm at its best.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from itertools import product
from pathlib import Path
from statistics import mean

import runs

from twelve import report
from twelve.config import ModelConfig, small_v3
from twelve.data.shards import PackedData
from twelve.data.tokenizer import Tokenizer
from twelve.model.engram import NGramHash

ARMS = {
    "plain": (), "+MTP": ("mtp",), "+Engram": ("engram",), "+mHC": ("mhc",), "all": ("mtp", "engram", "mhc"),
    "+experts": ("experts",),
}  # fmt: skip
ENGRAM = {"engram_max_ngram_size": 3, "engram_n_heads": 4, "engram_head_dim": 32, "engram_vocab_size": 16384}
STREAMS = 4
SETTINGS = ("minutes", "width", "layers", "experts", "experts_per_token", "context", "batch", "mark", "limit")


# --- one run ----------------------------------------------------------------------------------------------------------


def configure(arm: str, words: Tokenizer, options: argparse.Namespace) -> ModelConfig:
    """The model of an arm: the plain one with its parts added."""
    parts, width = ARMS[arm], options.width
    switches = (ENGRAM if "engram" in parts else {}) | ({"hc_mult": STREAMS} if "mhc" in parts else {})
    shape = {"experts_per_token": options.experts_per_token, "context": options.context}
    more = 0
    if "experts" in parts:
        with_table = small_v3(words.vocab_size, width, options.layers, **ENGRAM)
        moe_layers, expert = options.layers - 1, 3 * width * (width // 2)
        more = round(NGramHash(with_table).total_rows * with_table.engram_head_dim / (moe_layers * expert))
    config = small_v3(words.vocab_size, width, options.layers, options.experts + more, mtp=int("mtp" in parts), **shape,
                      **switches)  # fmt: skip
    return runs.with_tokenizer(config, words)


def run(arm: str, seed: int, rate: float, options: argparse.Namespace, folder: Path) -> runs.Row:
    """Train one arm for its minutes; what it measures. The table lies in `folder`, as in any training."""
    import torch

    from twelve.heap import keep_freed_memory
    from twelve.model import Transformer, count_parameters
    from twelve.train.precision import pick_device, pick_precision

    torch.set_num_threads(1)
    keep_freed_memory()
    device = pick_device(options.device)
    clock = time.process_time if device.type == "cpu" else time.monotonic
    data, words = PackedData(options.out / "tokens"), Tokenizer.load(options.out / "tokens")
    config = configure(arm, words, options)
    model = Transformer(config).init_weights(seed).to(device)
    if model.memory is not None:
        model.memory.use_tokenizer(words)
    trainer = runs.pretraining(model, data, folder, context=options.context, batch=options.batch, learning_rate=rate,
                               seed=seed, precision=pick_precision(device))  # fmt: skip

    def measure() -> dict[str, float]:
        return runs.bits_of(model, words, options.held_out, options.context, options.limit)

    spent, marks = 0.0, []
    for spent, falling, figures in runs.timed_steps(trainer, 60 * options.minutes, clock):
        if trainer.tokens // options.mark > len(marks):
            at = {"tokens": trainer.tokens, "seconds": spent, "falling": falling, "loss": figures["loss"]}
            marks.append(at | measure())
    return {**count_parameters(config), "steps": trainer.step, "tokens": trainer.tokens, "seconds": spent,
            "marks": marks, "end": measure()}  # fmt: skip


# --- all of them ------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="*", metavar="TEXT", help="to train on; tokenised once, into OUT/tokens")
    parser.add_argument("--held-out", nargs="+", type=runs.named, required=True, metavar="NAME=PATH")
    parser.add_argument("--limit", type=int, default=40, help="documents of each that are measured (default: 40)")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM")
    parser.add_argument("--seeds", nargs="+", type=int, default=[3, 4, 5])
    parser.add_argument("--learning-rate", nargs="+", type=float, default=[4e-3], help="each arm runs at each")
    parser.add_argument("--minutes", type=float, default=6, help="of training, a run (default: 6)")
    parser.add_argument("--mark", type=int, default=250_000, help="tokens between measurements")
    for name, value in {"width": 128, "layers": 6, "experts": 8, "experts-per-token": 2, "context": 256,
                        "batch": 16, "vocab-size": 4096}.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default: {value}")
    parser.add_argument("--device", help="default: what there is")
    parser.add_argument("--plot", type=Path, metavar="SVG")
    runs.add_options(parser, "runs/ablation")
    options = parser.parse_args()
    if job := options.one:
        with tempfile.TemporaryDirectory(dir=options.out) as folder:
            found = run(job["arm"], job["seed"], job["rate"], options, Path(folder))
        runs.add_row(options.out, job | found)
        return
    runs.tokenized(options.text, options.out / "tokens", options.vocab_size)
    failed = runs.run_all(jobs(options), "{arm}, seed {seed}, learning rate {rate:g}", options.out, options.workers)
    rows = runs.read_rows(options.out, settings(options))
    languages = [name for name, _ in options.held_out]
    print_table(rows, languages)
    write_report(options.out / "report.html", rows, languages)
    if options.plot:
        options.plot.write_text(plot(rows, languages), encoding="utf-8")
    runs.end(failed)


def settings(options: argparse.Namespace) -> dict:
    """What makes two rows comparable."""
    data = runs.data_hash(options.out / "tokens")
    return {name: getattr(options, name) for name in SETTINGS} | {"held_out": dict(options.held_out), "data": data}


def jobs(options: argparse.Namespace) -> list[runs.Job]:
    same = settings(options)
    return [{"arm": arm, "seed": seed, "rate": rate, "settings": same}
            for seed, rate, arm in product(options.seeds, options.learning_rate, options.arms)]  # fmt: skip


# --- what they say ----------------------------------------------------------------------------------------------------


def chosen(rows: list[dict], arm: str, rate: float) -> list[dict]:
    return [row for row in rows if (row["arm"], row["rate"]) == (arm, rate)]


def common_mark(rows: list[dict]) -> int:
    """Number of the last mark that every run passed before its learning rate fell; -1 for none."""
    return min((sum(not mark["falling"] for mark in row["marks"]) for row in rows), default=0) - 1


def bits(row: dict, language: str, mark: int | None) -> float:
    """At that mark, or for None at the end."""
    return (row["end"] if mark is None else row["marks"][mark])[language]


def best_rates(rows: list[dict], languages: list[str]) -> dict[str, float]:
    """Of each arm, the learning rate that ends lowest."""
    ends: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        ends.setdefault(row["arm"], {}).setdefault(row["rate"], []).append(sum(row["end"][name] for name in languages))
    return {arm: min(ends[arm], key=lambda rate, arm=arm: mean(ends[arm][rate])) for arm in ARMS if arm in ends}


def differences(rows: list[dict], arm: str, rates: dict[str, float], language: str, mark: int | None) -> list[float]:
    """Bits a byte of the arm less plain's, seed by seed, each at its best rate."""
    plain, other = (
        {row["seed"]: bits(row, language, mark) for row in chosen(rows, name, rates[name])} for name in ("plain", arm)
    )
    return [other[seed] - plain[seed] for seed in sorted(other.keys() & plain.keys())]


def verdicts(rows: list[dict], languages: list[str]) -> list[dict]:
    """A line for every arm, language and way to compare."""
    rates = best_rates(rows, languages)
    found = []
    for how, language, arm in product(("tokens", "seconds"), languages, rates):
        mark = common_mark([row for row in rows if row["arm"] in ("plain", arm)]) if how == "tokens" else None
        if arm == "plain" or "plain" not in rates or mark == -1:
            continue
        changes = differences(rows, arm, rates, language, mark)
        if changes:
            at = 0 if mark is None else rows[0]["marks"][mark]["tokens"]
            average, error = runs.spread(changes)
            found.append({"equal": f"{at:,} {how}" if at else how, "text": language, "arm": arm, "rate": rates[arm],
                          "change": average, "error": error, "p": runs.paired(changes), "seeds": len(changes),
                          "changes": changes})  # fmt: skip
    return found


def print_table(rows: list[dict], languages: list[str]) -> None:
    for line in summary(rows, languages):
        print("  ".join(f"{key} {value}" for key, value in line.items()))
    print("change of bits a byte against plain, paired over seeds; each arm at its best learning rate")
    for found in verdicts(rows, languages):
        change = f"{found['change']:+.4f} ± {found['error']:.4f}  p {found['p']:.3f}"
        print(f"  equal {found['equal']:14} {found['text']:4} {found['arm']:9} {change}  ({found['seeds']} seeds, "
              f"learning rate {found['rate']:g})")  # fmt: skip


def summary(rows: list[dict], languages: list[str]) -> list[dict]:
    """A line for every arm and learning rate, with its sizes."""
    lines = []
    for arm, rate in product(ARMS, sorted({row["rate"] for row in rows})):
        if mine := chosen(rows, arm, rate):
            first = mine[0]
            ends = {name: runs.spread([row["end"][name] for row in mine]) for name in languages}
            lines.append({
                "arm": arm, "rate": rate, "seeds": len(mine), "parameters": f"{first['total'] / 1e6:.2f}M",
                "of them table": f"{first['table'] / 1e6:.2f}M", "active": f"{first['active'] / 1e6:.2f}M",
                "tokens": f"{mean(row['tokens'] for row in mine) / 1e6:.2f}M",
                **{name: f"{value:.4f} ± {error:.4f}" for name, (value, error) in ends.items()},
            })  # fmt: skip
    return lines


def write_report(path: Path, rows: list[dict], languages: list[str]) -> None:
    found = [{key: f"{value:.4f}" if isinstance(value, float) else value for key, value in line.items()
              if key != "changes"} for line in verdicts(rows, languages)]  # fmt: skip
    shown = [report.table(summary(rows, languages), "At the end of equal seconds, mean and standard error over seeds")]
    shown.append(report.table(found, "Change of bits a byte against plain, paired over seeds"))
    rates, few = best_rates(rows, languages), list(ARMS)[:4]
    curves = []
    for language, clock, arms in product(languages, ("tokens", "seconds"), (few, ["plain", *list(ARMS)[4:]])):
        series = {}
        for arm in (arm for arm in arms if arm in rates):
            mine = chosen(rows, arm, rates[arm])
            marks = min(len(row["marks"]) for row in mine)
            ways = [[*row["marks"][:marks], row | row["end"]] for row in mine]
            points = list(zip(*ways, strict=True))  # of every seed
            series[arm] = tuple([mean(at[key] for at in seeds) for seeds in points] for key in (clock, language))
        curves.append(report.curve(f"Bits a byte, {language}", series, x_label=clock))
    report.write_report(path, "Ablation", [("Result", shown), ("On the way", curves)])


def plot(rows: list[dict], languages: list[str]) -> str:
    """Change against plain at equal tokens and equal seconds: bar, whisker of one standard error, a dot a seed."""
    found = verdicts(rows, languages)
    reach = 1.1 * max((abs(change) for line in found for change in line["changes"]), default=1.0)
    left, width, gap, height = 110, 210, 240, 26
    parts, bottom = [], 0
    for column, how in enumerate(("tokens", "seconds")):
        middle, y = left + column * (width + gap) + width / 2, 58
        parts.append(f'<text x="{middle}" y="42" text-anchor="middle">equal {how}</text>')
        for line in (line for line in found if line["equal"].endswith(how)):
            fill = "#3b6ea8" if line["change"] < 0 else "#b5723f"
            parts += [
                runs.label(middle - width / 2 - 10, y, f"{line['arm']}, {line['text']}", "end"),
                runs.bar(middle, y, width / 2 / reach, line["changes"], fill),
                runs.label(middle + width / 2 + 8, y, f"{line['change']:+.4f} ± {line['error']:.4f}"),
            ]
            y += height
        parts.append(f'<path d="M{middle} 50V{y}" stroke="#222"/>')
        bottom = max(bottom, y)
    title = "Bits a byte against plain: less is better; mean, standard error, and every seed"
    return runs.svg(title, left + 2 * (width + gap), bottom + 10, parts)


if __name__ == "__main__":
    main()
