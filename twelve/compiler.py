"""C++ sources that are compiled on first use and kept in the user's cache folder."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-std=c++17", "-shared", "-fPIC")


def compile_library(name: str, source: Path, others: list[Path], message: str) -> ctypes.CDLL | None:
    """The library `name` made of `source`, which includes `others`; None where there is no working compiler.

    `message` is printed before it is compiled, which happens once for a source, a compiler and a processor.
    TWELVE_NATIVE=0 in the environment makes it None.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None or os.environ.get("TWELVE_NATIVE") == "0":
        return None
    cache = cache_folder()
    texts = [file.read_text() for file in (source, *others)]
    # -march=native: a home folder may be shared by machines with different processors
    key = hashlib.sha256("\n".join([*texts, compiler, *FLAGS, _processor()]).encode()).hexdigest()[:16]
    target = cache / f"{name}-{key}.so"
    try:
        if not target.exists():
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as folder:
                made = Path(folder) / target.name
                print(f"twelve: {message}", file=sys.stderr)
                command = [compiler, *FLAGS, str(source), "-o", str(made)]
                subprocess.run(command, check=True, capture_output=True, timeout=300)
                os.replace(made, target)
        return ctypes.CDLL(str(target))
    except (OSError, subprocess.SubprocessError):
        return None


def cache_folder() -> Path:
    """Where this user keeps what can be made again; it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "twelve"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    except OSError:
        return platform.processor() + platform.machine()
