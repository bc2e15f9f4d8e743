"""A node behind a socket, from the server's side: fed on a thread, read here."""

import logging
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from xml.etree.ElementTree import Element, tostring

from voxelsigma.gadgets.context import Context
from voxelsigma.gadgets.external import items_of
from voxelsigma.gadgets.items import Item, Stream
from voxelsigma.gadgets.wire import (
    CONFIG,
    HEADER,
    Close,
    Failure,
    Reader,
    close_message,
    message,
    read_message,
    text_message,
)
from voxelsigma.gadgets.wire_items import to_wire
from voxelsigma.hosts.family import Family

logger = logging.getLogger("voxelsigma.host")

LEAVE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Exchange:
    """What is said to a node, and heard from it.

    Parameters
    ----------
    name
        The node, for messages.
    configuration
        Its configuration.
    context
        The scan.
    family
        Keeps the feeding thread.
    fate
        Tells in words how the node's process ended; empty if it ended well, or nothing is known.
    """

    name: str
    configuration: Element
    context: Context
    family: Family
    fate: Callable[[], str]

    def run(self, connection: socket.socket, items: Stream) -> Iterator[Item]:
        """Items in, items out.

        Raises
        ------
        RuntimeError
            If the node reports an error, sends what cannot be read, or ends without saying goodbye.
        """
        failures: list[BaseException] = []
        refused = threading.Event()
        feeder = self.family.thread(lambda: self._feed(connection, items, failures, refused))
        yield from items_of(self._messages(Reader(connection.recv), failures))
        heard_out = _closed_in_peace(connection)
        feeder.join()
        if failures:
            raise failures[0]
        # what was still to be sent says it too, where the other side's end overtook the reset
        if refused.is_set() or not heard_out:
            raise RuntimeError(f"{self.name}: ended{self.fate() or ' before it had read all its input'}")

    def _messages(self, reader: Reader, failures: list[BaseException]) -> Iterator[object]:
        while True:
            try:
                found = read_message(reader)
            except (EOFError, OSError) as error:
                if failures:
                    raise failures[0] from None
                raise RuntimeError(f"{self.name}: broke off{self.fate() or ' without an error'} ({error})") from None
            except ValueError as error:
                raise RuntimeError(f"{self.name}: sent what cannot be read ({error})") from None
            if isinstance(found, Failure):
                raise RuntimeError(f"{self.name}: {found.text}")
            if isinstance(found, Close):
                return
            yield found

    def _feed(
        self, connection: socket.socket, items: Stream, failures: list[BaseException], refused: threading.Event
    ) -> None:
        """Send configuration, header and items; a failure upstream ends the stream without a goodbye."""
        try:
            configuration = b'<?xml version="1.0"?>\n' + tostring(self.configuration)
            connection.sendall(text_message(CONFIG, configuration))
            connection.sendall(text_message(HEADER, self.context.header.xml))
            parts = (message(part) for item in items for part in to_wire(item))
            while (content := _next_upstream(parts, failures)) is not None:
                connection.sendall(content)
            if failures:
                connection.shutdown(socket.SHUT_RDWR)
            else:
                connection.sendall(close_message())
        except OSError:
            # the node is gone; the reading side knows better why
            logger.debug("%s closed its input", self.name)
            refused.set()


def _next_upstream(parts: Iterator[bytes], failures: list[BaseException]) -> bytes | None:
    """The next message; None at the end, or when what is upstream failed: the reading side raises that."""
    try:
        return next(parts, None)
    except BaseException as error:  # any failure must reach the consumer's thread
        failures.append(error)
        return None


def _closed_in_peace(connection: socket.socket) -> bool:
    """Whether the other side closed, after its goodbye, with everything read: else the system resets the connection."""
    connection.settimeout(LEAVE_SECONDS)
    try:
        while connection.recv(2**16):
            pass
    except OSError:
        return False
    return True
