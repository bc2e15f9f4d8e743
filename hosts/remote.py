"""An external that runs already: the client's side of `<connect>`, as a Gadgetron server has it."""

import socket
import time
from contextlib import suppress
from dataclasses import dataclass

from voxelsigma.gadgets.context import Context
from voxelsigma.gadgets.items import Stream
from voxelsigma.hosts.exchange import Exchange
from voxelsigma.hosts.family import Family
from voxelsigma.hosts.pipeline import Listening

TRIES = 10
PAUSE_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class ConnectNode:
    """Connects to a listening node, feeds it and reads what it sends."""

    node: Listening
    context: Context
    family: Family

    def __call__(self, items: Stream) -> Stream:
        """Items in, items out.

        Raises
        ------
        RuntimeError
            If nothing listens, or the node reports an error or breaks off.
        """
        exchange = Exchange(self._name, self.node.configuration, self.context, self.family, lambda: "")
        with self._connected() as connection:
            try:
                yield from exchange.run(connection, items)
            finally:
                # closing alone does not wake the thread that feeds it
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    @property
    def _name(self) -> str:
        return f"external at {self.node.host}:{self.node.port}"

    def _connected(self) -> socket.socket:
        """A connection; a node that is only just starting gets a few tries."""
        for attempt in range(TRIES):
            try:
                return socket.create_connection((self.node.host, self.node.port), timeout=None)
            except OSError as error:
                if attempt == TRIES - 1:
                    raise RuntimeError(
                        f"{self._name}: cannot be reached ({error.strerror or error}); "
                        f"start one with `voxelsigma worker --port {self.node.port}`"
                    ) from None
            time.sleep(PAUSE_SECONDS)
        raise AssertionError
