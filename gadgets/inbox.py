"""Bytes of a connection, taken off it by a thread of their own: nobody who sends ever waits for us."""

import tempfile
import threading
from collections import deque
from collections.abc import Callable
from typing import IO, Final

MEMORY: Final = 64 * 2**20
CHUNK: Final = 2**20

_OVERHEAD: Final = 64
"""Bytes that keeping a chunk takes besides its own; many small ones must not go uncounted."""


class Inbox:
    """What has arrived and was not asked for yet: in memory up to a bound, beyond it in a temporary file.

    A gadget that stops reading while it sends would hang the whole scan: the server goes on writing our input when a
    neighbour has failed, and never reads our output again. So the thread reads until the connection ends,
    whatever happens to the gadget.

    Parameters
    ----------
    receive
        Returns up to n bytes, none at the end.
    memory
        Bytes kept in memory.
    patience
        Seconds to wait in `get`; None waits for ever.
    """

    def __init__(self, receive: Callable[[int], bytes], *, memory: int = MEMORY, patience: float | None = None) -> None:
        self._receive = receive
        self._memory = memory
        self._patience = patience
        self._chunks: deque[bytes] = deque()
        self._held = 0
        self._file: IO[bytes] | None = None
        self._file_read = self._file_written = 0
        self._ended = self._discarding = self._over = False
        self._arrived = 0
        self._tail = b""
        self._failure: OSError | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="inbox", daemon=True)
        self._thread.start()

    def wait(self, seconds: float | None) -> bool:
        """Whether there is something to get, or the end has come, within some seconds."""
        with self._changed:
            return self._changed.wait_for(self._pending, seconds)

    def get(self, count: int) -> bytes:
        """Bytes in the order of their arrival, none at the end; at most `count` of those that went to the file.

        Raises
        ------
        OSError
            If the connection broke, or what arrived could not be kept.
        TimeoutError
            If nothing arrives for as long as patience lasts.
        """
        with self._changed:
            if not self._changed.wait_for(self._pending, self._patience):
                raise TimeoutError(f"nothing came for {self._patience:g} s")
            if self._chunks:
                chunk = self._chunks.popleft()
                self._held -= len(chunk) + _OVERHEAD
                return chunk
            if self._file is not None and self._file_read < self._file_written:
                return self._from_file(min(count, CHUNK))
            if self._failure is not None:
                raise self._failure
            return b""

    def discard(self) -> None:
        """Throw away what is here and what comes; the connection is still read to its end."""
        with self._changed:
            self._discarding = True
            self._forget()

    def until_silent(self, seconds: float, tail: bytes, limit: float | None) -> None:
        """Throw away what is here and what comes, until the connection ends or falls silent.

        Parameters
        ----------
        seconds
            How long nothing may come behind `tail`, two bytes.
        limit
            How long nothing may come at all; None for ever.
        """
        self.discard()
        silent = 0.0
        with self._changed:
            while not self._over and (limit is None or silent < limit):
                arrived = self._arrived
                if self._changed.wait_for(lambda: self._over or self._arrived != arrived, seconds):  # noqa: B023
                    silent = 0.0
                elif self._tail == tail:
                    return
                else:
                    silent += seconds

    @property
    def spilled(self) -> int:
        """Bytes that lie in the file now."""
        return self._file_written - self._file_read

    def join(self, seconds: float | None) -> bool:
        """Wait for the end of the connection; whether it has come."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def close(self) -> None:
        """Give back memory and file; call it when the connection is shut."""
        self.discard()
        with self._changed:
            if self._file is not None:
                self._file.close()
                self._file = None

    def _pending(self) -> bool:
        return bool(self._chunks) or self._file_read < self._file_written or self._ended

    def _run(self) -> None:
        try:
            while part := self._receive(CHUNK):
                with self._changed:
                    self._arrived += len(part)
                    self._tail = (self._tail + part[-2:])[-2:]
                    self._keep(part)
                    self._changed.notify_all()
        except OSError as error:
            self._failure = self._failure or error
        except Exception as error:
            # nobody may take this for the end of the stream
            self._failure = self._failure or OSError(f"the connection cannot be read ({type(error).__name__}: {error})")
        finally:
            with self._changed:
                self._ended = self._over = True
                self._changed.notify_all()

    def _keep(self, part: bytes) -> None:
        if self._discarding:
            return
        if self.spilled == 0 and self._held + len(part) + _OVERHEAD <= self._memory:
            self._chunks.append(part)
            self._held += len(part) + _OVERHEAD
            return
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="voxelsigma-", buffering=0)  # noqa: SIM115  # closed in close
            self._file.seek(self._file_written)
            rest = memoryview(part)
            while rest:
                rest = rest[self._file.write(rest) :]
            self._file_written += len(part)
        except OSError as error:
            # what has arrived before is still handed out, then comes the error
            self._failure = OSError(
                error.errno,
                f"{tempfile.gettempdir()}: cannot keep what arrives faster than it is used ({error.strerror})",
            )
            self._discarding = True
            self._ended = True

    def _from_file(self, count: int) -> bytes:
        assert self._file is not None
        self._file.seek(self._file_read)
        found = self._file.read(min(count, self._file_written - self._file_read))
        self._file_read += len(found)
        if self._file_read == self._file_written:
            self._file_read = self._file_written = 0
            self._file.truncate(0)
        return found

    def _forget(self) -> None:
        self._chunks.clear()
        self._held = 0
        self._file_read = self._file_written = 0
        if self._file is not None:
            self._file.truncate(0)
