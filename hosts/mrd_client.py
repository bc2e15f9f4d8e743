"""The client's side of the MRD protocol: what a scanner says to a Gadgetron, and hears from it.

Source: Gadgetron 4.7's server and its client `gadgetron_ismrmrd_client`; python-ismrmrd-server's `client.py`.
"""

import math
import queue
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, NoReturn, Protocol

from ismrmrd import Image

from voxelsigma.gadgets.wire import (
    Close,
    Configuration,
    Failure,
    FileName,
    Reader,
    ScanHeaderText,
    message,
    read_message,
)

MAX_NAME: Final = 1023

CONNECT_SECONDS: Final = 10.0
GONE_SECONDS: Final = 5.0
TEXTS_SECONDS: Final = 0.5
TICK_SECONDS: Final = 0.05


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens."""

    host: str
    port: int

    def __str__(self) -> str:
        """As `parse_address` reads it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """`host:port`, or `[host]:port` where the host is an IPv6 address.

    Raises
    ------
    ValueError
        If it is neither, or the port is not from 1 to 65535.
    """
    found = re.fullmatch(r"(?:\[(?P<six>[^\[\]\s]+)\]|(?P<host>[^:\[\]\s/]+)):(?P<port>[0-9]{1,5})", text)
    if found is None or not 1 <= int(found["port"]) <= 65535:
        raise ValueError(
            f"send: --to must be host:port or [IPv6 address]:port with a port from 1 to 65535, such as localhost:9002 "
            f"or [::1]:9002, got {text!r}"
        )
    return Address(found["six"] or found["host"], int(found["port"]))


def connect(address: Address, timeout: float = CONNECT_SECONDS) -> socket.socket:
    """A connection to a server; nothing that is written to it waits for more.

    Raises
    ------
    ConnectionError
        If the host is unknown, or nothing listens there.
    TimeoutError
        If the host does not answer within `timeout` seconds.
    """
    try:
        connection = socket.create_connection((address.host, address.port), timeout)
    except socket.gaierror as error:
        raise ConnectionError(f"{address}: the host is unknown ({error.strerror})") from None
    except ConnectionRefusedError:
        raise ConnectionError(f"{address}: nothing listens there (connection refused)") from None
    except TimeoutError:
        raise TimeoutError(f"{address}: no answer to the connection within {timeout:g} s") from None
    except OSError as error:
        raise ConnectionError(f"{address}: cannot be connected to ({error.strerror or error})") from None
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def opening(pipeline: str | bytes, header_xml: bytes) -> bytes:
    """What a client says first: a pipeline's name, or its XML as bytes, and the scan's header.

    Raises
    ------
    ValueError
        If the name is empty or does not fit into a message.
    """
    if isinstance(pipeline, bytes):
        return message(Configuration(pipeline)) + message(ScanHeaderText(header_xml))
    # the server wants a zero behind the name
    if not 1 <= len(pipeline.encode()) <= MAX_NAME or "\0" in pipeline:
        raise ValueError(
            f"send: a pipeline's name must have 1 to {MAX_NAME} bytes, none of them 0, got {pipeline[:40]!r} "
            f"of {len(pipeline.encode())}"
        )
    return message(FileName(pipeline)) + message(ScanHeaderText(header_xml))


class Stopped(Exception):  # noqa: N818  (no error: the way out of a feed)
    """The session is over; there is nobody left to send to."""


class Feed(Protocol):
    """What is sent."""

    def __call__(self, session: "Session") -> None:
        """Send all of it, by the session's `send` and `wait_until`."""

    def account(self) -> str:
        """What has been sent so far, in words."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """Something the server sent, and when the whole of it was here, on the monotonic clock."""

    item: Any
    at: float


@dataclass(frozen=True, slots=True)
class _Complaint:
    """A TEXT or ERROR of the server."""

    text: str


@dataclass(frozen=True, slots=True)
class _Lost:
    """The connection ended without CLOSE."""

    reason: str


@dataclass(frozen=True, slots=True)
class _Broken:
    """A thread of ours failed."""

    error: Exception


class Session:
    """One scan over one connection: a thread sends, another receives, the caller is given what arrives.

    Parameters
    ----------
    connection
        The socket; it is of no use after the session.
    address
        Of the server, for messages.
    timeout
        How many seconds the server may be silent after our CLOSE, or take nothing of what is sent to it.
    """

    def __init__(self, connection: socket.socket, address: Address, timeout: float) -> None:
        self._connection = connection
        self._address = address
        self._timeout = timeout
        self._events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._heard = time.monotonic()
        self._sending: float | None = None
        self._refused: float | None = None
        self._closed: float | None = None
        self._received: Counter[str] = Counter()
        self.ended = math.inf
        """When the server's CLOSE was here, on the monotonic clock."""

    def send(self, content: bytes) -> None:
        """Send, and return when the socket has taken the last byte.

        Raises
        ------
        Stopped
            If the server is gone or the session over.
        """
        if self._stop.is_set():
            raise Stopped
        self._sending = time.monotonic()
        try:
            self._connection.sendall(content)
        except OSError:
            # the other thread hears why, if anybody does
            self._refused = time.monotonic()
            raise Stopped from None
        finally:
            self._sending = None

    def wait_until(self, moment: float) -> None:
        """Wait for a moment of the monotonic clock.

        Raises
        ------
        Stopped
            If the session is over before it.
        """
        if self._stop.wait(max(0.0, moment - time.monotonic())):
            raise Stopped

    def arrivals(self, feed: Feed, tick: Callable[[], None]) -> Generator[Arrival, None, None]:
        """Send a feed and CLOSE; meanwhile, and until the server's CLOSE, what it sends.

        Parameters
        ----------
        feed
            What to send.
        tick
            Called often.

        Raises
        ------
        RuntimeError
            If the server sends an error; the text is its own.
        ConnectionError
            If the connection ends without CLOSE, or with one before all was sent.
        TimeoutError
            If the server is silent.
        ValueError
            If the server sends what cannot be read.
        """
        threads = [
            threading.Thread(target=self._feed, args=(feed,), name="mrd-send", daemon=True),
            threading.Thread(target=self._listen, name="mrd-receive", daemon=True),
        ]
        for thread in threads:
            thread.start()
        try:
            while True:
                event = self._next(TICK_SECONDS)
                tick()
                if event is None:
                    self._check_silence(feed)
                elif isinstance(event, Arrival) and isinstance(event.item, Close):
                    if self._closed is None:
                        raise ConnectionError(
                            f"{self._address}: the server closed before the scan's end; {self._account(feed)}"
                        )
                    self.ended = event.at
                    return
                elif isinstance(event, Arrival):
                    self._received[_name(event.item)] += 1
                    yield event
                else:
                    self._fail(event, feed)
        finally:
            self._stop.set()
            # wakes a thread that waits for the socket
            with suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join()

    def _feed(self, feed: Feed) -> None:
        """The sending thread."""
        try:
            feed(self)
            # before it is sent, since the answer may be quick
            self._closed = time.monotonic()
            self.send(message(Close()))
        except Stopped:
            pass
        except Exception as error:
            self._events.put(_Broken(error))

    def _listen(self) -> None:
        """The receiving thread."""
        reader = Reader(self._receive)
        try:
            while True:
                item = read_message(reader)
                at = time.monotonic()
                if isinstance(item, str | Failure):
                    self._events.put(_Complaint(item if isinstance(item, str) else item.text))
                else:
                    self._events.put(Arrival(item, at))
                if isinstance(item, Close):
                    return
        except EOFError as error:
            self._events.put(_Lost(str(error)))
        except OSError as error:
            self._events.put(_Lost(error.strerror or str(error)))
        except ValueError as error:
            self._events.put(_Broken(ValueError(f"{self._address}: the server sent what cannot be read: {error}")))
        except Exception as error:
            self._events.put(_Broken(error))

    def _receive(self, count: int) -> bytes:
        part = self._connection.recv(count)
        self._heard = time.monotonic()
        return part

    def _next(self, seconds: float) -> Any:
        """The next event; None if there is none for some time."""
        try:
            return self._events.get(timeout=seconds)
        except queue.Empty:
            return None

    def _check_silence(self, feed: Feed) -> None:
        for since, seconds, kind, what in (
            (self._refused, min(GONE_SECONDS, self._timeout), ConnectionError, "the server takes no more data"),
            (self._sending, self._timeout, TimeoutError, f"the server took no data for {self._timeout:g} s"),
            (self._closed, self._timeout, TimeoutError, f"silent for {self._timeout:g} s after the scan's end"),
        ):
            if since is not None and time.monotonic() - max(since, self._heard) > seconds:
                raise kind(f"{self._address}: {what}; {self._account(feed)}")

    def _fail(self, event: _Complaint | _Lost | _Broken, feed: Feed) -> NoReturn:
        """Raise what an event means."""
        if isinstance(event, _Broken):
            raise event.error
        if isinstance(event, _Lost):
            raise ConnectionError(
                f"{self._address}: the connection ended without CLOSE ({event.reason}); {self._account(feed)}"
            )
        self._stop.set()
        texts = [event.text]
        end = time.monotonic() + TEXTS_SECONDS
        # a server has one line for each node that failed
        while (left := end - time.monotonic()) > 0:
            following = self._next(left)
            if isinstance(following, _Complaint):
                texts.append(following.text)
            elif not isinstance(following, Arrival) or isinstance(following.item, Close):
                break
        raise RuntimeError(f"{self._address}: {'; '.join(text.strip() or 'an error without a text' for text in texts)}")

    def _account(self, feed: Feed) -> str:
        """What went and what came so far, in words."""
        received = ", ".join(f"{count} {name}" for name, count in self._received.items()) or "nothing"
        return f"sent {feed.account()}; received {received}"


def _name(item: Any) -> str:
    return f"of image series {item.image_series_index}" if isinstance(item, Image) else type(item).__name__
