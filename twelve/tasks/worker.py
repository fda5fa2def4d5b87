"""A process of its own for code that may raise, print, never return, or take its process down.

It is fault isolation, with the rights of the user: for the user's own code. For a model's code see sandbox.py.

The child imports a module and asks it for its functions: `functions(argument) -> {name: function}`. A message is a line
of JSON with many calls; the reply to each call is a line, so that one call that hangs costs no other call. Pipes of
their own carry them: what the code prints goes to standard error.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from twelve.errors import InputError

START = "import sys; from twelve.tasks.worker import serve; serve(*sys.argv[1:])"
START_SECONDS = 120.0  # to import what the module needs
LATE, DIED = "did not return in time", "ended its process"


@dataclass(frozen=True)
class Reply:
    """What a call returned, or why it did not (one line, with the place); fatal: calling again makes no sense."""

    value: Any = None
    error: str = ""
    fatal: bool = False

    @property
    def lost(self) -> bool:
        """Whether the process was lost with it."""
        return self.error in (LATE, DIED)


class Worker:
    """Calls functions of `module` in a child process, which starts when it is needed and again after it ended.

    memory: bytes of address space. Several threads may call; one call runs at a time.
    """

    def __init__(self, module: str, argument: str, memory: int = 0):
        self._arguments = [module, argument, str(memory)]
        self._lock = threading.Lock()
        self._stop: weakref.finalize | None = None
        self._requests = self._replies = -1

    def call(self, name: str, calls: Sequence[Sequence[Any]], seconds: float, patience: int = 0) -> list[Reply]:
        """A reply for each call's arguments, in order. A call that takes longer than `seconds` ends with its process;
        after `patience` in a row that lose their process, in one way or the other, the rest is left out.

        InputError when the module does not start.
        """
        with self._lock:
            replies: list[Reply] = []
            while len(replies) < len(calls):
                replies += self._run(name, calls[len(replies) :], seconds)
                if patience and sum(reply.lost for reply in replies[-patience:]) == patience:
                    break
            return replies

    def close(self) -> None:
        if self._stop:
            self._stop()
            self._stop = None

    def _run(self, name: str, calls: Sequence[Sequence[Any]], seconds: float) -> Iterator[Reply]:
        """Replies up to the first call that ended the process."""
        if not self._stop:
            self._start()
        message = json.dumps([name, list(calls)]).encode() + b"\n"
        try:
            for line in self._lines(message, len(calls), seconds):
                yield Reply(*json.loads(line))
        except (TimeoutError, EOFError) as error:
            self.close()
            yield Reply(error=LATE if isinstance(error, TimeoutError) else DIED)

    def _start(self) -> None:
        request_end, self._requests = os.pipe()
        self._replies, reply_end = os.pipe()
        alive, life = os.pipe()  # its end at our end, however that comes about, is the child's end
        theirs = (request_end, reply_end, alive)
        process = subprocess.Popen(
            [sys.executable, "-c", START, *self._arguments, *map(str, theirs)],
            stdin=subprocess.DEVNULL, pass_fds=theirs, start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )  # fmt: skip
        for descriptor in theirs:
            os.close(descriptor)
        os.set_blocking(self._requests, False)
        self._stop = weakref.finalize(self, _end, process, (self._requests, self._replies, life))
        try:
            [line] = self._lines(b"", 1, START_SECONDS)
        except (TimeoutError, EOFError) as error:
            self.close()
            why = "does not start" if isinstance(error, TimeoutError) else "ends its process when it is read"
            raise InputError(f"{self._arguments[1]} {why}") from None
        if error := json.loads(line):
            self.close()
            raise InputError(error)

    def _lines(self, message: bytes, wanted: int, seconds: float) -> Iterator[bytes]:
        """Send a message and give the lines of its reply. TimeoutError when `seconds` pass without one, EOFError when
        the child has gone."""
        poll = select.poll()
        poll.register(self._replies, select.POLLIN)
        if message:
            poll.register(self._requests, select.POLLOUT)
        unsent, held, deadline = memoryview(message), b"", time.monotonic() + seconds
        while wanted > 0:
            ready = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
            if not ready and time.monotonic() >= deadline:
                raise TimeoutError
            for descriptor, _ in ready:
                if descriptor == self._replies:
                    piece = os.read(descriptor, 1 << 16)
                    if not piece:
                        raise EOFError
                    *lines, held = (held + piece).split(b"\n")
                    for line in lines:
                        wanted -= 1
                        yield line
                        deadline = time.monotonic() + seconds
                    continue
                with contextlib.suppress(BlockingIOError):
                    try:
                        unsent = unsent[os.write(descriptor, unsent) :]
                    except BrokenPipeError:  # the reply's end will tell
                        unsent = unsent[:0]
                if not unsent:
                    poll.unregister(descriptor)


def _end(process: subprocess.Popen, descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # and whatever the code has started; it leads a session of its own
    process.kill()
    process.wait()


# --- in the child -----------------------------------------------------------------------------------------------------


def serve(module: str, argument: str, memory: str, requests: str, replies: str, alive: str) -> None:
    """Answer until the requests end."""
    os.dup2(2, 1)
    threading.Thread(target=_watch, args=(int(alive),), daemon=True).start()
    if int(memory):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (int(memory), int(memory)))
    with open(int(requests), "rb") as asked, open(int(replies), "wb") as answers:
        try:
            functions = import_module(module).functions(argument)
            trouble = ""
        except BaseException as error:
            functions, trouble = {}, describe(error, argument)
        answers.write(json.dumps(trouble).encode() + b"\n")
        answers.flush()
        for line in asked:
            name, calls = json.loads(line)
            for arguments in calls:
                try:
                    reply = json.dumps([functions[name](*arguments)])
                except BaseException as error:  # SystemExit and the like, too
                    reply = json.dumps([None, describe(error, argument), isinstance(error, InputError)])
                answers.write(reply.encode() + b"\n")
                answers.flush()
    os._exit(0)  # whatever threads the code has left


def describe(error: BaseException, path: str) -> str:
    """One line: the place in the file `path`, if it went through there, and the error."""
    if isinstance(error, InputError):
        return str(error)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    if isinstance(error, SyntaxError) and error.filename == path:
        lines, told = [error.lineno], error.msg
    else:
        told = str(error)
    place = f"{path} line {lines[-1]}" if lines else path
    return " ".join(f"{place}: {type(error).__name__}: {told}".split()).removesuffix(":")


def _watch(alive: int) -> None:
    os.read(alive, 1)
    os._exit(1)
