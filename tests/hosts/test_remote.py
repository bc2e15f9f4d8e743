"""Pipelines whose externals run already: replay and serve in front of a worker."""

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import fromstring

import numpy as np
import numpy.typing as npt
import pytest
from tests.hosts.conftest import Outcome
from tests.hosts.mrd_peer import Peer, Talk, answer
from tests.hosts.servers import Client, listening, nothing_left, whole

from voxelsigma.formats.header import parse_header
from voxelsigma.formats.image_file import read_series
from voxelsigma.formats.simulate import SimulatedScan
from voxelsigma.gadgets.context import Context
from voxelsigma.gadgets.wire import FileName
from voxelsigma.hosts import remote
from voxelsigma.hosts.family import Family
from voxelsigma.hosts.pipeline import PIPELINE_FOLDER, Listening
from voxelsigma.hosts.remote import ConnectNode
from voxelsigma.hosts.replay import replay
from voxelsigma.hosts.server import Policy, Server
from voxelsigma.hosts.worker import Worker

Written = Callable[..., Path]


@pytest.fixture
def worker_pipeline(tmp_path: Path) -> Written:
    """A shipped pipeline that connects to a port."""

    def write(port: int, name: str = "sense_sigma_worker.xml", **changes: str) -> Path:
        xml = (PIPELINE_FOLDER / name).read_text().replace('port="18000"', f'address="127.0.0.1" port="{port}"')
        for old, new in changes.items():
            assert old in xml
            xml = xml.replace(old, new)
        path = tmp_path / name
        path.write_text(xml)
        return path

    return write


@pytest.fixture
def worker_port() -> Iterator[int]:
    with nothing_left(), listening(Worker().handle) as listener:
        yield listener.port


def test_replay_through_a_worker(scan_file: Path, tmp_path: Path, worker_pipeline: Written, worker_port: int) -> None:
    """The same as in one process."""
    replay(scan_file, "sense_sigma.xml", tmp_path / "one.h5")
    replay(scan_file, str(worker_pipeline(worker_port)), tmp_path / "two.h5")
    one, two = read_series(tmp_path / "one.h5"), read_series(tmp_path / "two.h5")
    assert [series.index for series in two] == [series.index for series in one] == [1, 2000, 2100, 2200]
    for first, second in zip(one, two, strict=True):
        expected: npt.NDArray[np.float32] = first.data.astype(np.float32)
        np.testing.assert_allclose(second.data.astype(np.float32), expected, atol=1e-5 * expected.max())


def test_an_error_of_the_worker_is_shown(
    scan_file: Path, tmp_path: Path, worker_pipeline: Written, worker_port: int
) -> None:
    pipeline = worker_pipeline(worker_port, probes="probs")
    text = rf"^external at 127\.0\.0\.1:{worker_port}: voxelsigma worker: sketch: unknown property 'probs'; known are "
    with nothing_left(), pytest.raises(RuntimeError, match=text):
        replay(scan_file, str(pipeline), tmp_path / "out.h5")
    assert not (tmp_path / "out.h5").exists()


def test_an_error_in_the_middle_is_shown(
    scan: SimulatedScan, raw: Callable[..., Path], tmp_path: Path, worker_pipeline: Written, worker_port: int
) -> None:
    path = raw({"blocks": [scan.blocks[0], scan.blocks[1].select(slice(0, 11))]})
    text = r"external at .*: voxelsigma worker: accumulate: the volume slice 0 is incomplete: 8 of 16 lines"
    with nothing_left(), pytest.raises(RuntimeError, match=text):
        replay(path, str(worker_pipeline(worker_port)), tmp_path / "out.h5")
    assert not (tmp_path / "out.h5").exists()


def test_nothing_listens(
    scan_file: Path, tmp_path: Path, worker_pipeline: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PAUSE_SECONDS", 0.01)
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    text = (
        rf"^external at 127\.0\.0\.1:{port}: cannot be reached \(Connection refused\); "
        rf"start one with `voxelsigma worker --port {port}`$"
    )
    with nothing_left(), pytest.raises(RuntimeError, match=text):
        replay(scan_file, str(worker_pipeline(port)), tmp_path / "out.h5")


def test_the_command_says_so_too(
    scan_file: Path, tmp_path: Path, cli: Callable[..., Outcome], worker_pipeline: Written
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    outcome = cli("replay", scan_file, "-p", worker_pipeline(port), "-o", "out.h5")
    assert outcome.returncode == 1
    assert f"error: external at 127.0.0.1:{port}: cannot be reached (Connection refused)" in outcome.stderr
    assert not (tmp_path / "out.h5").exists()


def test_a_worker_that_starts_late(scan: SimulatedScan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSE_SECONDS", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    late = threading.Event()
    original = socket.create_connection

    def connected(*arguments: Any, **options: Any) -> socket.socket:
        if not late.is_set():
            late.set()
            raise ConnectionRefusedError(111, "Connection refused")
        return original(*arguments, **options)

    with Peer(answer()) as peer:
        port = int(peer.address.rpartition(":")[2])
        monkeypatch.setattr(socket, "create_connection", connected)
        assert list(node(scan, port)(iter(scan.blocks))) == []
    assert late.is_set()


def node(scan: SimulatedScan, port: int) -> ConnectNode:
    configuration = fromstring('<configuration><gadget name="prewhiten"/></configuration>')
    context = Context(header=parse_header(scan.header_xml))
    return ConnectNode(Listening("127.0.0.1", port, configuration), context, Family())


@pytest.mark.parametrize(
    ("script", "text"),
    [
        (lambda talk: None, r"broke off without an error"),
        (lambda talk: talk.complain("oh", 8), r"external at .*: oh$"),
        (lambda talk: (talk.hear_readouts(1), talk.close())[0], r"ended before it had read all its input"),
        (
            lambda talk: (talk.hear_all(), talk.say(b"\xff\xff"))[0],
            r"sent what cannot be read \(wire: message id 65535",
        ),
    ],
)
def test_whatever_it_does_is_noticed(scan: SimulatedScan, script: Callable[[Talk], None], text: str) -> None:
    with nothing_left(), Peer(script) as peer:
        port = int(peer.address.rpartition(":")[2])
        with pytest.raises(RuntimeError, match=rf"external at 127\.0\.0\.1:{port}: .*|{text}") as found:
            list(node(scan, port)(iter(scan.blocks * 200)))
    assert found.match(text)


def test_a_node_that_takes_nothing_holds_nobody_up(scan: SimulatedScan) -> None:
    """It reports an error and reads no more: the thread that feeds it waits in the socket."""
    left = threading.Event()

    def script(talk: Talk) -> None:
        talk.complain("oh", 8)
        left.wait(30)

    with nothing_left(), Peer(script, receive_buffer=4096) as peer:
        port = int(peer.address.rpartition(":")[2])
        with pytest.raises(RuntimeError, match=rf"external at 127\.0\.0\.1:{port}: oh"):
            list(node(scan, port)(iter(scan.blocks * 2000)))
        left.set()


def test_a_worker_behind_a_server(
    scan: SimulatedScan, tmp_path: Path, worker_pipeline: Written, worker_port: int
) -> None:
    worker_pipeline(worker_port)
    server = Server(Policy(folders=(tmp_path,)))
    with nothing_left(), listening(server.handle) as listener, Client(listener.port) as client:
        client.say(FileName("sense_sigma_worker"), *whole(scan))
        assert len(client.hear_all()) == 4
