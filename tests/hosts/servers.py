"""Servers for tests, in a thread or in a process of their own, and clients that say what they are told to."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from ismrmrd import Image

from voxelsigma.formats.simulate import SimulatedScan
from voxelsigma.gadgets.wire import Close, Reader, ScanHeaderText, message, read_message
from voxelsigma.hosts.listener import Handle, Listener

SECONDS = 60.0
"""Longest wait for anything; nothing here takes a tenth of it on an idle machine."""


@contextlib.contextmanager
def listening(handle: Handle, hosts: Sequence[str] = ("127.0.0.1",), grace: float = 0.0) -> Iterator[Listener]:
    """A listener on a free port, run in a thread; at the end it is stopped."""
    listener = Listener(hosts, 0, handle)
    thread = threading.Thread(target=listener.run, args=(grace,), daemon=True)
    thread.start()
    try:
        yield listener
    finally:
        listener.stop()
        thread.join(SECONDS)
        assert not thread.is_alive(), "the listener does not end"


class Client:
    """One connection to a server."""

    def __init__(self, port: int, host: str = "127.0.0.1", receive_buffer: int = 0) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.socket = socket.socket(family, socket.SOCK_STREAM)
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(SECONDS)
        try:
            self.socket.connect((host, port))
        except BaseException:
            self.socket.close()
            raise
        self._reader = Reader(self.socket.recv)

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()

    def say(self, *items: Any) -> None:
        """Send items of the wire; bytes go as they are."""
        self.socket.sendall(b"".join(item if isinstance(item, bytes) else message(item) for item in items))

    def hear(self) -> Any:
        """The next message."""
        return read_message(self._reader)

    def hear_all(self) -> list[Any]:
        """All messages up to CLOSE, behind which nothing may come."""
        found = []
        while not isinstance(item := self.hear(), Close):
            found.append(item)
        assert self.is_over()
        return found

    def complaint(self) -> str:
        """The text that must be all there comes before CLOSE."""
        found = self.hear_all()
        assert len(found) == 1, found
        assert isinstance(found[0], str), found
        return found[0]

    def is_over(self) -> bool:
        """Whether the other side hangs up, and says nothing before."""
        return not self._reader.buffered and not self.socket.recv(1)


def whole(scan: SimulatedScan) -> list[Any]:
    """A scan as a client sends it behind its first words."""
    return [ScanHeaderText(scan.header_xml), *scan.blocks, Close()]


def series_of(items: Sequence[Any]) -> dict[int, list[Image]]:
    """Images by series; nothing else may be among them."""
    found: dict[int, list[Image]] = {}
    for item in items:
        assert isinstance(item, Image), item
        found.setdefault(int(item.image_series_index), []).append(item)
    return found


def eventually(what: Callable[[], bool]) -> bool:
    """Whether something comes true in time."""
    end = time.monotonic() + SECONDS
    while not what():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    """No thread and no file descriptor may be left at the end that was not there before."""
    threads, descriptors = set(threading.enumerate()), _descriptors()
    yield
    assert eventually(lambda: set(threading.enumerate()) <= threads), set(threading.enumerate()) - threads
    assert eventually(lambda: len(_descriptors()) <= len(descriptors)), set(_descriptors()) - set(descriptors)


def _descriptors() -> list[str]:
    # without the one that lists them
    return os.listdir("/proc/self/fd")[:-1]  # noqa: PTH208


@dataclass(frozen=True)
class Served:
    """A server in a process of its own."""

    process: "subprocess.Popen[str]"
    port: int
    said: Path

    def end(self, number: int) -> int:
        """Send a signal and wait; the exit code."""
        self.process.send_signal(number)
        return self.process.wait(SECONDS)

    @property
    def log(self) -> str:
        """What it wrote to stderr so far."""
        return self.said.read_text()


@contextlib.contextmanager
def serving(folder: Path, *arguments: object, **environment: str) -> Iterator[Served]:
    """`python -m voxelsigma serve` or `worker` on a free port; at the end it is killed."""
    said = folder / f"server-{time.monotonic_ns()}.log"
    with said.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "voxelsigma", *map(str, arguments), "--port", "0"],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        found = re.search(r"listening on 127\.0\.0\.1:(\d+)", first)
        assert found is not None, (first, said.read_text())
        yield Served(process, int(found[1]), said)
    finally:
        process.kill()
        process.wait(SECONDS)
        assert process.stdout is not None
        process.stdout.close()
