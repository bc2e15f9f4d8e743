"""The embedded server: MRD clients connect, name a pipeline, send a scan and get its images, as from Gadgetron."""

import contextlib
import logging
import socket
import struct
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ismrmrd import Image
from ismrmrd.constants import ACQ_IS_NOISE_MEASUREMENT

from voxelsigma.formats.header import parse_header
from voxelsigma.gadgets.context import Context
from voxelsigma.gadgets.external import Incoming, items_of
from voxelsigma.gadgets.items import ReadoutBlock
from voxelsigma.gadgets.outgoing import GADGETRON_TYPES, DownstreamError, Outgoing
from voxelsigma.gadgets.turns import Turns
from voxelsigma.gadgets.wire import (
    TEXT,
    Close,
    Configuration,
    FileName,
    Query,
    ScanHeaderText,
    close_message,
    text_message,
)
from voxelsigma.hosts.embedded import connect
from voxelsigma.hosts.health import Tally
from voxelsigma.hosts.pipeline import Pipeline
from voxelsigma.hosts.requests import (
    is_noise_query,
    named_pipeline,
    parameters_of,
    sent_pipeline,
    with_parameters,
)
from voxelsigma.hosts.worker import answer_queries, give_back_memory, greeting, said, says_anything

logger = logging.getLogger("voxelsigma.server")

CLIENT_TYPES: Final = (*GADGETRON_TYPES, "int16", "int32")
"""Voxel types that MRD clients read."""

STALL_SECONDS: Final = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What clients may do.

    Parameters
    ----------
    folders
        Where pipelines are looked for, before those shipped.
    allow_xml
        Whether a client may send a pipeline's XML.
    idle_seconds
        How long a client may be silent between messages.
    noise
        A noise scan or covariance for all scans; None for each scan's own.
    """

    folders: tuple[Path, ...] = ()
    allow_xml: bool = False
    idle_seconds: float = 600.0
    noise: Path | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """A scan that a client announced: its pipeline, its header, and the first of its items."""

    pipeline: Pipeline
    header: bytes
    first: Any


@dataclass(slots=True)
class Server:
    """Serves one scan a connection, several at a time; only the work on the device takes turns."""

    policy: Policy
    tally: Tally = field(default_factory=lambda: Tally("server"))
    turns: Turns = field(default_factory=Turns)

    def handle(self, connection: socket.socket, peer: str) -> None:
        """Serve a connection to its end; whatever fails is told to the client as TEXT, then CLOSE."""
        if not says_anything(connection, peer):
            return
        _limit_sending(connection, self.policy.idle_seconds)
        source = Incoming(
            connection.recv,
            idle_seconds=self.policy.idle_seconds,
            stall_seconds=min(STALL_SECONDS, self.policy.idle_seconds),
        )
        try:
            first = greeting(source)
            if isinstance(first, Query | Close):
                answer_queries(connection, source, first, self.tally)
            elif isinstance(first, Configuration) and is_noise_query(first.xml):
                logger.info("%s asks for stored noise: there is none here", peer)
                connection.sendall(close_message())
                source.drain()
            else:
                with self.tally.scan():
                    self._scan(connection, source, first, peer)
        except DownstreamError as error:
            logger.error("%s: %s; its scan is given up", peer, error)
        except Exception as error:
            logger.error("%s: %s", peer, error, exc_info=error)
            with contextlib.suppress(OSError):
                text = said(f"voxelsigma: {error or type(error).__name__}")
                connection.sendall(text_message(TEXT, text.encode()))
                connection.sendall(close_message())
                # a client that is still sending must not lose the text to a reset connection
                if not isinstance(error, TimeoutError):
                    source.drain()
        finally:
            source.close()
            give_back_memory()

    def _scan(self, connection: socket.socket, source: Incoming, first: Any, peer: str) -> None:
        request = self._request(source, first)
        logger.info("%s: %s", peer, request.pipeline.source)
        context = Context(header=parse_header(request.header), turns=self.turns, noise=self.policy.noise)
        send = Outgoing(_sender(connection, self.policy.idle_seconds), CLIENT_TYPES)
        run_pipeline(request.pipeline, context, items_of(source.messages(request.first)), send)
        send.bytes(close_message())

    def _request(self, source: Incoming, first: Any) -> Request:
        """What comes before the items: a pipeline, a header, and texts."""
        parameters: dict[str, Any] = {}
        pipeline = self._pipeline(first)
        found = greeting(source)
        while isinstance(found, str):
            parameters |= parameters_of(found)
            found = greeting(source)
        if not isinstance(found, ScanHeaderText):
            raise ValueError(f"expected the ISMRMRD header behind the pipeline, got {type(found).__name__}")
        item: Any = self._next(source)
        while isinstance(item, str):
            parameters |= parameters_of(item)
            item = self._next(source)
        if isinstance(parameters.get("config"), str):
            pipeline = named_pipeline(parameters["config"], self.policy.folders)
        return Request(with_parameters(pipeline, parameters), found.xml, item)

    def _next(self, source: Incoming) -> Any:
        found = source.next(self.policy.idle_seconds)
        if found is None:
            raise TimeoutError(f"nothing came for {self.policy.idle_seconds:g} s behind the header")
        return found

    def _pipeline(self, asked: Any) -> Pipeline:
        if isinstance(asked, FileName):
            return named_pipeline(asked.name, self.policy.folders)
        if not isinstance(asked, Configuration):
            raise ValueError(f"expected the name of a pipeline first, got {type(asked).__name__}")
        text = asked.xml.removeprefix(BOM_UTF8).strip(b"\0 \r\n\t")
        if not text.startswith(b"<"):
            # some clients send the name where others send the XML
            return named_pipeline(text.decode(errors="replace"), self.policy.folders)
        if not self.policy.allow_xml:
            raise ValueError(
                "this server takes no pipelines from clients: name one of its own, or start it with --allow-xml"
            )
        return sent_pipeline(text)


def run_pipeline(pipeline: Pipeline, context: Context, items: Iterator[Any], send: Outgoing) -> int:
    """Items through a pipeline, images out.

    Returns
    -------
        How many images were sent.

    Raises
    ------
    ValueError
        If no image came out, of anything but a noise scan, which is kept for other measurements.
    """
    images, brought = 0, set[str]()
    dropped: dict[str, int] = {}
    with closing(connect(pipeline, context, _watched(items, brought))) as found:
        for item in found:
            if isinstance(item, Image):
                send(item)
                images += 1
                continue
            dropped[type(item).__name__] = dropped.get(type(item).__name__, 0) + 1
    if dropped:
        logger.info("not images, not sent: %s", ", ".join(f"{count} {name}" for name, count in dropped.items()))
    if not images and brought != {"noise"}:
        raise ValueError(f"no image came out of {pipeline.source}")
    return images


def _watched(items: Iterator[Any], brought: set[str]) -> Iterator[Any]:
    """The same items; notes which readouts were among them, `noise` or `other`."""
    for item in items:
        if isinstance(item, ReadoutBlock):
            noise = item.flagged(ACQ_IS_NOISE_MEASUREMENT)
            brought |= {name for name, found in (("noise", noise), ("other", ~noise)) if found.any()}
        yield item


def _limit_sending(connection: socket.socket, seconds: float) -> None:
    """Let a send wait for a client that takes nothing; reading has limits of its own, so the socket's will not do."""
    whole, part = divmod(seconds, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", int(whole), int(part * 1e6)))


def _sender(connection: socket.socket, seconds: float) -> Callable[[bytes], None]:
    """Sends all of some bytes."""

    def send(content: bytes) -> None:
        try:
            connection.sendall(content)
        except BlockingIOError:
            raise ConnectionError(f"it took nothing for {seconds:g} s") from None

    return send
