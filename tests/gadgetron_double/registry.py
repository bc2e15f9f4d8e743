"""Everything that could be left behind: processes, threads and sockets."""

import os
import signal
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from tests.gadgetron_double.framing import Message


class ChannelClosedError(Exception):
    """Nobody takes any more from this channel."""


class Channel:
    """A queue without limits between nodes: there is no back-pressure.

    It ends when every sender has released it; a receiver that stops makes the senders' next push fail.
    """

    def __init__(self) -> None:
        self._items: deque[Message] = deque()
        self._changed = threading.Condition()
        self._senders = 1
        self._stopped = False

    def split(self) -> "Channel":
        """One more sender."""
        with self._changed:
            self._senders += 1
        return self

    def push(self, item: Message) -> None:
        with self._changed:
            if self._stopped:
                raise ChannelClosedError
            self._items.append(item)
            self._changed.notify_all()

    def release(self) -> None:
        with self._changed:
            self._senders -= 1
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._items.clear()
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Message]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._items or self._stopped or self._senders <= 0)
                if not self._items:
                    return
                item = self._items.popleft()
            yield item


class Registry:
    """Starts and ends what a double needs."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.ending = threading.Event()
        self.processes: list[tuple[str, subprocess.Popen[bytes]]] = []
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._sockets: set[socket.socket] = set()
        self._channels: list[Channel] = []

    def note(self, line: str) -> None:
        with self._lock, self.log.open("a") as file:
            file.write(f"double: {line}\n")

    def start(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], folder: Path | None
    ) -> "subprocess.Popen[bytes]":
        """A process in a group of its own, so that what it starts is found too."""
        with self._lock, self.log.open("ab") as file:
            if self.ending.is_set():
                raise ChannelClosedError
            found = subprocess.Popen(
                command,
                env=environment,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self.processes.append((name, found))
        self.note(f"Started external Python module (pid: {found.pid}): {name}")
        return found

    def thread(self, name: str, function: Callable[..., None], *arguments: object) -> threading.Thread:
        found = threading.Thread(target=function, args=arguments, name=f"double {name}", daemon=True)
        with self._lock:
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            # started under the lock: a thread that does not yet run is not alive
            found.start()
            self._threads.append(found)
        return found

    def channel(self) -> Channel:
        found = Channel()
        with self._lock:
            self._channels.append(found)
            if self.ending.is_set():
                found.stop()
        return found

    def track(self, connection: socket.socket) -> socket.socket:
        with self._lock:
            self._sockets.add(connection)
        if self.ending.is_set():
            _shut(connection)
        return connection

    def close(self, connection: socket.socket) -> None:
        connection.close()
        with self._lock:
            self._sockets.discard(connection)

    def leftovers(self, seconds: float, *, but: frozenset[str] = frozenset()) -> list[str]:
        """What is still there after some seconds of waiting; threads and sockets of these names are no leftovers."""
        deadline = time.monotonic() + seconds
        while (found := self._now(but)) and time.monotonic() < deadline:
            time.sleep(0.01)
        return found

    def end(self) -> None:
        """Kill every process, wake every thread."""
        with self._lock:
            self.ending.set()
            processes, sockets, channels = list(self.processes), list(self._sockets), list(self._channels)
        for _, process in processes:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for channel in channels:
            channel.stop()
        for connection in sockets:
            _shut(connection)

    def _now(self, but: frozenset[str]) -> list[str]:
        with self._lock:
            processes, threads, sockets = list(self.processes), list(self._threads), list(self._sockets)
        found = [f"process {process.pid} of {name}" for name, process in processes if _runs(process)]
        names = [thread.name.removeprefix("double ") for thread in threads if thread.is_alive()]
        found += [f"thread {name}" for name in names if name not in but]
        listening = "listener" in but
        return found + [f"socket {one}" for one in sockets if not (listening and _listens(one))]


def _runs(process: "subprocess.Popen[bytes]") -> bool:
    """Whether a process, or one that it has started, is still there."""
    if process.poll() is None:
        return True
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    # what has ended and waits for a parent that never asks is gone all the same
    return any(_group_and_state(entry) == (process.pid, True) for entry in Path("/proc").glob("[0-9]*/stat"))


def _group_and_state(stat: Path) -> tuple[int, bool]:
    """Process group, and whether the process runs."""
    try:
        state, _parent, group = stat.read_text().rsplit(")", 1)[1].split()[:3]
    except OSError:
        return 0, False
    return int(group), state not in "ZX"


def _listens(connection: socket.socket) -> bool:
    with suppress(OSError):
        return bool(connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    return False


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
