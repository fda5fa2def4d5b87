"""What this machine can do: speed of matrix products, memory and disk; measured once in some seconds, and kept."""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from twelve.compiler import cache_folder, cxx
from twelve.errors import InputError
from twelve.files import free_bytes, read_json, write_json
from twelve.heap import memory

ROUNDS, BUDGET = (5, 15), 3.0  # of each measurement: least, most, and seconds for them all; their median counts
PRODUCT = (2048, 512, 1024)  # rows, inner and columns of the product: a small model's tokens and widths
COPIED = 64 << 20  # bytes of the copy that measures memory: above most caches, and below what a training holds
WRITTEN = 32 << 20  # bytes of the file that measures the disk
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


@dataclass(frozen=True)
class Machine:
    """Speeds are medians of several measurements with `threads` threads; compiler and free space are of now."""

    host: str
    processor: str
    cores: int  # that this process may use
    threads: int  # of torch
    torch: str  # version
    gflops: dict[str, float]  # 1e9 operations a second of a matrix product by type; what torch cannot do is absent
    memory_gb_s: float  # read and written in a large copy
    disk_gb_s: float  # written to the cache folder and synced
    gpus: list[dict[str, Any]]  # {"name", "memory" in bytes, "gflops" of bfloat16}
    compiler: str | None  # the command for C++
    memory_total: int  # bytes, no more than a container's limit
    memory_available: int
    disk_free: int  # bytes in the working folder


def measure(refresh: bool = False) -> Machine:
    """This machine, from the cache if it was measured with as many threads, these GPUs and this torch before; else in
    seconds.

    `refresh` measures again. A cache that cannot be read or written is done without.
    """
    path = cache_folder() / "machine.json"
    gpus = [torch.cuda.get_device_name(index) for index in _visible()]  # the same machine may show more or fewer
    threads = f"{torch.get_num_threads()} threads"
    key = ", ".join([platform.node(), _processor(), f"{_cores()} cores", threads, *gpus, torch.__version__])
    known = _read(path)
    if refresh or key not in known:
        known[key] = asdict(_measured())
        with contextlib.suppress(OSError, InputError):
            write_json(path, known)
    total, available = memory()
    free = free_bytes(".")
    compiler = shlex.join(cxx() or ()) or None
    return replace(
        Machine(**known[key]), compiler=compiler, memory_total=total, memory_available=available, disk_free=free
    )


def product_speed(clock: Callable[[], float]) -> float:
    """1e9 operations a second of a float32 product now, in seconds of this clock."""
    run = _product("float32")
    return _work() / statistics.median(_seconds(run, clock) for _ in range(ROUNDS[1])) / 1e9


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """What the cache holds that is of this version."""
    try:
        found = read_json(path)
        names = set(Machine.__dataclass_fields__)
        return {key: values for key, values in found.items() if set(values) == names}
    except (InputError, AttributeError, TypeError):
        return {}


def _measured() -> Machine:
    timers = {name: product for name in TYPES if (product := _product(name)) is not None}
    source = torch.ones(COPIED // 4)
    target = torch.empty_like(source)
    timers["copy"] = lambda: target.copy_(source)
    times: dict[str, list[float]] = {name: [] for name in timers}
    for run in timers.values():
        _seconds(run)  # the first time allocates
    began = time.perf_counter()
    for done in range(ROUNDS[1]):  # in turns: a disturbance meets all alike
        if done >= ROUNDS[0] and time.perf_counter() - began > BUDGET:
            break
        for name, run in timers.items():
            times[name].append(_seconds(run))
    middle = {name: statistics.median(each) for name, each in times.items()}
    copy = 2 * COPIED / middle.pop("copy") / 1e9
    return Machine(
        host=platform.node(), processor=_processor(), cores=_cores(), threads=torch.get_num_threads(),
        torch=torch.__version__,
        gflops={name: round(_work() / seconds / 1e9, 1) for name, seconds in middle.items()},
        memory_gb_s=round(copy, 2), disk_gb_s=round(_disk(), 3), gpus=list(_gpus()),
        compiler=None, memory_total=0, memory_available=0, disk_free=0,
    )  # fmt: skip


def _product(name: str, device: str = "cpu", scale: int = 1) -> Callable[[], Any] | None:
    """A product of that type, to be timed; None where torch has none."""
    rows, inner, columns = (scale * size for size in PRODUCT)
    left, right = (torch.ones(shape, dtype=TYPES[name], device=device) for shape in ((rows, inner), (inner, columns)))

    def run() -> Any:
        return torch._int_mm(left, right) if name == "int8" else left @ right

    try:
        run()
    except (RuntimeError, NotImplementedError):
        return None
    return run


def _seconds(run: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    began = clock()
    run()
    return clock() - began


def _work(scale: int = 1) -> int:
    """Operations of the product."""
    rows, inner, columns = PRODUCT
    return 2 * scale**3 * rows * inner * columns


def _disk() -> float:
    """GB/s of writing a file and waiting until it is on the disk; the median of three."""
    content = os.urandom(1 << 20) * (WRITTEN >> 20)
    folder = cache_folder()
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        times = []
        for _ in range(3):
            with tempfile.TemporaryFile(dir=folder) as file:
                began = time.perf_counter()
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                times.append(time.perf_counter() - began)
        return WRITTEN / statistics.median(times) / 1e9
    return 0.0


def _visible() -> range:
    return range(torch.cuda.device_count() if torch.cuda.is_available() else 0)


def _gpus() -> Iterator[dict[str, Any]]:
    for index in _visible():
        properties = torch.cuda.get_device_properties(index)
        device, scale = f"cuda:{index}", 4
        product = _product("bfloat16", device, scale)

        def run(product=product, device=device) -> None:
            product()
            torch.cuda.synchronize(device)

        speed = None
        if product is not None:
            run()
            speed = round(_work(scale) / statistics.median(_seconds(run) for _ in range(ROUNDS[1])) / 1e9, 1)
        yield {"name": properties.name, "memory": properties.total_memory, "gflops": speed}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()
