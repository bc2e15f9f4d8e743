"""The double's server: clients of the MRD protocol, each with a scan of its own."""

import socket
import struct
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from tests.gadgetron_double.framing import (
    CLOSE,
    CONFIG,
    FILENAME,
    HEADER,
    NODE,
    QUERY,
    RESPONSE,
    TEXT,
    Message,
    UnreadableError,
    close,
    messages_of,
    read_message,
    response,
    text_message,
)
from tests.gadgetron_double.node import ExternalNode, Options, build
from tests.gadgetron_double.pipeline import Connect, External, Pipeline, parse_pipeline
from tests.gadgetron_double.registry import Channel, ChannelClosedError, Registry

ANSWERS: Final = {b"gadgetron::version": b"4.7.2", b"gadgetron::info::python": b"1"}
LINGER_SECONDS: Final = 10.0

Read = Callable[[int], bytes]


class Double:
    """A Gadgetron server that runs externals only.

    Parameters
    ----------
    pipeline
        The configuration of every client that names one, by whatever name. A client may send its own.
    log
        File to which children's stdout and stderr, and what the server itself says, are appended.
    front_end
        A recording (bytes or their file) in place of what the C++ gadgets at the start of a pipeline would make of
        the client's data: its items are sent on when the first of these arrives, and externals get its header.
    environment, options
        See `Options`.
    """

    def __init__(
        self,
        pipeline: str | bytes,
        environment: Mapping[str, str] | None = None,
        *,
        log: Path,
        front_end: bytes | Path | None = None,
        **options: Any,
    ) -> None:
        self.log = log
        self.options = Options(environment=environment or {}, **options)
        self.recorded = _recorded(front_end)
        self.pipeline = pipeline
        self.configuration(pipeline)
        self.registry = Registry(log)
        # texts that were sent to clients, of all scans
        self.errors: list[str] = []
        self.scans = 0
        self._server = self.registry.track(socket.create_server(("127.0.0.1", 0), backlog=64))
        self.port: int = self._server.getsockname()[1]

    def __enter__(self) -> "Double":
        self.registry.thread("listener", self._listen)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.registry.end()
        self.registry.close(self._server)
        found = self.registry.leftovers(10)
        if found and kind is None:
            raise AssertionError(f"the double leaves behind: {found}")

    def configuration(self, content: str | bytes) -> Pipeline:
        """A pipeline that this double can run."""
        found = parse_pipeline(content)
        if found.natives and self.recorded is None:
            raise ValueError(f"the double cannot run {found.natives}: give a recording as front_end")
        return found

    def leftovers(self, seconds: float = 5.0) -> list[str]:
        """What scans have left: running processes, open connections and threads, after some seconds of waiting."""
        return self.registry.leftovers(seconds, but=frozenset({"listener"}))

    @property
    def exit_codes(self) -> list[tuple[str, int | None]]:
        """Names and exit codes of all children, in the order in which they were started."""
        return [(name, process.poll()) for name, process in self.registry.processes]

    @property
    def pids(self) -> list[int]:
        """Process numbers of all children, in the order in which they were started."""
        return [process.pid for _, process in self.registry.processes]

    @property
    def log_text(self) -> str:
        """What children and server have logged so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def _listen(self) -> None:
        while not self.registry.ending.is_set():
            try:
                connection, _address = self._server.accept()
            except OSError:
                return
            self.scans += 1
            self.registry.thread(f"scan {self.scans}", Scan(self, self.registry.track(connection)).serve)


class Scan:
    """One client."""

    def __init__(self, double: Double, connection: socket.socket) -> None:
        self._double = double
        self._registry = double.registry
        self._connection = connection
        self._lock = threading.Lock()
        self._errors: list[str] = []

    def serve(self) -> None:
        """From the configuration to the CLOSE, which waits for every child; errors come just before it."""
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            with self._connection.makefile("rb", 2**16) as stream:
                try:
                    self._converse(stream.read)
                except (ValueError, UnreadableError) as error:
                    self._fail("Connection Main Thread", str(error))
                except (EOFError, OSError):
                    self._fail("Connection Main Thread", "basic_ios::clear: iostream error")
                except ChannelClosedError:
                    # the double is ending
                    pass
                self._say_goodbye()
        finally:
            self._registry.close(self._connection)

    def _converse(self, read: Read) -> None:
        opening = self._await(read, {FILENAME, CONFIG}, {HEADER: "Received ISMRMRD header before config file."})
        if opening is None:
            return
        given = self._double.pipeline if opening.identifier == FILENAME else opening.raw[6:]
        pipeline = self._double.configuration(given)
        second = "Received second config file. Only one allowed."
        header = self._await(read, {HEADER}, {FILENAME: second, CONFIG: second})
        if header is None:
            return
        recorded = self._double.recorded if pipeline.natives else None
        self._run(pipeline, recorded[0] if recorded else header.raw[6:], read, recorded and recorded[1])

    def _await(self, read: Read, wanted: set[int], refused: Mapping[int, str]) -> Message | None:
        """One of the messages wanted; None if the client leaves instead."""
        while True:
            message = _from_client(read, {*wanted, *refused, QUERY, CLOSE})
            if message.identifier in wanted:
                return message
            if message.identifier in refused:
                raise ValueError(refused[message.identifier])
            if message.identifier == CLOSE:
                return None
            self._send(_answer(message).raw)

    def _run(self, pipeline: Pipeline, header: bytes, read: Read, recorded: list[Message] | None) -> None:
        externals: list[ExternalNode] = []

        def make(spec: External) -> ExternalNode:
            externals.append(ExternalNode(spec, self._double.options, self._registry, self._fail_in_stream))
            return externals[-1]

        stream = build(pipeline.nodes, make, self._registry)
        self._open(externals, header)
        source, sink = self._registry.channel(), self._registry.channel()
        reader = self._registry.thread("client's input", self._receive, read, pipeline, source, recorded)
        writer = self._registry.thread("client's output", self._deliver, pipeline, sink)
        stream.run(source, sink)
        reader.join()
        writer.join()
        for node in externals:
            node.finish()

    def _open(self, externals: list[ExternalNode], header: bytes) -> None:
        """All connections at once, before any data."""
        options = self._double.options
        one_by_one = [node for node in externals if isinstance(node.spec.action, Connect) and options.connect_reversed]
        threads = [
            self._registry.thread(f"opening of {node.spec.name}", self._open_one, node, header)
            for node in externals
            if node not in one_by_one
        ]
        for node in reversed(one_by_one):
            self._open_one(node, header)
        for thread in threads:
            thread.join()

    def _open_one(self, node: ExternalNode, header: bytes) -> None:
        try:
            node.open(header)
        except ChannelClosedError:
            # the double is ending
            pass
        except OSError as error:
            self._fail_in_stream(f"{node.spec.name}: {error}")

    def _receive(self, read: Read, pipeline: Pipeline, source: Channel, recorded: list[Message] | None) -> None:
        """The client's messages; it is not read any more once nobody takes them."""
        try:
            while True:
                message = _from_client(read, {*pipeline.readers, TEXT, QUERY, CLOSE})
                if message.identifier == CLOSE:
                    return
                if message.identifier == QUERY:
                    message = _answer(message)
                elif recorded is not None:
                    for item in recorded:
                        source.push(item)
                    recorded.clear()
                    continue
                source.push(message)
        except ChannelClosedError:
            pass
        except (UnreadableError, ValueError) as error:
            self._fail_in_stream(str(error))
        except (EOFError, OSError):
            self._fail_in_stream("basic_ios::clear: iostream error")
        finally:
            source.release()

    def _deliver(self, pipeline: Pipeline, sink: Channel) -> None:
        """What has a writer goes to the client, the rest is lost without a word."""
        writers = pipeline.writers | {TEXT, RESPONSE}
        try:
            for message in sink:
                if message.identifier in writers:
                    self._send(message.raw)
        except OSError:
            self._registry.note("the client is gone")
        finally:
            sink.stop()

    def _send(self, content: bytes) -> None:
        with self._lock:
            self._connection.sendall(content)

    def _fail_in_stream(self, text: str) -> None:
        self._fail("Stream", text)

    def _fail(self, location: str, text: str) -> None:
        if self._registry.ending.is_set():
            return
        found = f"[{location}] ERROR: {text}"
        self._registry.note(found)
        self._errors.append(found)
        self._double.errors.append(found)

    def _say_goodbye(self) -> None:
        if self._registry.ending.is_set():
            # a server that was killed says nothing
            return
        with suppress(OSError):
            for text in self._errors:
                self._send(text_message(TEXT, text.encode()))
            self._send(close())
            # what the client still sends must not reset the connection before it has read this
            self._connection.shutdown(socket.SHUT_WR)
            self._connection.settimeout(LINGER_SECONDS)
            while self._connection.recv(2**16):
                pass


def _from_client(read: Read, known: set[int]) -> Message:
    try:
        return read_message(read, known)
    except UnreadableError as error:
        # no handler for it
        raise ValueError("map::at") from error


def _answer(query: Message) -> Message:
    (correlation,) = struct.unpack_from("<Q", query.raw, 10)
    text = query.raw[26:]
    if text not in ANSWERS:
        raise ValueError("map::at")
    return Message(RESPONSE, response(correlation, ANSWERS[text]))


def _recorded(front_end: bytes | Path | None) -> tuple[bytes, list[Message]] | None:
    """Header and items of a recording."""
    if front_end is None:
        return None
    found = list(messages_of(front_end.read_bytes() if isinstance(front_end, Path) else front_end))
    headers = [message.raw[6:] for message in found if message.identifier == HEADER]
    return headers[0], [message for message in found if message.identifier in NODE]
