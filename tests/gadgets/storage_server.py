"""A small storage service like Gadgetron's, in a thread: keeps blobs by their tags, or misbehaves as told."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, urlsplit


@dataclass
class Storage:
    """What the service holds and was asked.

    `answer` replaces its behaviour: it gets the request's handler and writes what it likes.
    """

    address: str = ""
    blobs: dict[tuple[tuple[str, str], ...], bytes] = field(default_factory=dict)
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    answer: Callable[[BaseHTTPRequestHandler], None] | None = None


@contextmanager
def storage_service(prefix: str = "") -> Iterator[Storage]:
    """A running service; ended, with its threads, whatever happens."""
    storage = Storage()

    class Handler(BaseHTTPRequestHandler):
        timeout = 5

        def log_message(self, format: str, *args: object) -> None:
            del format, args

        def do_GET(self) -> None:
            self._serve(None)

        def do_POST(self) -> None:
            self._serve(self.rfile.read(int(self.headers["Content-Length"])))

        def _serve(self, body: bytes | None) -> None:
            url = urlsplit(self.path)
            tags = dict(parse_qsl(url.query))
            storage.requests.append((self.command, url.path, tags))
            if storage.answer is not None:
                storage.answer(self)
                return
            key = tuple(sorted((name, value) for name, value in tags.items() if not name.startswith("_")))
            if url.path == f"{prefix}/v1/blobs/data" and body is not None:
                storage.blobs[key] = body
                reply(self, 201, b"{}")
            elif url.path == f"{prefix}/v1/blobs/data/latest" and key in storage.blobs:
                reply(self, 200, storage.blobs[key])
            else:
                reply(self, 404, b"")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    storage.address = f"http://127.0.0.1:{server.server_address[1]}{prefix}"
    try:
        yield storage
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def reply(handler: BaseHTTPRequestHandler, status: int, body: bytes) -> None:
    """An ordinary answer."""
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def refusing_address() -> str:
    """An address at which nothing listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}"


def garbage(handler: BaseHTTPRequestHandler) -> None:
    """Answers with something else."""
    reply(handler, 200, b"<html>not a covariance</html>")
