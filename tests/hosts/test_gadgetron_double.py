"""The double behaves as the measured server does: recordings, configurations, and what travels where."""

import json
import os
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from tests.gadgetron_double import (
    TOYS,
    Double,
    Message,
    Peer,
    Received,
    Stage,
    Vanish,
    acquisitions,
    client,
    connect,
    execute,
    framing,
    image_message,
    messages_of,
    pipeline,
    reserialised,
    samples_of,
)
from tests.gadgetron_double.framing import ACQUISITION, BUCKET, IMAGE_ARRAY, RECON_DATA, TEXT, WAVEFORM

from voxelsigma.formats.simulate import SimulatedScan

ALL = ("Acquisition", "Waveform", "Image", "Buffer", "IsmrmrdImageArray", "AcquisitionBucket")

# items counted by hand; each recording has a configuration, a header and a CLOSE besides
RECORDINGS = {
    "snr_raw": {ACQUISITION: 69},
    "snr_whitened": {ACQUISITION: 68},
    "snr_bucket": {BUCKET: 1},
    "snr_recondata": {RECON_DATA: 1},
    "snr_recondata_ref": {RECON_DATA: 1},
    "snr_imagearray": {IMAGE_ARRAY: 3},
    "wav_raw": {ACQUISITION: 1 + 128, WAVEFORM: 3},
    "wav_bucket": {BUCKET: 1},
}


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with Stage(tmp_path) as found:
        yield found


def passes(peer: Peer) -> None:
    for message in peer:
        peer.send(message.raw)
    peer.leave()


def send(double: Double, scan: SimulatedScan, messages: Any = None, **given: Any) -> Received:
    given = {"configuration": "some_name.xml", "seconds": 30, **given}
    data = acquisitions(scan.blocks) if messages is None else messages
    return client(double.port, header=scan.header_xml, messages=data, **given)


def identifiers(messages: Any) -> list[int]:
    return [message.identifier for message in messages]


@pytest.mark.parametrize("name", RECORDINGS)
def test_every_recording_is_walked_to_its_last_byte(shared_data: Path, name: str) -> None:
    content = (shared_data / "wire" / f"{name}.bin").read_bytes()
    found = list(messages_of(content))
    assert b"".join(message.raw for message in found) == content
    assert identifiers(found[:2]) == [framing.CONFIG, framing.HEADER]
    assert identifiers(found[-1:]) == [framing.CLOSE]
    assert Counter(identifiers(found[2:-1])) == RECORDINGS[name]
    for size in np.linspace(1, len(content) - 3, 20, dtype=int):
        cut = content[:size]
        starts = np.cumsum([0, *(len(message.raw) for message in found)])
        if size not in starts:
            with pytest.raises(EOFError, match="the connection ends after"):
                list(messages_of(cut))


def test_a_stock_node_gets_and_returns_every_recording_that_the_package_can_write(
    shared_data: Path, scan: SimulatedScan, stage: Stage
) -> None:
    names = [name for name, items in RECORDINGS.items() if BUCKET not in items]
    content = [(shared_data / "wire" / f"{name}.bin").read_bytes() for name in names]
    sent = [message for one in content for message in messages_of(one) if message.identifier in framing.NODE]
    served = stage.double(execute("stock_toys", "passes"), readers=ALL, writers=ALL)
    found = send(served, scan, [message.raw for message in sent])
    assert (found.closed, found.texts) == (True, []), served.log_text
    assert identifiers(found.messages) == identifiers(sent)
    assert [len(message.raw) for message in found.messages] == [len(message.raw) for message in sent]
    assert [message.raw for message in found.messages if message.identifier == ACQUISITION] == [
        message.raw for message in sent if message.identifier == ACQUISITION
    ]
    assert served.exit_codes == [("stock_toys.passes", 0)]
    assert served.leftovers() == []


def test_buckets_and_everything_else_are_forwarded_byte_by_byte(
    shared_data: Path, scan: SimulatedScan, stage: Stage
) -> None:
    content = [(shared_data / "wire" / f"{name}.bin").read_bytes() for name in RECORDINGS]
    sent = [message.raw for one in content for message in messages_of(one) if message.identifier in framing.NODE]
    sent.append(image_message(np.arange(24, dtype=np.float32).reshape(2, 3, 4), {"role": "map"}))
    served = stage.double(connect(stage.listener(passes)), connect(stage.listener(passes)), readers=ALL, writers=ALL)
    found = send(served, scan, sent)
    assert (found.closed, found.texts) == (True, [])
    assert [message.raw for message in found.messages] == sent
    np.testing.assert_array_equal(found.images[0].data[0], np.arange(24).reshape(2, 3, 4))
    assert served.leftovers() == []


def test_a_configuration_arrives_as_the_server_writes_it(shared_data: Path) -> None:
    """Comments dropped, indented again; the recordings' own is a fixed point."""
    (config, *_) = messages_of((shared_data / "wire" / "snr_raw.bin").read_bytes())
    given = '<configuration><!-- why --><gadget   name="prewhiten"><property name="emit_covariance" value="true"/>'
    parsed = ElementTree.fromstring(given + "</gadget></configuration>")
    assert reserialised(parsed) == config.raw[6:]
    assert reserialised(ElementTree.fromstring(config.raw[6:])) == config.raw[6:]
    assert reserialised(None) == b'<?xml version="1.0"?>\n'


def test_what_a_child_is_started_with(scan: SimulatedScan, stage: Stage, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    note = tmp_path / "note.json"
    served = stage.double(
        execute("stock_toys", "writes_down", '<!-- no --><gadget name="s"><property name="a" value="1"/></gadget>'),
        environment={"TOYS_FILE": str(note), "GADGETRON_HOME": "/opt/gadgetron"},
        storage="http://127.0.0.1:9",
        folder=tmp_path / "here",
    )
    assert (send(served, scan).closed, served.exit_codes) == (True, [("stock_toys.writes_down", 0)]), served.log_text
    found = json.loads(note.read_text())
    assert found["arguments"][2:] == ["stock_toys", "writes_down"]
    assert found["arguments"][1].isdigit()
    assert found["folder"] == str(tmp_path / "here")
    assert found["storage"] == "http://127.0.0.1:9"
    assert found["path"].split(os.pathsep) == [TOYS, "/opt/gadgetron/share/gadgetron/python"]
    assert found["configuration"] == (
        '<?xml version="1.0"?>\n<configuration>\n\t<gadget name="s">\n\t\t<property name="a" value="1" />\n'
        "\t</gadget>\n</configuration>\n"
    )
    assert found["header"].encode() == scan.header_xml
    assert found["items"] == ["Acquisition"] * len(acquisitions(scan.blocks))
    assert "written to stdout" in served.log_text


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (("value=", "size="), "ERROR: Unable to parse property <property"),
        (('value="1"/>', ">1</property>"), "ERROR: Unable to parse property <property"),
        (('value="1"/>', 'value="a@b"/><name>n</name>'), "ERROR: map::at"),
        (("<version>2</version>", ""), "ERROR: the double has no gadgets for a <configuration>"),
        (("<stream>", "<stream><gadget><classname>NoiseAdjustGadget</classname></gadget>"), "NoiseAdjustGadget"),
        (("external>", "distributed>"), r"cannot run <distributed>"),
        (('type="python"', 'type="perl"'), "ERROR: map::at"),
        (("</configuration>", "<"), "ERROR: Failed to parse configuration"),
    ],
)
def test_configurations_that_are_rejected(
    scan: SimulatedScan, stage: Stage, change: tuple[str, str], text: str
) -> None:
    """Before anything is started; attributes only, no `@` where there is a name."""
    good = pipeline(execute("stock_toys", "passes", '<gadget><property name="x" value="1"/></gadget>'))
    served = stage.double()
    found = send(served, scan, configuration=good.replace(*change))
    assert found.closed
    assert len(found.texts) == 1
    assert text in found.texts[0]
    assert served.exit_codes == []


def test_a_pipeline_of_the_double_itself_is_checked_at_once(tmp_path: Path) -> None:
    native = pipeline("<gadget><classname>AccTrig</classname></gadget>")
    with pytest.raises(ValueError, match=r"cannot run .*AccTrig.*give a recording as front_end"):
        Double(native, log=tmp_path / "log")


@pytest.mark.parametrize(
    ("opening", "text"),
    [
        (framing.text_message(framing.HEADER, b"<h/>"), "Received ISMRMRD header before config file."),
        (struct.pack("<H1024sH1024s", 1, b"a.xml", 1, b"a.xml"), "Received second config file. Only one allowed."),
        (struct.pack("<H", 1008), "map::at"),
        (b"\x01", "iostream error"),
        (framing.close(), None),
    ],
)
def test_openings(stage: Stage, opening: bytes, text: str | None) -> None:
    served = stage.double()
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        connection.sendall(opening)
        connection.shutdown(socket.SHUT_WR)
        found = b"".join(iter(lambda: connection.recv(2**16), b""))
    messages = list(messages_of(found))
    assert identifiers(messages) == [TEXT] * (text is not None) + [framing.CLOSE]
    if text is not None:
        assert text in messages[0].text


def test_queries_are_answered(scan: SimulatedScan, stage: Stage) -> None:
    query = struct.pack("<HQQQ", framing.QUERY, 0, 77, 18) + b"gadgetron::version"
    found = send(stage.double(), scan, [query])
    assert [message.raw for message in found.messages] == [framing.response(77, b"4.7.2")]
    found = send(stage.double(), scan, [query.replace(b"version", b"versiom")])
    assert "map::at" in found.texts[0]


def test_what_has_no_writer_at_the_node_overtakes_it(scan: SimulatedScan, stage: Stage) -> None:
    def keeps(peer: Peer) -> None:
        held = [message.raw for message in peer]
        peer.send(b"".join(held))
        peer.leave()

    served = stage.double(connect(stage.listener(keeps)))
    data = acquisitions(scan.blocks)[:3]
    found = send(served, scan, [*data, framing.text_message(TEXT, b"a remark")])
    assert identifiers(found.messages) == [TEXT, ACQUISITION, ACQUISITION, ACQUISITION]
    assert found.texts == ["a remark"]


def test_what_has_no_writer_at_the_client_is_lost(scan: SimulatedScan, stage: Stage) -> None:
    served = stage.double(connect(stage.listener(passes)), writers=("Image",))
    image = image_message(np.ones((2, 2), np.float32))
    found = send(served, scan, [*acquisitions(scan.blocks)[:3], image])
    assert ([message.raw for message in found.messages], found.closed) == ([image], True)


def test_what_has_no_reader_is_an_error(scan: SimulatedScan, stage: Stage) -> None:
    served = stage.double(connect(stage.listener(passes)), readers=("Waveform",))
    found = send(served, scan)
    assert found.texts == ["[Stream] ERROR: map::at"]


def test_images_of_int16_go_to_a_node_but_do_not_come_back(scan: SimulatedScan, stage: Stage) -> None:
    heard: list[Message] = []

    def hears(peer: Peer) -> None:
        heard.extend(peer)
        peer.leave()

    short = image_message(np.ones((2, 2), np.int16))
    assert send(stage.double(connect(stage.listener(hears))), scan, [short]).texts == []
    assert [message.raw for message in heard] == [short]
    assert send(stage.double(connect(stage.listener(passes))), scan, [short]).texts == ["[Stream] ERROR: map::at"]


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "float32", "float64", "complex64", "complex128"])
def test_images_that_come_back(scan: SimulatedScan, stage: Stage, dtype: str) -> None:
    image = image_message(np.ones((3, 1, 2, 5), dtype), {"note": "x" * 20_000}, image_series_index=9001)
    found = send(stage.double(connect(stage.listener(passes))), scan, [image])
    assert [message.raw for message in found.messages] == [image]
    assert (found.images[0].image_series_index, found.images[0].data.shape) == (9001, (3, 1, 2, 5))


@pytest.mark.parametrize("backwards", [False, True])
def test_connections_come_before_any_data_in_any_order(scan: SimulatedScan, stage: Stage, backwards: bool) -> None:
    place: dict[str, int] = {}
    both = threading.Barrier(2, timeout=10)

    def waits(peer: Peer) -> None:
        place["second" if "second" in peer.configuration else "first"] = peer.number
        # neither gets on without the other
        both.wait()
        passes(peer)

    port = stage.listener(waits)
    served = stage.double(connect(port, "<first/>"), connect(port, "<second/>"), connect_reversed=backwards)
    found = send(served, scan)
    assert (len(found.messages), found.texts) == (len(acquisitions(scan.blocks)), [])
    assert sorted(place.values()) == [0, 1]
    if backwards:
        assert place == {"second": 0, "first": 1}


def test_a_listener_may_be_late_and_its_absence_is_an_error(scan: SimulatedScan, stage: Stage) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    served = stage.double(connect(port), connect_tries=3, connect_interval=0.05)
    found = send(served, scan)
    text = f"[Stream] ERROR: Failed to connect to external module on address: localhost:{port}"
    assert (found.texts, found.closed) == ([text], True)


def test_a_recording_stands_in_for_the_native_gadgets(shared_data: Path, scan: SimulatedScan, stage: Stage) -> None:
    recording = shared_data / "wire" / "snr_whitened.bin"
    headers: list[bytes] = []

    def notes(peer: Peer) -> None:
        headers.append(peer.header)
        passes(peer)

    natives = "<gadget><name/><dll/><classname>NoiseAdjustGadget</classname></gadget>"
    served = stage.double(natives, connect(stage.listener(notes)), front_end=recording)
    found = send(served, scan)
    (_, header, *items, _) = messages_of(recording.read_bytes())
    assert [message.raw for message in found.messages] == [item.raw for item in items]
    assert headers == [header.raw[6:]]
    # of nothing, natives make nothing
    assert send(served, scan, []).messages == ()


def test_streams_side_by_side(scan: SimulatedScan, stage: Stage) -> None:
    def node() -> str:
        return f'<stream key="a">{connect(stage.listener(passes))}</stream>'

    found = send(stage.double(f"<parallel><branch/><merge/>{node()}{node()}</parallel>"), scan)
    sent = acquisitions(scan.blocks)
    assert sorted(message.raw for message in found.messages) == sorted(sent * 2)


@pytest.mark.parametrize("order", [Vanish(), Vanish(reset=True)])
def test_a_client_that_leaves_ends_the_scan_as_if_it_were_complete(
    scan: SimulatedScan, stage: Stage, order: Vanish
) -> None:
    heard: list[int] = []
    ended = threading.Event()

    def counts(peer: Peer) -> None:
        heard.append(len(list(peer)))
        ended.set()
        peer.leave()

    def data() -> Iterator[bytes]:
        yield from acquisitions(scan.blocks)[:5]
        yield acquisitions(scan.blocks)[5][:100]
        time.sleep(0.2)
        raise order

    served = stage.double(connect(stage.listener(counts)))
    found = send(served, scan, data())
    assert not found.closed
    assert ended.wait(10)
    # half a message is none; nothing tells the node
    assert heard == [5]
    assert served.leftovers() == []


def test_samples_arrive(scan: SimulatedScan, stage: Stage) -> None:
    found = send(stage.double(connect(stage.listener(passes))), scan)
    expected = [samples for block in scan.blocks for samples in block.samples]
    for message, samples in zip(found.messages, expected, strict=True):
        np.testing.assert_array_equal(samples_of(message), samples)
