"""A Python external in a child process, run as a Gadgetron server runs it."""

import logging
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from xml.etree.ElementTree import tostring

from voxelsigma.gadgets.context import Context
from voxelsigma.gadgets.external import items_of
from voxelsigma.gadgets.items import Stream
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
from voxelsigma.hosts.pipeline import External

logger = logging.getLogger("voxelsigma.host")

CONNECT_SECONDS = 30.0
LEAVE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class ChildNode:
    """Runs `python -m gadgetron <port> <module> <target>`, feeds it over a socket and reads what it sends."""

    node: External
    context: Context
    family: Family = field(default_factory=Family)

    def __call__(self, items: Stream) -> Stream:
        """Items in, items out; what the child gets is what its own end of the wire can carry.

        Raises
        ------
        RuntimeError
            If the child fails to connect, reports an error, or ends without saying goodbye.
        """
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            command = [sys.executable, "-m", "gadgetron", str(port), self.node.module, self.node.target]
            child = self.family.start(command)
            try:
                with self._accept(server, child) as connection:
                    try:
                        yield from self._exchange(connection, child, items)
                    except BaseException:
                        # before its socket closes, of which it would complain
                        child.kill()
                        raise
                if code := self._exit_code(child):
                    raise RuntimeError(f"{self._name}: ended with exit code {code}, see its log above")
            finally:
                if child.poll() is None:
                    child.kill()
                    child.wait()

    @property
    def _name(self) -> str:
        return f"external {self.node.module}.{self.node.target}"

    def _accept(self, server: socket.socket, child: "subprocess.Popen[bytes]") -> socket.socket:
        """Wait for the child to connect back, as long as it lives."""
        server.settimeout(0.2)
        for _ in range(int(CONNECT_SECONDS / 0.2)):
            try:
                connection, _address = server.accept()
            except TimeoutError:
                if child.poll() is not None:
                    raise RuntimeError(
                        f"{self._name}: ended with exit code {child.returncode} before it connected"
                    ) from None
                continue
            connection.settimeout(None)
            return connection
        raise RuntimeError(f"{self._name}: did not connect within {CONNECT_SECONDS:g} s")

    def _exchange(self, connection: socket.socket, child: "subprocess.Popen[bytes]", items: Stream) -> Iterator[object]:
        """Feed on a thread, read here."""
        failures: list[BaseException] = []
        feeder = self.family.thread(lambda: self._feed(connection, items, failures))
        reader = Reader(connection.recv)

        def messages() -> Iterator[object]:
            while True:
                try:
                    found = read_message(reader)
                except (EOFError, OSError) as error:
                    if failures:
                        raise failures[0] from None
                    code = self._exit_code(child)
                    raise RuntimeError(
                        f"{self._name}: broke off with exit code {code}, see its log above ({error})"
                    ) from None
                except ValueError as error:
                    raise RuntimeError(f"{self._name}: sent what cannot be read ({error})") from None
                if isinstance(found, Failure):
                    raise RuntimeError(f"{self._name}: {found.text}")
                if isinstance(found, Close):
                    return
                yield found

        yield from items_of(messages())
        heard_out = _closed_in_peace(connection)
        feeder.join()
        if failures:
            raise failures[0]
        if not heard_out and not self._exit_code(child):
            raise RuntimeError(f"{self._name}: ended before it had read all its input")

    def _exit_code(self, child: "subprocess.Popen[bytes]") -> int:
        """Wait for the end of a child that has said goodbye."""
        try:
            return child.wait(timeout=LEAVE_SECONDS)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{self._name}: still runs {LEAVE_SECONDS:g} s after the end of its output") from None

    def _feed(self, connection: socket.socket, items: Stream, failures: list[BaseException]) -> None:
        """Send configuration, header and items; a failure upstream ends the stream without a goodbye."""
        try:
            configuration = b'<?xml version="1.0"?>\n' + tostring(self.node.configuration)
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
            # the child is gone; the reading side knows better why
            logger.debug("%s closed its input", self._name)


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
