"""Exact reads from a source of bytes: sizes are checked before memory is taken, the end of the source is an error."""

import math
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import numpy.typing as npt

MAX_TEXT: Final = 64 * 2**20
MAX_METADATA: Final = 16 * 2**20
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
            If `count` is beyond what any message can hold, or than there is memory for.
        EOFError
            If the source ends first; the text has the byte counts.
        TimeoutError
            If the source gives up waiting; the text has the byte counts.
        """
        bounded(count, what, MAX_ARRAY)
        if count <= len(self._buffer):
            return bytes(self._take(count))
        content = bytearray()
        with memory_for(what, count):
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
        with memory_for(what, size):
            found = np.empty(shape, dtype=kind)
        self.fill(found, what)
        return found

    def fill(self, found: npt.NDArray[Any], what: str) -> None:
        """Fill a contiguous array in C order, as bytes come.

        Raises
        ------
        EOFError, TimeoutError
            As for `read`.
        """
        size = found.nbytes
        if not size:
            return
        target = found.reshape(-1).view(np.uint8)
        done = 0
        while done < size:
            part = self._some(size - done, size, done, what)
            target[done : done + len(part)] = np.frombuffer(part, np.uint8)
            done += len(part)

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


@contextmanager
def memory_for(what: str, size: int) -> Iterator[None]:
    """Turn a lack of memory into an error that says what it was wanted for.

    Raises
    ------
    ValueError
        Where MemoryError is raised inside.
    """
    try:
        yield
    except MemoryError:
        raise ValueError(f"wire: no memory for {what} of {size} bytes") from None


def bounded(count: int, what: str, limit: int = MAX_ITEM, unit: str = "bytes") -> int:
    """A number of bytes, or of something else, that is plausible.

    Raises
    ------
    ValueError
        If it is not.
    """
    if not 0 <= count <= limit:
        raise ValueError(f"wire: {what} claims {count} {unit}; at most {limit} are accepted")
    return count


def sized_text(reader: Reader, length_layout: str, what: str, limit: int = MAX_TEXT) -> bytes:
    """A text behind its length."""
    (length,) = reader.unpack(length_layout, f"the length of {what}")
    return reader.read(bounded(length, what, limit), what)


def dimensions(reader: Reader, what: str) -> tuple[int, ...]:
    """The sizes in front of an array, the fastest axis first.

    Raises
    ------
    ValueError
        If their number, or the elements they make, are more than a message can hold.
    """
    (count,) = reader.unpack("<Q", f"the dimensions of {what}")
    bounded(count, what, MAX_DIMENSIONS, "dimensions")
    sizes = reader.unpack(f"<{count}Q", f"the dimensions of {what}")
    # an empty axis beside a huge one makes no bytes, and yet is more than an array can have
    if math.prod(max(size, 1) for size in sizes) > MAX_ARRAY:
        raise ValueError(f"wire: {what} claims shape {sizes}; at most {MAX_ARRAY} elements are accepted")
    return sizes


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
    """An array behind its sizes, as bytes.

    Raises
    ------
    ValueError
        If it has no axes: the one value in it would not be read.
    """
    if not found.shape:
        raise ValueError("wire: an array without axes cannot be sent: it is taken for an empty one")
    sizes = found.shape[::-1]
    return struct.pack(f"<Q{len(sizes)}Q", len(sizes), *sizes) + np.ascontiguousarray(found).tobytes()
