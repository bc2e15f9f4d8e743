"""A pipeline between two pipes: the ISMRMRD stream on standard input, images on standard output."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

from voxelsigma.formats.header import parse_header
from voxelsigma.gadgets.context import Context
from voxelsigma.gadgets.external import Incoming, items_of
from voxelsigma.gadgets.outgoing import Outgoing
from voxelsigma.gadgets.wire import Close, Configuration, FileName, ScanHeaderText, close_message, message
from voxelsigma.hosts.pipeline import load_pipeline
from voxelsigma.hosts.server import CLIENT_TYPES, run_pipeline

logger = logging.getLogger("voxelsigma.stream")


def stream(pipeline: str, source: int, sink: int, *, noise: Path | None = None) -> int:
    """Run what comes from one file descriptor through a pipeline, into another.

    The header goes out first, since ismrmrd_stream_to_hdf5 wants it. CLOSE goes out only where all went well: a
    reader then knows a stream that broke off.

    Parameters
    ----------
    pipeline
        Path of a Gadgetron XML file, or the name of a shipped one.
    source, sink
        File descriptors.
    noise
        A noise scan or covariance, instead of the stream's own.

    Returns
    -------
        Number of images written.

    Raises
    ------
    EOFError, ValueError, OSError, RuntimeError
        With one line that says what is wrong.
    """
    parsed = load_pipeline(pipeline)
    incoming = Incoming(_receiver(source))
    send = Outgoing(lambda content: _write_all(sink, content), CLIENT_TYPES)
    header = _header(incoming)
    context = Context(header=parse_header(header.xml), noise=noise)
    send.bytes(message(header))
    images = run_pipeline(parsed, context, items_of(incoming.messages()), send)
    send.bytes(close_message())
    return images


def _header(incoming: Incoming) -> ScanHeaderText:
    """The header, behind whatever configuration the stream brings, which does not count here."""
    while True:
        found = incoming.next()
        if isinstance(found, ScanHeaderText):
            return found
        if isinstance(found, FileName | Configuration):
            logger.warning("the stream brings a configuration of its own, which is ignored")
        elif not isinstance(found, str):
            named = "CLOSE" if isinstance(found, Close) else type(found).__name__
            raise ValueError(f"stream: expected the ISMRMRD header first, got {named}")


def _receiver(source: int) -> Callable[[int], bytes]:
    """Reads from a duplicate of the descriptor, so that a late read cannot meet another file under its number."""
    own = os.dup(source)

    def receive(count: int) -> bytes:
        try:
            part = os.read(own, count)
        except OSError:
            os.close(own)
            raise
        if not part:
            os.close(own)
        return part

    return receive


def _write_all(sink: int, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(sink, rest) :]
