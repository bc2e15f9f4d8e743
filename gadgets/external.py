"""A gadget behind Gadgetron's socket: messages in, messages out."""

import queue
import threading
import time
from collections.abc import Iterator
from typing import Any
from xml.etree.ElementTree import Element

from ismrmrd import Acquisition, constants

from voxelsigma.formats.header import parse_header
from voxelsigma.formats.readouts import block_of
from voxelsigma.gadgets.chaining import build
from voxelsigma.gadgets.context import Context
from voxelsigma.gadgets.items import Item
from voxelsigma.gadgets.wire import Close, Failure, Reader, message, read_message
from voxelsigma.gadgets.wire_items import FromWire, to_wire

BLOCK_SECONDS = 0.05
BLOCK_READOUTS = 256

_CUTTING = (
    constants.ACQ_LAST_IN_SLICE,
    constants.ACQ_LAST_IN_REPETITION,
    constants.ACQ_LAST_IN_MEASUREMENT,
    constants.ACQ_LAST_IN_AVERAGE,
)


class Incoming:
    """Messages of a socket, read by a thread of their own that never stops before CLOSE.

    A gadget that stops reading while it sends would hang the whole scan: the server reads its output only as long as
    it can write its input.
    """

    def __init__(self, socket: Any) -> None:
        self._messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._reader = Reader(socket.recv)
        self._thread = threading.Thread(target=self._run, name="incoming", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                found = read_message(self._reader)
            except Exception as error:  # the consumer raises it
                self._messages.put(error)
                return
            self._messages.put(found)
            if isinstance(found, Close):
                return

    def messages(self) -> Iterator[Any]:
        """Messages until CLOSE; None where none came for a while.

        Raises
        ------
        EOFError, ValueError
            If the stream ends or breaks before CLOSE.
        """
        while True:
            try:
                found = self._messages.get(timeout=BLOCK_SECONDS)
            except queue.Empty:
                yield None
                continue
            if isinstance(found, Close):
                return
            if isinstance(found, Exception):
                raise found
            if isinstance(found, Failure):
                raise ValueError(found.text)
            yield found

    def drain(self) -> None:
        """Wait until everything up to CLOSE, or to the end of the stream, has been read."""
        self._thread.join()


def items_of(messages: Iterator[Any]) -> Iterator[Item]:
    """Items of a stream of messages; readouts in blocks, cut at flags, at a change of shape, and after 50 ms."""
    convert = FromWire()
    waiting: list[Acquisition] = []
    since = 0.0
    for found in messages:
        if isinstance(found, Acquisition):
            if waiting and _shape(found) != _shape(waiting[0]):
                yield block_of(waiting)
                waiting = []
            since = since if waiting else time.monotonic()
            waiting.append(found)
            full = len(waiting) >= BLOCK_READOUTS or time.monotonic() - since >= BLOCK_SECONDS
            if full or any(found.is_flag_set(flag) for flag in _CUTTING):
                yield block_of(waiting)
                waiting = []
            continue
        if waiting:
            yield block_of(waiting)
            waiting = []
        if found is not None:
            yield from convert(found)
    if waiting:
        yield block_of(waiting)


def serve(connection: Any, source: Incoming, name: str) -> None:
    """Run a gadget on a connection of the gadgetron package."""
    context = Context(header=parse_header(connection.raw_bytes.header))
    configuration = connection.config if connection.config is not None else Element("configuration")
    gadget = build(name, configuration, context)
    for item in gadget(items_of(source.messages())):
        for part in to_wire(item):
            connection.socket.write(message(part))


def _shape(acquisition: Acquisition) -> tuple[int, int, int]:
    return acquisition.active_channels, acquisition.number_of_samples, acquisition.trajectory_dimensions
