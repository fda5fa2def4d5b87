"""What benchmarks of many runs share: a run is a process of its own, and leaves a row in OUT/rows.jsonl.

A job is a dict of what tells a run from others, and its row begins with it. `run_all` starts the jobs that have no row
yet, each as the command that was given, with --one JOB behind it:

    if job := options.one:
        runs.add_row(options.out, job | run(job, options))
        return
    failed = runs.run_all(jobs(options), "{arm}, seed {seed}", options.out, options.workers)
    ...  # tables of runs.read_rows(options.out)
    runs.end(failed)

Below that: training for a time, what rows say over seeds, and pictures.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from statistics import mean, stdev
from typing import IO, Any

from twelve.data.shards import META, PackedData
from twelve.data.tokenizer import Tokenizer
from twelve.files import read_json
from twelve.options import positive

Job = dict[str, Any]  # JSON
Row = dict[str, Any]
GRACE = 10  # seconds that a run has to end after Ctrl-C


# --- options ----------------------------------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser, out: str, workers: int = 2) -> None:
    """--workers, --out and the hidden --one."""
    parser.add_argument("--workers", type=positive, default=workers, help=f"runs at a time (default: {workers})")
    parser.add_argument("--out", type=Path, default=Path(out), help=f"default: {out}")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)


def named(value: str) -> tuple[str, str]:
    """The type of a NAME=PATH option."""
    name, _, path = value.partition("=")
    if not path:
        raise argparse.ArgumentTypeError(f"{value!r} is not NAME=PATH")
    return name, path


# --- rows -------------------------------------------------------------------------------------------------------------


def read_rows(out: Path, settings: dict | None = None) -> list[Row]:
    """The rows of `out`, in the order in which runs ended; with `settings`, those of runs with equal ones."""
    path = out / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    return rows if settings is None else [row for row in rows if row["settings"] == settings]


def add_row(out: Path, row: Row) -> None:
    line = (json.dumps(row) + "\n").encode()
    with open(out / "rows.jsonl", "ab", buffering=0) as file:
        file.write(line)  # at once: other runs may end now, too


def is_one(options: argparse.Namespace, run: Callable[[Job, argparse.Namespace, Path], Row]) -> bool:
    """Whether this process is one run (--one), which is then done in a folder of its own, and its row added."""
    if (job := options.one) is None:
        return False
    with tempfile.TemporaryDirectory(dir=options.out) as folder:
        found = run(job, options, Path(folder))
    add_row(options.out, job | found)
    return True


def row_of(job: Job, rows: Iterable[Row]) -> Row | None:
    """The row that this job left, if it has run."""
    return next((row for row in rows if job.items() <= row.items()), None)


# --- processes --------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A run that is under way."""

    name: str
    process: subprocess.Popen
    errors: IO[bytes]  # what it writes to standard error
    began: float

    def ended(self) -> tuple[int, str]:
        """Exit status and standard error."""
        with self.errors:
            self.errors.seek(0)
            return self.process.returncode, self.errors.read().decode(errors="replace").strip()


def run_all(
    jobs: Iterable[Job], name: str, out: Path, workers: int, environment: Mapping[str, str] | None = None
) -> list[str]:
    """Run the jobs that have no row in `out`, `workers` at a time; of each that failed a line, for `end`.

    `name.format(**job)` is what a run is called, `environment` what it finds besides ours. When this process is
    stopped, so are the runs.
    """
    rows = read_rows(out)
    waiting = deque(job for job in jobs if row_of(job, rows) is None)
    running: list[Run] = []
    failed = []
    for number in (signal.SIGTERM, signal.SIGHUP):  # an exit like any other, which stops the runs
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.popleft()
                running.append(_start(job, name.format(**job), environment or {}))
            time.sleep(0.2)
            for run in [run for run in running if run.process.poll() is not None]:
                running.remove(run)
                status, errors = run.ended()
                said = f"done in {time.monotonic() - run.began:.0f} s"
                if status:
                    last = errors.splitlines()[-9:] or ["nothing on standard error"]
                    failed.append(f"{run.name}: exit status {status}: {last[-1]}")
                    said = "\n".join(last)
                print(f"{run.name}: {said}", flush=True)
    except KeyboardInterrupt:
        print("stopped: the same command goes on from here", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    finally:
        _stop(running)
    return failed


def end(failed: Sequence[str]) -> None:
    """Exit with status 1 if a run failed, and say which."""
    if failed:
        sys.exit("\n".join([f"failed: {len(failed)} of the runs; the same command tries them again", *failed]))


def _start(job: Job, name: str, environment: Mapping[str, str]) -> Run:
    errors = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the run
    process = subprocess.Popen(
        [sys.executable, *sys.argv, "--one", json.dumps(job)], env=os.environ | environment,
        stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True,  # Ctrl-C reaches it once, from `_stop`
    )  # fmt: skip
    return Run(name, process, errors, time.monotonic())


def _stop(running: Sequence[Run]) -> None:
    """Interrupt the runs and what they have started, so that they tidy up; end those that do not."""
    try:
        _signal(running, signal.SIGINT)
        until = time.monotonic() + GRACE
        for run in running:
            run.process.wait(max(0.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass
    finally:
        _signal(running, signal.SIGKILL)


def _signal(running: Sequence[Run], number: int) -> None:
    for run in running:
        with suppress(ProcessLookupError, PermissionError):  # none of its group is left
            os.killpg(run.process.pid, number)


# --- training for a time ----------------------------------------------------------------------------------------------


def tokenized(texts: Sequence[str], folder: Path, vocab_size: int) -> None:
    """Tokenise the texts into `folder`, if that has not been done."""
    if not (folder / META).exists():
        from twelve.data.corpus import tokenize

        tokenize(texts, folder, None, vocab_size)


def data_hash(folder: Path) -> str:
    """The SHA-256 of the tokens in `folder`."""
    return read_json(folder / META)["sha256"]


def with_tokenizer(config, words: Tokenizer):
    """`config` with the numbers of the tokenizer's tokens that begin, end and pad."""
    return replace(config, bos_token_id=words.bos_id, eos_token_id=words.eos_id, pad_token_id=words.pad_id)


def pretraining(
    model, data: PackedData, folder: Path, *, context: int, batch: int, learning_rate: float, seed: int,
    threads: int = 1, precision: str = "float32", order: int | None = None, **plan: Any,
):  # fmt: skip
    """A trainer as `pretrain` has it, step by step under the caller's hand; its files would lie in `folder`. order: the
    seed by which text is read, where it is another."""
    from twelve.plan.cost import drawn
    from twelve.train.loop import Supervised
    from twelve.train.plan import Plan, describe
    from twelve.train.pretrain import BETAS

    made = Plan(
        stage="pretrain", options={}, config=model.config.to_dict(), data=describe(data), context=context,
        batch_size=batch, micro_batch_size=batch, learning_rate=learning_rate, seed=seed, threads=threads,
        precision=precision, **plan, betas=BETAS,
        drawn=drawn(model.config.vocab_size) if model.device.type == "cpu" else 0,
    )  # fmt: skip
    (folder / "training").mkdir()
    order = seed if order is None else order
    return Supervised(model, lambda step: data.batch(step, batch, context, order), made, folder)


def timed_steps(trainer, seconds: float, clock: Callable[[], float]) -> Iterator[tuple[float, bool, dict[str, float]]]:
    """Train for that time; what it spent so far, whether the learning rate was falling, and the figures of every step.

    The schedule ends with the time. What the caller does between steps is not counted.
    """
    from twelve.train.loop import NO_END

    plan, spent = trainer.plan, 0.0
    while spent < seconds:
        known = trainer.step > plan.warmup  # the speed: the schedule's end follows the clock
        plan.revisions = [(0, max(trainer.step + 1, round(trainer.step * seconds / spent)) if known else NO_END)]
        falling = plan.in_decay(trainer.step)
        began = clock()
        figures = trainer.train_step()
        spent += clock() - began
        yield spent, falling, figures


def bits_of(
    model, words: Tokenizer, texts: Iterable[tuple[str, str | Path]], context: int | None = None,
    limit: int | None = None,
) -> dict[str, float]:  # fmt: skip
    """Bits a byte of every named text; a model in training stays there."""
    from twelve.evaluate.bits import bits_per_byte

    training = model.training
    model.eval()
    bits = {name: bits_per_byte(model, words, path, context, limit).bits_per_byte for name, path in texts}
    model.train(training)
    return bits


# --- what rows say ----------------------------------------------------------------------------------------------------


def spread(values: Sequence[float], alone: float = math.nan) -> tuple[float, float]:
    """Mean and its standard error, which for a single value is `alone`."""
    return mean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else alone


def paired(values: Sequence[float]) -> float:
    """Two-sided p-value of Student's t-test that the mean of these differences is 0; NaN where they do not differ."""
    from twelve.evaluate.statistics import student

    average, error = spread(values)
    return student(average / error, len(values) - 1) if error > 0 else math.nan


# --- pictures ---------------------------------------------------------------------------------------------------------


def bar(x: float, y: float, unit: float, values: Sequence[float], fill: str) -> str:
    """Of SVG a bar from x to the mean of `values`, a whisker of one standard error, a dot each; `unit`: length of 1."""
    average, error = (unit * value for value in spread(values, 0.0))
    dots = (f'<circle cx="{x + unit * value:.1f}" cy="{y + 10}" r="2.5" fill="#222"/>' for value in values)
    return (
        f'<rect x="{x + min(0, average):.1f}" y="{y}" width="{abs(average):.1f}" height="20" fill="{fill}"/>'
        f'<path d="M{x + average - error:.1f} {y + 10}h{2 * error:.1f}" stroke="#222" stroke-width="2"/>{"".join(dots)}'
    )


def label(x: float, y: float, text: str, anchor: str = "start") -> str:
    """Of SVG a line of text, on the line of a bar at y."""
    return f'<text x="{x:g}" y="{y + 15:g}" text-anchor="{anchor}">{escape(text)}</text>'


def svg(title: str, width: float, height: float, parts: Iterable[str]) -> str:
    """A picture with its title above; parts lie below y = 30."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" font-family="sans-serif" '
        f'font-size="13"><rect width="100%" height="100%" fill="#fff"/>'
        f'<text x="10" y="20" font-weight="bold">{escape(title)}</text>{"".join(parts)}</svg>\n'
    )
