"""Turns: every step has one driver, everybody gets what they wait for, and nobody is woken for nothing."""

import threading
import time
from contextlib import suppress

import pytest

from twelve.engine.turns import Turns


class Counter:
    """A step adds one, when it may; never two at once."""

    def __init__(self):
        self.steps, self.may_step, self.stepping = 0, threading.Semaphore(0), threading.Lock()
        self.turns = Turns(lambda: None, self.step)

    def step(self):
        assert self.stepping.acquire(blocking=False)
        self.may_step.acquire()
        time.sleep(0.002)  # long enough for others to run meanwhile
        self.steps += 1
        self.stepping.release()

    def wait(self, steps, name=None):
        """A thread that waits until there are so many."""

        def work():
            with suppress(KeyboardInterrupt):
                self.turns.run_until(lambda: self.steps >= steps)

        thread = threading.Thread(target=work, name=name, daemon=True)
        thread.start()
        return thread


def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.002)


@pytest.fixture
def counter():
    return Counter()


@pytest.fixture
def woken(monkeypatch):
    """The threads that were woken, in order."""
    real, threads = threading.Condition.wait, []

    def wait(own, timeout=None):
        done = real(own, timeout)
        threads.append(threading.current_thread())
        if threads[-1].name == "interrupted":
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(threading.Condition, "wait", wait)
    return threads


def test_who_waits_is_woken_once_and_somebody_always_drives(counter, woken):
    threads = [counter.wait(10 * (number % 10 + 1)) for number in range(30)]
    until(lambda: len(counter.turns._sleepers) == 29)
    counter.may_step.release(1000)
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert counter.steps == 100 and not counter.turns.driving and not counter.turns._sleepers
    assert max(map(woken.count, threads)) <= 3  # for its end, and to drive, for which it may come too late


def test_one_that_stops_waiting_passes_the_turn_on(counter, woken):
    first = counter.wait(1)
    until(lambda: counter.turns.driving)
    heir = counter.wait(3, "interrupted")
    until(lambda: len(counter.turns._sleepers) == 1)
    other = counter.wait(2)
    until(lambda: len(counter.turns._sleepers) == 2)
    counter.may_step.release(10)
    for thread in (first, heir, other):
        thread.join(10)
        assert not thread.is_alive()
    assert counter.steps == 2 and heir in woken


def test_one_that_is_woken_to_drive_and_needs_it_no_more_passes_the_turn_on(counter):
    """As where a client leaves between being chosen and looking for itself."""
    first, left = counter.wait(1), threading.Event()
    until(lambda: counter.turns.driving)

    def leaving():
        me = threading.current_thread()
        counter.turns.run_until(lambda: left.is_set() and threading.current_thread() is me)

    second = threading.Thread(target=leaving, daemon=True)
    second.start()
    until(lambda: len(counter.turns._sleepers) == 1)
    third = counter.wait(2)
    until(lambda: len(counter.turns._sleepers) == 2)
    left.set()
    counter.may_step.release(2)
    for thread in (first, second, third):
        thread.join(10)
        assert not thread.is_alive()


def test_who_wants_to_be_alone_waits_for_the_step_and_the_others_go_on_afterwards(counter):
    drivers = [counter.wait(steps) for steps in (5, 6)]
    until(lambda: len(counter.turns._sleepers) == 1)
    found = []

    def be_alone():
        with counter.turns.alone():
            found.append(counter.steps)
            time.sleep(0.05)
            found.append(counter.steps)

    alone = threading.Thread(target=be_alone, daemon=True)
    alone.start()
    until(lambda: len(counter.turns._sleepers) == 2)
    counter.may_step.release(10)
    for thread in (*drivers, alone):
        thread.join(10)
        assert not thread.is_alive()
    assert counter.steps == 6 and found[0] == found[1] >= 5
