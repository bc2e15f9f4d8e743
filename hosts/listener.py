"""Listening on several addresses: every connection is accepted at once and gets a thread of its own."""

import contextlib
import errno
import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

logger = logging.getLogger("voxelsigma.listener")

LOOPBACK: Final = ("127.0.0.1", "::1")
BACKLOG: Final = 128
MOST_CONNECTIONS: Final = 256
LEAVE_SECONDS: Final = 2.0
"""How long a client may take to hang up once it was told everything."""

Handle = Callable[[socket.socket, str], None]


class Listener:
    """Accepts connections and hands each to a function on a thread of its own.

    Parameters
    ----------
    hosts
        Addresses or names to listen on; beside others the loopback address of IPv6 may be missing.
    port
        Port; 0 picks a free one.
    handle
        Called with every connection and the name of its other side; the connection is closed when it returns.

    Raises
    ------
    OSError
        If an address cannot be listened on; the text names it.
    """

    def __init__(self, hosts: Sequence[str], port: int, handle: Handle) -> None:
        self._handle = handle
        self._sockets = _bind(hosts, port)
        self._names: list[tuple[Any, ...]] = [found.getsockname() for found in self._sockets]
        self._wake_read, self._wake_write = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        for found in (*self._sockets, self._wake_read):
            self._selector.register(found, selectors.EVENT_READ)
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._connections: dict[threading.Thread, socket.socket] = {}

    @property
    def port(self) -> int:
        """The port, the same on all addresses."""
        return int(self._names[0][1])

    @property
    def addresses(self) -> tuple[str, ...]:
        """What it listens on, as `host:port`."""
        return tuple(map(_name, self._names))

    @property
    def connections(self) -> int:
        """Connections that are served now."""
        with self._lock:
            return len(self._connections)

    @property
    def stopping(self) -> bool:
        """Whether it was asked to stop."""
        return self._stopping.is_set()

    def stop(self) -> None:
        """Accept no more; may be called from a signal handler."""
        self._stopping.set()
        with contextlib.suppress(OSError):
            self._wake_write.send(b"x")

    def run(self, grace: float = 30.0) -> None:
        """Accept until stopped; then wait for the connections that are served, and shut what is left of them.

        Parameters
        ----------
        grace
            Seconds to wait for them.
        """
        try:
            while not self.stopping:
                for key, _ in self._selector.select():
                    if key.fileobj is not self._wake_read:
                        assert isinstance(key.fileobj, socket.socket)
                        self._accept(key.fileobj)
        finally:
            self._stopping.set()
            self._finish(grace)

    def close(self) -> None:
        """Give back its sockets; `run` does so itself."""
        self._selector.close()
        for found in (*self._sockets, self._wake_read, self._wake_write):
            found.close()

    def _accept(self, listening: socket.socket) -> None:
        try:
            connection, address = listening.accept()
        except BlockingIOError:
            return
        except OSError as error:
            # out of descriptors, or the peer has left meanwhile: neither may end the server
            logger.warning("a connection could not be accepted (%s)", error.strerror)
            if error.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(0.1)
            return
        peer = _name(address)
        if self.connections >= MOST_CONNECTIONS:
            logger.warning("connection from %s refused: %d are served already", peer, MOST_CONNECTIONS)
            connection.close()
            return
        connection.setblocking(True)
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        thread = threading.Thread(target=self._serve, args=(connection, peer), name=f"serve {peer}", daemon=True)
        with self._lock:
            self._connections[thread] = connection
        try:
            thread.start()
        except RuntimeError as error:
            # out of threads: who is served already must not suffer
            logger.warning("connection from %s refused: %s", peer, error)
            with self._lock:
                del self._connections[thread]
            connection.close()

    def _serve(self, connection: socket.socket, peer: str) -> None:
        try:
            self._handle(connection, peer)
        except Exception:
            logger.exception("connection from %s failed", peer)
        finally:
            _leave(connection)
            with self._lock:
                del self._connections[threading.current_thread()]

    def _finish(self, grace: float) -> None:
        self.close()
        until = time.monotonic() + grace
        while self.connections and time.monotonic() < until:
            time.sleep(0.02)
        with self._lock:
            left = dict(self._connections)
        for thread, connection in left.items():
            logger.warning("%s is cut off: it was still served after %g s", thread.name, grace)
            # its input ends here, so that its handler can still say why
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RD)
        for thread in left:
            thread.join(5)


def _leave(connection: socket.socket) -> None:
    """Close a connection without a reset, which could take our last words from who has not read them yet."""
    end = time.monotonic() + LEAVE_SECONDS
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(LEAVE_SECONDS)
        while connection.recv(2**16) and time.monotonic() < end:
            pass
    # wakes a thread that still reads
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


def _bind(hosts: Sequence[str], port: int) -> list[socket.socket]:
    """Listening sockets on all addresses of some hosts, with one port."""
    found: list[socket.socket] = []
    wanted = [entry for host in hosts for entry in _resolved(host)]
    # comes last: it may be missing where something else is there
    wanted.sort(key=lambda entry: entry[1] == "::1")
    try:
        for family, address in dict.fromkeys(wanted):
            try:
                found.append(_listening(family, address, port, dual=(socket.AF_INET, "0.0.0.0") not in wanted))
            except OSError as error:
                missing = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
                if address == "::1" and found and error.errno in missing:
                    continue
                hint = ", something else listens there" if error.errno == errno.EADDRINUSE else ""
                raise OSError(
                    f"{_name((address, port))}: cannot listen ({error.strerror}{hint}); choose another --port or --host"
                ) from None
            port = port or int(found[0].getsockname()[1])
    except BaseException:
        for opened in found:
            opened.close()
        raise
    return found


def _resolved(host: str) -> list[tuple[socket.AddressFamily, str]]:
    try:
        infos = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise OSError(f"{host}: no address to listen on ({error.strerror})") from None
    return list(dict.fromkeys((family, str(address[0])) for family, _, _, _, address in infos))


def _listening(family: socket.AddressFamily, address: str, port: int, *, dual: bool) -> socket.socket:
    """A listening socket; one on all addresses of IPv6 takes those of IPv4 too where it may."""
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            found.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if dual and address == "::" else 1)
        found.bind((address, port))
        found.listen(BACKLOG)
        found.setblocking(False)
    except BaseException:
        found.close()
        raise
    return found


def _name(address: tuple[object, ...]) -> str:
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"
