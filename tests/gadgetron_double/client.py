"""The client's side of the protocol."""

import socket
import struct
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from ismrmrd import Image, Meta
from tests.gadgetron_double.framing import (
    ACQUISITION,
    CLOSE,
    CONFIG,
    FILENAME,
    HEADER,
    IMAGE,
    NODE,
    RESPONSE,
    TEXT,
    Message,
    close,
    read_message,
    text_message,
)


class Vanish(Exception):  # noqa: N818 - an order, not an error
    """Raised by the messages of a client: it leaves without a word; with `reset`, so hard that unread data are lost."""

    def __init__(self, *, reset: bool = False) -> None:
        super().__init__()
        self.reset = reset


@dataclass(frozen=True, slots=True)
class Received:
    """What a client got.

    Parameters
    ----------
    messages
        All messages but the CLOSE.
    times
        When each came, in seconds after the connection was made.
    closed
        Whether the server sent CLOSE; otherwise it left, or the time was over (`timed_out`).
    elapsed
        Seconds to the end.
    """

    messages: tuple[Message, ...]
    times: tuple[float, ...]
    closed: bool
    timed_out: bool
    elapsed: float

    @property
    def texts(self) -> list[str]:
        """Texts, in order."""
        return [message.text for message in self.messages if message.identifier == TEXT]

    @property
    def images(self) -> list[Any]:
        """Images, in order, as `ismrmrd.Image`."""
        return [image_of(message) for message in self.messages if message.identifier == IMAGE]


def client(
    port: int,
    configuration: str | bytes,
    header: bytes,
    messages: Iterable[bytes] = (),
    *,
    seconds: float = 60.0,
    say_close: bool = True,
    host: str = "127.0.0.1",
) -> Received:
    """Send a scan and read until CLOSE, the end of the connection, or the end of the time.

    Parameters
    ----------
    port, host
        Of the server.
    configuration
        XML (anything that starts with `<`), or the name of a pipeline.
    header
        ISMRMRD header.
    messages
        Bytes to send after it, whole messages or not. A generator may pause, and raise `Vanish` to leave.
    seconds
        Time for everything.
    say_close
        Whether to send CLOSE at the end.
    """
    begin = time.monotonic()
    given = configuration.encode() if isinstance(configuration, str) else configuration
    opening = text_message(CONFIG, given) if given.lstrip().startswith(b"<") else file_name(given)
    with socket.create_connection((host, port), timeout=seconds) as connection:
        connection.settimeout(None)
        parts = (opening + text_message(HEADER, header), messages, close() if say_close else b"")
        sender = threading.Thread(target=_send, args=(connection, *parts), daemon=True)
        timer = threading.Timer(max(0.0, begin + seconds - time.monotonic()), _shut, (connection,))
        timer.start()
        sender.start()
        found, times, closed = _read(connection, begin)
        timed_out = not closed and not timer.is_alive()
        timer.cancel()
        _shut(connection)
        sender.join(10)
        timer.join(10)
    return Received(tuple(found), tuple(times), closed, timed_out, time.monotonic() - begin)


def file_name(name: bytes) -> bytes:
    """A FILENAME message."""
    return struct.pack("<H1024s", FILENAME, name)


def acquisitions(blocks: Iterable[Any]) -> list[bytes]:
    """ACQUISITION messages of blocks with `headers`, `samples` (readouts, coils, k0) and `trajectory`."""
    return [
        struct.pack("<H", ACQUISITION) + header.tobytes() + trajectory.tobytes() + samples.tobytes()
        for block in blocks
        for header, samples, trajectory in zip(block.headers, block.samples, block.trajectory, strict=True)
    ]


def image_message(data: npt.NDArray[Any], meta: Mapping[str, str] | None = None, **fields: int) -> bytes:
    """An IMAGE message; data has the shape `(coils, z, y, x)` or a part of it."""
    image = Image.from_array(data, transpose=False, **fields)
    image.meta = Meta(meta or {})
    parts = [struct.pack("<H", IMAGE)]
    image.serialize_into(lambda part: parts.append(bytes(part)))
    return b"".join(parts)


def image_of(message: Message) -> Any:
    """An IMAGE message as an `ismrmrd.Image`."""
    position = 2

    def read(count: int) -> bytes:
        nonlocal position
        position += count
        return message.raw[position - count : position]

    return Image.deserialize_from(read)


def samples_of(message: Message) -> npt.NDArray[np.complex64]:
    """Samples of an ACQUISITION message, shape `(coils, k0)`, without its trajectory."""
    samples, _, channels = struct.unpack_from("<3H", message.raw, 2 + 34)
    return np.frombuffer(message.raw[-8 * samples * channels :], dtype=np.complex64).reshape(channels, samples)


def _send(connection: socket.socket, opening: bytes, messages: Iterable[bytes], ending: bytes) -> None:
    try:
        connection.sendall(opening)
        for message in messages:
            connection.sendall(message)
        connection.sendall(ending)
    except Vanish as order:
        if order.reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            # closes for good: the reading side wakes up with the reset of its own end
            connection.shutdown(socket.SHUT_RD)
        else:
            _shut(connection)
    except OSError:
        # the server does not listen any more; what it says is read elsewhere
        pass


def _read(connection: socket.socket, begin: float) -> tuple[list[Message], list[float], bool]:
    found: list[Message] = []
    times: list[float] = []
    with connection.makefile("rb", 2**16) as stream, suppress(EOFError, OSError):
        while True:
            message = read_message(stream.read, NODE | {TEXT, RESPONSE, CLOSE})
            if message.identifier == CLOSE:
                return found, times, True
            found.append(message)
            times.append(time.monotonic() - begin)
    return found, times, False


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
