"""Listening externals inside the test's own process: what they do is written with bare bytes."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import TracebackType

from tests.gadgetron_double.framing import (
    CLOSE,
    CONFIG,
    ERROR,
    HEADER,
    IMAGE_BYTES,
    NODE,
    Message,
    close,
    read_message,
)


class Peer:
    """An external's end of a connection, after configuration and header were read; `number` is its place in line."""

    def __init__(self, connection: socket.socket, number: int = 0) -> None:
        self.connection = connection
        self.number = number
        # else the end of what was sent could be lost when a part leaves with unread input
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._stream = connection.makefile("rb", 2**16)
        self.configuration = read_message(self._stream.read, {CONFIG}).text
        self.header = read_message(self._stream.read, {HEADER}).raw[6:]
        self.heard_close = False

    def __iter__(self) -> Iterator[Message]:
        """Items until CLOSE."""
        while not self.heard_close:
            message = read_message(self._stream.read, NODE | {CLOSE}, IMAGE_BYTES.keys())
            if message.identifier == CLOSE:
                self.heard_close = True
                return
            yield message

    def send(self, content: bytes) -> None:
        """Bytes, whole messages or not."""
        self.connection.sendall(content)

    def leave(self, *, error: str | None = None, drain: bool = True) -> None:
        """ERROR where there is a text, CLOSE, and the rest of the input unless that is to be lost."""
        if error is not None:
            self.send(ERROR.to_bytes(2, "little") + len(error.encode()).to_bytes(8, "little") + error.encode())
        self.send(close())
        if drain:
            for _ in self:
                pass

    def end(self) -> None:
        self._stream.close()
        self.connection.close()


class Listener:
    """Accepts every connection at once and plays a part on each, in the order in which they came.

    Parameters
    ----------
    part
        Called with a `Peer` on a thread of its own; the connection is closed when it returns, whatever was read.
    """

    def __init__(self, part: Callable[[Peer], None]) -> None:
        self._part = part
        self._server = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._server.getsockname()[1]
        self._threads: list[threading.Thread] = []
        self._connections: list[socket.socket] = []

    def __enter__(self) -> "Listener":
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for connection in [self._server, *self._connections]:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._accepting.join(10)
        self._server.close()
        for thread in self._threads:
            thread.join(10)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _address = self._server.accept()
                self._connections.append(connection)
                thread = threading.Thread(target=self._play, args=(connection, len(self._threads)), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _play(self, connection: socket.socket, number: int) -> None:
        # a part that is cut off by the end of the listener, or of the server, ends here
        with suppress(OSError, EOFError):
            peer = Peer(connection, number)
            try:
                self._part(peer)
            finally:
                peer.end()
        connection.close()
