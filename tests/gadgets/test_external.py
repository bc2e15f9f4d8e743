"""Messages of a connection: their end, their errors, draining, and readouts in blocks."""

import io
import itertools
import logging
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ismrmrd import Acquisition, Image, constants

from voxelsigma.formats.readouts import HEADER_DTYPE, ReadoutBlock
from voxelsigma.gadgets import external, wire
from voxelsigma.gadgets.external import BLOCK_READOUTS, Incoming, items_of
from voxelsigma.gadgets.wire_readouts import CUTTING, stated_headers

PATIENCE = 30.0
IMAGE = Image.from_array(np.ones((1, 2, 3), np.float32), transpose=False)


@contextmanager
def connected(**options: Any) -> Iterator[tuple[Incoming, socket.socket]]:
    """Incoming messages, and the other end of their connection."""
    ours, theirs = socket.socketpair()
    theirs.settimeout(PATIENCE)
    source = Incoming(ours.recv, **options)
    try:
        yield source, theirs
    finally:
        theirs.close()
        ours.shutdown(socket.SHUT_RDWR)
        assert source.join(PATIENCE)
        source.close()
        ours.close()


def finishes(action: Callable[[], object]) -> bool:
    """Whether something ends within patience; a hang must not be the suite's."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return not thread.is_alive()


def a_readout(**fields: Any) -> bytes:
    return wire.message(Acquisition.from_array(np.ones((2, 3), np.complex64), **fields))


def test_messages_up_to_close() -> None:
    with connected() as (source, theirs):
        theirs.sendall(wire.message(IMAGE) + wire.message("a text") + wire.close_message() + b"never read")
        found = [item for item in source.messages() if item is not None]
        assert found == [IMAGE]
        assert source.closed


def test_texts_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "voxelsigma.wire")
    with connected() as (source, theirs):
        theirs.sendall(wire.message("from upstream") + wire.close_message())
        assert [item for item in source.messages() if item is not None] == []
    assert "text on the stream: from upstream" in caplog.messages


def test_a_message_that_was_taken_already_comes_first() -> None:
    with connected() as (source, theirs):
        theirs.sendall(wire.message(IMAGE) + wire.close_message())
        first = source.next(PATIENCE)
        assert [item for item in source.messages(first) if item is not None] == [IMAGE]
        assert list(source.messages(wire.Close())) == []


def test_nothing_comes_within_a_time() -> None:
    with connected() as (source, _):
        assert source.next(0.01) is None
        assert next(source.messages()) is None


def test_the_end_inside_a_message_tells_what_came() -> None:
    with connected() as (source, theirs):
        theirs.sendall(a_readout() * 3 + a_readout()[:100])
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(
            EOFError,
            match="stream ends after 98 of 340 bytes of an ACQUISITION header, 3 messages after its beginning and "
            "without CLOSE",
        ):
            list(source.messages())
        # the end of the connection is the end of draining, too
        assert finishes(source.drain)


def test_the_end_between_messages_is_an_error_too() -> None:
    with connected() as (source, theirs):
        theirs.sendall(a_readout())
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(EOFError, match="after 0 of 2 bytes of a message id, 1 messages after its beginning and wi"):
            list(source.messages())


def test_an_error_from_upstream_is_raised_with_its_text_and_drained_to_close() -> None:
    with connected() as (source, theirs):
        theirs.sendall(wire.error_message("prewhiten: it broke") + wire.message(IMAGE) + wire.close_message())
        with pytest.raises(ValueError, match=r"^prewhiten: it broke$"):
            list(source.messages())
        assert finishes(source.drain)
        assert source.closed


def test_a_header_among_the_items_is_refused() -> None:
    with connected() as (source, theirs):
        theirs.sendall(wire.message(IMAGE) + wire.message(wire.ScanHeaderText(b"<a/>")) + wire.close_message())
        with pytest.raises(ValueError, match="ScanHeaderText message in the middle of a scan"):
            list(source.messages())


def test_nothing_between_messages_for_too_long() -> None:
    with connected(idle_seconds=0.1) as (source, theirs):
        theirs.sendall(wire.message(IMAGE))
        with pytest.raises(TimeoutError, match=r"nothing came for 0\.1 s, and no CLOSE"):
            list(source.messages())


def test_half_a_message_then_nothing() -> None:
    with connected(stall_seconds=0.1) as (source, theirs):
        theirs.sendall(a_readout()[:50])
        with pytest.raises(TimeoutError, match=r"nothing came for 0\.1 s, after 48 of 340 bytes of an ACQ"):
            list(source.messages())
        # who has been waited for in vain is not waited for again
        assert finishes(source.drain)


def test_draining_reads_to_close_and_never_beyond() -> None:
    with connected() as (source, theirs):
        theirs.sendall(wire.message(IMAGE) * 3)
        assert source.next(PATIENCE) == IMAGE
        drained = threading.Thread(target=source.drain, daemon=True)
        drained.start()
        drained.join(0.2)
        assert drained.is_alive()
        theirs.sendall(wire.message(IMAGE) + wire.close_message())
        drained.join(PATIENCE)
        assert not drained.is_alive()
        # the connection stays open: reading again would wait for ever
        assert finishes(source.drain)


def test_draining_gives_up_who_is_silent_for_longer_than_allowed() -> None:
    with connected(idle_seconds=0.1) as (source, theirs):
        theirs.sendall(wire.message(IMAGE))
        assert source.next(PATIENCE) == IMAGE
        assert finishes(source.drain)
        assert not source.closed


def test_what_cannot_be_parsed_is_drained_until_silence_behind_close(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external, "SILENCE_SECONDS", 0.1)
    with connected() as (source, theirs):
        theirs.sendall(struct.pack("<H", 777) + bytes(1000))
        with pytest.raises(ValueError, match="message id 777 after 0 bytes is unknown"):
            list(source.messages())
        drained = threading.Thread(target=source.drain, daemon=True)
        drained.start()
        drained.join(0.5)
        assert drained.is_alive(), "silence alone is no CLOSE: a scanner may pause"
        theirs.sendall(bytes(10**6) + wire.close_message())
        drained.join(PATIENCE)
        assert not drained.is_alive()


def test_what_cannot_be_kept_is_drained_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external, "SILENCE_SECONDS", 0.1)

    def full(**_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with connected(memory=10) as (source, theirs):
        theirs.sendall(wire.message(IMAGE))
        with pytest.raises(OSError, match="cannot keep what arrives"):
            list(source.messages())
        drained = threading.Thread(target=source.drain, daemon=True)
        drained.start()
        # the sender is not blocked, and CLOSE is waited for
        theirs.sendall(bytes(10**7))
        drained.join(0.3)
        assert drained.is_alive()
        theirs.sendall(wire.close_message())
        drained.join(PATIENCE)
        assert not drained.is_alive()


@st.composite
def streams(draw: st.DrawFn) -> list[Any]:
    """Runs of readouts of several shapes, some of them flagged, with images and pauses between."""
    counter = itertools.count()
    found: list[Any] = []
    run = st.tuples(st.integers(1, 5), st.sampled_from([(2, 3), (2, 4), (1, 3)]), st.integers(0, 2**5 - 1))
    for entry in draw(st.lists(st.none() | st.just("image") | run, max_size=10)):
        if entry is None:
            found.append(None)
        elif isinstance(entry, str):
            found.append(Image.from_array(np.zeros((1, 1), np.float32), transpose=False, image_index=next(counter)))
        else:
            count, (coils, length), flagged = entry
            headers = np.zeros(count, dtype=HEADER_DTYPE)
            headers["scan_counter"] = [next(counter) for _ in range(count)]
            headers["flags"] = np.where(np.arange(count) & flagged, 1 << (constants.ACQ_LAST_IN_SLICE - 1), 0)
            block = ReadoutBlock(
                headers, np.zeros((count, coils, length), np.complex64), np.zeros((count, length, 0), np.float32)
            )
            found.append(ReadoutBlock(stated_headers(block), block.samples, block.trajectory))
    return found


def numbers(items: Any) -> list[int]:
    found = []
    for item in items:
        if isinstance(item, ReadoutBlock):
            found += item.headers["scan_counter"].tolist()
        elif item is not None:
            found.append(item.image_index)
    return found


@settings(max_examples=60, deadline=None)
@given(messages=streams())
def test_blocks_lose_nothing_keep_order_and_end_behind_flags(messages: list[Any]) -> None:
    found = list(items_of(iter(messages)))
    assert numbers(found) == numbers(messages)
    for item in found:
        if isinstance(item, ReadoutBlock):
            assert len(item) == len(item.samples) == len(item.trajectory) > 0
            assert set(item.headers["number_of_samples"].tolist()) == {item.samples.shape[2]}
            assert set(item.headers["active_channels"].tolist()) == {item.samples.shape[1]}
            assert not (item.headers["flags"][:-1] & CUTTING).any()


def some_readouts(count: int) -> ReadoutBlock:
    headers = np.zeros(count, dtype=HEADER_DTYPE)
    return ReadoutBlock(headers, np.zeros((count, 1, 2), np.complex64), np.zeros((count, 2, 0), np.float32))


def test_readouts_are_joined_up_to_a_number_and_not_across_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    single = some_readouts(1)
    found = items_of(iter([single] * (BLOCK_READOUTS + 3) + [None, single, single]))
    assert [len(item) for item in found] == [BLOCK_READOUTS, 3, 2]


def test_readouts_do_not_wait_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(0, external.BLOCK_SECONDS / 3.5)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    found = items_of(iter([some_readouts(1)] * 20))
    assert max(len(item) for item in found) <= 4


@pytest.mark.parametrize(
    "flag",
    ["ACQ_LAST_IN_SLICE", "ACQ_LAST_IN_REPETITION", "ACQ_LAST_IN_MEASUREMENT", "ACQ_LAST_IN_AVERAGE"],
)
def test_what_completes_something_leaves_at_once(flag: str) -> None:
    last = a_readout(flags=1 << (getattr(constants, flag) - 1))
    source = io.BytesIO(a_readout() * 2 + last + a_readout() + wire.close_message())
    found = items_of(Incoming(source.read).messages())
    assert [len(item) for item in found] == [3, 1]
