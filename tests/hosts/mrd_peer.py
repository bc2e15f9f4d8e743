"""A small MRD server for tests: it serves one connection by a script, with a parser of its own."""

import ctypes
import socket
import struct
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy as np
from ismrmrd import Acquisition, AcquisitionHeader, Image, Meta, WaveformHeader

SECONDS = 20.0

FILENAME, CONFIG, HEADER, CLOSE, TEXT, ERROR = 1, 2, 3, 4, 5, 8
ACQUISITION, IMAGE, WAVEFORM = 1008, 1022, 1026


class Gone(Exception):  # noqa: N818
    """The client hung up."""


class Talk:
    """The server's side of a connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.heard: list[tuple[int, bytes]] = []
        """Messages so far: id, and what follows it."""

    def read(self, count: int) -> bytes:
        content = b""
        while len(content) < count:
            part = self.connection.recv(count - len(content))
            if not part:
                raise Gone
            content += part
        return content

    def hear(self) -> tuple[int, bytes]:
        """The next message."""
        (identifier,) = struct.unpack("<H", self.read(2))
        self.heard.append((identifier, self._body(identifier)))
        return self.heard[-1]

    def hear_readouts(self, count: int) -> None:
        """Everything up to a number of readouts."""
        while count:
            count -= self.hear()[0] == ACQUISITION

    def hear_all(self) -> None:
        """Everything up to CLOSE."""
        while self.hear()[0] != CLOSE:
            pass

    def hear_the_end(self) -> None:
        """Everything until the client hangs up."""
        while self.connection.recv(2**16):
            pass

    def say(self, content: bytes) -> None:
        self.connection.sendall(content)

    def show(self, *images: Image) -> None:
        for image in images:
            self.say(struct.pack("<H", IMAGE) + image.to_bytes())

    def complain(self, text: str, identifier: int = TEXT) -> None:
        layout = "<HI" if identifier == TEXT else "<HQ"
        self.say(struct.pack(layout, identifier, len(text.encode())) + text.encode())

    def close(self) -> None:
        self.say(struct.pack("<H", CLOSE))

    def _body(self, identifier: int) -> bytes:
        if identifier == FILENAME:
            return self.read(1024)
        if identifier in (CONFIG, HEADER):
            size = self.read(4)
            return size + self.read(struct.unpack("<I", size)[0])
        if identifier == ACQUISITION:
            head = self.read(ctypes.sizeof(AcquisitionHeader))
            found = AcquisitionHeader.from_buffer_copy(head)
            floats = found.trajectory_dimensions + 2 * found.active_channels
            return head + self.read(4 * found.number_of_samples * floats)
        if identifier == WAVEFORM:
            head = self.read(ctypes.sizeof(WaveformHeader))
            wave = WaveformHeader.from_buffer_copy(head)
            return head + self.read(4 * wave.channels * wave.number_of_samples)
        assert identifier == CLOSE, identifier
        return b""


class Peer:
    """Listens on a free port, and lets a script serve the first connection in a thread.

    At the end of the block the script must be over; what it raised is raised here.
    """

    def __init__(self, script: Callable[[Talk], None], host: str = "127.0.0.1", receive_buffer: int = 0) -> None:
        self._script = script
        self._failure: BaseException | None = None
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.socket(family, socket.SOCK_STREAM)
        if receive_buffer:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self._listener.bind((host, 0))
        self._listener.listen(1)
        self._listener.settimeout(SECONDS)
        port = self._listener.getsockname()[1]
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self.heard: list[tuple[int, bytes]] = []
        self.over = threading.Event()

    def __enter__(self) -> "Peer":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.join(SECONDS)
        self._listener.close()
        if error is None:
            assert not self._thread.is_alive(), "the toy server's script does not end"
            if self._failure is not None:
                raise self._failure

    def _serve(self) -> None:
        try:
            connection, _ = self._listener.accept()
            with connection:
                connection.settimeout(SECONDS)
                # what is held back would be lost where the socket is closed with data unread
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                talk = Talk(connection)
                self.heard = talk.heard
                self._script(talk)
        except Gone:
            pass
        except BaseException as error:
            self._failure = error
        finally:
            self.over.set()


def answer(*images: Image) -> Callable[[Talk], None]:
    """A server that takes the whole scan, shows some images, and closes."""

    def script(talk: Talk) -> None:
        talk.hear_all()
        talk.show(*images)
        talk.close()

    return script


def image(series: int = 1, values: Any = 1.0, comment: str = "", **counters: int) -> Image:
    """A small image."""
    data = np.full((1, 4, 6), values, dtype=np.float32)
    found = Image.from_array(data, acquisition=Acquisition(), transpose=False, image_series_index=series, **counters)
    found.meta = Meta({"ImageComments": comment} if comment else {})
    return found
