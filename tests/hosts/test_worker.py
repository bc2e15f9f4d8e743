"""The resident worker: Gadgetron's side of the wire is played here."""

import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ismrmrd import Acquisition, Image
from tests.hosts.conftest import Outcome, simulated
from tests.hosts.servers import SECONDS, Client, eventually, listening, nothing_left, series_of, serving, whole

from voxelsigma.formats.simulate import SimulatedScan
from voxelsigma.gadgets.items import ReadoutBlock
from voxelsigma.gadgets.wire import Close, Configuration, Failure, FileName, ScanHeaderText, message
from voxelsigma.hosts import worker as module
from voxelsigma.hosts.health import ask
from voxelsigma.hosts.listener import LOOPBACK
from voxelsigma.hosts.worker import Worker

PREWHITEN = '<gadget name="prewhiten"/>'
SENSE = (
    PREWHITEN + '<gadget name="accumulate"/><gadget name="coil_maps"/><gadget name="reconstruct"/>'
    '<gadget name="sketch"><property name="maps" value="magnitude gfactor"/></gadget>'
)
NETWORK = SENSE.replace(
    '<gadget name="reconstruct"/>',
    '<gadget name="reconstruct"><property name="model" value="unrolled_small"/></gadget>',
).replace('<property name="maps"', '<property name="probes" value="2"/><property name="maps"')


def configured(gadgets: str) -> Configuration:
    return Configuration(f'<?xml version="1.0"?>\n<configuration>{gadgets}</configuration>\n'.encode())


@pytest.fixture(scope="module")
def worker() -> Worker:
    return Worker()


@pytest.fixture(scope="module")
def port(worker: Worker) -> Iterator[int]:
    with listening(worker.handle, LOOPBACK) as listener:
        yield listener.port


def failure(client: Client) -> str:
    """The ERROR that must be all there comes before CLOSE."""
    (found,) = client.hear_all()
    assert isinstance(found, Failure), found
    return found.text


@pytest.mark.parametrize("host", LOOPBACK)
def test_a_chain(port: int, scan: SimulatedScan, host: str) -> None:
    with Client(port, host) as client:
        client.say(configured(SENSE), *whole(scan))
        found = series_of(client.hear_all())
    assert sorted(found) == [1, 2000, 2200]
    assert found[1][0].meta["voxelsigma_model"] == "sense"


def test_the_configuration_alone_says_which_gadget_a_connection_is(port: int, scan: SimulatedScan) -> None:
    """Nodes of one scan, opened in reverse order before any data, as Gadgetron does."""
    nodes = [
        '<gadget name="prewhiten"><property name="forward" value="covariance"/></gadget>',
        '<gadget name="accumulate"/><gadget name="coil_maps"><property name="forward" value="kspace"/></gadget>',
        '<gadget name="reconstruct"/><gadget name="sketch"><property name="maps" value="magnitude gfactor"/></gadget>',
    ]
    header, *items = whole(scan)
    with nothing_left():
        clients = [Client(port) for _ in nodes][::-1]
        try:
            for client, node in zip(clients, nodes, strict=True):
                client.say(configured(node), header)
            carried: list[Any] = items[:-1]
            for client in clients:
                client.say(*carried, Close())
                carried = client.hear_all()
        finally:
            for client in clients:
                client.socket.close()
    with Client(port) as client:
        client.say(configured(SENSE), *whole(scan))
        expected = series_of(client.hear_all())
    found = series_of(carried)
    assert sorted(found) == sorted(expected)
    for series, (image,) in expected.items():
        np.testing.assert_allclose(found[series][0].data, image.data, atol=1e-5 * image.data.max())


def test_a_single_gadget(port: int, scan: SimulatedScan) -> None:
    with Client(port) as client:
        client.say(configured(PREWHITEN), *whole(scan))
        found = client.hear_all()
    assert all(isinstance(block, ReadoutBlock) for block in found)
    assert sum(map(len, found)) == len(scan.blocks[1])


def test_several_scans_at_a_time(worker: Worker, port: int, scan: SimulatedScan) -> None:
    done = worker.tally.report()["done"]
    with nothing_left():
        clients = [Client(port) for _ in range(4)]
        header, noise, imaging, end = whole(scan)
        for client in clients:
            client.say(configured(SENSE), header, noise)
        # all have begun before one ends
        assert eventually(lambda: worker.tally.report()["running"] == 4)
        for client in clients[::-1]:
            client.say(imaging, end)
        found = [series_of(client.hear_all()) for client in clients]
        for client in clients:
            client.socket.close()
    for other in found[1:]:
        np.testing.assert_allclose(other[2000][0].data, found[0][2000][0].data, rtol=1e-6)
    assert worker.tally.report()["done"] == done + 4


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ([Configuration(b"")], "chain: its configuration lists no gadget"),
        ([Configuration(b"\0")], "chain: its configuration lists no gadget"),
        ([configured("")], 'chain: its configuration lists no gadget; expected <gadget name="…"/> elements'),
        ([configured('<gadget name="x"/>')], "no gadget is called 'x'; known are prewhiten, "),
        ([configured('<property name="probes" value="3"/>')], "chain: unexpected <property>"),
        (
            [configured('<gadget name="sketch"><property name="probes" value="no"/></gadget>')],
            "sketch: property 'probes' must be an integer",
        ),
        ([Configuration(b"<configuration>")], "configuration: not well-formed XML"),
        (
            [Configuration(b'<!DOCTYPE a [<!ENTITY b "bb">]><configuration>&b;</configuration>')],
            "configuration: document types and entities are refused",
        ),
        ([struct.pack("<HI", 2, 2**20 + 1)], "a configuration claims 1048577 bytes"),
        ([FileName("sense_sigma.xml")], "expected a configuration first, got FileName"),
        ([struct.pack("<H", 999)], "message id 999 after 0 bytes is unknown"),
    ],
)
def test_bad_configurations(port: int, scan: SimulatedScan, said: list[Any], text: str) -> None:
    with Client(port) as client:
        client.say(*said, *whole(scan))
        client.socket.shutdown(socket.SHUT_WR)
        found = failure(client)
    assert found.startswith("voxelsigma worker: ")
    assert text in found


@pytest.mark.parametrize(
    ("header", "text"),
    [
        (ScanHeaderText(b"no XML"), "header"),
        (ScanHeaderText(b'<!DOCTYPE a [<!ENTITY b "bb">]><a>&b;</a>'), "document types and entities are refused"),
        (configured(SENSE), "expected a header behind the configuration, got Configuration"),
        (struct.pack("<HI", 3, 2**31), "a header claims 2147483648 bytes"),
    ],
)
def test_bad_headers(port: int, header: Any, text: str) -> None:
    with Client(port) as client:
        client.say(configured(SENSE), header, Close())
        client.socket.shutdown(socket.SHUT_WR)
        assert text in failure(client)


def test_incomplete_data(port: int, scan: SimulatedScan) -> None:
    header, noise, imaging, end = whole(scan)
    half = imaging.select(slice(0, 11))
    with nothing_left():
        with Client(port) as client:
            client.say(configured(SENSE), header, noise, half, end)
            assert "accumulate: the volume slice 0 is incomplete: 8 of 16 lines" in failure(client)
        with Client(port) as client:
            client.say(configured(SENSE), header, noise, message(half)[:-100])
            client.socket.shutdown(socket.SHUT_WR)
            assert "stream ends after " in failure(client)


def test_voxels_that_gadgetron_cannot_read(port: int, scan: SimulatedScan) -> None:
    array = np.zeros((1, 4, 4), dtype=np.int16)
    picture = Image.from_array(array, acquisition=Acquisition(), transpose=False, image_series_index=7)
    with Client(port) as client:
        client.say(configured(SENSE), ScanHeaderText(scan.header_xml), picture, *scan.blocks, Close())
        assert "image series 7 has int16 voxels, which the server cannot read; it reads uint16" in failure(client)


def test_one_scan_fails_and_another_does_not(port: int, scan: SimulatedScan) -> None:
    header, noise, imaging, end = whole(scan)
    with nothing_left(), Client(port) as good:
        good.say(configured(SENSE), header, noise)
        with Client(port) as bad:
            bad.say(configured(SENSE), header, noise)
            bad.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        good.say(imaging, end)
        assert len(series_of(good.hear_all())) == 3


def test_whoever_says_nothing_is_not_kept(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GREETING_SECONDS", 0.2)
    with nothing_left():
        with Client(port) as silent:
            assert silent.is_over()
        monkeypatch.setattr(module, "GREETING_SECONDS", 1.0)
        with Client(port) as client:
            client.say(configured(SENSE))
            assert "nothing came for 1 s" in failure(client)


def test_the_first_item_is_not_kept_waiting(port: int, scan: SimulatedScan) -> None:
    """Handled within 0.2 s of the connection; ten times that is allowed here."""
    header, noise, imaging, end = whole(scan)
    with Client(port) as client:
        client.say(configured(PREWHITEN), header, noise, imaging.select(slice(0, 1)))
        client.socket.settimeout(2.0)
        assert isinstance(client.hear(), ReadoutBlock)
        client.socket.settimeout(SECONDS)
        client.say(imaging.select(slice(1, None)), end)
        client.hear_all()


def test_a_bad_pipeline_is_an_error_at_the_start(cli: Callable[..., Outcome]) -> None:
    found = cli("worker", "--port", 0, "--pipeline", "nothing.xml")
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr.startswith("error: nothing.xml: no such pipeline file; shipped are ")
    assert found.stderr.count("\n") == 1


def test_a_process(tmp_path: Path, scan: SimulatedScan) -> None:
    with serving(tmp_path, "worker", "--pipeline", "sense_sigma_worker.xml") as served:
        assert ask("127.0.0.1", served.port)["models"] == ["sense"]
        with Client(served.port) as client:
            client.say(configured(SENSE), *whole(scan))
            assert len(client.hear_all()) == 3
        assert served.end(signal.SIGTERM) == 0
        assert served.log == ""


@pytest.mark.slow
def test_200_scans_leave_nothing(tmp_path: Path) -> None:
    """Memory at the end within 5 % of that after the 10th; no descriptor and no thread more.

    Every tenth scan goes through a network, which takes most of the time.
    """
    small = simulated(matrix=(1, 24, 24), reference_lines=8, noise_samples=1024)
    with serving(tmp_path, "worker", "--pipeline", "unrolled_sigma_worker.xml") as served:
        before: tuple[int, int, int] | None = None
        for number in range(200):
            with Client(served.port) as client:
                client.say(configured(SENSE if number % 10 else NETWORK), *whole(small))
                assert sorted(series_of(client.hear_all())) == [1, 2000, 2200]
            if number == 9:
                before = settled(served.process.pid)
        after = settled(served.process.pid)
        assert before is not None
        assert after[0] <= 1.05 * before[0]
        assert after[1:] == before[1:]
        assert ask("127.0.0.1", served.port)["done"] == 200


def settled(number: int) -> tuple[int, int, int]:
    """Resident memory of a process in KiB, its descriptors and its threads, when the last connection is gone."""
    found, end = resources(number), time.monotonic() + SECONDS
    while time.monotonic() < end:
        time.sleep(0.3)
        found, before = resources(number), found
        if found[1:] == before[1:]:
            break
    return found


def resources(number: int) -> tuple[int, int, int]:
    folder = Path(f"/proc/{number}")
    status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
    memory, threads = (int(status[name].split()[0]) for name in ("VmRSS", "Threads"))
    return memory, len(os.listdir(folder / "fd")), threads  # noqa: PTH208
