"""The child processes of one pipeline, and the threads that feed them: started together, ended together."""

import os
import subprocess
import threading
from collections.abc import Callable


class Family:
    """Keeps what a pipeline starts, so that nothing outlives it.

    A stock Gadgetron child whose socket closes would complain to the terminal, or spin for ever.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ended = False
        self._children: list[subprocess.Popen[bytes]] = []
        self._threads: list[threading.Thread] = []

    def start(self, command: list[str]) -> "subprocess.Popen[bytes]":
        """Start a child process.

        Raises
        ------
        RuntimeError
            If the pipeline has ended meanwhile.
        """
        with self._lock:
            if self._ended:
                raise RuntimeError("the pipeline has ended")
            # its log shares this one's stderr; stdout may be somebody's data
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2, env=_environment())
            self._children.append(child)
            return child

    def thread(self, work: Callable[[], None]) -> threading.Thread:
        """Start a thread."""
        thread = threading.Thread(target=work, daemon=True)
        with self._lock:
            self._threads.append(thread)
        thread.start()
        return thread

    def end(self) -> None:
        """Kill the children that still run, and wait for the threads that fed them."""
        with self._lock:
            self._ended = True
        for child in self._children:
            if child.poll() is None:
                child.kill()
                child.wait()
        for thread in self._threads:
            if thread is not threading.current_thread():
                # a feeder's next send or receive fails now
                thread.join(timeout=10)


def _environment() -> dict[str, str]:
    """Children log what is worth a warning, unless told otherwise."""
    return {"GADGETRON_EXTERNAL_LOG_LEVEL": "WARNING", **os.environ}
