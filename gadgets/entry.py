"""The way in from Gadgetron, on the standard library alone, so that even a failing import is reported."""

import logging
import os
import struct
import sys
from typing import Any, NoReturn

_CLOSE = 4
_ERROR = 8

logger = logging.getLogger("voxelsigma")


def run(connection: Any, name: str) -> NoReturn:
    """Serve a connection with a gadget, then leave the process; on any failure the client gets an error.

    The package's connection always says goodbye as if all were well, and the server holds its client until this
    process has ended. So CLOSE is sent here, and the process ends at once: with exit code 0, or, behind an ERROR
    and with the input drained until its CLOSE (else both sides would wait for each other), with 1.

    Parameters
    ----------
    connection
        The gadgetron package's connection.
    name
        The gadget.
    """
    socket = connection.socket.socket
    source = None
    try:
        from voxelsigma.gadgets.external import Incoming
        from voxelsigma.gadgets.node import run_node
        from voxelsigma.gadgets.outgoing import Outgoing

        source = Incoming(socket.recv)
        raw = connection.raw_bytes
        send = Outgoing(socket.sendall)
        run_node(name, raw.config, raw.header, source, send)
        send.bytes(struct.pack("<H", _CLOSE))
    except BaseException as error:
        _fail(socket, source, name, error)
    _leave(0)


def _fail(socket: Any, source: Any, name: str, error: BaseException) -> NoReturn:
    """Report, drain and leave."""
    gone = _downstream_gone(error)
    if gone:
        # nobody reads our output any more, and who failed has said why: only the input must not block
        logger.error("%s: %s; what comes is discarded", name, error)
    else:
        logger.error("%s failed", name, exc_info=error)
    content = f"voxelsigma {name}: {_described(error, name)}".encode(errors="replace")
    try:
        if not gone:
            socket.sendall(struct.pack("<HQ", _ERROR, len(content)) + content + struct.pack("<H", _CLOSE))
    except OSError:
        logger.exception("%s: the error could not be sent", name)
    try:
        if source is not None:
            source.drain()
        else:
            _drain_unparsed(socket)
    except OSError:
        # the neighbour is gone: there is nothing left to drain
        pass
    finally:
        _leave(1)


def _described(error: BaseException, name: str) -> str:
    """What went wrong, and in which gadget of a chain where that is known."""
    described = getattr(sys.modules.get("voxelsigma.gadgets.node"), "described", None)
    return str(described(error, name)) if described is not None else str(error) or type(error).__name__


def _downstream_gone(error: BaseException) -> bool:
    """Whether an error says that nobody reads our output; other broken connections, to a storage say, are told."""
    module = sys.modules.get("voxelsigma.gadgets.outgoing")
    kind = getattr(module, "DownstreamError", None)
    return kind is not None and isinstance(error, kind)


def _leave(code: int) -> NoReturn:
    try:
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    finally:
        os._exit(code)


def _drain_unparsed(socket: Any, patience_seconds: float = 2.0) -> None:
    """Read on without a parser, until the stream ends or falls silent behind what looks like CLOSE."""
    tail = b""
    socket.settimeout(patience_seconds)
    while True:
        try:
            part = socket.recv(2**20)
        except TimeoutError:
            if tail == struct.pack("<H", _CLOSE):
                return
            continue
        if not part:
            return
        tail = (tail + part)[-2:]
