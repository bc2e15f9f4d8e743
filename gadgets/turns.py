"""Turns on a device that several scans share."""

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """Lets one at a time work, in the order in which they asked; a plain lock may starve whoever waits longest."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[threading.Event] = deque()
        self._busy = False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Wait for a turn, and hold it."""
        ticket = threading.Event()
        with self._lock:
            if self._busy:
                self._waiting.append(ticket)
            else:
                self._busy = True
                ticket.set()
        try:
            ticket.wait()
        except BaseException:
            # interrupted: nobody may wait for a turn that will not be taken
            self._give_up(ticket)
            raise
        try:
            yield
        finally:
            with self._lock:
                self._pass_on()

    def _give_up(self, ticket: threading.Event) -> None:
        with self._lock:
            if ticket.is_set():
                self._pass_on()
            else:
                self._waiting.remove(ticket)

    def _pass_on(self) -> None:
        if self._waiting:
            self._waiting.popleft().set()
        else:
            self._busy = False
