"""`twelve doctor`: what it finds on machines of every kind, each with what to do, and its exit status."""

import json
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from twelve import cli, doctor
from twelve.doctor import OK, SLOW, STOP
from twelve.engine import native
from twelve.plan import machine as machine_module
from twelve.plan.machine import Machine

GIB = 2**30
GOOD = Machine(
    host="here", processor="A processor", cores=4, threads=4, torch="2.13.0",
    gflops={"float32": 200.0, "bfloat16": 90.0, "int8": 300.0}, memory_gb_s=20.0, disk_gb_s=0.5, gpus=[],
    compiler="/usr/bin/g++", memory_total=16 * GIB, memory_available=12 * GIB, disk_free=100 * GIB,
)  # fmt: skip
GPU = {"name": "A GPU", "memory": 24 * GIB, "gflops": 90_000.0}


@pytest.fixture(autouse=True)
def _quiet_machine(monkeypatch):
    """Nothing of the machine that the tests run on."""
    for name, value in (("_busy", list), ("_swapped", int), ("_quota", lambda: None)):
        monkeypatch.setattr(doctor, name, value)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(native, "library", lambda: object())
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("TWELVE_NATIVE", raising=False)


@pytest.fixture
def examine(monkeypatch, capsys):
    """The findings of a machine that differs from a good one, and the exit status."""

    def run(status: int = 0, **different) -> dict:
        monkeypatch.setattr(machine_module, "measure", lambda refresh: replace(GOOD, **different))
        assert cli.main(["doctor", "--json"]) == status
        said = json.loads(capsys.readouterr().out)
        assert said["usable"] == (status == 0)
        assert all(found["advice"] for found in said["findings"] if found["level"] != OK)  # each with what to do
        return {found["name"]: found for found in said["findings"]}

    return run


def levels(findings: dict) -> set[str]:
    return {name for name, found in findings.items() if found["level"] != OK}


def test_a_good_machine_has_nothing_slow(examine):
    found = examine()
    assert levels(found) == set()
    assert {"packages", "device", "processor", "speed", "compiler", "memory", "disk"} <= set(found)
    assert "torch" in found["packages"]["text"] and "safetensors" in found["packages"]["text"]
    assert "bfloat16 is 2.2 times slower, so float32 is used" in found["speed"]["text"]
    assert "bfloat16 is" not in examine(gflops={"float32": 100.0, "bfloat16": 300.0})["speed"]["text"]


@pytest.mark.parametrize(
    ("different", "name", "level", "words"),
    [
        ({"memory_available": GIB // 2}, "memory", SLOW, "That is little"),
        ({"disk_free": 2 * GIB}, "disk", SLOW, "three times its model"),
        ({"disk_gb_s": 0.01}, "disk", SLOW, "takes long"),
        ({"threads": 8}, "processor", SLOW, "more threads than the 4 cores"),
    ],
)
def test_what_is_slow_is_named_alone(examine, different, name, level, words):
    found = examine(**different)
    assert levels(found) == {name} and found[name]["level"] == level and words in found[name]["text"]


def test_a_full_disk_is_told_and_stops(examine, capsys, monkeypatch):
    found = examine(status=2, disk_free=1000)
    assert found["disk"]["level"] == STOP
    assert cli.main(["doctor"]) == 2
    out, err = capsys.readouterr()
    assert "stop  disk" in out and "next:" not in out  # the report is printed all the same
    assert err.count("\n") == 1 and err.startswith("twelve: error: 0.0 GB of disk are too little")


def test_a_gpu_is_named_and_one_that_torch_cannot_use_is_told(examine, monkeypatch):
    assert "A GPU, 25.8 GB, bfloat16 90,000 GFLOP/s" in examine(gpus=[GPU])["device"]["text"]
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    found = examine()
    assert levels(found) == {"device"} and "torch 2.13.0 cannot use it" in found["device"]["text"]


def test_threads_and_what_sets_them(examine, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = examine(threads=1)
    assert "OMP_NUM_THREADS=1 leaves cores idle" in found["processor"]["text"]
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert levels(examine(threads=1)) == set()
    monkeypatch.setattr(doctor, "_quota", lambda: 1.5)
    found = examine()
    assert "more threads than the 1.5 cores" in found["processor"]["text"]
    assert "--threads 1" in found["processor"]["advice"]
    for threads, asked, advice in ((4, "4", "OMP_NUM_THREADS=1"), (1, "1", "")):  # which is then taken
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
        assert examine(threads=threads)["processor"]["advice"].startswith(advice)
    assert levels(examine(threads=1)) == set()


def test_a_compiler_that_is_absent_turned_off_or_broken(examine, monkeypatch, tmp_path):
    monkeypatch.setattr(native, "library", lambda: None)
    found = examine(compiler=None)
    assert levels(found) == {"compiler"} and "6 times slower" in found["compiler"]["text"]
    assert "apt install g++" in found["compiler"]["advice"]
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho 'x: error: unsupported option -fopenmp' >&2\nexit 1\n")
    broken.chmod(0o755)
    text = examine(compiler=str(broken))["compiler"]["text"]
    assert "cannot build the kernels (x: error: unsupported option -fopenmp)" in text
    assert "OpenMP" in examine(compiler="/no/such/g++")["compiler"]["advice"]
    monkeypatch.setenv("TWELVE_NATIVE", "0")
    assert "TWELVE_NATIVE=0 turns" in examine()["compiler"]["text"]


def test_swap_and_busy_processes(examine, monkeypatch):
    monkeypatch.setattr(doctor, "_swapped", lambda: 3 * GIB)
    monkeypatch.setattr(doctor, "_busy", lambda: [doctor.Finding("busy", SLOW, "others", "wait")])
    assert levels(examine()) == {"swap", "busy"}


def test_a_process_that_computes_is_named(monkeypatch):
    monkeypatch.undo()
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.2)
        [found] = doctor._busy(1.0)
    finally:
        child.kill()
        child.wait()
    assert found.level == SLOW and "other processes use" in found.text


def test_missing_packages_stop_and_extras_do_not(examine, monkeypatch, capsys):
    real = doctor.importlib.util.find_spec
    gone = {"zstandard", "huggingface_hub"}
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name in gone else real(name))
    found = examine()
    assert "pull (`twelve pull`), zst (.zst files)" in found["extras"]["text"] and levels(found) == set()
    gone.clear()
    version = doctor.importlib.metadata.version
    with monkeypatch.context() as older:  # the one that tokenizers brought
        older.setattr(doctor.importlib.metadata, "version", lambda name: (
            "0.36.0" if name == "huggingface_hub" else version(name)
        ))  # fmt: skip
        assert "pull (`twelve pull`)" in examine()["extras"]["text"]
    gone.add("safetensors")
    found = examine(status=2)
    assert found.keys() == {"packages"} and "not installed: safetensors" in found["packages"]["text"]
    monkeypatch.undo()
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: "2.9.1")
    assert cli.main(["doctor"]) == 2
    assert "torch 2.9.1 is too old: pip install 'torch>=2.11'" in capsys.readouterr().err


def test_folders_that_cannot_be_written_to(examine, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    found = examine()
    assert levels(found) == {"folder"} and "XDG_CACHE_HOME" in found["folder"]["advice"]


def test_the_report_is_short_and_plain(monkeypatch, capsys):
    monkeypatch.setattr(machine_module, "measure", lambda refresh: replace(GOOD, threads=8))
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 30 and max(map(len, lines)) <= 110 and lines[-1] == "next: twelve demo"
    assert lines[-2] == "One thing makes twelve slow here."
    assert any(line.startswith("slow  processor") for line in lines)


def test_every_extra_of_the_package_is_looked_for():
    declared = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert declared["optional-dependencies"].keys() - {"test", "bench"} <= doctor.EXTRAS.keys()
