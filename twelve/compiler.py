"""C++ sources that are compiled on first use and kept in the user's cache folder."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
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
    compiler = cxx()
    if compiler is None or os.environ.get("TWELVE_NATIVE") == "0":
        return None
    cache = cache_folder()
    texts = [file.read_text() for file in (source, *others)]
    # -march=native: a home folder may be shared by machines with different processors
    key = hashlib.sha256("\n".join([*texts, *compiler, *FLAGS, _processor()]).encode()).hexdigest()[:16]
    target = cache / f"{name}-{key}.so"
    try:
        if target.exists():
            try:
                return ctypes.CDLL(str(target))
            except OSError:
                if not os.access(target, os.X_OK):  # nothing in this folder may run, a new one neither
                    raise
        print(f"twelve: {message}", file=sys.stderr)
        _compile([*compiler, *FLAGS, str(source)], target)
        return ctypes.CDLL(str(target))
    except (OSError, subprocess.SubprocessError) as error:
        print(f"twelve: going on without that, more slowly: {_reason(error)}", file=sys.stderr)
        return None


def cxx() -> list[str] | None:
    """The command that compiles C++: what CXX names, arguments included, or g++; None where that is not there."""
    try:
        command = shlex.split(os.environ.get("CXX") or "g++")
    except ValueError:  # a quotation mark without an end
        return None
    found = shutil.which(command[0]) if command else None
    return found and [found, *command[1:]]


def _compile(command: list[str], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        subprocess.run([*command, "-o", str(made)], check=True, capture_output=True, text=True, timeout=300)
        with open(made, "rb") as file:
            os.fsync(file.fileno())  # or a power cut could leave half of it under the name
        os.replace(made, target)


def _reason(error: Exception) -> str:
    """In one line; of what a compiler says its first error."""
    said = error.stderr.strip().splitlines() if isinstance(error, subprocess.CalledProcessError) else []
    return next((line for line in said if "error" in line), said[-1] if said else str(error))


def cache_folder() -> Path:
    """Where this user keeps what can be made again; it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "twelve"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    except OSError:
        return platform.processor() + platform.machine()
