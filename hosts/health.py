"""Health of a running server: asked for with Gadgetron's own QUERY message, answered at once."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import voxelsigma
from voxelsigma.gadgets.wire import Query, Reader, Response, close_message, message, read_message

HEALTH_QUESTION: Final = "voxelsigma::health"


@dataclass(slots=True)
class Tally:
    """What a server has done so far.

    Parameters
    ----------
    name
        Of the server.
    """

    name: str
    models: tuple[str, ...] = ()
    _since: float = field(default_factory=time.monotonic)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _counts: dict[str, int] = field(default_factory=lambda: {"running": 0, "done": 0, "failed": 0})

    @contextmanager
    def scan(self) -> Iterator[None]:
        """Count a connection that brings a scan, and how it ends."""
        self._add("running", 1)
        outcome = "failed"
        try:
            yield
            outcome = "done"
        finally:
            self._add("running", -1)
            self._add(outcome, 1)

    def answer(self, query: Query) -> Response:
        """The answer to a query; to one that is not known, what Gadgetron would say."""
        if query.question == HEALTH_QUESTION:
            return Response(query.number, json.dumps(self.report()))
        if query.question == "gadgetron::info":
            return Response(query.number, f"voxelsigma {voxelsigma.__version__} {self.name}, no Gadgetron")
        return Response(query.number, f"Unable to respond to query: {query.question}")

    def report(self) -> dict[str, Any]:
        """Counts and times."""
        with self._lock:
            counts = dict(self._counts)
        return {
            "status": "ok",
            "server": self.name,
            "version": voxelsigma.__version__,
            "uptime_seconds": round(time.monotonic() - self._since, 1),
            "models": list(self.models),
            **counts,
        }

    def _add(self, name: str, count: int) -> None:
        with self._lock:
            self._counts[name] += count


def ask(host: str, port: int, timeout: float = 5.0) -> dict[str, Any]:
    """Ask a server for its health.

    Raises
    ------
    ConnectionError
        If nothing listens there, or what listens is no voxelsigma; the text names the address.
    """
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        with socket.create_connection((host, port), timeout) as connection:
            connection.settimeout(timeout)
            connection.sendall(message(Query(1, HEALTH_QUESTION)) + close_message())
            found = read_message(Reader(connection.recv))
    except (OSError, ValueError, EOFError) as error:
        raise ConnectionError(f"{where}: no answer ({error})") from None
    try:
        report = json.loads(found.answer)
    except (AttributeError, ValueError):
        raise ConnectionError(f"{where}: something listens there, but it is no voxelsigma server") from None
    if not isinstance(report, dict):
        raise ConnectionError(f"{where}: something listens there, but it is no voxelsigma server")
    return report
