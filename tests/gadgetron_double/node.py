"""The nodes of one scan: how the server treats an external."""

import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from tests.gadgetron_double.framing import (
    CLOSE,
    CONFIG,
    ERROR,
    HEADER,
    NODE,
    NODE_IMAGES,
    Message,
    UnreadableError,
    close,
    read_message,
    text_message,
)
from tests.gadgetron_double.pipeline import Connect, Execute, External, Node, Parallel
from tests.gadgetron_double.registry import Channel, ChannelClosedError, Registry

# what the server makes of bytes that it could not read: garbage, that always was 1
BROKEN: Final = "Received illegal message id from external peer: 1"
# within this a peer that did not hear the server out resets its connection
RESET_SECONDS: Final = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How the server is set up.

    Parameters
    ----------
    environment
        Added to the environment of the children.
    storage
        What `GADGETRON_STORAGE_ADDRESS` says to the children.
    interpreter
        The first `python` on the server's PATH.
    folder
        The server's, and the children's, current folder.
    child_seconds
        A child that has not connected back by then is killed.
    connect_tries, connect_interval
        How often, and every how many seconds, to try to reach a listening external.
    connect_reversed
        Connect to listening externals one after the other, the last first; otherwise all at once.
    """

    environment: Mapping[str, str] = field(default_factory=dict)
    storage: str | None = None
    interpreter: str = sys.executable
    folder: Path | None = None
    child_seconds: float = 30.0
    connect_tries: int = 10
    connect_interval: float = 2.0
    connect_reversed: bool = False

    def child_environment(self) -> dict[str, str]:
        found = {**os.environ, **self.environment}
        found.pop("GADGETRON_STORAGE_ADDRESS", None)
        if self.storage is not None:
            found["GADGETRON_STORAGE_ADDRESS"] = self.storage
        if home := found.get("GADGETRON_HOME"):
            paths = [found.get("PYTHONPATH", ""), f"{home}/share/gadgetron/python"]
            found["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        return found


class Running(Protocol):
    """A node of a scan."""

    def run(self, source: Channel, sink: Channel) -> None:
        """From the first item to the last; releases `sink` and stops `source`."""


class ExternalNode:
    """One external: a connection, written by one thread and read by another, and perhaps a child."""

    def __init__(self, spec: External, options: Options, registry: Registry, fail: Callable[[str], None]) -> None:
        self.spec = spec
        self._options = options
        self._registry = registry
        self._fail = fail
        self._connection: socket.socket | None = None
        self._child: subprocess.Popen[bytes] | None = None
        # as in the server, one lock for writing and for changing state: a blocked write holds up the reader
        self._lock = threading.Lock()
        self._outbound_open = True
        self._broken = False
        self._goodbye = False
        self._spoke = False
        self._remote_errors: list[str] = []

    def open(self, header: bytes) -> None:
        """Get the connection and send configuration and header; without a connection the node is a failed one."""
        action = self.spec.action
        connection = self._execute(action) if isinstance(action, Execute) else self._connect(action)
        if connection is None:
            return
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = self._registry.track(connection)
        try:
            connection.sendall(text_message(CONFIG, self.spec.configuration) + text_message(HEADER, header))
        except OSError:
            self._broken = True

    def run(self, source: Channel, sink: Channel) -> None:
        if self._connection is None:
            source.stop()
            sink.release()
            return
        writer = self._registry.thread(f"writer of {self.spec.name}", self._write_all, source, sink.split())
        self._read_all(self._connection, source, sink)
        writer.join()
        if self._child is None:
            self._judge(RESET_SECONDS)
        if self._child is None or not self._goodbye:
            # a node whose output is not read any more learns of it here, when all its input was written
            self._registry.close(self._connection)

    def finish(self) -> None:
        """Wait for the child, however long that takes, and only then close its connection."""
        if self._child is None:
            return
        self._child.wait()
        if self._connection is not None and self._goodbye:
            self._judge(0)
            self._registry.close(self._connection)

    def _execute(self, action: Execute) -> socket.socket | None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(0.02)
            arguments = ["-m", "gadgetron", str(server.getsockname()[1]), action.module]
            arguments += [action.target] if action.target else []
            self._child = self._registry.start(
                self.spec.name,
                [self._options.interpreter, *arguments],
                self._options.child_environment(),
                self._options.folder,
            )
            deadline = time.monotonic() + self._options.child_seconds
            while self._child.poll() is None:
                with suppress(TimeoutError):
                    connection, _address = server.accept()
                    connection.settimeout(None)
                    return connection
                if time.monotonic() > deadline:
                    self._fail(f"{self.spec.name} did not connect within {self._options.child_seconds:g} s")
                    self._child.kill()
                    self._child.wait()
        self._registry.note(f"{self.spec.name} never connected, exit code {self._child.returncode}")
        return None

    def _connect(self, action: Connect) -> socket.socket | None:
        for attempt in range(self._options.connect_tries):
            if attempt and self._registry.ending.wait(self._options.connect_interval):
                return None
            with suppress(OSError):
                return socket.create_connection((action.address, action.port))
        self._fail(f"Failed to connect to external module on address: {action.address}:{action.port}")
        return None

    def _write_all(self, source: Channel, bypass: Channel) -> None:
        """What the node can be sent, in order; the rest passes it by and overtakes what it holds."""
        try:
            for message in source:
                if message.identifier in NODE:
                    self._write(message.raw)
                else:
                    bypass.push(message)
        except ChannelClosedError:
            pass
        finally:
            self._close_outbound()
            source.stop()
            bypass.release()

    def _write(self, content: bytes) -> None:
        with self._lock:
            self._write_locked(content)

    def _write_locked(self, content: bytes) -> None:
        if self._broken or not self._outbound_open or self._connection is None:
            raise ChannelClosedError
        try:
            self._connection.sendall(content)
        except OSError:
            self._broken = True
            raise ChannelClosedError from None

    def _close_outbound(self) -> None:
        # nothing may get between CLOSE and the end: a node that has read CLOSE leaves
        with self._lock:
            with suppress(ChannelClosedError):
                self._write_locked(close())
            self._outbound_open = False

    def _read_all(self, connection: socket.socket, source: Channel, sink: Channel) -> None:
        with connection.makefile("rb", 2**16) as stream:
            try:
                while (message := self._read(stream.read, source)) is not None:
                    self._spoke = True
                    sink.push(message)
            except ChannelClosedError:
                self._registry.note(f"the output of {self.spec.name} is not read any more")
            except UnreadableError as error:
                known = error.identifier is None
                text = f"Received illegal message id from external peer: {error.identifier}"
                self._fail(str(error) if known else text)
            except (EOFError, OSError):
                self._fail(BROKEN)
                source.stop()
            finally:
                sink.release()

    def _read(self, read: Callable[[int], bytes], source: Channel) -> Message | None:
        """The next item; None at the node's CLOSE."""
        while True:
            message = read_message(read, NODE | {CLOSE, ERROR}, NODE_IMAGES)
            if message.identifier == ERROR:
                self._spoke = True
                self._remote_errors.append(message.text)
                self._close_outbound()
                source.stop()
            elif message.identifier == CLOSE:
                with self._lock:
                    self._goodbye = True
                return None
            else:
                return message

    def _judge(self, seconds: float) -> None:
        """What the client is told of a node that said goodbye.

        A node that leaves without having read its input resets the connection. Whether the server still reads what
        the node had sent before is a race there. Here it is always lost, unless that was a CLOSE alone.
        """
        if not self._goodbye or self._connection is None:
            return
        # a node that shuts its connection before it closes it ends it twice: only the second time may be a reset
        for ending in (select.POLLERR | select.POLLRDHUP, select.POLLERR):
            poll = select.poll()
            poll.register(self._connection, ending)
            poll.poll(1000 * seconds if self._spoke else 0)
        reset = self._connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0
        if (reset or self._broken) and self._spoke:
            self._fail(BROKEN)
        elif self._remote_errors:
            self._fail("Errors received: \n" + "".join(f"{text}\n" for text in self._remote_errors))


class ParallelNode:
    """Streams side by side: each gets every message, and their outputs are merged as they come."""

    def __init__(self, streams: Sequence["StreamNode"], registry: Registry) -> None:
        self._streams = streams
        self._registry = registry

    def run(self, source: Channel, sink: Channel) -> None:
        inputs = [self._registry.channel() for _ in self._streams]
        threads = [
            self._registry.thread("parallel stream", stream.run, given, sink.split())
            for stream, given in zip(self._streams, inputs, strict=True)
        ]
        try:
            for message in source:
                for given in inputs:
                    given.push(message)
        except ChannelClosedError:
            pass
        finally:
            source.stop()
            for given in inputs:
                given.release()
            for thread in threads:
                thread.join()
            sink.release()


class StreamNode:
    """Nodes one after the other, each in a thread of its own, with a channel between two."""

    def __init__(self, nodes: Sequence[Running], registry: Registry) -> None:
        self._nodes = nodes
        self._registry = registry

    def run(self, source: Channel, sink: Channel) -> None:
        if not self._nodes:
            _pass(source, sink)
            return
        between = [self._registry.channel() for _ in self._nodes[1:]]
        threads = [
            self._registry.thread("node", node.run, before, after)
            for node, before, after in zip(self._nodes, [source, *between], [*between, sink], strict=True)
        ]
        for thread in threads:
            thread.join()


def build(nodes: Sequence[Node], make: Callable[[External], ExternalNode], registry: Registry) -> StreamNode:
    """The running form of a stream."""

    def built(node: Node) -> Running:
        if isinstance(node, Parallel):
            return ParallelNode([build(stream, make, registry) for stream in node.streams], registry)
        return make(node)

    return StreamNode([built(node) for node in nodes], registry)


def _pass(source: Channel, sink: Channel) -> None:
    with suppress(ChannelClosedError):
        for message in source:
            sink.push(message)
    source.stop()
    sink.release()
