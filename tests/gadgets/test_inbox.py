"""What takes bytes off a connection: in order, in bounded memory, and never blocking who sends."""

import errno
import os
import queue
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from voxelsigma.gadgets.inbox import Inbox

PATIENCE = 30.0
Feed = Callable[[bytes | Exception], None]


@contextmanager
def fed(**options: Any) -> Iterator[tuple[Inbox, Feed]]:
    """An inbox and what puts bytes, the end, or an error into its connection."""
    waiting: queue.Queue[bytes | Exception] = queue.Queue()

    def receive(count: int) -> bytes:
        found = waiting.get(timeout=PATIENCE)
        if isinstance(found, Exception):
            raise found
        assert len(found) <= count
        return found

    inbox = Inbox(receive, **{"patience": PATIENCE, **options})
    try:
        yield inbox, waiting.put
    finally:
        waiting.put(b"")
        assert inbox.join(PATIENCE)
        inbox.close()


def everything(inbox: Inbox) -> bytes:
    return b"".join(iter(lambda: inbox.get(2**16), b""))


def arrived(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < limit, "nothing happened"
        time.sleep(0.001)


def descriptors() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208  # the links' names are wanted, most of them dangle


def test_order_is_kept_between_memory_and_file() -> None:
    rng = random.Random(0)
    sent = [rng.randbytes(rng.choice((1, 100, 900, 2000, 70_000))) for _ in range(300)]
    found = bytearray()
    with fed(memory=1024) as (inbox, feed):
        for number, part in enumerate(sent):
            feed(part)
            # now and then the consumer catches up, and memory is used again
            if number % 50 > 40:
                wanted = sum(map(len, sent[: number + 1]))
                while len(found) < wanted:
                    found += inbox.get(rng.choice((10, 5000)))
                assert inbox.spilled == 0
        feed(b"")
        found += everything(inbox)
    assert bytes(found) == b"".join(sent)
    assert len(found) > 3 * 2**20


def test_a_slow_consumer_gets_all_and_the_file_is_given_back() -> None:
    content = random.Random(1).randbytes(5 * 2**20)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        inbox = Inbox(ours.recv, memory=1024, patience=PATIENCE)
        # nobody reads, and yet all can be sent
        theirs.settimeout(PATIENCE)
        theirs.sendall(content)
        theirs.shutdown(socket.SHUT_WR)
        assert inbox.join(PATIENCE)
        assert inbox.spilled >= len(content) - 1024
        assert inbox._file is not None
        assert os.fstat(inbox._file.fileno()).st_size == inbox.spilled
        found = bytearray()
        while part := inbox.get(2**16):
            found += part
            time.sleep(0.0002)
        assert found == content
        assert os.fstat(inbox._file.fileno()).st_size == inbox.spilled == 0
        inbox.close()


def test_small_parts_in_memory_are_counted_with_what_they_take_besides() -> None:
    with fed(memory=10 * 2**10) as (inbox, feed):
        for _ in range(1000):
            feed(b"x")
        arrived(lambda: inbox._arrived == 1000)
        # 10 KiB hold 157 of them, at 64 bytes each and their own
        assert inbox.spilled == 1000 - 157


def test_the_end_comes_behind_what_was_kept() -> None:
    with fed() as (inbox, feed):
        assert not inbox.wait(0.01)
        feed(b"last")
        feed(b"")
        assert inbox.wait(PATIENCE)
        assert inbox.get(1) == b"last"
        assert inbox.get(1) == inbox.get(1) == b""


@pytest.mark.parametrize(
    ("failure", "text"),
    [
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "Connection reset by peer"),
        (RuntimeError("no"), r"the connection cannot be read \(RuntimeError: no\)"),
    ],
)
def test_a_broken_connection_is_an_error_behind_what_was_kept(failure: Exception, text: str) -> None:
    with fed(memory=8) as (inbox, feed):
        feed(b"kept in the file")
        feed(failure)
        assert inbox.join(PATIENCE)
        assert inbox.get(100) == b"kept in the file"
        for _ in range(2):
            with pytest.raises(OSError, match=text):
                inbox.get(100)


def test_a_sender_that_resets_the_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        theirs = socket.create_connection(listener.getsockname())
        ours, _ = listener.accept()
    with ours:
        inbox = Inbox(ours.recv, patience=PATIENCE)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        theirs.close()
        with pytest.raises(ConnectionResetError):
            inbox.get(1)
        assert inbox.join(PATIENCE)
        inbox.close()


def test_patience_ends() -> None:
    with fed(patience=0.02) as (inbox, feed):
        with pytest.raises(TimeoutError, match=r"nothing came for 0\.02 s"):
            inbox.get(1)
        feed(b"late")
        arrived(lambda: inbox.wait(0.1))
        assert inbox.get(9) == b"late"


@pytest.mark.parametrize("stage", ["making the file", "writing to it"])
def test_where_nothing_can_be_kept_the_sender_is_not_blocked(monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    class Full:
        def seek(self, offset: int) -> None:
            del offset

        def write(self, content: memoryview) -> int:
            raise OSError(errno.ENOSPC, "No space left on device", len(content))

        def truncate(self, size: int) -> None:
            del size

        def close(self) -> None:
            pass

    def temporary(**_: Any) -> Full:
        if stage == "making the file":
            raise OSError(errno.ENOSPC, "No space left on device")
        return Full()

    monkeypatch.setattr(tempfile, "TemporaryFile", temporary)
    with fed(memory=200) as (inbox, feed):
        feed(b"a" * 100)
        feed(b"b" * 200)
        feed(b"c" * 10)
        arrived(lambda: inbox._arrived == 310)
        assert inbox.get(2**20) == b"a" * 100
        for _ in range(2):
            with pytest.raises(OSError, match=r"cannot keep what arrives faster than it is used \(No space left"):
                inbox.get(2**20)
        feed(b"d" * 1000)
        arrived(lambda: inbox._arrived == 1310)
        assert inbox.spilled == 0


FULL_DISK = f"""
import errno, resource, socket, sys
from voxelsigma.gadgets.inbox import Inbox
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
ours, theirs = socket.socketpair()
theirs.settimeout({PATIENCE})
inbox = Inbox(ours.recv, memory=1024, patience={PATIENCE})
content = bytes(range(256)) * 2**14
theirs.sendall(content)
theirs.close()
assert inbox.join({PATIENCE})
found = b""
try:
    while part := inbox.get(2**16):
        found += part
except OSError as error:
    assert error.errno == errno.EFBIG, error
    assert "cannot keep what arrives faster than it is used" in str(error), error
    # how much comes at a time is up to the system: what came whole before the disk was full is there
    assert 2**16 < len(found) <= 2**20 + 2**10 and content.startswith(found), len(found)
    sys.exit(7)
"""


def test_what_came_before_the_disk_was_full_is_handed_out() -> None:
    found = subprocess.run([sys.executable, "-c", FULL_DISK], timeout=120, check=False, capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (7, "")


def test_nothing_is_left_behind() -> None:
    before = descriptors(), threading.active_count()
    for _ in range(3):
        with fed(memory=10) as (inbox, feed):
            feed(b"x" * 100)
            arrived(lambda inbox=inbox: inbox.spilled == 100)  # type: ignore[misc]
            assert len(descriptors()) == len(before[0]) + 1
    assert (descriptors(), threading.active_count()) == before


def test_after_discard_nothing_is_kept_and_all_is_read() -> None:
    with fed(memory=10) as (inbox, feed):
        feed(b"x" * 100)
        arrived(lambda: inbox.spilled == 100)
        inbox.discard()
        feed(b"y" * 100)
        feed(b"")
        assert inbox.join(PATIENCE)
        assert inbox.get(10) == b""
        assert inbox.spilled == 0


def until_silent(inbox: Inbox, limit: float | None) -> threading.Thread:
    thread = threading.Thread(target=inbox.until_silent, args=(0.05, b"\4\0", limit), daemon=True)
    thread.start()
    return thread


def test_silence_counts_only_behind_what_is_expected_last() -> None:
    with fed() as (inbox, feed):
        feed(b"read by nobody \4")
        arrived(lambda: inbox._arrived == 16)
        thread = until_silent(inbox, None)
        thread.join(0.3)
        assert thread.is_alive()
        feed(b"\0")
        thread.join(PATIENCE)
        assert not thread.is_alive()


@pytest.mark.parametrize("ending", ["limit", "end", "error"])
def test_silence_of_another_kind_lasts_to_a_limit_or_the_end(ending: str) -> None:
    with fed() as (inbox, feed):
        feed(b"half a mess")
        thread = until_silent(inbox, 0.2 if ending == "limit" else None)
        if ending != "limit":
            feed(b"" if ending == "end" else ConnectionResetError())
        thread.join(PATIENCE)
        assert not thread.is_alive()
