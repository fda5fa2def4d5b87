"""The inside of the sandbox: a script of its own that sandbox.py starts, in an interpreter without site packages.

It becomes two processes. One runs the model's code, confined, and answers calls. The other runs the tests, in which the
names that they do not define themselves are calls into the first. Only arguments and returned values pass between them,
as Python literals; the tests are read after the fork, so the code has nothing to look at and no verdict to forge.
"""

from __future__ import annotations

import ast
import builtins
import ctypes
import json
import math
import os
import platform
import resource
import signal
import struct
import sys
import traceback
from typing import BinaryIO

LONGEST_REPLY = 1 << 18  # bytes of a returned value
FILE_BYTES, FOLDER_BYTES, OPEN_FILES = 8 << 20, 32 << 20, 32

# Linux: what one thread of Python needs to compute and to use files. All else is EPERM: sockets, processes, signals,
# mode and owner of files, mounts, limits.
ALLOWED = {
    "x86_64": (0xC000003E, (
        *range(16), 17, 18, 19, 20, 21, 23, 24, 25, 28, 32, 35, 39, 60, 63, 74, 77, 79, 80, 82, 83, 84,
        87, 89, 95, 96, 97, 98, 99, 100, 102, 104, 107, 108, 110, 131, 186, 201, 202, 217, 228, 229, 230, 231, 257, 258,
        262, 263, 264, 267, 269, 270, 271, 273, 292, 293, 316, 318, 332, 334, 439,
    )),
    "aarch64": (0xC00000B7, (
        17, 23, 24, 34, 35, 38, 46, 48, 49, 56, 57, 59, 61, 62, 63, 64, 65, 66, 67, 68, 72, 73, 78, 79, 80, 82, 93,
        94, 98, 99, 101, 113, 114, 115, 124, 132, 134, 135, 139, 153, 160, 163, 165, 166, 169, 172, 173, 174, 175, 176,
        177, 178, 179, 214, 215, 216, 222, 226, 233, 276, 278, 291, 293, 439,
    )),
}  # fmt: skip
FCNTL = {"x86_64": 72, "aarch64": 25}
# of it the copies and flags of descriptors; F_SETOWN with O_ASYNC would have the kernel send any signal to any process
FCNTL_COMMANDS = (0, 1, 2, 3, 4, 1030)
READ, EVERYTHING = 0b1100, (1 << 15) - 1  # Landlock: of a file and of a folder; all rights up to its version 3
RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1}  # of earlier versions
SET_NO_NEW_PRIVILEGES, SET_SECCOMP, SET_DEATH_SIGNAL, SET_DUMPABLE = 38, 22, 1, 4
NEW_MOUNTS, NEW_IPC, NEW_USER, NEW_NETWORK = 0x20000, 0x8000000, 0x10000000, 0x40000000
MOUNT_SETATTR, LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 442, 444, 445, 446  # the same on every machine


# --- confinement ------------------------------------------------------------------------------------------------------


def limit(seconds: float, memory: int) -> None:
    """CPU seconds and address space of this process and those it makes; no core file."""
    cpu = math.ceil(seconds)
    for what, most in (("CPU", cpu), ("AS", memory), ("CORE", 0)):
        _limit(what, most)


def confine(folder: str, isolate: bool) -> None:
    """No way out of `folder`, as far as this machine can. No return code is asked: sandbox.py tries what holds."""
    libc = ctypes.CDLL(None, use_errno=True)
    _limit("FSIZE", FILE_BYTES)
    _limit("NOFILE", OPEN_FILES)
    if isolate and sys.platform == "linux":
        _enter_namespaces(libc, folder)
        libc.prctl(SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        libc.prctl(SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        os.chdir(folder)
        _restrict_files(libc, folder)
        _restrict_calls(libc)
    else:
        os.chdir(folder)


def _limit(what: str, most: int) -> None:
    try:
        resource.setrlimit(getattr(resource, f"RLIMIT_{what}"), (most, most))
    except (OSError, ValueError, AttributeError):  # macOS has no limit of the address space
        pass


def _enter_namespaces(libc: ctypes.CDLL, folder: str) -> None:
    """No network, every file system read-only, and a small one in memory at `folder`."""
    user, group = os.getuid(), os.getgid()
    if libc.unshare(NEW_USER | NEW_MOUNTS | NEW_NETWORK | NEW_IPC) != 0:
        return
    try:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    except OSError:
        pass
    read_only = struct.pack("QQQQ", 1, 0, 0, 0)
    libc.syscall(MOUNT_SETATTR, -100, b"/", 0x8000, read_only, ctypes.c_size_t(len(read_only)))
    no_set_id_devices_programs = 2 | 4 | 8
    size = f"size={FOLDER_BYTES},mode=700".encode()
    libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", ctypes.c_ulong(no_set_id_devices_programs), size)


def _restrict_files(libc: ctypes.CDLL, folder: str) -> None:
    """Landlock: read Python and its libraries, write in the folder, nothing else."""
    version = libc.syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return
    handled = RIGHTS.get(version, EVERYTHING)
    rules = libc.syscall(LANDLOCK_CREATE, struct.pack("Q", handled), ctypes.c_size_t(8), 0)
    places = [(path, READ) for path in (sys.base_prefix, "/usr/lib", "/lib", "/lib64", "/usr/share/zoneinfo")]
    for path, rights in [*places, ("/dev/null", 0b110), ("/dev/urandom", 0b100), (folder, handled & ~1)]:
        try:
            place = os.open(path, os.O_PATH)
        except OSError:
            continue
        rights &= handled if os.path.isdir(path) else 0b110
        libc.syscall(LANDLOCK_ADD, rules, 1, struct.pack("=Qi", rights, place), 0)
        os.close(place)
    libc.syscall(LANDLOCK_RESTRICT, rules, 0)
    os.close(rules)


def _restrict_calls(libc: ctypes.CDLL) -> None:
    """seccomp: a program for the kernel's filter that lets pass what is in the list."""
    if platform.machine() not in ALLOWED:
        return
    machine, allowed = ALLOWED[platform.machine()]
    fcntl, commands = FCNTL[platform.machine()], FCNTL_COMMANDS
    load, jump_if_equal, give = 0x20, 0x15, 0x06
    kill, refuse, allow = 0x80000000, 0x00050001, 0x7FFF0000
    program = [(load, 0, 0, 4), (jump_if_equal, 1, 0, machine), (give, 0, 0, kill), (load, 0, 0, 0)]
    last = len(program) + len(allowed) + 2 + len(commands) + 1  # where `allow` stands
    program += [(jump_if_equal, last - at - 1, 0, number) for at, number in enumerate(allowed, len(program))]
    program += [(jump_if_equal, 0, 1 + len(commands), fcntl), (load, 0, 0, 24)]  # the second argument's lower half
    program += [(jump_if_equal, last - at - 1, 0, number) for at, number in enumerate(commands, len(program))]
    program += [(give, 0, 0, refuse), (give, 0, 0, allow)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in program))
    libc.prctl(SET_SECCOMP, 2, struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)), 0, 0)


# --- the model's side -------------------------------------------------------------------------------------------------


def answer_calls(source: str, requests: BinaryIO, replies: BinaryIO) -> None:
    """Run the code, then call its functions as asked. The first line tells whether it ran."""

    def reply(*what: object) -> None:
        replies.write(repr(what).encode("utf-8", "backslashreplace") + b"\n")
        replies.flush()

    namespace: dict[str, object] = {"__name__": "answer"}
    try:
        exec(compile(source, "answer", "exec"), namespace)
        reply("value", None)
    except BaseException as error:
        reply("error", type(error).__name__, str(error))
    for line in requests:
        name, arguments, named = ast.literal_eval(line.decode())
        try:
            reply("value", namespace[name](*arguments, **named))
        except BaseException as error:
            reply("error", type(error).__name__, str(error)[:200])


# --- the tests' side --------------------------------------------------------------------------------------------------


class Failed(BaseException):
    """The code broke off, or answered no literal: no test may catch this."""


class Code:
    """The functions of the code, called through pipes."""

    def __init__(self, requests: BinaryIO, replies: BinaryIO):
        self.requests, self.replies, self.calls = requests, replies, 0

    def function(self, name: str):
        def call(*arguments: object, **named: object) -> object:
            self.calls += 1
            try:
                self.requests.write(repr((name, arguments, named)).encode() + b"\n")
                self.requests.flush()
            except BrokenPipeError:
                raise Failed("the code ended its process, or ran out of time or memory") from None
            return self.receive()

        return call

    def receive(self) -> object:
        line = self.replies.readline(LONGEST_REPLY)
        if not line:
            raise Failed("the code ended its process, or ran out of time or memory")
        if not line.endswith(b"\n"):
            raise Failed("what the code returned is too long")
        try:
            kind, *rest = ast.literal_eval(line.decode())
            [value] = rest if kind == "value" else [None]
        except Exception:
            raise Failed("what the code returned is no plain value") from None
        if kind == "value":
            return value
        raise _error(*map(str, rest))


def _error(name: str = "", told: str = "") -> Exception:
    """As the code raised it, where a test may expect it."""
    if name in ("ArithmeticError", "IndexError", "KeyError", "TypeError", "ValueError", "ZeroDivisionError"):
        return getattr(builtins, name)(told)
    return RuntimeError(f"{name} {told}")


def judge(tests: str, code: Code) -> str:
    """Run the tests. Why they failed, "" when they passed."""
    try:
        code.receive()
        tree = ast.parse(tests)
        namespace = {name: code.function(name) for name in _free_names(tree)}
        exec(compile(tree, "tests", "exec"), namespace)
    except BaseException as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "tests"]
        place = f"test line {lines[-1]}" if lines else "the code"
        return " ".join(f"{place}: {type(error).__name__} {error}".split())
    return "" if code.calls else "the tests call nothing of the code"


def _free_names(tree: ast.AST) -> set[str]:
    """Names that the tests use and do not define."""
    nodes = list(ast.walk(tree))
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    defined = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    defined |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.ExceptHandler)}
    defined |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    defined |= {(node.asname or node.name).split(".")[0] for node in nodes if isinstance(node, ast.alias)}
    return used - defined - set(dir(builtins))


# --- both -------------------------------------------------------------------------------------------------------------


def main() -> None:
    orders = json.loads(_receive())
    limit(orders["seconds"], orders["memory"])
    signal.alarm(int(orders["patience"]) + 2)  # should sandbox.py no longer be there to end this
    call_read, call_write = os.pipe()
    reply_read, reply_write = os.pipe()
    if os.fork() == 0:
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(nothing, descriptor)
        keep = {0, 1, 2, call_read, reply_write}
        for descriptor in set(range(3, 64)) - keep:
            try:
                os.close(descriptor)
            except OSError:
                pass
        signal.alarm(0)
        confine(orders["folder"], orders["isolate"])
        answer_calls(orders["source"], os.fdopen(call_read, "rb"), os.fdopen(reply_write, "wb"))
        os._exit(0)
    os.close(call_read)
    os.close(reply_write)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_DUMPABLE, 0, 0, 0, 0)  # closes /proc/PID of this process to the code
    why = judge(_receive().decode(), Code(os.fdopen(call_write, "wb"), os.fdopen(reply_read, "rb")))
    os.write(1, json.dumps(why).encode())
    os._exit(0)


def _receive() -> bytes:
    """A message: its length in 8 bytes, then itself. Nothing is read ahead: the tests come after the fork."""
    [size] = struct.unpack("Q", _read(8))
    return _read(size)


def _read(size: int) -> bytes:
    pieces = []
    while size:
        pieces.append(os.read(0, size))
        if not pieces[-1]:
            os._exit(1)
        size -= len(pieces[-1])
    return b"".join(pieces)


if __name__ == "__main__":
    main()
