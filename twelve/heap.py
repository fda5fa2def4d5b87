"""Memory of the machine and of this process: what can be had, and what the C library does with what was freed."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4  # of malloc.h
CGROUPS = Path("/sys/fs/cgroup")


def memory() -> tuple[int, int]:
    """Bytes of RAM in all, and those that can be had now: of the machine, or of the container where that has less."""
    page = os.sysconf("SC_PAGE_SIZE")
    total = page * os.sysconf("SC_PHYS_PAGES")
    available = total // 2  # where the system does not say
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    for limit, used in _limits():
        total, available = min(total, limit), min(available, max(0, limit - used))
    return total, available


def _limits() -> Iterator[tuple[int, int]]:
    """Limit and use, in bytes, of every control group that this process is in (version 1 or 2), and those above it."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, place = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            base = CGROUPS / "memory" if controllers else CGROUPS
            names = ("memory.max", "memory.current")
            if controllers:
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
            inside = base / place.strip("/")
            for folder in (inside, *inside.parents):
                if folder.is_relative_to(base):
                    yield from _limit(folder, *names)


def _limit(folder: Path, most: str, now: str) -> Iterator[tuple[int, int]]:
    with contextlib.suppress(OSError, ValueError):
        limit, used = int((folder / most).read_text()), int((folder / now).read_text())  # "max" is no number: no limit
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        yield limit, used - int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))  # these pages can go


def keep_freed_memory() -> None:
    """Let glibc keep large blocks that were freed, instead of giving them back and faulting every page in again.

    A training step frees and allocates the same few hundred megabytes over and over; this took about a tenth of its
    time.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(MMAP_MAX, 0)  # not a threshold: the largest that glibc takes is 32 MiB, and residual streams are above
        mallopt(TRIM_THRESHOLD, 2**31 - 1)
        mallopt(TOP_PAD, 64 << 20)


def give_back() -> None:
    """Give freed memory back to the system now."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
