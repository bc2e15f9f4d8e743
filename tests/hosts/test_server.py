"""The embedded server with clients of all kinds, well-behaved and other."""

import json
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ismrmrd import Acquisition, Image
from tests.gadgets.storage_server import storage_service
from tests.hosts.servers import Client, eventually, listening, nothing_left, series_of, whole

from voxelsigma.formats.image_file import read_series
from voxelsigma.formats.simulate import SimulatedScan
from voxelsigma.gadgets.wire import Close, Configuration, FileName, ScanHeaderText, message
from voxelsigma.hosts import server as module
from voxelsigma.hosts import worker
from voxelsigma.hosts.listener import LOOPBACK
from voxelsigma.hosts.pipeline import PIPELINE_FOLDER
from voxelsigma.hosts.replay import replay
from voxelsigma.hosts.send import send
from voxelsigma.hosts.server import Policy, Server

SENSE = FileName("sense_sigma.xml")
LEGACY = (
    "<gadgetronStreamConfiguration><gadget><name>x</name><dll>y</dll>"
    "<classname>{}</classname></gadget></gadgetronStreamConfiguration>"
)


@pytest.fixture(scope="module")
def server() -> Server:
    return Server(Policy(idle_seconds=20.0))


@pytest.fixture(scope="module")
def port(server: Server) -> Iterator[int]:
    with listening(server.handle, LOOPBACK) as listener:
        yield listener.port


@pytest.fixture(scope="module")
def replayed(scan_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """Voxels of each series that replay makes of the small scan."""
    output = tmp_path_factory.mktemp("replayed") / "out.h5"
    replay(scan_file, "sense_sigma.xml", output)
    return {series.index: series.data[:, 0] for series in read_series(output)}


def assert_equal_to(replayed: dict[int, Any], items: list[Any]) -> None:
    found = series_of(items)
    assert sorted(found) == sorted(replayed) == [1, 2000, 2100, 2200]
    for index, images in found.items():
        voxels = np.stack([image.data[0] for image in images])
        np.testing.assert_allclose(voxels, replayed[index], atol=1e-5 * replayed[index].max())


def picture(series: int, dtype: str = "int16", size: int = 4) -> Image:
    array = np.arange(2 * size * size).reshape(2, size, size).astype(dtype)
    return Image.from_array(array, acquisition=Acquisition(), transpose=False, image_series_index=series)


@pytest.mark.parametrize("name", ["sense_sigma.xml", "sense_sigma"])
@pytest.mark.parametrize("host", LOOPBACK)
def test_a_client_names_a_pipeline(
    port: int, scan: SimulatedScan, replayed: dict[int, Any], name: str, host: str
) -> None:
    with Client(port, host) as client:
        client.say(FileName(name), *whole(scan))
        assert_equal_to(replayed, client.hear_all())


def test_our_own_client(port: int, scan_file: Path, tmp_path: Path, replayed: dict[int, Any]) -> None:
    report = send(scan_file, f"[::1]:{port}", pipeline="sense_sigma", output=tmp_path / "out.h5")
    assert [series.images for series in report.series] == [1, 1, 1, 1]
    assert [series.index for series in read_series(tmp_path / "out.h5")] == sorted(replayed)


@pytest.mark.parametrize("before", [b"", b"\xef\xbb\xbf"])
def test_a_client_sends_its_pipeline_where_that_is_allowed(
    port: int, scan: SimulatedScan, replayed: dict[int, Any], before: bytes
) -> None:
    xml = Configuration(before + (PIPELINE_FOLDER / "sense_sigma.xml").read_bytes() + b"\0")
    with listening(Server(Policy(allow_xml=True)).handle) as listener, Client(listener.port) as client:
        client.say(xml, *whole(scan))
        assert_equal_to(replayed, client.hear_all())
    with Client(port) as client:
        client.say(xml, *whole(scan))
        assert (
            "takes no pipelines from clients: name one of its own, or start it with --allow-xml" in client.complaint()
        )


def test_a_name_where_others_send_the_xml(port: int, scan: SimulatedScan, replayed: dict[int, Any]) -> None:
    with Client(port) as client:
        client.say(Configuration(b"sense_sigma\0"), *whole(scan))
        assert_equal_to(replayed, client.hear_all())


def test_json_of_a_console_sets_properties(port: int, scan: SimulatedScan) -> None:
    """The pipeline's name as 1,024 bytes, header, JSON, items, CLOSE."""
    values = {
        "config": "sense_sigma",
        "sketch.probes": 8,
        "sketch.estimator": "sketch",
        "sketch_maps": "magnitude",
        "freq": "1",
    }
    header, *items = whole(scan)
    with Client(port) as client:
        client.say(FileName("unrolled_sigma"), header, json.dumps({"parameters": values}), "a remark", *items)
        found = series_of(client.hear_all())
    assert sorted(found) == [1, 2000]
    assert found[2000][0].meta["voxelsigma_probes"] == "8"
    assert found[1][0].meta["voxelsigma_model"] == "sense"


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"sketch.probs": 8}, "sketch: unknown property 'probs'; known are chunk, "),
        ({"sketch.probes": 1}, "sketch: property 'probes' must be an integer from 2 to 65536, got '1'"),
        ({"prewhiten.noise_file": "/etc/passwd"}, "'/etc/passwd' is refused; a client may not name files"),
        ({"reconstruct.model": "card.yaml"}, "'card.yaml' is refused; a client may not name files of the server"),
        ({"config": "../secret"}, "pipeline '../secret': expected a plain file name"),
        ({"coil_maps.\ud800": "x"}, "coil_maps: unknown property '?'"),
    ],
)
def test_bad_parameters(port: int, scan: SimulatedScan, values: dict[str, Any], text: str) -> None:
    header, *items = whole(scan)
    with Client(port) as client:
        client.say(SENSE, header, json.dumps({"parameters": values}), *items)
        assert text in client.complaint()


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with a pipeline that whitens and does no more."""
    (tmp_path / "own.xml").write_text(
        "<configuration><version>2</version><stream><external>"
        '<execute name="voxelsigma.gadgets.prewhiten" target="gadget" type="python"/></external>'
        "</stream></configuration>"
    )
    return tmp_path


def test_a_text_that_has_no_bytes_is_told_all_the_same(scan: SimulatedScan, own: Path) -> None:
    """JSON may hold half a character, which may get into the error."""
    header, *items = whole(scan)
    with listening(Server(Policy(folders=(own,))).handle) as listener, Client(listener.port) as client:
        client.say(FileName("own"), header, '{"parameters": {"sketch.\\ud800": 1}}', *items)
        assert "parameter 'sketch.?': own.xml has no gadget 'sketch'" in client.complaint()


@pytest.mark.parametrize(
    ("first", "text"),
    [
        (FileName("nothing.xml"), "pipeline 'nothing.xml': there is none of that name; there are modl_sigma.xml"),
        (FileName("../pipelines/sense_sigma.xml"), "expected a plain file name, without '/' or '..'"),
        (FileName("/etc/passwd"), "expected a plain file name"),
        (FileName(""), "pipeline '': expected a plain file name"),
        (FileName(".hidden"), "expected a plain file name"),
        (Configuration(b""), "pipeline '': expected a plain file name"),
        (Configuration(b"sense\0sigma"), "expected a plain file name"),
        (Configuration(LEGACY.format("OtherGadget").encode()), "this server takes no pipelines from clients"),
        (FileName("sense_sigma_hybrid.xml"), "the C++ gadget NoiseAdjust (NoiseAdjustGadget) needs a real Gadgetron"),
        (struct.pack("<HI", 2, 2**20 + 1), "a configuration claims 1048577 bytes; at most 1048576 are accepted"),
        (struct.pack("<H", 999), "message id 999 after 0 bytes is unknown"),
        (ScanHeaderText(b"<x/>"), "expected the name of a pipeline first, got ScanHeaderText"),
        (message(SENSE) + message(SENSE), "expected the ISMRMRD header behind the pipeline, got FileName"),
        (message(SENSE) + message(ScanHeaderText(b"no XML")), "header"),
        (
            message(SENSE) + message(ScanHeaderText(b'<!DOCTYPE x [<!ENTITY a "b">]><x>&a;</x>')),
            "document types and entities are refused",
        ),
        (message(SENSE) + struct.pack("<HI", 3, 2**31), "a header claims 2147483648 bytes; at most 16777216"),
    ],
)
def test_bad_beginnings(port: int, scan: SimulatedScan, first: Any, text: str) -> None:
    with Client(port) as client:
        client.say(first, *whole(scan))
        client.socket.shutdown(socket.SHUT_WR)
        assert text in client.complaint()


BOMB = '<!DOCTYPE a [<!ENTITY b "bb"><!ENTITY c "&b;&b;">]>'


@pytest.mark.parametrize(
    ("xml", "text"),
    [
        (LEGACY.format("OtherGadget"), "expected <configuration><version>2</version>"),
        (BOMB + "<configuration>&c;</configuration>", "document types and entities are refused"),
        ("<configuration>", "not well-formed XML"),
        ("<a>" * 140_000 + "</a>" * 140_000, "elements are nested more than 32 deep"),
    ],
)
def test_bad_pipelines(scan: SimulatedScan, xml: str, text: str) -> None:
    with listening(Server(Policy(allow_xml=True)).handle) as listener, Client(listener.port) as client:
        client.say(Configuration(xml.encode()), *whole(scan))
        assert text in client.complaint()


def test_the_stock_clients_noise_query_is_answered_and_never_executed(
    port: int, scan: SimulatedScan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Server, "_scan", lambda *_: pytest.fail("executed"))
    query = Configuration(LEGACY.format("NoiseSummaryGadget").encode())
    with Client(port) as client:
        client.say(query, ScanHeaderText(scan.header_xml), Close())
        assert client.hear_all() == []
    # a client that waits for the answer before it says more
    with Client(port) as client:
        client.say(query)
        assert isinstance(client.hear(), Close)
        client.say(ScanHeaderText(scan.header_xml), Close())
        assert client.is_over()


def test_a_truncated_scan_gives_counts_and_no_image(port: int, scan: SimulatedScan) -> None:
    half = scan.blocks[1].select(slice(0, 11))
    with Client(port) as client:
        client.say(SENSE, ScanHeaderText(scan.header_xml), scan.blocks[0], half, Close())
        assert "the volume slice 0 is incomplete: 8 of 16 lines" in client.complaint()


def test_a_stream_that_breaks_off(port: int, scan: SimulatedScan) -> None:
    with Client(port) as client:
        client.say(SENSE, *whole(scan)[:-1])
        client.socket.shutdown(socket.SHUT_WR)
        found = client.hear_all()
    # what was whole has left
    assert "stream ends after 0 of 2 bytes of a message id, 56 messages after its beginning" in found[-1]


def test_a_scan_without_data(port: int, scan: SimulatedScan) -> None:
    with Client(port) as client:
        client.say(SENSE, ScanHeaderText(scan.header_xml), Close())
        assert "the stream ended without an imaging readout" in client.complaint()


def test_a_pipeline_that_makes_no_image(scan: SimulatedScan, own: Path) -> None:
    with listening(Server(Policy(folders=(own,))).handle) as listener, Client(listener.port) as client:
        client.say(FileName("own"), *whole(scan))
        assert "no image came out of own.xml" in client.complaint()


@pytest.mark.parametrize(
    ("size", "text"),
    [
        ((3, 4, 2), "or the item before it does not have the size that its header states"),
        ((4, 400, 2000), "of 6400000 bytes of an IMAGE of shape (1, 2000, 400, 4)"),
        ((65535, 65535, 2), "an IMAGE of shape (1, 2, 65535, 65535) claims 17179344900 bytes; at most 4294967296"),
    ],
)
def test_an_image_whose_size_is_not_that_of_its_header(
    port: int, scan: SimulatedScan, size: tuple[int, int, int], text: str
) -> None:
    content = bytearray(message(picture(7)))
    # the matrix, behind message id, version, data type, flags and measurement
    content[18:24] = struct.pack("<3H", *size)
    with Client(port) as client:
        client.say(SENSE, ScanHeaderText(scan.header_xml), bytes(content), scan.blocks[0], Close())
        client.socket.shutdown(socket.SHUT_WR)
        assert text in client.hear_all()[-1]


def test_images_of_a_client_pass_with_their_type(port: int, scan: SimulatedScan, replayed: dict[int, Any]) -> None:
    header, *items = whole(scan)
    with Client(port) as client:
        client.say(SENSE, header, picture(7), picture(7), picture(8, "int64"), *items)
        *found, last = sent = client.hear_all()
    assert [int(image.image_series_index) for image in sent[:3]] == [7, 7, 8]
    assert found[0].data.dtype == np.int16
    np.testing.assert_array_equal(found[2].data, picture(8, "int64").data)
    assert_equal_to(replayed, [*sent[3:-1], last])


@pytest.mark.parametrize(
    ("second", "text"),
    [
        (picture(7, "float32"), "and goes on with float32"),
        (picture(7, size=5), "and goes on with int16 of shape (1, 2, 5, 5)"),
    ],
)
def test_a_series_that_changes(port: int, scan: SimulatedScan, second: Image, text: str) -> None:
    header, *items = whole(scan)
    with Client(port) as client:
        client.say(SENSE, header, picture(7), second, *items)
        first, complaint = client.hear_all()
    assert first.image_series_index == 7
    assert "image series 7 began with int16 images of shape (1, 2, 4, 4)" in complaint
    assert text in complaint


def test_silence_at_the_beginning(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "GREETING_SECONDS", 0.2)
    with nothing_left():
        with Client(port) as client:
            assert client.is_over()
        # half a word is not nothing
        monkeypatch.setattr(worker, "GREETING_SECONDS", 1.0)
        monkeypatch.setattr(module, "STALL_SECONDS", 0.2)
        with Client(port) as client:
            client.say(message(SENSE)[:100])
            assert "nothing came for 0.2 s, after 98 of 1024 bytes of a FILENAME" in client.complaint()
        with Client(port) as client:
            client.say(SENSE)
            assert "nothing came for 1 s" in client.complaint()


def test_half_a_message_then_silence(port: int, scan: SimulatedScan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STALL_SECONDS", 0.3)
    with nothing_left(), Client(port) as client:
        client.say(SENSE, ScanHeaderText(scan.header_xml), message(scan.blocks[0])[:1000])
        assert "nothing came for 0.3 s, after " in client.complaint()


def test_silence_between_messages(scan: SimulatedScan) -> None:
    with nothing_left(), listening(Server(Policy(idle_seconds=0.5)).handle) as listener:
        with Client(listener.port) as client:
            client.say(SENSE, ScanHeaderText(scan.header_xml))
            assert "nothing came for 0.5 s behind the header" in client.complaint()
        with Client(listener.port) as client:
            client.say(SENSE, ScanHeaderText(scan.header_xml), scan.blocks[0])
            assert "nothing came for 0.5 s, and no CLOSE" in client.complaint()


def test_a_client_that_vanishes_takes_nobody_along(
    server: Server, port: int, scan: SimulatedScan, replayed: dict[int, Any]
) -> None:
    failed = server.tally.report()["failed"]
    with nothing_left(), Client(port) as lasting:
        lasting.say(SENSE, ScanHeaderText(scan.header_xml), scan.blocks[0])
        with Client(port) as client:
            client.say(SENSE, ScanHeaderText(scan.header_xml), scan.blocks[0])
            # leaves by a reset
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert eventually(lambda: server.tally.report()["failed"] == failed + 1)
        lasting.say(scan.blocks[1], Close())
        assert_equal_to(replayed, lasting.hear_all())


def test_a_client_that_does_not_read(scan: SimulatedScan) -> None:
    server = Server(Policy(idle_seconds=0.5))
    big = picture(7, "int16", 1500)
    with nothing_left(), listening(server.handle) as listener, Client(listener.port, receive_buffer=4096) as client:
        client.say(SENSE, ScanHeaderText(scan.header_xml), *[big] * 4)
        # it is not waited for longer than for a silent one
        assert eventually(lambda: server.tally.report()["failed"] == 1)


def test_an_error_reaches_a_client_that_is_still_sending(port: int, scan: SimulatedScan) -> None:
    big = message(picture(8, "int16", 1000))
    heard: list[Any] = []
    with Client(port) as client:
        client.say(SENSE, ScanHeaderText(scan.header_xml), picture(7), picture(7, size=5))
        listener = threading.Thread(target=lambda: heard.extend(client.hear_all()))
        listener.start()
        # far more than the buffers of a connection hold, and it is not cut off before its end
        for _ in range(25):
            client.say(big)
        client.say(Close())
        listener.join(60)
    assert "image series 7 began with" in heard[-1]


def test_two_scans_at_once_of_which_one_fails(
    server: Server, port: int, scan: SimulatedScan, replayed: dict[int, Any]
) -> None:
    header, noise, imaging, end = whole(scan)
    with Client(port) as good, Client(port) as bad:
        good.say(SENSE, header, noise, imaging.select(slice(0, 5)))
        bad.say(SENSE, header, noise, imaging.select(slice(0, 5)), struct.pack("<H", 999), end)
        assert "message id 999" in bad.complaint()
        assert server.tally.report()["running"] >= 1
        good.say(imaging.select(slice(5, len(imaging))), end)
        assert_equal_to(replayed, good.hear_all())


def test_a_noise_scan_is_kept_or_refused(port: int, scan: SimulatedScan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GADGETRON_STORAGE_ADDRESS", raising=False)
    with Client(port) as client:
        client.say(SENSE, ScanHeaderText(scan.header_xml), scan.blocks[0], Close())
        assert "the stream holds noise readouts only (32) and no imaging readout" in client.complaint()
    with storage_service() as storage, Client(port) as client:
        monkeypatch.setenv("GADGETRON_STORAGE_ADDRESS", storage.address)
        client.say(SENSE, ScanHeaderText(scan.header_xml), scan.blocks[0], Close())
        assert client.hear_all() == []
        assert len(storage.blobs) == 1
