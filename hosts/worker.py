"""The resident worker: the other end of Gadgetron's `<connect>`, with models loaded and warm."""

import contextlib
import logging
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from voxelsigma.formats.header import parse_header
from voxelsigma.gadgets.chaining import chain, specs_of
from voxelsigma.gadgets.context import Context
from voxelsigma.gadgets.external import Incoming
from voxelsigma.gadgets.node import converse, parse_configuration
from voxelsigma.gadgets.outgoing import DownstreamError, Outgoing
from voxelsigma.gadgets.turns import Turns
from voxelsigma.gadgets.wire import (
    Close,
    Configuration,
    Query,
    ScanHeaderText,
    close_message,
    error_message,
    message,
)
from voxelsigma.hosts.health import Tally

logger = logging.getLogger("voxelsigma.worker")

GREETING_SECONDS: Final = 30.0
"""How long a connection may take to say what it wants; Gadgetron says it at once."""


@dataclass(slots=True)
class Worker:
    """Serves one node of one scan a connection; the configuration alone says which gadgets it is.

    Several connections are served at a time; only the work on the device takes turns, in the order of asking.
    """

    tally: Tally = field(default_factory=lambda: Tally("worker"))
    turns: Turns = field(default_factory=Turns)

    def handle(self, connection: socket.socket, peer: str) -> None:
        """Serve a connection to its end; whatever fails is reported on it as ERROR, then CLOSE."""
        source = Incoming(connection.recv)
        try:
            first = first_word(source, peer)
            if first is None:
                return
            if isinstance(first, Query | Close):
                answer_queries(connection, source, first, self.tally)
                return
            with self.tally.scan():
                self._node(connection, source, first, peer)
        except DownstreamError as error:
            logger.error("%s: %s; what comes is discarded", peer, error)
            source.drain()
        except Exception as error:
            logger.error("%s: %s", peer, error, exc_info=error)
            with contextlib.suppress(OSError):
                connection.sendall(error_message(f"voxelsigma worker: {error or type(error).__name__}"))
                connection.sendall(close_message())
                source.drain()
        finally:
            source.close()

    def _node(self, connection: socket.socket, source: Incoming, first: object, peer: str) -> None:
        if not isinstance(first, Configuration):
            raise ValueError(f"expected a configuration first, got {type(first).__name__}")
        header = greeting(source)
        if not isinstance(header, ScanHeaderText):
            raise ValueError(f"expected a header behind the configuration, got {type(header).__name__}")
        specs = specs_of(parse_configuration(first.xml))
        logger.info("%s: %s", peer, " ".join(spec.name for spec in specs))
        context = Context(header=parse_header(header.xml), turns=self.turns)
        send = Outgoing(connection.sendall)
        converse(chain(specs, context), source, send)
        send.bytes(close_message())


def first_word(source: Incoming, peer: str) -> object:
    """What a connection says first; None if it leaves without a word, as port scanners and health checks do."""
    try:
        return greeting(source)
    except (EOFError, OSError) as error:
        if source.received:
            raise
        logger.info("%s left without a word (%s)", peer, error)
        return None


def greeting(source: Incoming) -> object:
    """A message that must come without delay."""
    found = source.next(GREETING_SECONDS)
    if found is None:
        raise TimeoutError(f"nothing came for {GREETING_SECONDS:g} s")
    return found


def answer_queries(connection: socket.socket, source: Incoming, first: object, tally: Tally) -> None:
    """Answer queries until CLOSE; who does not wait for the answer does not matter."""
    found = first
    with contextlib.suppress(ConnectionError, EOFError):
        while isinstance(found, Query):
            connection.sendall(message(tally.answer(found)))
            found = greeting(source)
        if not isinstance(found, Close):
            raise ValueError(f"expected queries and CLOSE, got {type(found).__name__}")
        connection.sendall(close_message())


def preload(pipelines: Sequence[str]) -> tuple[str, ...]:
    """Load and warm the models of some pipelines.

    Returns
    -------
        The models' names.
    """
    from voxelsigma.gadgets.warming import warm
    from voxelsigma.hosts.pipeline import gadgets_of, load_pipeline

    return warm([spec for name in pipelines for spec in gadgets_of(load_pipeline(name))])
