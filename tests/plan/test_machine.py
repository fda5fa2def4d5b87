"""Measuring: once for a machine and a number of threads; limits of containers; what to do without a cache."""

from dataclasses import asdict

import pytest
import torch

from twelve.plan import machine


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Small measurements, and a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, value in {"ROUNDS": (2, 3), "BUDGET": 0.1, "COPIED": 1 << 20, "WRITTEN": 1 << 20,
                        "PRODUCT": (64, 32, 64)}.items():  # fmt: skip
        monkeypatch.setattr(machine, name, value)
    return tmp_path / "cache" / "twelve" / "machine.json"


def test_it_is_measured_once(quick, monkeypatch):
    first = machine.measure()
    assert first.gflops["float32"] > 0 and first.memory_gb_s > 0 and first.disk_gb_s > 0
    assert first.threads == 1 and first.cores >= 1 and first.torch == torch.__version__
    assert 0 < first.memory_available <= first.memory_total and first.disk_free > 0
    monkeypatch.setattr(machine, "_measured", lambda: pytest.fail("measured again"))
    again = machine.measure()
    fresh = {"memory_available", "disk_free"}
    assert {k: v for k, v in asdict(again).items() if k not in fresh} == {
        k: v for k, v in asdict(first).items() if k not in fresh
    }


def test_other_threads_are_another_machine(quick, monkeypatch):
    machine.measure()
    calls = []
    real = machine._measured
    monkeypatch.setattr(machine, "_measured", lambda: calls.append(1) or real())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert machine.measure().threads == 2 and calls == [1]
    machine.measure()
    assert calls == [1]
    machine.measure(refresh=True)
    assert calls == [1, 1]


def test_a_gpu_that_was_hidden_is_measured_when_it_shows(quick, monkeypatch):
    assert machine.measure().gpus == []
    monkeypatch.setattr(machine, "_visible", lambda: range(1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "A GPU")
    monkeypatch.setattr(machine, "_gpus", lambda: [{"name": "A GPU", "memory": 8, "gflops": 1.0}])
    assert [gpu["name"] for gpu in machine.measure().gpus] == ["A GPU"]


@pytest.mark.parametrize("content", ["", "[]", '{"x": 1}', '{"x": {"host": "y"}}'])
def test_a_damaged_cache_is_measured_anew(quick, content):
    quick.parent.mkdir(parents=True)
    quick.write_text(content)
    assert machine.measure().gflops["float32"] > 0
    assert machine.measure().host in quick.read_text()


def test_without_a_cache_it_is_measured_each_time(quick):
    quick.parent.parent.mkdir(parents=True)
    quick.parent.write_text("a file where the folder would be")
    found = machine.measure()
    assert found.gflops["float32"] > 0 and found.disk_gb_s == 0
