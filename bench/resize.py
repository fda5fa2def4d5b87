"""What a resized model is ahead of a fresh one: minutes of training until it has the fresh one's bits a byte.

    python bench/resize.py TEXT... --held-out ko=ko-val.jsonl en=en-val.jsonl --seeds 3 4 5 --out runs/resize

For every seed a model is trained for `--teacher-minutes`, then resized (as `twelve convert` does; what to keep is
measured on TEXT), and a fresh model of just that shape is trained beside it for the last of `--budgets`, in minutes.
The resized one is trained anew for each of the budgets, each a whole run with its own decay of the learning rate, so
that the time to the fresh one's value is read between ends of runs, not on the way. The teacher's own minutes do not
count: the question is what to do when one has a model. Seconds that resizing takes are told; measuring is not counted.
Minutes are the processor's, so that other work on it changes nothing.

Arms: half the depth, half the width, and experts from a dense model; models have a memory (Engram), as `pretrain` makes
them. A run is a process of its own on one thread, `--workers` at a time, and leaves its row in rows.jsonl: the same
command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from itertools import product
from pathlib import Path
from statistics import mean

import runs

from twelve import report
from twelve.config import small_v3, with_memory
from twelve.data.shards import PackedData
from twelve.data.tokenizer import Tokenizer

ARMS = {"depth": "half the depth", "width": "half the width", "experts": "experts from dense"}
SETTINGS = ("teacher_minutes", "width", "layers", "experts", "experts_per_token", "context", "batch", "learning_rate",
            "resized_rate", "limit")  # fmt: skip


# --- one run ----------------------------------------------------------------------------------------------------------


def sizes(arm: str, options: argparse.Namespace) -> dict[str, int]:
    """What is asked of `resize`."""
    return {
        "depth": {"layers": options.layers // 2}, "width": {"width": options.width // 2},
        "experts": {"experts": options.experts},
    }[arm]  # fmt: skip


def teacher_of(arm: str, seed: int, options: argparse.Namespace) -> Path:
    return options.out / f"teacher-{'dense' if arm == 'experts' else 'experts'}-{seed}"


def make_teacher(arm: str, seed: int, options: argparse.Namespace) -> runs.Row:
    """Train the model that this arm resizes, and keep it as a folder; what it measures."""
    from twelve.model import Transformer

    words = Tokenizer.load(options.out / "tokens")
    experts = 0 if arm == "experts" else options.experts
    config = small_v3(words.vocab_size, options.width, options.layers, experts, options.experts_per_token,
                      options.context, **with_memory())  # fmt: skip
    model = Transformer(runs.with_tokenizer(config, words)).init_weights(seed)
    model.memory.use_tokenizer(words)
    place = teacher_of(arm, seed, options)
    return train(model, options.teacher_minutes, seed, options.learning_rate, options, place)


def run(arm: str, way: str, minutes: float, seed: int, options: argparse.Namespace) -> runs.Row:
    """What one model of the resized shape measures: `way` is "resized" or "fresh"."""
    from twelve.convert import load
    from twelve.convert.resize import resize
    from twelve.model import Transformer, count_parameters
    from twelve.train.pretrain import reading_order

    teacher, words = load(teacher_of(arm, seed, options), device="cpu")
    began = time.monotonic()
    model = resize(teacher, **sizes(arm, options), tokenizer=words, texts=options.text, seed=seed)
    figures = {"resize_seconds": time.monotonic() - began} if way == "resized" else {}
    if way == "fresh":
        model = Transformer(model.config).init_weights(seed)
        model.memory.use_tokenizer(words)
    figures["start"] = runs.bits_of(model, words, options.held_out, options.context, options.limit)
    rate = options.learning_rate if way == "fresh" else options.resized_rate
    order = reading_order(seed, None if way == "fresh" else "the teacher")  # as `pretrain --from`
    return figures | count_parameters(model.config) | train(model, minutes, seed, rate, options, order=order)


def train(
    model, minutes: float, seed: int, rate: float, options: argparse.Namespace, place: Path | None = None,
    order: int | None = None,
) -> runs.Row:  # fmt: skip
    """Train `model` for that time, and save it in `place`: marks on the way, and what it measures at the end."""
    import torch

    from twelve.convert import save
    from twelve.heap import keep_freed_memory

    torch.set_num_threads(1)
    keep_freed_memory()
    data, words = PackedData(options.out / "tokens"), Tokenizer.load(options.out / "tokens")

    def measure() -> dict[str, float]:
        return runs.bits_of(model, words, options.held_out, options.context, options.limit)

    spent, marks = 0.0, []
    with tempfile.TemporaryDirectory() as folder:
        trainer = runs.pretraining(model, data, Path(folder), context=options.context, batch=options.batch,
                                   learning_rate=rate, seed=seed, order=order)  # fmt: skip
        for spent, falling, _ in runs.timed_steps(trainer, 60 * minutes, time.process_time):
            if spent // options.mark > len(marks):
                marks.append({"seconds": spent, "tokens": trainer.tokens, "falling": falling} | measure())
        if place is not None:
            save(model.eval(), words, place)
        return {"steps": trainer.step, "tokens": trainer.tokens, "seconds": spent, "marks": marks, "end": measure()}


# --- all of them ------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="+", metavar="TEXT", help="to train on; tokenised once, into OUT/tokens")
    parser.add_argument("--held-out", nargs="+", type=runs.named, required=True, metavar="NAME=PATH")
    parser.add_argument("--limit", type=int, default=40, help="documents of each that are measured (default: 40)")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=["depth"], metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[3, 4, 5])
    parser.add_argument("--teacher-minutes", type=float, default=10, help="of the model that is resized (default: 10)")
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.75, 1.5, 3, 6], metavar="MINUTES",
                        help="of a resized model's runs; the last also of a fresh one's (0.75 1.5 3 6)")  # fmt: skip
    parser.add_argument("--mark", type=float, default=20, help="seconds of training between measurements")
    parser.add_argument("--learning-rate", type=float, default=4e-3, help="default: 4e-3")
    parser.add_argument("--resized-rate", type=float, default=1e-3, help="the resized model's (default: 1e-3)")
    for name, value in {"width": 128, "layers": 8, "experts": 8, "experts-per-token": 2, "context": 256,
                        "batch": 16, "vocab-size": 4096}.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default: {value}")
    parser.add_argument("--plot", type=Path, metavar="SVG")
    runs.add_options(parser, "runs/resize")
    options = parser.parse_args()
    options.budgets = sorted(map(float, options.budgets))
    if job := options.one:
        arm, way, seed = job["arm"], job["way"], job["seed"]
        teaching = way == "teacher"
        found = make_teacher(arm, seed, options) if teaching else run(arm, way, job["minutes"], seed, options)
        runs.add_row(options.out, job | found)
        return
    runs.tokenized(options.text, options.out / "tokens", options.vocab_size)
    failed = []
    for some in (teachers(options), jobs(options)):  # the latter start from the former
        failed += runs.run_all(some, "{arm}, {way}, {minutes:g} minutes, seed {seed}", options.out, options.workers)
    rows = [row for row in runs.read_rows(options.out, settings(options)) if row["way"] != "teacher"]
    languages = [name for name, _ in options.held_out]
    found = verdicts(rows, languages, options)
    print_table(rows, found, languages, options)
    write_report(options.out / "report.html", rows, found, languages, options)
    if options.plot:
        options.plot.write_text(plot(rows, languages, options), encoding="utf-8")
    runs.end(failed)


def settings(options: argparse.Namespace) -> dict:
    """What makes two rows comparable."""
    data = runs.data_hash(options.out / "tokens")
    return {name: getattr(options, name) for name in SETTINGS} | {"held_out": dict(options.held_out), "data": data}


def teachers(options: argparse.Namespace) -> list[runs.Job]:
    """Those that are not there yet, whatever made them."""
    kinds = {arm == "experts": arm for arm in reversed(options.arms)}.values()  # an arm of each kind of teacher
    minutes, same = float(options.teacher_minutes), settings(options)
    return [{"arm": arm, "way": "teacher", "minutes": minutes, "seed": seed, "settings": same}
            for seed, arm in product(options.seeds, kinds)
            if not (teacher_of(arm, seed, options) / "config.json").exists()]  # fmt: skip


def jobs(options: argparse.Namespace) -> list[runs.Job]:
    same = settings(options)
    ways = [("fresh", options.budgets[-1]), *(("resized", minutes) for minutes in options.budgets)]
    return [{"arm": arm, "way": way, "minutes": minutes, "seed": seed, "settings": same}
            for seed, arm, (way, minutes) in product(options.seeds, options.arms, ways)]  # fmt: skip


# --- what they say ----------------------------------------------------------------------------------------------------


def chosen(rows: list[dict], arm: str, way: str, minutes: float) -> dict[int, dict]:
    """The rows of these runs, by seed."""
    return {row["seed"]: row for row in rows if (row["arm"], row["way"], row["minutes"]) == (arm, way, minutes)}


def reached(ends: list[tuple[float, float]], goal: float) -> float:
    """Minutes until the value `goal`, on the line between ends (minutes, bits) over the logarithm of time; the first
    minutes if these do already, infinity if none does."""
    before = None
    for minutes, bits in ends:
        if bits <= goal:
            if before is None:
                return minutes
            share = (before[1] - goal) / (before[1] - bits)
            return math.exp(math.log(before[0]) + share * math.log(minutes / before[0]))
        before = minutes, bits
    return math.inf


def verdicts(rows: list[dict], languages: list[str], options: argparse.Namespace) -> list[dict]:
    """For every arm and text: the fresh model's bits, and after how many minutes the resized one has them."""
    found, last = [], options.budgets[-1]
    for arm, language in product(options.arms, languages):
        fresh = chosen(rows, arm, "fresh", last)
        resized = {minutes: chosen(rows, arm, "resized", minutes) for minutes in options.budgets}
        seeds = [seed for seed in sorted(fresh) if all(seed in of for of in resized.values())]
        if not seeds:
            continue
        times = [
            reached([(minutes, resized[minutes][seed]["end"][language]) for minutes in options.budgets],
                    fresh[seed]["end"][language])
            for seed in seeds
        ]  # fmt: skip
        gains = [resized[last][seed]["end"][language] - fresh[seed]["end"][language] for seed in seeds]
        found.append({
            "arm": arm, "text": language, "seeds": len(seeds),
            "fresh": runs.spread([fresh[seed]["end"][language] for seed in seeds]),
            "start": runs.spread([resized[last][seed]["start"][language] for seed in seeds]),
            "ends": {m: runs.spread([resized[m][seed]["end"][language] for seed in seeds]) for m in options.budgets},
            "reached": runs.spread(times) if all(map(math.isfinite, times)) else (math.inf, math.nan), "times": times,
            "gain": runs.spread(gains),
        })  # fmt: skip
    return found


def print_table(rows: list[dict], found: list[dict], languages: list[str], options: argparse.Namespace) -> None:
    last = options.budgets[-1]
    for arm in options.arms:
        for row in list(chosen(rows, arm, "resized", last).values())[:1]:
            print(f"{ARMS[arm]}: {row['total'] / 1e6:.2f}M parameters, {row['active'] / 1e6:.2f}M active; resized in "
                  f"{row['resize_seconds']:.1f} s")  # fmt: skip
    print("bits a byte of held-out text, mean ± standard error over seeds")
    for line in found:
        print(f"  {ARMS[line['arm']]:20} {line['text']}  fresh after {last:g} min {_shown(line['fresh'])}  "
              f"({line['seeds']} seeds)")  # fmt: skip
        print(f"    resized: untrained {_shown(line['start'])}",
              *(f"{minutes:g} min {_shown(end)}" for minutes, end in line["ends"].items()), sep="  ")  # fmt: skip
        average, error = line["reached"]
        times = ", ".join(f"{'≤ ' * (one == options.budgets[0])}{one:.2f}" for one in line["times"])
        print(f"    has the fresh one's value after {average:.2f} ± {error:.2f} min of {last:g} (each: {times}); "
              f"at {last:g} min {line['gain'][0]:+.4f} ± {line['gain'][1]:.4f} against it")  # fmt: skip


def _shown(value: tuple[float, float]) -> str:
    return f"{value[0]:.4f} ± {value[1]:.4f}"


def curves(rows: list[dict], arm: str, language: str, options: argparse.Namespace) -> dict[str, tuple[list, list]]:
    """Of fresh and resized models the mean over seeds on the way through the longest runs, and resized ends."""
    last, series = options.budgets[-1], {}
    for way in ("fresh", "resized"):
        if mine := list(chosen(rows, arm, way, last).values()):
            marks = min(len(row["marks"]) for row in mine)
            ways = [[{"seconds": 0.0} | row["start"], *row["marks"][:marks], row | row["end"]] for row in mine]
            points = list(zip(*ways, strict=True))  # of every seed
            series[way] = tuple([mean(at[key] for at in seeds) for seeds in points] for key in ("seconds", language))
    ends = [(60 * m, of) for m in options.budgets if (of := chosen(rows, arm, "resized", m))]
    if ends:
        series["resized, ends of runs"] = (
            [seconds for seconds, _ in ends], [mean(row["end"][language] for row in of.values()) for _, of in ends],
        )  # fmt: skip
    return series


def write_report(
    path: Path, rows: list[dict], found: list[dict], languages: list[str], options: argparse.Namespace
) -> None:
    lines = [
        {"arm": ARMS[line["arm"]], "text": line["text"], "seeds": line["seeds"], "fresh": _shown(line["fresh"]),
         **{f"resized, {minutes:g} min": _shown(end) for minutes, end in line["ends"].items()},
         "minutes to the fresh one's": "{:.2f} ± {:.2f}".format(*line["reached"])}
        for line in found
    ]  # fmt: skip
    shown = [report.table(lines, "Bits a byte, mean and standard error over seeds")]
    drawn = [
        report.curve(f"{ARMS[arm]}, {language}", curves(rows, arm, language, options), x_label="seconds")
        for arm, language in product(options.arms, languages)
    ]
    report.write_report(path, "Resized models", [("Result", shown), ("On the way", drawn)])


def plot(rows: list[dict], languages: list[str], options: argparse.Namespace) -> str:
    """A panel for each arm and text: bits a byte over minutes, fresh and resized, on the way and at ends of runs."""
    width, height, left, top, colours = 300, 190, 60, 50, ("#b5723f", "#3b6ea8", "#1d3f66")
    parts, minutes = [], options.budgets[-1]
    for (row, arm), (column, language) in product(enumerate(options.arms), enumerate(languages)):
        series = curves(rows, arm, language, options)
        if not series:
            continue
        x, y = left + column * (width + 90), top + row * (height + 70)
        later = [bits for times, values in series.values() for time, bits in zip(times, values, strict=True)
                 if time > 3 * minutes]  # from a twentieth on  # fmt: skip
        low, high = min(later), max(later)
        scale = height / max(high - low, 1e-9)
        parts.append(f'<text x="{x}" y="{y - 12}">{ARMS[arm]}, {language}</text>'
                     f'<path d="M{x} {y}V{y + height}H{x + width}" stroke="#222" fill="none"/>'
                     f'<text x="{x - 6}" y="{y + 8}" text-anchor="end">{high:.2f}</text>'
                     f'<text x="{x - 6}" y="{y + height}" text-anchor="end">{low:.2f}</text>'
                     f'<text x="{x + width}" y="{y + height + 18}" text-anchor="end">{minutes:g} min</text>'
                     )  # fmt: skip
        for number, (name, (seconds, values)) in enumerate(series.items()):
            at = [(x + second / (60 * minutes) * width, y + (high - bits) * scale)
                  for second, bits in zip(seconds, values, strict=True) if bits <= high]  # fmt: skip
            colour = colours[number % 3]
            if name.endswith("runs"):
                parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{colour}"/>' for a, b in at]
            else:
                line = "L".join(f"{a:.1f} {b:.1f}" for a, b in at)
                parts.append(f'<path d="M{line}" stroke="{colour}" stroke-width="2" fill="none"/>')
            parts.append(f'<text x="{x + width - 4}" y="{y + 14 + 16 * number}" text-anchor="end" fill="{colour}">'
                         f"{name}</text>")  # fmt: skip
    right, bottom = left + len(languages) * (width + 90), top + len(options.arms) * (height + 70)
    title = "Bits a byte of held-out text over minutes of training, mean over seeds; less is better"
    return runs.svg(title, right, bottom, parts)


if __name__ == "__main__":
    main()
