"""The double fails as the measured server does: stock children, broken neighbours, chains that hang."""

import os
import re
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.gadgetron_double import (
    Double,
    Peer,
    Received,
    Stage,
    acquisitions,
    client,
    connect,
    execute,
    framing,
    image_message,
    pipeline,
)

from voxelsigma.formats.simulate import SimulatedScan

BROKEN = "[Stream] ERROR: Received illegal message id from external peer: 1"

# target of the stock toys, texts for the client, how many of the items it gets, exit code of the child;
# of what a node has sent, its system may throw away the end when it leaves with unread input
FAILURES = {
    "raises_mid_stream": ([BROKEN], "some", 1),
    "exits": ([BROKEN], "some", 3),
    "returns_early": ([BROKEN], "some", 0),
    "is_killed": ([BROKEN], "some", -signal.SIGKILL),
    "raises_at_once": ([], "none", 1),
    "raises_at_the_end": ([], "all", 1),
    "is_not_there": ([], "none", 1),
    "passes": ([], "all", 0),
}

# the package refuses to write one: the data type stands behind id and version
FLOAT32_IMAGE = image_message(np.ones((2, 2), np.float32))
INT32_IMAGE = FLOAT32_IMAGE[:4] + b"\4\0" + FLOAT32_IMAGE[6:]


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with Stage(tmp_path) as found:
        yield found


def passes(peer: Peer) -> None:
    for message in peer:
        peer.send(message.raw)
    peer.leave()


def fails(text: str, after: int = 0, *, drain: bool = True) -> Callable[[Peer], None]:
    """Passes some items, then reports an error."""

    def part(peer: Peer) -> None:
        if after:
            for number, message in enumerate(peer, start=1):
                peer.send(message.raw)
                if number == after:
                    break
        peer.leave(error=text, drain=drain)

    return part


def send(double: Double, scan: SimulatedScan, messages: Any = None, **given: Any) -> Received:
    given = {"configuration": "some_name.xml", "seconds": 30, **given}
    data = acquisitions(scan.blocks) if messages is None else messages
    return client(double.port, header=scan.header_xml, messages=data, **given)


def in_background(*arguments: Any, **given: Any) -> tuple[threading.Thread, list[Received]]:
    found: list[Received] = []
    thread = threading.Thread(target=lambda: found.append(send(*arguments, **given)), daemon=True)
    thread.start()
    return thread, found


def big(scan: SimulatedScan, megabytes: int) -> Iterator[bytes]:
    """Readouts of 160 kB."""
    header = acquisitions(scan.blocks)[0][: 2 + framing.ACQUISITION_HEADER]
    sized = bytearray(header)
    struct.pack_into("<3H", sized, 2 + 34, 1000, 20, 20)
    readout = bytes(sized) + np.ones(20_000, np.complex64).tobytes()
    return (readout for _ in range(megabytes * 2**20 // len(readout)))


@pytest.mark.parametrize("target", FAILURES)
def test_what_the_client_sees_of_a_stock_node(scan: SimulatedScan, stage: Stage, target: str) -> None:
    texts, amount, code = FAILURES[target]
    served = stage.double(execute("stock_toys", target))
    found = send(served, scan)
    everything = len(acquisitions(scan.blocks))
    assert (found.closed, found.texts) == (True, texts), served.log_text
    count = len(found.messages) - len(texts)
    assert count in {"none": [0], "some": range(4), "all": [everything]}[amount]
    assert served.exit_codes == [(f"stock_toys.{target}", code)]
    assert served.leftovers() == []


@pytest.mark.parametrize(
    ("module", "text"), [("broken_toy", "a_module_that_is_not_there"), ("no_such_module", "no_such_module")]
)
def test_a_module_that_cannot_be_imported_is_nothing(scan: SimulatedScan, stage: Stage, module: str, text: str) -> None:
    served = stage.double(execute(module))
    found = send(served, scan)
    assert (found.closed, found.messages) == (True, ())
    assert re.search(f"ModuleNotFoundError: No module named '{text}'", served.log_text)


def test_a_missing_package_is_nothing_and_a_silent_child_an_error(
    scan: SimulatedScan, stage: Stage, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 7\n")
    python.chmod(0o755)
    served = stage.double(execute("stock_toys", "passes"), interpreter=str(python))
    found = send(served, scan)
    assert (found.closed, found.messages, served.exit_codes) == (True, (), [("stock_toys.passes", 7)])
    sleeper = tmp_path / "sleeper"
    sleeper.write_text("#!/bin/sh\nexec sleep 60\n")
    sleeper.chmod(0o755)
    served = stage.double(execute("stock_toys", "passes"), interpreter=str(sleeper), child_seconds=0.2)
    assert send(served, scan).texts == ["[Stream] ERROR: stock_toys.passes did not connect within 0.2 s"]
    served = stage.double(execute("stock_toys", "passes"), interpreter=str(tmp_path / "none"))
    assert "No such file" in send(served, scan).texts[0]
    assert served.leftovers() == []


@pytest.mark.parametrize("after", [0, 1, 10**9])
def test_an_error_message_reaches_the_client(scan: SimulatedScan, stage: Stage, after: int) -> None:
    """On the first item, in the middle and after the end, if the node drains its input unless it has read CLOSE."""
    served = stage.double(connect(stage.listener(fails("sketch: no probes", after))))
    found = send(served, scan)
    assert (found.closed, found.texts) == (True, ["[Stream] ERROR: Errors received: \nsketch: no probes\n"])
    items = [message for message in found.messages if message.identifier == framing.ACQUISITION]
    assert len(items) == min(after, len(acquisitions(scan.blocks)))


def test_an_error_makes_the_server_say_close(scan: SimulatedScan, stage: Stage) -> None:
    """So that the node's drain ends although the client has not."""
    drained = threading.Event()

    def part(peer: Peer) -> None:
        next(iter(peer))
        peer.leave(error="enough")
        drained.set()

    def data() -> Iterator[bytes]:
        first, *rest = acquisitions(scan.blocks)
        yield first
        assert drained.wait(10)
        yield from rest

    assert "enough" in send(stage.double(connect(stage.listener(part))), scan, data()).texts[0]


@pytest.mark.parametrize("after", [0, 1])
def test_an_error_is_lost_if_the_node_leaves_its_input_unread(scan: SimulatedScan, stage: Stage, after: int) -> None:
    served = stage.double(connect(stage.listener(fails("sketch: no probes", after, drain=False))))
    assert send(served, scan).texts == [BROKEN]


@pytest.mark.parametrize("count", [0, 2])
def test_an_end_without_close_is_an_illegal_message(scan: SimulatedScan, stage: Stage, count: int) -> None:
    def part(peer: Peer) -> None:
        for number, message in enumerate(peer):
            if number == count:
                return
            peer.send(message.raw)

    found = send(stage.double(connect(stage.listener(part))), scan)
    assert (found.closed, found.texts, len(found.messages)) == (True, [BROKEN], count + 1)


def test_half_a_message_is_none(scan: SimulatedScan, stage: Stage) -> None:
    def part(peer: Peer) -> None:
        items = [message.raw for message in peer]
        peer.send(items[0] + items[1][:50])

    found = send(stage.double(connect(stage.listener(part))), scan)
    assert (found.texts, len(found.messages)) == ([BROKEN], 2)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (framing.text_message(framing.TEXT, b"hello"), "Received illegal message id from external peer: 5"),
        (framing.text_message(framing.HEADER, b"hello"), "Received illegal message id from external peer: 3"),
        (struct.pack("<H", 1012), "Received illegal message id from external peer: 1012"),
        (b"\xff" * 64, "Received illegal message id from external peer: 65535"),
        (image_message(np.ones((2, 2), np.int16)), "map::at"),
        (INT32_IMAGE, "map::at"),
    ],
)
def test_what_the_server_cannot_read_from_a_node(scan: SimulatedScan, stage: Stage, content: bytes, text: str) -> None:
    def part(peer: Peer) -> None:
        peer.send(content)
        peer.leave()

    found = send(stage.double(connect(stage.listener(part))), scan)
    assert (found.closed, found.texts) == (True, [f"[Stream] ERROR: {text}"])


def test_text_from_a_node_hangs_a_long_scan_for_good(scan: SimulatedScan, stage: Stage) -> None:
    def part(peer: Peer) -> None:
        peer.send(framing.text_message(framing.TEXT, b"hello"))
        passes(peer)

    thread, _ = in_background(stage.double(connect(stage.listener(part))), scan, big(scan, 40))
    thread.join(2)
    assert thread.is_alive()


def test_a_stock_node_before_a_failed_one_hangs_a_long_scan_for_good(scan: SimulatedScan, stage: Stage) -> None:
    """Its output is not read any more, its input still written: it blocks in `send`, and reads no more."""
    failing = stage.listener(fails("downstream", 1))
    served = stage.double(execute("stock_toys", "passes"), connect(failing))
    thread, found = in_background(served, scan, big(scan, 60))
    wait_for(lambda: "output of stock_toys.passes is not read any more" in served.log_text)
    # the error is known and will never be told
    wait_for(lambda: "Errors received: \ndownstream" in "".join(served.errors))
    thread.join(2)
    assert thread.is_alive()
    assert served.leftovers(0)
    served.__exit__(None, None, None)
    thread.join(10)
    assert (found[0].closed, found[0].texts) == (False, [])
    assert served.exit_codes == [("stock_toys.passes", -signal.SIGKILL)]
    assert served.leftovers() == []


def test_a_node_with_a_reader_thread_does_not(scan: SimulatedScan, stage: Stage) -> None:
    """When its input is written its connection is closed: that is how its blocked `send` ends."""
    failing = stage.listener(fails("downstream", 1))
    served = stage.double(execute("stock_toys", "passes_with_a_reader"), connect(failing))
    found = send(served, scan, big(scan, 60))
    assert (found.closed, found.texts) == (True, ["[Stream] ERROR: Errors received: \ndownstream\n"])
    assert served.exit_codes == [("stock_toys.passes_with_a_reader", 1)]
    assert served.leftovers() == []


@pytest.mark.parametrize("part", [fails("upstream", 2), fails("upstream", 2, drain=False)])
def test_an_upstream_failure_looks_like_a_normal_end(
    scan: SimulatedScan, stage: Stage, part: Callable[[Peer], None]
) -> None:
    heard: list[int] = []

    def counts(peer: Peer) -> None:
        heard.append(len(list(peer)))
        peer.leave()
        assert peer.heard_close

    found = send(stage.double(connect(stage.listener(part)), connect(stage.listener(counts))), scan)
    assert (found.closed, len(found.texts), heard) == (True, 1, [2])


def test_the_client_is_held_until_every_child_has_left(scan: SimulatedScan, stage: Stage) -> None:
    served = stage.double(execute("stock_toys", "tidies_up"))
    found = send(served, scan)
    assert (found.closed, found.texts) == (True, [])
    # the child sleeps for a second after its last item
    assert found.elapsed - found.times[-1] >= 0.9
    assert None not in dict(served.exit_codes).values()


def test_a_second_drain_after_close_hangs(scan: SimulatedScan, stage: Stage) -> None:
    """The connection stays open until the child has left, which waits for its end."""
    served = stage.double(execute("stock_toys", "drains_again"))
    thread, found = in_background(served, scan)
    wait_for(lambda: "drains again" in served.log_text)
    thread.join(1)
    assert thread.is_alive()
    assert served.exit_codes == [("stock_toys.drains_again", None)]
    served.__exit__(None, None, None)
    thread.join(10)
    assert (found[0].closed, len(found[0].messages)) == (False, len(acquisitions(scan.blocks)))


def test_nothing_pushes_back(scan: SimulatedScan, stage: Stage) -> None:
    """The client gets rid of everything while the node reads nothing."""
    sent = threading.Event()

    def part(peer: Peer) -> None:
        assert sent.wait(20)
        passes(peer)

    def data() -> Iterator[bytes]:
        yield from big(scan, 40)
        sent.set()

    found = send(stage.double(connect(stage.listener(part))), scan, data())
    assert (found.closed, len(found.messages)) == (True, len(list(big(scan, 40))))


def test_a_scan_that_fails_does_not_touch_another(scan: SimulatedScan, stage: Stage) -> None:
    served = stage.double()
    good = pipeline(connect(stage.listener(passes)), writers=("Acquisition",))
    bad = pipeline(connect(stage.listener(fails("no", 1))), writers=("Acquisition",))
    halfway, failed = threading.Event(), threading.Event()

    def slowly() -> Iterator[bytes]:
        data = acquisitions(scan.blocks)
        yield from data[:5]
        halfway.set()
        assert failed.wait(10)
        yield from data[5:]

    thread, found = in_background(served, scan, slowly(), configuration=good)
    assert halfway.wait(10)
    assert len(send(served, scan, configuration=bad).texts) == 1
    failed.set()
    thread.join(10)
    assert (found[0].closed, found[0].texts) == (True, [])
    assert len(found[0].messages) == len(acquisitions(scan.blocks))
    assert served.leftovers() == []


def test_a_client_that_is_gone_ends_the_output_too(scan: SimulatedScan, stage: Stage) -> None:
    served = stage.double(execute("stock_toys", "passes_with_a_reader"))
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        connection.sendall(struct.pack("<H1024s", framing.FILENAME, b"x"))
        connection.sendall(framing.text_message(framing.HEADER, scan.header_xml))
        for message in big(scan, 20):
            connection.sendall(message)
    assert served.leftovers(20) == []
    assert any("basic_ios::clear" in text for text in served.errors)


def test_what_is_left_is_reported_and_killed(scan: SimulatedScan, stage: Stage) -> None:
    served = stage.double(execute("stock_toys", "leaves_a_child"))
    found = send(served, scan)
    assert found.closed
    (left,) = served.leftovers(0.2)
    assert left == f"process {served.pids[0]} of stock_toys.leaves_a_child"
    served.__exit__(None, None, None)
    assert served.leftovers(0) == []
    with pytest.raises(ProcessLookupError):
        os.kill(served.pids[0], 0)
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", served.port))


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_double_that_leaves_something_behind_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = Double(pipeline(), log=tmp_path / "log")
    with served:
        sleeper = served.registry.start("sleeper", ["sleep", "60"], dict(os.environ), None)
        monkeypatch.setattr(served.registry, "leftovers", lambda seconds: ["a process"] if seconds else [])
        with pytest.raises(AssertionError, match="the double leaves behind"):
            served.__exit__(None, None, None)
        monkeypatch.undo()
    assert isinstance(sleeper, subprocess.Popen)
    assert sleeper.returncode == -signal.SIGKILL
