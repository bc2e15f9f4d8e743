"""The way in from Gadgetron, in a process of its own: what the server gets, and that the process is gone at once."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ismrmrd import Acquisition, Image

from voxelsigma.formats.simulate import SimulatedScan
from voxelsigma.gadgets import wire

PATIENCE = 60.0
TOY = '''
import os
import sys
from voxelsigma.gadgets.entry import run
import voxelsigma.gadgets.node as node


def behaviour(items):
    """Passes items on; does what the environment says."""
    how = os.environ["TOY"]
    for number, item in enumerate(items):
        if how == "raise" and number == 1:
            raise RuntimeError("it broke here: \\u03c3")
        if how == "silent" and number == 1:
            raise ValueError
        if how == "refused" and number == 1:
            raise ConnectionRefusedError("storage: connection refused")
        if how == "early" and number == 1:
            return
        yield item
    if how == "last":
        raise RuntimeError("too late")


node.build = lambda name, configuration, context: behaviour


def gadget(connection):
    run(connection, "toy")
'''


@dataclass
class Child:
    """A gadget's process, and the server's end of its connection."""

    process: subprocess.Popen[str]
    connection: socket.socket

    def send(self, *content: bytes) -> None:
        for part in content:
            self.connection.sendall(part)

    def finish(self) -> tuple[int, str]:
        """Exit code and log, once the process has ended of its own accord."""
        log = self.process.communicate(timeout=PATIENCE)[1]
        return self.process.returncode, log

    def read(self) -> list[Any]:
        """All messages up to the end of the connection."""
        content = bytearray()
        with contextlib.suppress(ConnectionResetError):
            while part := self.connection.recv(2**20):
                content += part
        source = iter([bytes(content)])
        reader = wire.Reader(lambda count: next(source, b""))
        found = []
        while reader.total < len(content):
            found.append(wire.read_message(reader))
        return found


Start = Callable[..., Any]
PAIR = """
import logging, socket, sys
from gadgetron.external.connection import Connection
from toys import gadget
logging.basicConfig()
with Connection(socket.socket(fileno=int(sys.argv[1]))) as connection:
    gadget(connection)
"""


@pytest.fixture
def start(tmp_path: Path, scan: SimulatedScan) -> Start:
    """Start a gadget as Gadgetron does; the process is ended whatever happens."""
    (tmp_path / "toys.py").write_text(TOY)

    @contextmanager
    def run(module: str = "toys", how: str = "pass", *, pair: bool = False) -> Iterator[Child]:
        paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": paths, "TOY": how, "OMP_NUM_THREADS": "1"}
        with contextlib.ExitStack() as stack:
            if pair:
                connection, theirs = socket.socketpair()
                command = ["-c", PAIR, str(theirs.fileno())]
            else:
                theirs = socket.create_server(("127.0.0.1", 0))
                theirs.settimeout(PATIENCE)
                command = ["-m", "gadgetron", str(theirs.getsockname()[1]), module, "gadget"]
            with theirs:
                process = stack.enter_context(
                    subprocess.Popen(
                        [sys.executable, *command],
                        env=environment,
                        stderr=subprocess.PIPE,
                        text=True,
                        pass_fds=(theirs.fileno(),) if pair else (),
                    )
                )
                stack.callback(process.kill)
                if not pair:
                    connection, _ = theirs.accept()
            stack.enter_context(connection)
            connection.settimeout(PATIENCE)
            connection.sendall(wire.message(wire.Configuration(b"<configuration/>")))
            connection.sendall(wire.message(wire.ScanHeaderText(scan.header_xml)))
            yield Child(process, connection)

    return run


def an_image(number: int = 0) -> bytes:
    return wire.message(Image.from_array(np.ones((1, 4, 4), np.float32), transpose=False, image_index=number))


def a_readout() -> bytes:
    return wire.message(Acquisition.from_array(np.ones((2, 8), np.complex64)))


def test_success(start: Start) -> None:
    with start() as child:
        child.send(an_image(1), an_image(2), wire.close_message())
        found = child.read()
        since = time.monotonic()
        assert child.finish()[0] == 0
        # the client is held until the process has gone
        assert time.monotonic() - since < 5
        assert [type(item) for item in found] == [Image, Image, wire.Close]


@pytest.mark.parametrize(
    ("how", "images", "text"),
    [
        ("raise", 1, "voxelsigma toy: it broke here: σ"),
        ("silent", 1, "voxelsigma toy: ValueError"),
        ("refused", 1, "voxelsigma toy: storage: connection refused"),
        ("last", 3, "voxelsigma toy: too late"),
    ],
)
def test_an_exception(start: Start, how: str, images: int, text: str) -> None:
    with start(how=how) as child:
        child.send(an_image(1), an_image(2), an_image(3))
        if how == "last":
            child.send(wire.close_message())
        else:
            # more than any buffer holds, while the failure is told: the sender must not be blocked
            child.send(*[a_readout() * 500] * 40, wire.close_message())
        found = child.read()
        code, log = child.finish()
        assert code == 1
        assert found[images:] == [wire.Failure(text), wire.Close()]
        assert "Traceback" in log
        assert "toy failed" in log


def test_an_import_that_fails(start: Start, tmp_path: Path) -> None:
    (tmp_path / "defusedxml").mkdir()
    (tmp_path / "defusedxml" / "__init__.py").write_text("raise ImportError('a library is broken')")
    with start("voxelsigma.gadgets.prewhiten") as child:
        child.send(a_readout() * 100, wire.close_message())
        found = child.read()
        code, log = child.finish()
        assert code == 1
        assert found == [wire.Failure("voxelsigma prewhiten: a library is broken"), wire.Close()]
        assert "ImportError: a library is broken" in log


def test_a_configuration_that_is_wrong(start: Start) -> None:
    with start("voxelsigma.gadgets.chain") as child:
        child.send(a_readout(), wire.close_message())
        found = child.read()
        assert child.finish()[0] == 1
        assert isinstance(found[0], wire.Failure)
        assert found[0].text.startswith("voxelsigma chain: chain: its configuration lists no gadget")


def test_the_end_inside_a_message(start: Start) -> None:
    with start() as child:
        child.send(an_image(), a_readout()[:40])
        child.connection.shutdown(socket.SHUT_WR)
        image, failure, close = child.read()
        code, _ = child.finish()
        assert code == 1
        assert isinstance(image, Image)
        assert close == wire.Close()
        assert failure.text == (
            "voxelsigma toy: stream ends after 38 of 340 bytes of an ACQUISITION header, "
            "1 messages after its beginning and without CLOSE"
        )


def test_a_gadget_that_has_enough_still_sees_whether_the_stream_was_whole(start: Start) -> None:
    with start(how="early") as child:
        child.send(an_image(1), an_image(2), an_image(3))
        child.connection.shutdown(socket.SHUT_WR)
        found = child.read()
        assert child.finish()[0] == 1
        assert isinstance(found[1], wire.Failure)
        assert "3 messages after its beginning and without CLOSE" in found[1].text


def test_nobody_reads_the_output(start: Start) -> None:
    with start(pair=True) as child:
        child.send(an_image())
        echo = bytearray()
        while len(echo) < len(an_image()):
            echo += child.connection.recv(2**20)
        # from here on the child's output is refused, while its input goes on
        child.connection.shutdown(socket.SHUT_RD)
        child.send(*[an_image() * 1000] * 100)
        assert child.process.poll() is None, "the input must be read up to CLOSE"
        child.send(wire.close_message())
        code, log = child.finish()
        assert code == 1
        assert "toy: who reads the output is gone (Broken pipe); what comes is discarded" in log
        assert "could not be sent" not in log
        assert "Traceback" not in log
