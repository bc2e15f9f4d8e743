"""The way in from Gadgetron, on the standard library alone, so that even a failing import is reported."""

import logging
import os
import struct
import sys
from typing import Any, NoReturn

_CLOSE = 4
_ERROR = 8


def run(connection: Any, name: str) -> None:
    """Serve a connection with a gadget; on any failure the client gets an error and the process ends.

    The package's connection always says goodbye as if all were well. So a failure sends ERROR and CLOSE
    here, drains the input until its CLOSE (else both sides would wait for each other), and leaves
    the process at once with exit code 1.

    Parameters
    ----------
    connection
        The gadgetron package's connection.
    name
        The gadget.
    """
    source = None
    try:
        from voxelsigma.gadgets.external import Incoming, serve

        source = Incoming(connection.socket.socket)
        serve(connection, source, name)
    except BaseException as error:
        logging.getLogger("voxelsigma").exception("%s failed", name)
        _fail(connection.socket.socket, source, f"voxelsigma {name}: {error or type(error).__name__}")


def _fail(socket: Any, source: Any, text: str) -> NoReturn:
    """Report, drain and leave."""
    content = text.encode()
    try:
        socket.sendall(struct.pack("<HQ", _ERROR, len(content)) + content + struct.pack("<H", _CLOSE))
        if source is not None:
            source.drain()
        else:
            _drain_unparsed(socket)
    except OSError:
        # the neighbour is gone: there is nobody left to tell
        pass
    finally:
        sys.stderr.flush()
        os._exit(1)


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
