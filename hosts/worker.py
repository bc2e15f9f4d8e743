"""The resident worker: the other end of Gadgetron's `<connect>`, with models loaded and warm."""

import contextlib
import ctypes
import linecache
import logging
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from voxelsigma.formats.header import parse_header
from voxelsigma.gadgets.chaining import chain, specs_of
from voxelsigma.gadgets.context import Context
from voxelsigma.gadgets.external import Incoming
from voxelsigma.gadgets.node import converse, described, parse_configuration
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


class SilentError(TimeoutError):
    """Who connected does not go on: waiting for the end of what it sends would be for ever."""


@dataclass(slots=True)
class Worker:
    """Serves one node of one scan a connection; the configuration alone says which gadgets it is.

    Several connections are served at a time; only the work on the device takes turns, in the order of asking.
    """

    tally: Tally = field(default_factory=lambda: Tally("worker"))
    turns: Turns = field(default_factory=Turns)

    def handle(self, connection: socket.socket, peer: str) -> None:
        """Serve a connection to its end; whatever fails is reported on it as ERROR, then CLOSE."""
        if not says_anything(connection, peer):
            return
        source = Incoming(connection.recv)
        try:
            first = greeting(source)
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
                connection.sendall(error_message(said(f"voxelsigma worker: {described(error, 'worker')}")))
                connection.sendall(close_message())
                if not isinstance(error, SilentError):
                    source.drain()
        finally:
            source.close()
            give_back_memory()

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


def give_back_memory() -> None:
    """Return to the system what a scan does not need any more.

    torch keeps the source of every graph that it traced, for tracebacks, and for ever; and the C library keeps for each
    thread that ever ran what it freed.
    """
    loader = getattr(sys.modules.get("torch.fx.graph_module"), "_loader", None)
    sources: dict[str, str] = getattr(loader, "eval_cache", {})
    for name in list(sources):
        sources.pop(name, None)
        linecache.cache.pop(name, None)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def says_anything(connection: socket.socket, peer: str) -> bool:
    """Whether a connection brings a first byte in time; port scanners and probes of load balancers bring none."""
    reason = "it hung up"
    try:
        connection.settimeout(GREETING_SECONDS)
        if connection.recv(1, socket.MSG_PEEK):
            connection.settimeout(None)
            return True
    except TimeoutError:
        reason = f"nothing came for {GREETING_SECONDS:g} s"
    except OSError as error:
        reason = error.strerror or str(error)
    logger.info("%s left without a word (%s)", peer, reason)
    return False


def said(text: str) -> str:
    """A text that has a message: what a client sent may hold halves of characters, which have no bytes."""
    return text.encode(errors="replace").decode()


def greeting(source: Incoming) -> object:
    """A message that must come without delay."""
    found = source.next(GREETING_SECONDS)
    if found is None:
        raise SilentError(f"nothing came for {GREETING_SECONDS:g} s")
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
