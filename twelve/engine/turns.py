"""Threads that wait for answers take turns at computing them: one at a time, for all."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Turns:
    """Whoever needs a step that nobody computes becomes the driver, until it has what it waited for.

    `step()` computes one, called by the driver alone. `settle()` lets in and lets go, called between steps with
    `changed` held.
    """

    def __init__(self, settle: Callable[[], None], step: Callable[[], None]) -> None:
        self._settle, self._step = settle, step
        self.changed = threading.Condition()  # told when a step has ended
        self.driving = False

    def run_until(self, done: Callable[[], object]) -> None:
        """Return when `done()`, which other threads' steps may bring about; else drive."""
        drives = False
        try:
            with self.changed:
                while not done():
                    if not self.driving:
                        drives = self.driving = True
                        break
                    self.changed.wait()
            while drives:
                with self.changed:
                    self._settle()
                    if done():
                        return
                self._step()
                with self.changed:
                    self._settle()
                    self.changed.notify_all()
        finally:
            if drives:
                self._stop()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Between two steps: nobody else drives."""
        drives = False
        try:
            with self.changed:
                self.changed.wait_for(lambda: not self.driving)
                drives = self.driving = True
            yield
        finally:
            if drives:
                self._stop()

    def _stop(self) -> None:
        with self.changed:
            self._settle()
            self.driving = False
            self.changed.notify_all()
