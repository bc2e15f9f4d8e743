"""Starts a gadget as a Gadgetron server does, with a scan of no readouts, and hears whether it answers."""

import os
import signal
import socket
import struct
import subprocess
import tempfile
from collections.abc import Mapping

from voxelsigma.hosts.check import Check

HANDSHAKE_SECONDS = 120.0

_CONFIG, _HEADER, _CLOSE, _ERROR = 2, 3, 4, 8
_CONFIGURATION = b'<configuration><gadget name="sketch"/></configuration>'
_SPACE = b"<matrixSize><x>8</x><y>8</y><z>1</z></matrixSize><fieldOfView_mm><x>8</x><y>8</y><z>1</z></fieldOfView_mm>"
_EMPTY_SCAN = (
    b'<?xml version="1.0"?><ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD"><experimentalConditions>'
    b"<H1resonanceFrequency_Hz>63500000</H1resonanceFrequency_Hz></experimentalConditions><encoding>"
    b"<encodedSpace>" + _SPACE + b"</encodedSpace><reconSpace>" + _SPACE + b"</reconSpace><encodingLimits/>"
    b"<trajectory>cartesian</trajectory></encoding></ismrmrdHeader>"
)


def handshake(python: str, environment: Mapping[str, str], seconds: float = HANDSHAKE_SECONDS) -> Check:
    """Play the server for one gadget: configuration, header, end of data.

    Parameters
    ----------
    python
        The interpreter.
    environment
        Its environment.
    seconds
        How long each step may take.
    """
    name = "gadget started as the server does"
    with socket.create_server(("127.0.0.1", 0)) as server, tempfile.TemporaryFile() as log:
        port = str(server.getsockname()[1])
        child = subprocess.Popen(
            [python, "-m", "gadgetron", port, "voxelsigma.gadgets.chain", "gadget"],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            failure = _converse(_accept(server, child, seconds), seconds)
            if not failure and (code := child.wait(timeout=seconds)):
                failure = f"ends with exit code {code}"
        except (OSError, EOFError, subprocess.TimeoutExpired) as error:
            failure = str(error) or type(error).__name__
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        if not failure:
            return Check(name, True, "answers")
        log.seek(0)
        said = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        last = f"; its log ends with: {said[-1].strip()}" if said else ""
    return Check(name, False, failure + last, f"run {python} -c 'import voxelsigma.gadgets.external' to see why")


def _accept(server: socket.socket, child: "subprocess.Popen[bytes]", seconds: float) -> socket.socket:
    """Wait for the child to connect back, as long as it lives."""
    server.settimeout(0.2)
    for _ in range(int(seconds / 0.2) + 1):
        try:
            connection, _address = server.accept()
        except TimeoutError:
            if child.poll() is not None:
                raise EOFError(f"ends with exit code {child.returncode} before it connects") from None
            continue
        return connection
    raise EOFError(f"does not connect within {seconds:g} s")


def _converse(connection: socket.socket, seconds: float) -> str:
    """What went wrong; empty when the gadget said goodbye properly."""
    with connection:
        connection.settimeout(seconds)
        for number, content in ((_CONFIG, _CONFIGURATION), (_HEADER, _EMPTY_SCAN)):
            connection.sendall(struct.pack("<HI", number, len(content)) + content)
        connection.sendall(struct.pack("<H", _CLOSE))
        answer = b""
        while part := connection.recv(2**16):
            answer += part
    if answer == struct.pack("<H", _CLOSE):
        return ""
    if answer[:2] == struct.pack("<H", _ERROR):
        (length,) = struct.unpack_from("<Q", answer.ljust(10, b"\0"), 2)
        return "reports: " + answer[10 : 10 + length].decode(errors="replace")
    return f"answers with {len(answer)} bytes that are no goodbye"
