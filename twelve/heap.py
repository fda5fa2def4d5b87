"""What the C library does with memory that was freed: keep it for speed, or give it back. Without glibc, nothing."""

from __future__ import annotations

import contextlib
import ctypes

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4  # of malloc.h


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
