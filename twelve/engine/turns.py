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
        self.changed = threading.RLock()
        self.driving = False
        # What each sleeping thread waits for. To wake all after every step would take far longer than a step as soon as
        # hundreds stand in line.
        self._sleepers: dict[threading.Condition, Callable[[], object]] = {}

    def run_until(self, done: Callable[[], object]) -> None:
        """Return when `done()`, which other threads' steps may bring about; else drive."""
        drives = False
        try:
            with self.changed:
                while not done():
                    if not self.driving:
                        drives = self.driving = True
                        break
                    self._sleep(done)
            while drives:
                with self.changed:
                    self._settle()
                    if done():
                        return
                self._step()
                with self.changed:
                    self._settle()
                    self._wake()
        finally:
            if drives:
                self._stop()
            else:  # it may have been woken to drive, and have what it waited for by now
                with self.changed:
                    if not self.driving:
                        self._wake()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Between two steps: nobody else drives."""
        drives = False
        try:
            with self.changed:
                while self.driving:
                    self._sleep(lambda: not self.driving)
                drives = self.driving = True
            yield
        finally:
            if drives:
                self._stop()

    def _stop(self) -> None:
        with self.changed:
            self._settle()
            self.driving = False
            self._wake()

    def _sleep(self, done: Callable[[], object]) -> None:
        """Until `done()`, or there is a driver to replace."""
        sleeper, woken = threading.Condition(self.changed), False
        self._sleepers[sleeper] = done
        try:
            woken = sleeper.wait()
        finally:
            del self._sleepers[sleeper]
            if not woken:  # Ctrl-C: another one may have to drive instead
                self._wake()

    def _wake(self) -> None:
        """Those who have what they wait for, and one to drive where nobody does."""
        wanted = not self.driving
        for sleeper, done in self._sleepers.items():
            if done():
                sleeper.notify()
            elif wanted:
                sleeper.notify()
                wanted = False
