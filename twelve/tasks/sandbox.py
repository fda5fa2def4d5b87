"""Running code that a model wrote against tests, where it can do no harm and cannot pass by fraud.

The code runs in a process of its own (jail.py) with limits of CPU seconds, wall seconds, memory and file sizes, without
environment, descriptors, threads or child processes. On Linux three things hold it, each as far as the machine has it:
namespaces without a network and with read-only file systems, Landlock, and a seccomp filter that lets a short list of
system calls pass. What is not surely there is not believed: before the first run the code of a burglar is tried, and
where it reaches the network or a file outside of its folder, `run_tests` refuses, unless told `unsafe`.

The tests run in another process. Functions that they call and do not define are the model's; arguments and returned
values cross as plain values (numbers, text, lists, tuples, dicts, sets, None). So a test sees no object that lies about
being equal, and the code sees no test.

Not covered: faults of the kernel itself; what can be learned from timing or from how full the machine is; reading
Python's own files and libraries (and, where there is no Landlock, every file that the user can read, which it cannot
send anywhere); filling the disk with many files of the temporary folder, where there are no namespaces; tests that need
arguments changed in place, or classes. With `unsafe` nothing but the limits stands between the code and the user's
files, network and processes, and it may find the tests.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from twelve.errors import InputError

SECONDS, MEMORY = 4.0, 512 << 20
UNSAFE = False  # --unsafe-code sets it
LONGEST_SOURCE = 100_000  # characters
SCRIPT = Path(__file__).with_name("jail.py")
_checked = threading.Lock()
_faults: list[str] | None = None


@dataclass(frozen=True)
class Verdict:
    """Whether all tests passed; if not, why, in one line."""

    passed: bool
    reason: str = ""


def run_tests(source: str, tests: str, seconds: float = SECONDS, memory: int = MEMORY, unsafe: bool = False) -> bool:
    """Whether the functions of `source` pass `tests`, Python statements that raise where something is wrong.

    `seconds` of CPU time (and three times that by the clock), `memory` in bytes. InputError when this machine cannot
    isolate the code and `unsafe` is not set, or the tests are not Python.
    """
    return judge(source, tests, seconds, memory, unsafe).passed


def judge(source: str, tests: str, seconds: float = SECONDS, memory: int = MEMORY, unsafe: bool = False) -> Verdict:
    """`run_tests` with the reason."""
    try:
        compile(tests, "tests", "exec")
    except (SyntaxError, ValueError) as error:
        raise InputError(f"the tests are not Python: {error}") from None
    unsafe = unsafe or UNSAFE
    if not unsafe and (faults := isolation_faults()):
        raise InputError(
            f"this machine cannot isolate a model's code: it {', '.join(faults)}; "
            "use Linux with Landlock or user namespaces, or take the risk with --unsafe-code"
        )
    if len(source) > LONGEST_SOURCE:
        return Verdict(False, "the code is too long")
    return _run(source, tests, seconds, memory, isolate=not unsafe)


def isolation_faults() -> list[str]:
    """What a burglar's code could do in the sandbox of this machine. Tried once in a process."""
    global _faults
    with _checked:
        if _faults is None:
            _faults = _break_out()
        return _faults


def _run(source: str, tests: str, seconds: float, memory: int, isolate: bool) -> Verdict:
    patience = 3 * seconds + 1
    with tempfile.TemporaryDirectory(prefix="twelve-", ignore_cleanup_errors=True) as folder, ExitStack() as open_ends:
        orders = {
            "source": source, "seconds": seconds, "memory": memory, "patience": patience, "folder": folder,
            "isolate": isolate,
        }  # fmt: skip
        parts = json.dumps(orders).encode(), tests.encode("utf-8", "replace")
        message = b"".join(struct.pack("Q", len(part)) + part for part in parts)
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-X", "utf8", str(SCRIPT)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=folder, env={},
            start_new_session=True,
        )  # fmt: skip
        open_ends.callback(process.wait)
        open_ends.callback(_end_group, process.pid)
        try:
            told, _ = process.communicate(message, timeout=patience)
        except subprocess.TimeoutExpired:
            return Verdict(False, f"still running after {patience:g} seconds")
        if not told:
            return Verdict(False, "the tests ran out of time or memory")
        reason = json.loads(told)
        return Verdict(not reason, reason)


def _end_group(group: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


# --- trying to break out ----------------------------------------------------------------------------------------------

BURGLAR = """
import fcntl, os, socket

def worked(action, *arguments):
    try:
        action(*arguments)
    except OSError:
        return False
    return True

def connect(kind, address):
    with socket.socket(*kind) as end:
        end.connect(address)
        end.send(b"x")

def reach(port): return worked(connect, (socket.AF_INET, socket.SOCK_STREAM), ("127.0.0.1", port))
def send(port): return worked(connect, (socket.AF_INET, socket.SOCK_DGRAM), ("127.0.0.1", port))
def talk(path): return worked(connect, (socket.AF_UNIX, socket.SOCK_STREAM), path)
def truncate(path): return worked(os.open, path, os.O_RDONLY | os.O_TRUNC)
def write(path): return worked(os.open, path, os.O_WRONLY)
def create(path): return worked(os.open, path, os.O_WRONLY | os.O_CREAT)
def remove(path): return worked(os.unlink, path)
def chmod(path): return worked(os.chmod, path, 0o777)
def link(path): return worked(os.symlink, "x", path)
def kill(process): return worked(os.kill, process, 0)
def own_signals(process): return worked(fcntl.fcntl, 0, fcntl.F_SETOWN, process)
def fork(): return worked(lambda: os.fork() or os._exit(0))
def run(): return worked(os.execv, "/bin/true", ["true"])
def own(): open("own", "w").write("x"); return open("own").read()
"""


def _break_out() -> list[str]:
    with tempfile.TemporaryDirectory() as folder, ExitStack() as sockets:
        path, new, end = (os.path.join(folder, name) for name in ("old", "new", "socket"))
        Path(path).write_text("old")
        tcp = sockets.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
        udp = sockets.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        unix = sockets.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        for each, address in ((tcp, ("127.0.0.1", 0)), (udp, ("127.0.0.1", 0)), (unix, end)):
            each.bind(address)
        tcp.listen()
        unix.listen()
        tries = {
            "could use the network": [
                f"reach({tcp.getsockname()[1]})", f"send({udp.getsockname()[1]})", f"talk({end!r})",
            ],
            "could write outside of its folder": [
                f"truncate({path!r})", f"write({path!r})", f"create({new!r})", f"chmod({path!r})", f"link({new!r})",
                f"remove({path!r})",
            ],
            "could signal or start processes": [
                f"kill({os.getpid()})", f"own_signals({os.getpid()})", "fork()", "run()",
            ],
        }  # fmt: skip
        faults = []
        for fault, calls in tries.items():
            tests = "\n".join(["assert own() == 'x'", *(f"assert not {call}" for call in calls)])
            if not _run(BURGLAR, tests, SECONDS, MEMORY, isolate=True).passed:
                faults.append(fault)
        return faults
