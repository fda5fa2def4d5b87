"""What memory can be had, of the machine or of its container."""

import pytest

from twelve import heap


def test_a_container_has_less(monkeypatch, tmp_path):
    total, _ = heap.memory()
    for folder, names in ((tmp_path, ("memory.max", "memory.current", "inactive_file")),
                          (tmp_path / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes",
                                                 "total_inactive_file"))):  # fmt: skip
        folder.mkdir(exist_ok=True)
        most, now, cached = names
        (folder / most).write_text("1000000\n")
        (folder / now).write_text("700000\n")
        (folder / "memory.stat").write_text(f"anon 1\n{cached} 200000\n")
    monkeypatch.setattr(heap, "CGROUPS", tmp_path)
    if not list(heap._limits()):
        pytest.skip("this process is in no control group")
    assert heap.memory() == (1_000_000, 500_000)
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        (tmp_path / name).write_text("max\n")
    assert heap.memory()[0] == total
