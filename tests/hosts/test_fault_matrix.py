"""Whatever fails in a scan: the client is told by whom and why, gets no image of it, and nothing is left behind."""

import re
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.gadgetron_double import (
    Double,
    Peer,
    Received,
    Stage,
    Vanish,
    acquisitions,
    client,
    connect,
    execute,
    framing,
    pipeline,
)
from tests.hosts import faulty_gadgets
from tests.hosts.servers import eventually, listening, nothing_left, serving

from voxelsigma.formats.simulate import SimulatedScan
from voxelsigma.gadgets.registry import GADGETS
from voxelsigma.hosts.worker import Worker

BROKEN = "[Stream] ERROR: Received illegal message id from external peer: 1"
TOLD = "[Stream] ERROR: Errors received: \n"
WAYS = ("execute", "connect")

FRONT = '<gadget name="prewhiten"/><gadget name="faulty"><property name="how" value="{}"/></gadget>'
FRONT += '<gadget name="accumulate"/>'
BACK = '<gadget name="coil_maps"/><gadget name="reconstruct"><property name="model" value="sense"/></gadget>'
BACK += '<gadget name="sketch"/>'

Build = Callable[..., str]


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """A worker that lives as long as the tests: each of them finds it as the one before has left it."""
    with pytest.MonkeyPatch.context() as patch, listening(Worker().handle) as listener:
        patch.setitem(GADGETS, "faulty", faulty_gadgets.ENTRY)
        yield listener.port


@pytest.fixture(scope="module")
def way(port: int) -> Build:
    """Pipelines of one way to run the front of a chain, which fails as it is told; the rest is the worker's."""

    def build(name: str, how: str = "never") -> str:
        if name == "connect":
            return pipeline(connect(port, FRONT.format(how) + BACK))
        return pipeline(execute("faulty_gadgets", configuration=FRONT.format(how)), connect(port, BACK))

    return build


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with Stage(tmp_path) as found:
        yield found


@pytest.fixture
def double(stage: Stage) -> Double:
    return stage.double(environment={"PYTHONPATH": faulty_gadgets.FOLDER, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def alone(way: Build, scan: SimulatedScan, tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Images of the scan that nothing happens to."""
    with Stage(tmp_path_factory.mktemp("alone")) as stage:
        found = send(stage.double(), scan, way("connect"))
        assert (found.closed, found.texts) == (True, [])
        return voxels(found)


def send(double: Double, scan: SimulatedScan, xml: str, messages: Any = None, **given: Any) -> Received:
    data = acquisitions(scan.blocks) if messages is None else messages
    return client(double.port, xml, scan.header_xml, data, **{"seconds": 60, **given})


def in_background(*arguments: Any, **given: Any) -> tuple[threading.Thread, list[Received]]:
    found: list[Received] = []
    thread = threading.Thread(target=lambda: found.append(send(*arguments, **given)), daemon=True)
    thread.start()
    return thread, found


def voxels(found: Received) -> list[bytes]:
    return [bytes(image.getHead()) + image.data.tobytes() for image in found.images]


def passes(peer: Peer) -> None:
    for message in peer:
        peer.send(message.raw)
    peer.leave()


def fails(text: str, after: int) -> Callable[[Peer], None]:
    """A node that passes some items, then reports an error."""

    def part(peer: Peer) -> None:
        for _, message in zip(range(after), peer, strict=False):
            peer.send(message.raw)
        peer.leave(error=text)

    return part


def half(scan: SimulatedScan) -> list[bytes]:
    """Messages of the scan up to the middle of the imaging readouts."""
    return acquisitions(scan.blocks)[: len(scan.blocks[0]) + len(scan.blocks[1]) // 2]


def assert_still_served(double: Double, scan: SimulatedScan, xml: str, alone: list[bytes]) -> None:
    found = send(double, scan, xml)
    assert (found.closed, found.texts) == (True, [])
    assert voxels(found) == alone
    assert double.leftovers() == []


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize(
    ("how", "text"),
    [("first", "no chocolate at all"), ("middle", "no chocolate left"), ("end", "no chocolate for you")],
)
def test_a_gadget_raises(
    double: Double, way: Build, port: int, scan: SimulatedScan, alone: list[bytes], name: str, how: str, text: str
) -> None:
    with nothing_left():
        found = send(double, scan, way(name, how))
        assert found.closed
        assert double.leftovers() == []
    who = {"execute": "chain", "connect": "worker"}[name]
    # a neighbour may complain of what it did not get
    assert f"{TOLD}voxelsigma {who}: faulty: {text}\n" in found.texts
    assert all("voxelsigma" in other for other in found.texts)
    if how == "end":
        # the volume was whole before: what has left by then is good
        assert voxels(found) == alone[: len(found.images)]
    else:
        assert found.images == []
    assert [code for _, code in double.exit_codes] == ([1] if name == "execute" else [])
    assert_still_served(double, scan, way("connect"), alone)


@pytest.mark.parametrize(
    ("target", "texts"),
    [
        ("broken_imports.whitening", [f"{TOLD}voxelsigma prewhiten: voxelsigma.gadgets.whitening is broken\n"]),
        ("broken_imports.wire", [f"{TOLD}voxelsigma prewhiten: voxelsigma.gadgets.wire is broken\n"]),
        ("no_such_module.gadget", []),
    ],
)
def test_an_import_fails(double: Double, scan: SimulatedScan, target: str, texts: list[str]) -> None:
    """What is missing before our code runs nobody can tell: that is why there is a `doctor`."""
    found = send(double, scan, pipeline(execute(*target.split("."))))
    assert (found.closed, found.texts, found.images) == (True, texts, [])
    assert double.exit_codes == [(target, 1)]
    assert double.leftovers() == []


def test_a_child_is_killed(double: Double, way: Build, port: int, scan: SimulatedScan, alone: list[bytes]) -> None:
    with nothing_left():
        found = send(double, scan, way("execute", "killed"))
        assert found.closed
        assert double.leftovers() == []
    assert BROKEN in found.texts
    assert found.images == []
    assert [code for _, code in double.exit_codes] == [-9]
    assert_still_served(double, scan, way("connect"), alone)


def test_a_worker_in_a_process_of_its_own(
    double: Double, scan: SimulatedScan, alone: list[bytes], tmp_path: Path
) -> None:
    """It survives a scan with bad data, serves the next one, and is killed in the third."""
    imaging = scan.blocks[1]
    samples = imaging.samples.copy()
    samples[3, 0, 0] = np.nan
    bad = acquisitions([scan.blocks[0], imaging.with_samples(samples)])
    with serving(tmp_path, "worker") as served:
        xml = pipeline(connect(served.port, '<gadget name="prewhiten"/><gadget name="accumulate"/>' + BACK))
        found = send(double, scan, xml, bad)
        assert (found.closed, found.images, len(found.texts)) == (True, [], 1)
        assert f"{TOLD}voxelsigma worker: prewhiten: readout 36 holds NaN or Inf" in found.texts[0]
        assert_still_served(double, scan, xml, alone)

        def killing() -> Iterator[bytes]:
            yield from half(scan)
            served.process.kill()
            served.process.wait(10)
            yield from acquisitions(scan.blocks)[len(half(scan)) :]

        found = send(double, scan, xml, killing())
        assert (found.closed, found.texts, found.images) == (True, [BROKEN], [])
        assert double.leftovers() == []


def big(scan: SimulatedScan, megabytes: int) -> Iterator[bytes]:
    """The scan's noise, then readouts of 160 kB: more than any buffer holds."""
    noise, imaging = scan.blocks
    yield from acquisitions([noise])
    coils = imaging.samples.shape[1]
    header = bytearray(acquisitions([imaging])[0][: 2 + framing.ACQUISITION_HEADER])
    struct.pack_into("<3H", header, 2 + 34, 20_000 // coils, coils, coils)
    readout = bytes(header) + np.ones(20_000, np.complex64).tobytes()
    for _ in range(megabytes * 2**20 // len(readout)):
        yield readout


@pytest.mark.parametrize("name", WAYS)
def test_a_downstream_node_fails_in_a_long_scan(
    double: Double, stage: Stage, port: int, scan: SimulatedScan, name: str
) -> None:
    """Nobody reads our output any more while our input is still written: who stopped reading would hang the scan."""
    failing = connect(stage.listener(fails("downstream: no chocolate", 3)))
    ours = '<gadget name="prewhiten"/><gadget name="faulty"/>'
    node = connect(port, ours) if name == "connect" else execute("faulty_gadgets", configuration=ours)
    with nothing_left():
        found = send(double, scan, pipeline(node, failing), big(scan, 100), seconds=100)
        assert (found.closed, found.texts) == (True, [f"{TOLD}downstream: no chocolate\n"])
        assert "is not read any more" in double.log_text
        assert double.leftovers() == []
    assert [code for _, code in double.exit_codes] == ([1] if name == "execute" else [])


@pytest.mark.parametrize("name", WAYS)
def test_ours_fails_in_a_long_scan(double: Double, port: int, scan: SimulatedScan, name: str) -> None:
    """Who leaves with input unread loses what it has said."""
    ours = '<gadget name="prewhiten"/><gadget name="faulty"><property name="how" value="middle"/></gadget>'
    node = connect(port, ours) if name == "connect" else execute("faulty_gadgets", configuration=ours)
    with nothing_left():
        found = send(double, scan, pipeline(node), big(scan, 100), seconds=100)
        who = {"execute": "chain", "connect": "worker"}[name]
        assert (found.closed, found.texts) == (True, [f"{TOLD}voxelsigma {who}: faulty: no chocolate left\n"])
        assert double.leftovers() == []


def test_ours_fails_downstream_in_a_long_scan(double: Double, port: int, scan: SimulatedScan) -> None:
    node = execute("faulty_gadgets", configuration='<gadget name="prewhiten"/>')
    failing = connect(port, '<gadget name="faulty"><property name="how" value="first"/></gadget>')
    with nothing_left():
        found = send(double, scan, pipeline(node, failing), big(scan, 100), seconds=100)
        assert (found.closed, found.texts) == (True, [f"{TOLD}voxelsigma worker: faulty: no chocolate at all\n"])
        assert double.leftovers() == []
    assert double.exit_codes == [("faulty_gadgets.gadget", 1)]


@pytest.mark.parametrize("name", WAYS)
def test_an_upstream_node_fails(
    double: Double, stage: Stage, way: Build, scan: SimulatedScan, alone: list[bytes], name: str
) -> None:
    """Ours see a normal end of the stream: that is no evidence of completeness."""
    xml = way(name).replace("<stream>", f"<stream>{connect(stage.listener(fails('upstream', len(half(scan)))))}")
    with nothing_left():
        found = send(double, scan, xml)
        assert (found.closed, found.images) == (True, [])
        assert double.leftovers() == []
    assert f"{TOLD}upstream\n" in found.texts
    assert any(re.search(r"accumulate: .* is incomplete: \d+ of 16 lines", text) for text in found.texts)
    assert_still_served(double, scan, way("connect"), alone)


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("reset", [False, True])
def test_the_client_is_gone(
    double: Double, way: Build, scan: SimulatedScan, alone: list[bytes], name: str, reset: bool
) -> None:
    def leaves() -> Iterator[bytes]:
        yield from half(scan)
        raise Vanish(reset=reset)

    with nothing_left():
        found = send(double, scan, way(name), leaves())
        assert found.images == []
        assert double.leftovers(20) == []
    assert any("is incomplete" in text for text in double.errors)
    assert [code for _, code in double.exit_codes] == ([1] if name == "execute" else [])
    assert_still_served(double, scan, way("connect"), alone)


@pytest.mark.parametrize("name", WAYS)
def test_half_a_message_then_silence(
    double: Double, way: Build, scan: SimulatedScan, alone: list[bytes], name: str
) -> None:
    silent, enough = threading.Event(), threading.Event()

    def falls_silent() -> Iterator[bytes]:
        yield from half(scan)
        yield acquisitions(scan.blocks)[-1][:500]
        silent.set()
        assert enough.wait(60)
        raise Vanish

    with nothing_left():
        thread, found = in_background(double, scan, way(name), falls_silent())
        assert silent.wait(60)
        # whatever comes of silence comes in this time, or after any other
        thread.join(1)
        assert thread.is_alive()
        assert double.errors == []
        enough.set()
        thread.join(60)
        assert found[0].images == []
        assert double.leftovers(20) == []
    assert_still_served(double, scan, way("connect"), alone)


@pytest.mark.parametrize("name", WAYS)
def test_two_scans_at_once_of_which_one_fails(
    double: Double, way: Build, scan: SimulatedScan, alone: list[bytes], name: str
) -> None:
    halfway, failed = threading.Event(), threading.Event()

    def slowly() -> Iterator[bytes]:
        yield from half(scan)
        halfway.set()
        assert failed.wait(60)
        yield from acquisitions(scan.blocks)[len(half(scan)) :]

    with nothing_left():
        thread, found = in_background(double, scan, way(name), slowly())
        assert halfway.wait(60)
        other = send(double, scan, way(name, "middle"))
        assert "faulty: no chocolate left" in "".join(other.texts)
        assert other.images == []
        failed.set()
        thread.join(60)
        assert (found[0].closed, found[0].texts) == (True, [])
        assert voxels(found[0]) == alone
        assert double.leftovers() == []
    assert eventually(lambda: sorted(code for _, code in double.exit_codes if code is not None) in ([], [0, 1]))
