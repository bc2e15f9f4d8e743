"""A file for the HDF5 library, which cannot bear a write that fails."""

import os
from pathlib import Path
from typing import Any


class SteadyFile:
    """A new file whose writes succeed even where the disk is full.

    HDF5 never lets go of a file that it could not write: closing it fails, each object of it complains on stderr, and
    the process crashes at its end. So bytes that the disk refuses are kept in memory, HDF5 closes in peace, and
    `failure` tells; whoever writes should look at it after every item, and stop.

    It has the methods that h5py's driver for Python file objects calls, and no others.

    Parameters
    ----------
    path
        The file; it must not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.failure: OSError | None = None
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._position = 0
        self._size = 0
        self._kept: list[tuple[int, bytes]] = []

    def close(self) -> None:
        """Close the file; HDF5 must have closed it before."""
        try:
            os.close(self._descriptor)
        except OSError as error:
            # network file systems tell of a full disk as late as here
            self.failure = self.failure or error

    def write(self, content: Any) -> int:
        """Write all of it at the current position, or keep it."""
        view = memoryview(content).cast("B")
        start, done = self._position, 0
        try:
            while done < len(view) and self.failure is None:
                done += os.pwrite(self._descriptor, view[done:], start + done)
        except OSError as error:
            self.failure = error
        if done < len(view):
            self._kept.append((start + done, bytes(view[done:])))
        self._position = start + len(view)
        self._size = max(self._size, self._position)
        return len(view)

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer from the current position; what was never written is zero."""
        view = memoryview(buffer).cast("B")
        start, stop = self._position, self._position + len(view)
        found = os.pread(self._descriptor, len(view), start)
        view[:] = found + bytes(len(view) - len(found))
        for offset, content in self._kept:
            first, last = max(start, offset), min(stop, offset + len(content))
            if first < last:
                view[first - start : last - start] = content[first - offset : last - offset]
        self._position = stop
        return len(view)

    def read(self, count: int) -> bytes:
        """The next `count` bytes."""
        content = bytearray(count)
        self.readinto(content)
        return bytes(content)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move the position."""
        origins = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}
        self._position = origins[whence] + offset
        return self._position

    def tell(self) -> int:
        """The position."""
        return self._position

    def truncate(self, size: int) -> int:
        """Set the length, as far as the disk lets it."""
        try:
            if self.failure is None:
                os.ftruncate(self._descriptor, size)
        except OSError as error:
            self.failure = error
        self._size = size
        return size

    def flush(self) -> None:
        """Nothing is buffered."""
