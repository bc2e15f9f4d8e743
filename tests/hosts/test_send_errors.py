"""How a simulated scan ends when the server, the network or the call is wrong."""

import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ismrmrd
import numpy as np
import pytest
from tests.hosts.mrd_peer import ERROR, TEXT, Peer, Talk, answer, image

from voxelsigma.hosts import mrd_client
from voxelsigma.hosts.mrd_client import parse_address
from voxelsigma.hosts.send import send

READOUTS = 54


@pytest.fixture(autouse=True)
def _no_thread_left() -> Iterator[None]:
    yield
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("mrd-")]


@pytest.mark.parametrize("identifier", [TEXT, ERROR])
@pytest.mark.parametrize("readouts", [0, 5, READOUTS])
def test_an_error_of_the_server_wins(scan_file: Path, tmp_path: Path, identifier: int, readouts: int) -> None:
    """It is told whether the server then takes the rest, or hangs up with data unread, as here."""
    output = tmp_path / "out.h5"
    output.write_bytes(b"older")

    def script(talk: Talk) -> None:
        talk.hear_readouts(readouts)
        talk.show(image())
        talk.complain("gadget sketch: out of memory", identifier)
        talk.complain("and one more")

    with Peer(script) as peer, pytest.raises(RuntimeError, match=r":\d+: gadget sketch: out of memory; and one more$"):
        send(scan_file, peer.address, pipeline="x", tr=0.002, output=output)
    assert output.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [output]


def test_an_error_of_a_server_that_goes_on_reading(scan_file: Path) -> None:
    def script(talk: Talk) -> None:
        talk.complain("no such pipeline")
        talk.hear_the_end()

    with Peer(script) as peer, pytest.raises(RuntimeError, match=r"no such pipeline$"):
        send(scan_file, peer.address, pipeline="x", tr=60)


def test_a_vanishing_server(scan_file: Path, tmp_path: Path) -> None:
    def script(talk: Talk) -> None:
        talk.hear_all()
        talk.show(image(), image(), image(2000))

    expected = (
        r"127.0.0.1:\d+: the connection ended without CLOSE .*sent 54 of 54 readouts; received 2 of image series 1, "
    )
    with Peer(script) as peer, pytest.raises(ConnectionError, match=expected + "1 of image series 2000$"):
        send(scan_file, peer.address, pipeline="x", output=tmp_path / "out.h5")
    assert list(tmp_path.iterdir()) == []


def test_half_an_image(scan_file: Path) -> None:
    def script(talk: Talk) -> None:
        talk.hear_all()
        talk.say(struct.pack("<H", 1022) + image().to_bytes()[:-10])

    with Peer(script) as peer, pytest.raises(ConnectionError, match=r"stream ends after 86 of 96 bytes of an IMAGE"):
        send(scan_file, peer.address, pipeline="x")


def test_nonsense_from_the_server(scan_file: Path) -> None:
    def script(talk: Talk) -> None:
        talk.say(b"HTTP/1.1 400 Bad Request\r\n")
        talk.hear_the_end()

    with (
        Peer(script) as peer,
        pytest.raises(ValueError, match=r":\d+: the server sent what cannot be read: .*message id"),
    ):
        send(scan_file, peer.address, pipeline="x", tr=60)


@pytest.mark.parametrize("tr", [0.0, 0.002])
def test_a_server_that_leaves_before_the_end(scan_file: Path, tr: float) -> None:
    with Peer(lambda talk: talk.hear_readouts(5)) as peer, pytest.raises(ConnectionError) as caught:
        send(scan_file, peer.address, pipeline="x", tr=tr)
    assert "the connection ended without CLOSE" in str(caught.value)
    assert "of 54 readouts; received nothing" in str(caught.value)


def test_a_server_that_closes_before_the_end(scan_file: Path) -> None:
    def script(talk: Talk) -> None:
        talk.hear_readouts(1)
        talk.close()
        talk.hear_the_end()

    # the answer can be here before the thread that sent has counted
    expected = r"the server closed before the scan's end; sent [01] of 54 readouts; received nothing$"
    with Peer(script) as peer, pytest.raises(ConnectionError, match=expected):
        send(scan_file, peer.address, pipeline="x", tr=60)


def test_a_silent_server(scan_file: Path) -> None:
    def script(talk: Talk) -> None:
        talk.hear_all()
        talk.hear_the_end()

    expected = r"silent for 0.3 s after the scan's end; sent 54 of 54 readouts; received nothing$"
    with Peer(script) as peer, pytest.raises(TimeoutError, match=expected):
        send(scan_file, peer.address, pipeline="x", timeout=0.3)


def test_silence_before_the_scans_end_is_no_error(scan_file: Path) -> None:
    with Peer(answer(image())) as peer:
        report = send(scan_file, peer.address, pipeline="x", tr=0.01, timeout=0.3)
    assert report.series[0].images == 1


def test_a_server_that_takes_no_data(scan_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = mrd_client.connect

    def narrow(address: mrd_client.Address) -> socket.socket:
        connection = real(address)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return connection

    monkeypatch.setattr("voxelsigma.hosts.send.connect", narrow)
    over = threading.Event()

    def script(talk: Talk) -> None:
        over.wait(20)

    with Peer(script, receive_buffer=4096) as peer:
        try:
            with pytest.raises(TimeoutError, match=r"took no data for 0.3 s; sent \d+ of 54 readouts"):
                send(scan_file, peer.address, pipeline="x", timeout=0.3)
        finally:
            over.set()


def test_a_series_that_changes_its_size(scan_file: Path, tmp_path: Path) -> None:
    other = ismrmrd.Image.from_array(
        np.zeros((1, 8, 8), np.float32), acquisition=ismrmrd.Acquisition(), transpose=False, image_series_index=1
    )
    with Peer(answer(image(), other)) as peer, pytest.raises(ValueError, match="each series has one type and one size"):
        send(scan_file, peer.address, pipeline="x", output=tmp_path / "out.h5")
    assert list(tmp_path.iterdir()) == []


def test_nothing_listens(scan_file: Path) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        with pytest.raises(ConnectionError, match=rf"^127.0.0.1:{port}: nothing listens there \(connection refused\)$"):
            send(scan_file, f"127.0.0.1:{port}", pipeline="x")


@pytest.mark.parametrize(
    "text",
    ["", "localhost", "localhost:", ":9002", "localhost:0", "localhost:65536", "::1:9002", "[::1]", "a b:9", "h:9x"],
)
def test_a_wrong_address(text: str) -> None:
    with pytest.raises(ValueError, match=r"--to must be host:port or \[IPv6 address\]:port .* got "):
        parse_address(text)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"tr": -1.0}, "send: tr must be from 0 to 60 seconds, got -1.0"),
        ({"tr": float("nan")}, "send: tr must be"),
        ({"timeout": 0.0}, "send: timeout must be"),
        ({"pipeline": ""}, "a pipeline's name must have 1 to 1023 bytes"),
        ({"pipeline": "σ" * 512}, "a pipeline's name must have 1 to 1023 bytes, none of them 0, got .* of 1024"),
        ({"pipeline": "none.xml", "send_xml": True}, "none.xml: no such pipeline file; shipped are .*sense_sigma.xml"),
        ({"group": "other"}, "has no group 'other'"),
        ({"output": Path("/nowhere/out.h5")}, "folder /nowhere does not exist"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_sent(scan_file: Path, options: dict[str, Any], expected: str) -> None:
    # nothing listens on this port: a connection would fail with another text
    with pytest.raises((ValueError, FileNotFoundError), match=expected):
        send(scan_file, "127.0.0.1:1", **{"pipeline": "x", **options})


def test_the_scan_is_no_output(scan_file: Path) -> None:
    with pytest.raises(ValueError, match="is the scan itself"):
        send(scan_file, "127.0.0.1:1", pipeline="x", output=scan_file)
