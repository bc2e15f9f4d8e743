"""Exact reads from a source of bytes: sizes are checked before memory is taken, the end of the source is an error."""

import math
import struct
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

MAX_TEXT: Final = 64 * 2**20
MAX_ITEM: Final = 4 * 2**30
MAX_ARRAY: Final = 16 * 2**30
MAX_DIMENSIONS: Final = 10
CHUNK: Final = 2**20


class Reader:
    """Exact reads from a byte source.

    It may hold bytes beyond what was asked for: from the first read on the source is the reader's alone.

    Parameters
    ----------
    receive
        Returns up to n bytes, none at the end of the source.
    """

    def __init__(self, receive: Callable[[int], bytes]) -> None:
        self._receive = receive
        self._buffer = memoryview(b"")
        self.total = 0

    @property
    def buffered(self) -> memoryview:
        """What was received and not read yet."""
        return self._buffer

    def read(self, count: int, what: str = "a message") -> bytes:
        """Exactly `count` bytes.

        Raises
        ------
        ValueError
            If `count` is beyond what any message can hold.
        EOFError
            If the source ends first; the text has the byte counts.
        TimeoutError
            If the source gives up waiting; the text has the byte counts.
        """
        bounded(count, what, MAX_ARRAY)
        if count <= len(self._buffer):
            return bytes(self._take(count))
        content = bytearray()
        while (missing := count - len(content)) > 0:
            content += self._some(missing, count, len(content), what)
        return bytes(content)

    def unpack(self, layout: str, what: str) -> tuple[Any, ...]:
        """Values in the layout of `struct`."""
        return struct.unpack(layout, self.read(struct.calcsize(layout), what))

    def array(self, shape: tuple[int, ...], dtype: npt.DTypeLike, what: str) -> npt.NDArray[Any]:
        """An array in C order with memory of its own, filled as bytes come.

        Raises
        ------
        ValueError
            If it is larger than any message can hold, or than there is memory for.
        EOFError, TimeoutError
            As for `read`.
        """
        kind = np.dtype(dtype)
        size = math.prod(shape) * kind.itemsize
        bounded(size, what, MAX_ARRAY)
        try:
            found = np.empty(shape, dtype=kind)
        except MemoryError:
            raise ValueError(f"wire: no memory for {what} of shape {shape}, {size} bytes") from None
        if not size:
            return found
        target = found.reshape(-1).view(np.uint8)
        done = 0
        while done < size:
            part = self._some(size - done, size, done, what)
            target[done : done + len(part)] = np.frombuffer(part, np.uint8)
            done += len(part)
        return found

    def ready(self, count: int, what: str) -> memoryview:
        """At least `count` bytes, which stay unread, and whatever else was received; for small counts."""
        while len(self._buffer) < count:
            part = self._more(count, len(self._buffer), what)
            self._buffer = memoryview(bytes(self._buffer) + part)
        return self._buffer

    def skip(self, count: int) -> None:
        """Drop bytes that are buffered."""
        self._take(count)

    def _take(self, count: int) -> memoryview:
        part, self._buffer = self._buffer[:count], self._buffer[count:]
        self.total += count
        return part

    def _some(self, wanted: int, count: int, done: int, what: str) -> memoryview:
        """Some of the bytes that are missing."""
        if not self._buffer:
            self._buffer = memoryview(self._more(count, done, what))
        return self._take(min(wanted, len(self._buffer)))

    def _more(self, count: int, done: int, what: str) -> bytes:
        """The next bytes of the source."""
        try:
            found = self._receive(CHUNK)
        except TimeoutError as error:
            raise TimeoutError(f"{error}, after {done} of {count} bytes of {what}") from None
        if not found:
            raise EOFError(f"stream ends after {done} of {count} bytes of {what}")
        return found


def bounded(count: int, what: str, limit: int = MAX_ITEM) -> int:
    """A number of bytes that is plausible.

    Raises
    ------
    ValueError
        If it is not.
    """
    if not 0 <= count <= limit:
        raise ValueError(f"wire: {what} claims {count} bytes; at most {limit} are accepted")
    return count


def sized_text(reader: Reader, length_layout: str, what: str, limit: int = MAX_TEXT) -> bytes:
    """A text behind its length."""
    (length,) = reader.unpack(length_layout, f"the length of {what}")
    return reader.read(bounded(length, what, limit), what)


def dimensions(reader: Reader, what: str) -> tuple[int, ...]:
    """The sizes in front of an array, the fastest axis first; nothing is taken on trust but their number."""
    (count,) = reader.unpack("<Q", f"the dimensions of {what}")
    if count > MAX_DIMENSIONS:
        raise ValueError(f"wire: {what} claims {count} dimensions; at most {MAX_DIMENSIONS} are accepted")
    return reader.unpack(f"<{count}Q", f"the dimensions of {what}")


def array(reader: Reader, dtype: npt.DTypeLike, what: str, axes: int | None = None) -> npt.NDArray[Any]:
    """An array behind its sizes, in C order: its axes are the message's, last one first.

    An array of no dimensions at all is the server's way to send an empty one.

    Raises
    ------
    ValueError
        If it has another number of axes than expected, or claims more bytes than a message can hold.
    """
    sizes = dimensions(reader, what)
    if not sizes and axes != 0:
        return np.empty((0,) * (1 if axes is None else axes), dtype=dtype)
    if axes is not None and len(sizes) != axes:
        raise ValueError(f"wire: {what} has {len(sizes)} dimensions; expected {axes}")
    return reader.array(sizes[::-1], dtype, what)


def array_bytes(found: npt.NDArray[Any]) -> bytes:
    """An array behind its sizes, as bytes."""
    sizes = found.shape[::-1]
    return struct.pack(f"<Q{len(sizes)}Q", len(sizes), *sizes) + np.ascontiguousarray(found).tobytes()
