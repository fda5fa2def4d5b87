"""A lock that serves in the order of asking."""

import threading
from collections import deque


class FairLock:
    """Hands itself to the threads in the order they came; threading.Lock promises no order.

    It may be left in another thread than the one that entered: a generator can be closed anywhere.
    """

    def __init__(self):
        self._changed = threading.Condition()
        self._line: deque[object] = deque()  # the first one holds the lock

    def __enter__(self) -> None:
        ticket = object()
        with self._changed:
            self._line.append(ticket)
            try:
                self._changed.wait_for(lambda: self._line[0] is ticket)
            except BaseException:  # Ctrl-C while waiting: leave the line, or nobody behind would ever be served
                self._line.remove(ticket)
                self._changed.notify_all()
                raise

    def __exit__(self, *_) -> None:
        with self._changed:
            self._line.popleft()
            self._changed.notify_all()
