"""A Python external in a child process, run as a Gadgetron server runs it."""

import socket
import subprocess
import sys
from dataclasses import dataclass, field

from voxelsigma.gadgets.context import Context
from voxelsigma.gadgets.items import Stream
from voxelsigma.hosts.exchange import LEAVE_SECONDS, Exchange
from voxelsigma.hosts.family import Family
from voxelsigma.hosts.pipeline import External

CONNECT_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class ChildNode:
    """Runs `python -m gadgetron <port> <module> <target>`, feeds it over a socket and reads what it sends."""

    node: External
    context: Context
    family: Family = field(default_factory=Family)

    def __call__(self, items: Stream) -> Stream:
        """Items in, items out; what the child gets is what its own end of the wire can carry.

        Raises
        ------
        RuntimeError
            If the child fails to connect, reports an error, or ends without saying goodbye.
        """
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            command = [sys.executable, "-m", "gadgetron", str(port), self.node.module, self.node.target]
            child = self.family.start(command)
            exchange = Exchange(
                self._name,
                self.node.configuration,
                self.context,
                self.family,
                lambda: self._fate(child),
            )
            try:
                with self._accept(server, child) as connection:
                    try:
                        yield from exchange.run(connection, items)
                    except BaseException:
                        # before its socket closes, of which it would complain
                        child.kill()
                        raise
                if code := self._exit_code(child):
                    raise RuntimeError(f"{self._name}: ended with exit code {code}, see its log above")
            finally:
                if child.poll() is None:
                    child.kill()
                    child.wait()

    @property
    def _name(self) -> str:
        return f"external {self.node.module}.{self.node.target}"

    def _accept(self, server: socket.socket, child: "subprocess.Popen[bytes]") -> socket.socket:
        """Wait for the child to connect back, as long as it lives."""
        server.settimeout(0.2)
        for _ in range(int(CONNECT_SECONDS / 0.2)):
            try:
                connection, _address = server.accept()
            except TimeoutError:
                if child.poll() is not None:
                    raise RuntimeError(
                        f"{self._name}: ended with exit code {child.returncode} before it connected"
                    ) from None
                continue
            connection.settimeout(None)
            return connection
        raise RuntimeError(f"{self._name}: did not connect within {CONNECT_SECONDS:g} s")

    def _fate(self, child: "subprocess.Popen[bytes]") -> str:
        code = self._exit_code(child)
        return f" with exit code {code}, see its log above" if code else ""

    def _exit_code(self, child: "subprocess.Popen[bytes]") -> int:
        """Wait for the end of a child that has said goodbye."""
        try:
            return child.wait(timeout=LEAVE_SECONDS)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{self._name}: still runs {LEAVE_SECONDS:g} s after the end of its output") from None
