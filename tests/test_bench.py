"""bench/runs.py: runs in processes of their own, rows that stay, and what is told of those that fail."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from twelve.data.shards import META
from twelve.files import write_json

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import argparse, os, signal, subprocess, sys, time
from pathlib import Path
import runs

signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background is born deaf to it
parser = argparse.ArgumentParser()
parser.add_argument("--kinds", nargs="+")
runs.add_options(parser, "nowhere")
options = parser.parse_args()
if job := options.one:
    began = time.monotonic()
    if job["kind"] == "broken" and not (options.out / "mended").exists():
        raise ValueError("this kind is broken")
    if job["kind"] == "endless":
        child = subprocess.Popen(["sleep", "1000"])
        (options.out / "pids.part").write_text(f"{os.getpid()} {child.pid}")
        (options.out / "pids.part").rename(options.out / "pids")
        child.wait()
    time.sleep(0.3)
    runs.add_row(options.out, job | {"began": began, "ended": time.monotonic(), "said": os.environ["SAID"]})
else:
    jobs = [{"kind": kind, "share": 0.1, "settings": {"of": [1, 2]}} for kind in options.kinds]
    runs.end(runs.run_all(jobs, "a {kind} one", options.out, options.workers, {"SAID": "well"}))
"""


@pytest.fixture
def runs(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    import runs

    return runs


@pytest.fixture
def command(tmp_path):
    """A benchmark of some kinds, as a command, and what it needs to find our modules."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    places = os.pathsep.join([str(ROOT / "bench"), str(ROOT)])

    def of(*kinds: str) -> dict:
        return {"args": [sys.executable, str(program), "--kinds", *kinds, "--out", str(tmp_path)],
                "env": os.environ | {"PYTHONPATH": places}, "text": True}  # fmt: skip

    return of


def test_runs_leave_rows_and_are_not_run_again(runs, command, tmp_path):
    earlier = {"kind": "b", "share": 0.1, "settings": {"of": [1, 2]}, "kept": True}
    runs.add_row(tmp_path, earlier)
    runs.add_row(tmp_path, {**earlier, "kind": "c", "settings": {"of": [1, 3]}})  # of other settings
    done = subprocess.run(**command("a", "b", "c", "d"), capture_output=True)
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in sorted(done.stdout.splitlines())] == ["a a one", "a c one", "a d one"]
    rows = runs.read_rows(tmp_path, {"of": [1, 2]})
    assert rows[0] == earlier and sorted(row["kind"] for row in rows) == ["a", "b", "c", "d"]
    assert list(rows[1])[:3] == ["kind", "share", "settings"] and rows[1]["said"] == "well"
    at_once = [sum(row["began"] <= at["began"] < row["ended"] for row in rows[1:]) for at in rows[1:]]
    assert max(at_once) <= 2  # the default
    before = (tmp_path / "rows.jsonl").read_bytes()
    again = subprocess.run(**command("a", "b", "c", "d"), capture_output=True)
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert (tmp_path / "rows.jsonl").read_bytes() == before


def test_a_run_that_fails_is_told_and_tried_again(runs, command, tmp_path):
    done = subprocess.run(**command("broken", "a"), capture_output=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "a broken one: exit status 1: ValueError: this kind is broken"
    assert [row["kind"] for row in runs.read_rows(tmp_path)] == ["a"]  # others go on
    (tmp_path / "mended").touch()
    again = subprocess.run(**command("broken", "a"), capture_output=True)
    assert again.returncode == 0 and again.stdout.startswith("a broken one: done in ")
    assert [row["kind"] for row in runs.read_rows(tmp_path)] == ["a", "broken"]


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_what_was_started_ends_with_the_benchmark(command, tmp_path, number, status):
    process = subprocess.Popen(**command("endless", "a", "a"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not (tmp_path / "pids").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == status and "Traceback" not in errors
    time.sleep(0.1)
    states = subprocess.run(["ps", "-o", "stat=", "-p", (tmp_path / "pids").read_text().replace(" ", ",")],
                            capture_output=True, text=True).stdout.split()  # fmt: skip
    assert all(state.startswith("Z") for state in states)  # gone, or nobody has asked yet how they ended
    assert not (tmp_path / "rows.jsonl").exists()


def test_rows_of_earlier_versions_are_known(runs, tmp_path):
    """What tells a run from others, as rows.jsonl files have it."""
    import ablation
    import facts
    import quality
    import reasoning
    import resize
    import scaling

    for folder in ("tokens", "tokens-4096"):
        write_json(tmp_path / folder / META, {"sha256": "0123456789abcdef" * 4})
    options = SimpleNamespace(
        out=tmp_path, held_out=[("ko", "some/ko.jsonl")], text=["t"], seeds=[3], arms=["plain"], limit=30, minutes=6,
        width=128, layers=6, experts=8, experts_per_token=2, context=256, batch=16, mark=9, learning_rate=[0.004],
    )  # fmt: skip
    held_out, data = {"ko": "some/ko.jsonl"}, "0123456789abcdef" * 4
    shape = {"width": 128, "layers": 6, "experts": 8, "experts_per_token": 2, "context": 256, "batch": 16}
    assert ablation.jobs(options) == [
        {"arm": "plain", "seed": 3, "rate": 0.004,
         "settings": {"minutes": 6, **shape, "mark": 9, "limit": 30, "held_out": held_out, "data": data}}
    ]  # fmt: skip
    options.arms, options.learning_rate, options.resized_rate = ["depth"], 0.004, 0.002
    options.teacher_minutes, options.budgets = 10, [6.0]
    settings = {"teacher_minutes": 10, **shape, "learning_rate": 0.004, "resized_rate": 0.002, "limit": 30,
                "held_out": held_out, "data": data}  # fmt: skip
    assert [*resize.teachers(options), *resize.jobs(options)] == [
        {"arm": "depth", "way": way, "minutes": minutes, "seed": 3, "settings": settings}
        for way, minutes in (("teacher", 10), ("fresh", 6), ("resized", 6))
    ]
    options.megabytes, options.count, options.times, options.vocab_size = 24, 100, 10, 4096
    settings = {"text": ["t"], "count": 100, "times": 10, "megabytes": 24, "batch": 16, "vocab_size": 4096,
                "learning_rate": 0.004, "held_out": held_out}  # fmt: skip
    assert facts.jobs(options)[1] == {"model": "plain", "seed": 3, "settings": settings}
    options.arms = ["random"]
    settings = {"text": ["t"], "megabytes": 24, "minutes": 6, "limit": 30, "held_out": held_out, "shape": quality.SHAPE}
    assert quality.jobs(options) == [{"arm": "random", "seed": 3, "settings": settings}]
    options.seed, options.rate, options.batch, options.vocabulary, options.threads = [0], [0.004], [8], [4096], 1
    options.experts, options.shapes, options.marks, options.decay_share = [0], ["64x2"], [1.0, 2.0], 0.4
    options.reading = 0
    assert scaling.jobs(options) == [
        {"width": 64, "layers": 2, "experts": 0, "vocabulary": 4096, "batch": 8, "rate": 0.004, "reading": 0, "seed": 0,
         "threads": 1, "settings": {"context": 256, "marks": [1.0, 2.0], "limit": 30, "decay_share": 0.4,
                      "held_out": {"ko": "ko.jsonl"}, "data": data[:16]}}
    ]  # fmt: skip
    first, later = reasoning.jobs("curriculum", [3])
    assert first[0] == {"experiment": "curriculum", "arm": "arithmetic uniform", "seed": 3}
    assert {job["arm"] for job in (*first, *later)} == set(reasoning.ARMS["curriculum"])


def test_settings_tell_rows_apart(runs, tmp_path):
    assert runs.read_rows(tmp_path) == []
    runs.add_row(tmp_path, {"seed": 1, "settings": {"of": "이"}})
    assert runs.read_rows(tmp_path, {"of": "이"}) == [{"seed": 1, "settings": {"of": "이"}}]
    assert runs.read_rows(tmp_path, {"of": "일"}) == []
    assert runs.row_of({"seed": 2}, runs.read_rows(tmp_path)) is None
    assert json.loads((tmp_path / "rows.jsonl").read_text()) == {"seed": 1, "settings": {"of": "이"}}


def test_paired_differences(runs):
    t = 2 / (1 / math.sqrt(3))
    assert runs.paired([1, 2, 3]) == pytest.approx(1 - t / math.sqrt(t * t + 2))  # closed form of two degrees
    assert math.isnan(runs.paired([1.0])) and math.isnan(runs.paired([1.0, 1.0]))
    assert runs.spread([1.0], 0.0) == (1.0, 0.0) and math.isnan(runs.spread([1.0])[1])


def test_a_picture_is_well_formed(runs):
    bars = [runs.label(90, 40, "a < b", "end"), runs.bar(100, 40, 50, [-1.0, -2.0], "#abc")]
    picture = ElementTree.fromstring(runs.svg("A & B", 200, 80, bars))
    _, bar = (node for node in picture.iter() if node.tag.endswith("rect"))
    assert float(bar.get("x")) == 25 and float(bar.get("width")) == 75  # to the left, as long as the mean
    assert [float(dot.get("cx")) for dot in picture.iter() if dot.tag.endswith("circle")] == [50, 0]
