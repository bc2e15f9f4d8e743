"""The scanner simulator against a toy server: what is sent and when, what comes back, and how it ends."""

import shutil
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import h5py
import ismrmrd
import numpy as np
import pytest
from ismrmrd.hdf5 import waveform_dtype
from tests.hosts.mrd_peer import ACQUISITION, CLOSE, CONFIG, FILENAME, HEADER, WAVEFORM, Peer, Talk, answer, image

from voxelsigma.formats.image_file import read_series
from voxelsigma.formats.readouts import ReadoutBlock
from voxelsigma.formats.simulate import SimulatedScan
from voxelsigma.gadgets.items import VolumeKey
from voxelsigma.hosts.mrd_client import parse_address
from voxelsigma.hosts.pipeline import PIPELINE_FOLDER
from voxelsigma.hosts.send import ArrivedImage, Player, Report, SeriesLatency, latencies, report_lines, send
from voxelsigma.hosts.tape import recorded

READOUTS = 54
Raw = Callable[..., Path]


@pytest.fixture(autouse=True)
def _no_thread_left() -> Iterator[None]:
    yield
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("mrd-")]


def nothing(*_: object) -> None:
    pass


def acquisitions(path: Path) -> list[bytes]:
    """The readouts of a file as ismrmrd-python writes them."""
    with closing(ismrmrd.Dataset(path, create_if_needed=False)) as dataset:
        return [dataset.read_acquisition(number).to_bytes() for number in range(dataset.number_of_acquisitions())]


def test_a_scan_is_sent_whole_and_in_order(scan: SimulatedScan, scan_file: Path) -> None:
    with Peer(answer(image())) as peer:
        report = send(scan_file, peer.address, pipeline="sense_sigma.xml")
    assert [identifier for identifier, _ in peer.heard] == [FILENAME, HEADER, *[ACQUISITION] * READOUTS, CLOSE]
    assert peer.heard[0][1] == b"sense_sigma.xml".ljust(1024, b"\0")
    assert peer.heard[1][1] == struct.pack("<I", len(scan.header_xml)) + scan.header_xml
    assert [content for _, content in peer.heard[2:-1]] == acquisitions(scan_file)
    assert (report.readouts, report.waveforms, report.dropped) == (READOUTS, 0, {})


@pytest.mark.parametrize("name", ["sense_sigma.xml", str(PIPELINE_FOLDER / "sense_sigma.xml")])
def test_a_pipeline_is_sent_as_xml(scan_file: Path, name: str) -> None:
    with Peer(answer(image())) as peer:
        send(scan_file, peer.address, pipeline=name, send_xml=True)
    xml = (PIPELINE_FOLDER / "sense_sigma.xml").read_bytes()
    assert peer.heard[0] == (CONFIG, struct.pack("<I", len(xml)) + xml)


def test_waveforms_go_with_the_readout_they_precede(scan_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "scan.h5"
    shutil.copy(scan_file, path)
    records = np.zeros(3, dtype=waveform_dtype)
    # readout n (from 0) has the time stamp 2n: before the first, between the 10th and 11th, after all
    records["head"]["time_stamp"] = [0, 19, 1000]
    records["head"]["channels"], records["head"]["number_of_samples"] = 1, 2
    for number in range(3):
        records["data"][number] = np.array([number, 7], dtype=np.uint32)
    with h5py.File(path, "r+") as file:
        file["dataset"].create_dataset("waveforms", data=records)
    with Peer(answer(image())) as peer:
        report = send(path, peer.address, pipeline="x", tr=0.001)
    kinds = [identifier for identifier, _ in peer.heard[2:-1]]
    assert [number for number, kind in enumerate(kinds) if kind == WAVEFORM] == [0, 11, 56]
    waves = [content for kind, content in peer.heard if kind == WAVEFORM]
    assert [content[-8:] for content in waves] == [struct.pack("<2I", number, 7) for number in range(3)]
    assert [content for kind, content in peer.heard if kind == ACQUISITION] == acquisitions(path)
    assert (report.readouts, report.waveforms) == (READOUTS, 3)


class FakeSession:
    """A clock that only waiting and sending move."""

    def __init__(self, cost: Callable[[int], float]) -> None:
        self.now = 100.0
        self.began: list[float] = []
        self._cost = cost

    def wait_until(self, moment: float) -> None:
        self.now = max(self.now, moment)

    def send(self, content: bytes) -> None:
        self.began.append(self.now)
        self.now += self._cost(len(self.began) - 1)


def test_the_pace_does_not_drift(scan_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the first message is the opening; the socket blocks for 3.5 TR at readout 10, else takes a tenth of a TR
    session = FakeSession(lambda number: 0.035 if number == 11 else 0.001)
    monkeypatch.setattr("time.monotonic", lambda: session.now)
    with recorded(scan_file, "dataset", nothing) as tape:
        player = Player(tape, b"opening", 0.01)
        player(session)  # type: ignore[arg-type]  # what of a session it uses
    start = session.began[1]
    began = np.array(session.began[1:]) - start
    expected = np.arange(READOUTS) * 0.01
    # readouts 11 to 13 make up for the delay at once
    expected[11:14] = [0.135, 0.136, 0.137]
    np.testing.assert_allclose(began, expected, atol=1e-9)
    report = player.report(session.now, (), {})
    # done at 135, 136, 137 ms, due at 100, 110, 120 and (138) 130 ms
    assert report.late == 3
    assert report.lag == pytest.approx(0.035)
    assert report.sending == pytest.approx(0.01 * (READOUTS - 1) + 0.001)


def test_readouts_are_never_early(scan_file: Path) -> None:
    with Peer(answer(image())) as peer:
        report = send(scan_file, peer.address, pipeline="x", tr=0.004)
    assert report.sending >= 0.004 * (READOUTS - 1)
    assert report.closing >= 0


def test_images_are_written_as_they_came(scan_file: Path, tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((2, 1, 4, 6)).astype(np.float32)
    shown = [image(1, values[0], "an image", slice=3), image(1, values[1]), image(2000, 0.5, "a map")]
    output = tmp_path / "out.h5"
    with Peer(answer(*shown)) as peer:
        report = send(scan_file, peer.address, pipeline="x", output=output, output_group="images")
    first, second = read_series(output, "images")
    assert (first.index, second.index) == (1, 2000)
    np.testing.assert_array_equal(first.data[:, 0], values)
    np.testing.assert_array_equal(second.data, np.full((1, 1, 1, 4, 6), 0.5, np.float32))
    assert [bytes(head) for head in first.headers] == [bytes(found.getHead()) for found in shown[:2]]
    assert [dict(meta) for meta in first.attributes] == [{"ImageComments": "an image"}, {}]
    assert [(series.index, series.images, series.comment) for series in report.series] == [
        (1, 2, "an image"),
        (2000, 1, "a map"),
    ]


def test_latencies_by_slice(raw: Raw) -> None:
    """Two slices; the map of the first is shown while the second is under way."""
    path = raw(slices=2)
    noise = 32

    def script(talk: Talk) -> None:
        talk.hear()
        talk.hear()
        talk.show(image(1, slice=0))
        talk.hear_readouts(noise + 22)
        talk.show(image(1, slice=0), image(2000, slice=0))
        talk.hear_all()
        talk.show(image(1, slice=1), image(1, slice=1, repetition=4), image(2000, slice=1))
        talk.close()

    with Peer(script) as peer:
        report = send(path, peer.address, pipeline="x", tr=0.002)
    image_series, map_series = report.series
    # one came before its slice was sent, one is of a repetition that is none of the scan's
    assert (image_series.images, len(image_series.latencies), image_series.unmatched) == (4, 2, 2)
    assert (map_series.images, len(map_series.latencies), map_series.unmatched) == (2, 2, 0)
    assert all(0 <= latency < 10 for latency in image_series.latencies + map_series.latencies)


@pytest.mark.parametrize("flagged", [True, False])
def test_where_a_slice_ends(raw: Raw, scan: SimulatedScan, flagged: bool) -> None:
    """On the last flagged readout, a navigator here, or else on the last imaging one."""
    block = scan.blocks[1]
    headers = block.headers.copy()
    headers["flags"] &= ~np.uint64(1 << (ismrmrd.ACQ_LAST_IN_SLICE - 1))
    headers["flags"][-2:] |= np.uint64(1 << (ismrmrd.ACQ_IS_NAVIGATION_DATA - 1))
    if flagged:
        headers["flags"][-2] |= np.uint64(1 << (ismrmrd.ACQ_LAST_IN_SLICE - 1))
    path = raw({"blocks": [scan.blocks[0], ReadoutBlock(headers, block.samples, block.trajectory)]})
    with recorded(path, "dataset", nothing) as tape:
        assert tape.last == {VolumeKey(): READOUTS - 2 if flagged else READOUTS - 3}


def test_each_volume_has_its_end(raw: Raw) -> None:
    with recorded(raw(slices=2, repetitions=2, averages=2), "dataset", nothing) as tape:
        ends = tape.last
    keys = [VolumeKey(slice=part, repetition=turn) for turn in range(2) for part in range(2)]
    assert sorted(ends, key=lambda key: ends[key]) == keys
    assert ends[keys[-1]] == tape.readouts - 1


def test_latencies_are_counted_from_what_was_sent() -> None:
    ends = {VolumeKey(): (10.0, 10.5), VolumeKey(slice=1): (20.0, 20.5)}
    images = [
        ArrivedImage(7, "name", VolumeKey(), 12.5),
        # here before the sending thread noted the end, and before the readout was sent at all
        ArrivedImage(7, "", VolumeKey(slice=1), 20.25),
        ArrivedImage(7, "", VolumeKey(slice=1), 19.0),
        ArrivedImage(1, "", VolumeKey(slice=2), 30.0),
    ]
    assert latencies(images, ends) == (SeriesLatency(1, "", 1, ()), SeriesLatency(7, "name", 3, (2.0, 0.0)))


def test_the_report_is_a_table() -> None:
    report = Report(
        readouts=100,
        waveforms=3,
        tr=0.004,
        late=2,
        lag=0.0123,
        sending=0.4,
        closing=1.25,
        series=(SeriesLatency(1, "an image", 3, (0.1, 0.3, 0.25)), SeriesLatency(2000, "", 2, ())),
        dropped={"Waveform": 3},
    )
    assert report_lines(report) == [
        "sent 100 readouts and 3 waveforms in 0.40 s, every 4 ms; 2 were late by more than that, "
        "the largest lag was 12.3 ms",
        "the server closed 1.250 s after the last",
        "series  images  median [s]  max [s]  no slice  comment",
        "     1       3       0.250    0.300         0  an image",
        "  2000       2           -        -         2",
        "not images, left out: 3 Waveform",
    ]


def test_a_server_without_images(scan_file: Path, tmp_path: Path) -> None:
    with Peer(answer()) as peer:
        report = send(scan_file, peer.address, pipeline="x")
    assert report_lines(report)[-1] == "no images came"
    output = tmp_path / "out.h5"
    with Peer(answer()) as peer, pytest.raises(ValueError, match="no image came out of x; nothing was written"):
        send(scan_file, peer.address, pipeline="x", output=output)
    assert list(tmp_path.iterdir()) == []


def test_other_items_are_counted(scan_file: Path) -> None:
    def script(talk: Talk) -> None:
        talk.hear_all()
        talk.say(b"".join(struct.pack("<H", kind) + content for kind, content in talk.heard if kind == ACQUISITION))
        talk.close()

    with Peer(script) as peer:
        assert send(scan_file, peer.address, pipeline="x").dropped == {"ReadoutBlock": READOUTS}


def test_ipv6(scan_file: Path) -> None:
    try:
        peer = Peer(answer(image()), host="::1")
    except OSError:
        pytest.skip("this machine has no IPv6")
    with peer:
        assert peer.address.startswith("[::1]:")
        assert send(scan_file, peer.address, pipeline="x").readouts == READOUTS


@pytest.mark.parametrize("text", ["localhost:9002", "10.0.0.1:1", "[fe80::1%eth0]:65535"])
def test_an_address_survives(text: str) -> None:
    assert str(parse_address(text)) == text


def test_progress_is_told(scan_file: Path) -> None:
    told: list[tuple[str, int, int]] = []
    with Peer(answer(image())) as peer:
        send(scan_file, peer.address, pipeline="x", tr=0.004, progress=lambda *report: told.append(report))
    assert told[0] == ("read", READOUTS, READOUTS)
    assert all(total == READOUTS for stage, _, total in told if stage == "readouts")
    assert told[-1] == ("images", 1, 0)
