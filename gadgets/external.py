"""A gadget behind a connection: messages in, messages out."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np

from voxelsigma.formats.readouts import ReadoutBlock, joined
from voxelsigma.gadgets.inbox import MEMORY, Inbox
from voxelsigma.gadgets.items import Item
from voxelsigma.gadgets.wire import (
    Close,
    Configuration,
    Failure,
    FileName,
    Query,
    Reader,
    Response,
    ScanHeaderText,
    read_message,
)
from voxelsigma.gadgets.wire_items import FromWire
from voxelsigma.gadgets.wire_readouts import CUTTING

logger = logging.getLogger("voxelsigma.wire")

BLOCK_SECONDS: Final = 0.05
BLOCK_READOUTS: Final = 256
BLOCK_BYTES: Final = 2**19
SILENCE_SECONDS: Final = 2.0

_CLOSE_TAIL: Final = b"\4\0"


class Incoming:
    """Messages of a connection, which is read by a thread of its own until it ends.

    Parameters
    ----------
    receive
        Returns up to n bytes, none at the end.
    idle_seconds
        How long may pass between messages; None for ever.
    stall_seconds
        How long a message may stand still; None for ever.
    memory
        Bytes kept in memory; what is beyond goes to a temporary file.
    """

    def __init__(
        self,
        receive: Callable[[int], bytes],
        *,
        idle_seconds: float | None = None,
        stall_seconds: float | None = None,
        memory: int = MEMORY,
    ) -> None:
        self._inbox = Inbox(receive, memory=memory, patience=stall_seconds)
        self._reader = Reader(self._inbox.get)
        self._idle_seconds = idle_seconds
        self._stall_seconds = stall_seconds
        self.received = 0
        self._broken = self._stalled = False
        self.closed = False

    def next(self, seconds: float | None = None) -> Any:
        """The next message whatever it is; None if none begins within some seconds.

        Raises
        ------
        EOFError, ValueError, OSError
            If the stream ends or breaks before CLOSE.
        """
        if not self._reader.buffered and not self._inbox.wait(seconds):
            return None
        try:
            found = read_message(self._reader)
        except EOFError as error:
            self._broken = True
            raise EOFError(f"{error}, {self.received} messages after its beginning and without CLOSE") from None
        except TimeoutError:
            self._broken = self._stalled = True
            raise
        except BaseException:
            self._broken = True
            raise
        self.received += len(found) if isinstance(found, ReadoutBlock) else 1
        self.closed = isinstance(found, Close)
        return found

    def messages(self, first: Any = None) -> Iterator[Any]:
        """Messages until CLOSE; None where none came for a while.

        Parameters
        ----------
        first
            A message that was taken already.

        Raises
        ------
        EOFError, ValueError, OSError
            If the stream ends or breaks before CLOSE, or an ERROR comes.
        TimeoutError
            If nothing comes for too long.
        """
        since = time.monotonic()
        found = first if first is not None else self.next(BLOCK_SECONDS)
        while not isinstance(found, Close):
            if isinstance(found, Failure):
                raise ValueError(found.text)
            if found is not None:
                since = time.monotonic()
            elif self._idle_seconds is not None and time.monotonic() - since > self._idle_seconds:
                raise TimeoutError(f"nothing came for {self._idle_seconds:g} s, and no CLOSE")
            if isinstance(found, FileName | Configuration | ScanHeaderText | Query | Response):
                self._broken = True
                raise ValueError(f"wire: a {type(found).__name__} message in the middle of a scan")
            if isinstance(found, str):
                logger.info("text on the stream: %s", found[:1000])
            else:
                yield found
            found = self.next(BLOCK_SECONDS)

    def drain(self) -> None:
        """Read on until CLOSE or the end.

        Where the stream cannot be parsed or kept, until it falls silent behind what looks like CLOSE. Whoever has
        been silent for longer than is allowed is not waited for.
        """
        # what is wrong with the rest is of no interest any more
        with contextlib.suppress(EOFError, OSError, ValueError):
            while not (self.closed or self._broken):
                if self.next(self._idle_seconds) is None:
                    return
        if not (self.closed or self._stalled):
            self._inbox.until_silent(SILENCE_SECONDS, _CLOSE_TAIL, self._stall_seconds)

    def close(self) -> None:
        """Give back what is held; call it when the connection is shut."""
        self._inbox.close()

    def join(self, seconds: float) -> bool:
        """Wait for the other side to shut the connection; whether it did."""
        self._inbox.discard()
        return self._inbox.join(seconds)


def items_of(messages: Iterator[Any]) -> Iterator[Item]:
    """Items of a stream of messages; readouts in blocks, cut at flags, at a change of shape, and after 50 ms."""
    convert = FromWire()
    waiting: list[ReadoutBlock] = []
    since = 0.0
    for found in messages:
        if isinstance(found, ReadoutBlock):
            for block, cut in _cut(found):
                if waiting and _shape(block) != _shape(waiting[0]):
                    yield joined(waiting)
                    waiting = []
                since = since if waiting else time.monotonic()
                waiting.append(block)
                full = _large(waiting) or time.monotonic() - since >= BLOCK_SECONDS
                if cut or full:
                    yield joined(waiting)
                    waiting = []
            continue
        if waiting:
            yield joined(waiting)
            waiting = []
        if found is not None:
            yield from convert(found)
    if waiting:
        yield joined(waiting)
    convert.end()


def _large(blocks: list[ReadoutBlock]) -> bool:
    """Whether joining more would cost more than it saves."""
    return sum(map(len, blocks)) >= BLOCK_READOUTS or sum(block.samples.nbytes for block in blocks) >= BLOCK_BYTES


def _cut(block: ReadoutBlock) -> Iterator[tuple[ReadoutBlock, bool]]:
    """Parts of a block that end behind flagged readouts, and whether they do."""
    flagged = np.flatnonzero((block.headers["flags"] & CUTTING) != 0)
    start = 0
    for index in flagged.tolist():
        yield block.select(slice(start, index + 1)), True
        start = index + 1
    if start < len(block):
        yield block.select(slice(start, len(block))), False


def _shape(block: ReadoutBlock) -> tuple[int, ...]:
    return (*block.samples.shape[1:], block.trajectory.shape[2])
