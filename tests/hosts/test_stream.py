"""A pipeline between pipes, as processes of a shell have it."""

import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ismrmrd
import numpy as np
import pytest
from tests.hosts.servers import SECONDS, series_of, whole

from voxelsigma.formats.image_file import read_series
from voxelsigma.formats.raw_writer import write_raw
from voxelsigma.formats.readouts import ReadoutBlock
from voxelsigma.formats.simulate import SimulatedScan
from voxelsigma.gadgets.outgoing import DownstreamError
from voxelsigma.gadgets.wire import Close, Configuration, FileName, Reader, ScanHeaderText, message, read_message
from voxelsigma.hosts.replay import replay
from voxelsigma.hosts.stream import stream

Piped = subprocess.CompletedProcess[bytes]
serializing = pytest.mark.skipif(not hasattr(ismrmrd, "ProtocolSerializer"), reason="ismrmrd-python before 1.15")


def through(folder: Path, content: bytes, *arguments: object) -> Piped:
    return subprocess.run(
        [sys.executable, "-m", "voxelsigma", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)},
        input=content,
        capture_output=True,
        timeout=SECONDS,
        check=False,
    )


def messages(content: bytes) -> list[Any]:
    """All messages of a stream; nothing may be left over."""
    source = io.BytesIO(content)
    reader, found = Reader(source.read), []
    while reader.buffered or source.tell() < len(content):
        found.append(read_message(reader))
    return found


def said(*items: Any) -> bytes:
    return b"".join(map(message, items))


def run(content: bytes, pipeline: str = "sense_sigma.xml", noise: Path | None = None) -> tuple[bytes, int]:
    """What comes out of a stream in this process, and how many images it says."""
    (source, feeding), (reading, sink) = os.pipe(), os.pipe()
    received: list[bytes] = []

    def feed() -> None:
        with os.fdopen(feeding, "wb") as file:
            file.write(content)

    def read() -> None:
        with os.fdopen(reading, "rb") as file:
            received.append(file.read())

    threads = [threading.Thread(target=work, daemon=True) for work in (feed, read)]
    for thread in threads:
        thread.start()
    try:
        count = stream(pipeline, source, sink, noise=noise)
    finally:
        os.close(sink)
        for thread in threads:
            thread.join(SECONDS)
        os.close(source)
    return received[0], count


@serializing
def test_the_packages_of_others_write_and_read_it(scan: SimulatedScan, scan_file: Path, tmp_path: Path) -> None:
    """ismrmrd-python on both sides of a process; the images are those of replay."""
    buffer = io.BytesIO()
    serializer = ismrmrd.ProtocolSerializer(buffer)
    with ismrmrd.Dataset(scan_file, create_if_needed=False) as dataset:
        serializer.serialize(ismrmrd.xsd.CreateFromDocument(dataset.read_xml_header()))
        for number in range(dataset.number_of_acquisitions()):
            serializer.serialize(dataset.read_acquisition(number))
    serializer.close()
    found = through(tmp_path, buffer.getvalue(), "-v", "stream", "-p", "sense_sigma.xml")
    assert found.returncode == 0, found.stderr
    # the log is there, and all of it elsewhere
    assert b"info: " in found.stderr
    items = list(ismrmrd.ProtocolDeserializer(io.BytesIO(found.stdout)).deserialize())
    assert isinstance(items[0], ismrmrd.xsd.ismrmrdHeader)
    replay(scan_file, "sense_sigma.xml", tmp_path / "out.h5")
    expected = read_series(tmp_path / "out.h5")
    images = series_of(items[1:])
    assert sorted(images) == [series.index for series in expected] == [1, 2000, 2100, 2200]
    for series in expected:
        (image,) = images[series.index]
        np.testing.assert_allclose(image.data, series.data[0], atol=1e-5 * series.data.max())
    assert found.stdout.endswith(message(Close()))


def test_header_images_and_close(scan: SimulatedScan) -> None:
    content, count = run(said(*whole(scan)))
    header, *images, end = messages(content)
    assert (header, end) == (ScanHeaderText(scan.header_xml), Close())
    assert len(images) == count == 4
    assert sorted(series_of(images)) == [1, 2000, 2100, 2200]


def test_a_configuration_on_the_stream_does_not_count(scan: SimulatedScan, caplog: pytest.LogCaptureFixture) -> None:
    _, count = run(said(FileName("x"), Configuration(b"<x/>"), "a remark", *whole(scan)))
    assert count == 4
    assert caplog.text.count("the stream brings a configuration of its own, which is ignored") == 2


def test_noise_from_a_file(scan: SimulatedScan, tmp_path: Path) -> None:
    """Twice the noise: half the image, in SNR units."""
    louder = ReadoutBlock(scan.blocks[0].headers, 2 * scan.blocks[0].samples, scan.blocks[0].trajectory)
    path = tmp_path / "noise.h5"
    write_raw(path, scan.header_xml, [louder])
    found = []
    for noise in (None, path):
        content, _ = run(said(*whole(scan)), noise=noise)
        found.append(series_of(messages(content)[1:-1])[1][0].data)
    np.testing.assert_allclose(2 * found[1], found[0], atol=1e-4 * found[0].max())


def test_nothing_but_the_protocol_goes_out(scan: SimulatedScan, tmp_path: Path, pipeline: Callable[..., Path]) -> None:
    """Whatever a gadget prints, in this process or in one of its own."""
    (tmp_path / "chatty.py").write_text(
        "import os, sys\n"
        "def talks(connection):\n"
        "    print('hello'); os.write(1, b'again'); sys.stdout.flush()\n"
        "    for item in connection:\n"
        "        print(item); connection.send(item)\n"
    )
    # imported by the process itself
    (tmp_path / "sitecustomize.py").write_text("import atexit\natexit.register(print, 'goodbye')\n")
    path = pipeline(
        ("chatty", "talks", {}),
        ("voxelsigma.gadgets.chain", "gadget", [(name, {}) for name in ("prewhiten", "accumulate", "coil_maps")]),
    )
    path.write_text(
        path.read_text().replace(
            '<gadget name="coil_maps"></gadget>',
            '<gadget name="coil_maps"></gadget><gadget name="reconstruct"></gadget>',
        )
    )
    found = through(tmp_path, said(*whole(scan)), "-v", "stream", "-p", path)
    assert found.returncode == 0, found.stderr
    header, image, end = messages(found.stdout)
    assert (header, image.image_series_index, end) == (ScanHeaderText(scan.header_xml), 1, Close())
    for text in (b"hello", b"again", b"goodbye"):
        assert text in found.stderr


@pytest.mark.parametrize(
    ("content", "arguments", "text"),
    [
        (lambda scan: b"", ["sense_sigma.xml"], b"stream ends after 0 of 2 bytes of a message id"),
        (lambda scan: said(*whole(scan)), ["nothing.xml"], b"nothing.xml: no such pipeline file; shipped are"),
        (lambda scan: said(*whole(scan))[:-1000], ["sense_sigma.xml"], b"without CLOSE"),
    ],
)
def test_an_error_is_one_line_and_no_close(
    scan: SimulatedScan, tmp_path: Path, content: Callable[[SimulatedScan], bytes], arguments: list[str], text: bytes
) -> None:
    found = through(tmp_path, content(scan), "stream", "-p", *arguments)
    assert found.returncode == 1
    assert found.stderr.startswith(b"error: ")
    assert found.stderr.count(b"\n") == 1
    assert text in found.stderr
    # a header at most
    assert all(isinstance(item, ScanHeaderText) for item in messages(found.stdout))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda items: items[1:], ValueError, "stream: expected the ISMRMRD header first, got ReadoutBlock"),
        (lambda items: items[-1:], ValueError, "stream: expected the ISMRMRD header first, got CLOSE"),
        (lambda items: items[:-1], EOFError, "stream ends after 0 of 2 bytes of a message id, 55 messages after"),
        (lambda items: [items[0], items[-1]], ValueError, "without an imaging readout"),
        (lambda items: [*items[:2], items[2].select(slice(0, 11)), items[3]], ValueError, "incomplete: 8 of 16 lines"),
        (lambda items: [ScanHeaderText(b"no"), *items[1:]], ValueError, "header"),
    ],
)
def test_what_is_wrong_is_said(
    scan: SimulatedScan, change: Callable[[list[Any]], list[Any]], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        run(said(*change(whole(scan))))


def test_a_reader_that_is_gone(scan: SimulatedScan, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "voxelsigma", "stream", "-p", "sense_sigma.xml"],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stdin.write(said(*whole(scan)))
        process.stdin.flush()
        assert process.wait(SECONDS) == 1
        assert b"error: who reads the output is gone (Broken pipe)" in process.stderr.read()
    finally:
        process.kill()
        process.wait(SECONDS)
        for file in (process.stdin, process.stderr):
            assert file is not None
            file.close()


def test_a_reader_that_leaves_meanwhile(scan: SimulatedScan) -> None:
    (source, feeding), (reading, sink) = os.pipe(), os.pipe()
    os.close(reading)
    with os.fdopen(feeding, "wb") as file, os.fdopen(sink, "wb"), os.fdopen(source, "rb"):
        file.write(message(ScanHeaderText(scan.header_xml)))
        file.flush()
        with pytest.raises(DownstreamError, match="who reads the output is gone"):
            stream("sense_sigma.xml", source, sink)
        file.close()
