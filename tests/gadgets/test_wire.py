"""The wire format: round trips, truncations, implausible sizes."""

import io
import itertools
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ismrmrd import Acquisition, Image

from voxelsigma.formats.readouts import HEADER_DTYPE, ReadoutBlock, acquisitions_of
from voxelsigma.formats.simulate import Simulation, simulate
from voxelsigma.gadgets import wire
from voxelsigma.gadgets.external import items_of
from voxelsigma.gadgets.items import (
    KSpace,
    NoiseCovariance,
    OversampledReadout,
    Sensitivities,
    VolumeKey,
    Whitening,
)
from voxelsigma.gadgets.wire_items import FromWire, to_wire
from voxelsigma.gadgets.wire_readouts import stated_headers


def through_the_wire(item: Any) -> list[Any]:
    convert = FromWire()
    found: list[Any] = []
    for part in to_wire(item):
        reader = wire.Reader(io.BytesIO(wire.message(part)).read)
        found.extend(convert(wire.read_message(reader)))
    return found


WHITENING = Whitening(
    source="noise readouts",
    samples=384,
    effective_samples=333.25,
    coils=3,
    dwell_time_us=20.0,
    bandwidth=0.793,
    scale=0.43625,
    calibrated=True,
)


def some_kspace(**changes: Any) -> KSpace:
    rng = np.random.default_rng(0)
    scan = simulate(Simulation(matrix=(1, 16, 16), coils=3, acceleration=2, mask="uniform_1d", reference_lines=4))
    headers = np.zeros((2, 4), dtype=scan.blocks[0].headers.dtype)
    headers["number_of_samples"] = [[5, 0, 5, 0], [5, 0, 5, 0]]
    headers["idx"]["slice"] = 2
    data = (rng.standard_normal((3, 2, 4, 5)) + 1j * rng.standard_normal((3, 2, 4, 5))).astype(np.complex64)
    lines = np.zeros((2, 4), dtype=bool)
    lines[:, 1:3] = True
    values: dict[str, Any] = {
        "data": data,
        "variance": rng.random((2, 4, 5), dtype=np.float32),
        "reference": data * lines[..., None],
        "reference_lines": lines,
        "headers": headers,
        "limits": ((0, 1), (0, 2), (1, 4)),
        "encoded_fov_mm": (10.0, 200.0, 250.0),
        "recon_fov_mm": (10.0, 200.0, 125.0),
        "recon_matrix": (2, 4, 6),
        "whitening": WHITENING,
        "incomplete": "18 of 36 lines",
        "partial_fourier": "k1 0.75",
        "readout": OversampledReadout(10, 2, 9),
    }
    return KSpace(**{**values, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"reference": None, "reference_lines": np.zeros((2, 4), dtype=bool)},
        {"whitening": None, "incomplete": "", "partial_fourier": "", "readout": None},
    ],
)
def test_kspace_survives_the_wire(changes: dict[str, Any]) -> None:
    sent = some_kspace(**changes)
    (found,) = through_the_wire(sent)
    for name in ("data", "variance", "headers", "reference_lines"):
        np.testing.assert_array_equal(getattr(found, name), getattr(sent, name))
    if sent.reference is None:
        assert found.reference is None
    else:
        np.testing.assert_array_equal(found.reference, sent.reference)
    for name in ("limits", "recon_matrix", "whitening", "incomplete", "partial_fourier", "readout", "key"):
        assert getattr(found, name) == getattr(sent, name)
    assert found.encoded_fov_mm == pytest.approx(sent.encoded_fov_mm)
    assert found.recon_fov_mm == pytest.approx(sent.recon_fov_mm)


@settings(max_examples=25, deadline=None)
@given(
    coils=st.integers(1, 6),
    samples=st.integers(7, 10**6),
    dwell=st.floats(0, 100, width=32),
    labels=st.lists(st.text("ABCs_:1 2", min_size=1).filter(str.strip), max_size=3).map(tuple),
    calibrated=st.booleans(),
    scale=st.none() | st.floats(0.1, 10),
)
def test_a_covariance_survives_the_wire(
    coils: int, samples: int, dwell: float, labels: tuple[str, ...], calibrated: bool, scale: float | None
) -> None:
    labels = tuple(label.strip() for label in labels)
    rng = np.random.default_rng(coils)
    root = rng.standard_normal((coils, coils)) + 1j * rng.standard_normal((coils, coils))
    sent = NoiseCovariance(
        matrix=root @ root.conj().T,
        samples=samples,
        effective_samples=samples / 3,
        dwell_time_us=dwell,
        bandwidth=0.793,
        labels=labels,
        calibrated=calibrated,
        applied_scale=scale,
    )
    (found,) = through_the_wire(sent)
    np.testing.assert_allclose(found.matrix, sent.matrix, rtol=1e-6, atol=1e-6)
    for name in ("samples", "effective_samples", "dwell_time_us", "bandwidth", "labels", "source", "calibrated"):
        assert getattr(found, name) == getattr(sent, name)
    assert found.applied_scale == sent.applied_scale


def test_sensitivities_survive_the_wire() -> None:
    maps = (np.arange(2 * 3 * 4 * 5) * (1 + 1j)).reshape(2, 3, 4, 5).astype(np.complex64)
    key = VolumeKey(slice=3, contrast=1, phase=2, repetition=4, set=5)
    (found,) = through_the_wire(Sensitivities(maps=maps, key=key, method="espirit (kernel 6)"))
    np.testing.assert_array_equal(found.maps, maps)
    assert (found.key, found.method) == (key, "espirit (kernel 6)")


def test_readouts_survive_the_wire() -> None:
    scan = simulate(Simulation(matrix=(1, 16, 16), coils=3, acceleration=2, mask="uniform_1d", reference_lines=4))
    sent = scan.blocks[1]
    (first,) = through_the_wire(sent)
    assert isinstance(first, ReadoutBlock)
    np.testing.assert_array_equal(first.samples, sent.samples)
    np.testing.assert_array_equal(first.headers, sent.headers)
    (single,) = through_the_wire(next(acquisitions_of(sent)))
    np.testing.assert_array_equal(single.samples, sent.samples[:1])


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.float32, np.float64, np.complex64, np.complex128])
def test_images_survive_the_wire(dtype: Any) -> None:
    image = Image.from_array(np.arange(12).reshape(1, 3, 4).astype(dtype), transpose=False)
    image.attribute_string = "<ismrmrdMeta><meta><name>a</name><value>b</value></meta></ismrmrdMeta>"
    (found,) = through_the_wire(image)
    assert found.data.dtype == dtype
    assert found.data.flags.writeable
    np.testing.assert_array_equal(found.data, image.data)
    assert found.meta["a"] == "b"


@pytest.mark.parametrize(
    "content",
    [
        wire.message(Acquisition.from_array(np.ones((2, 16), np.complex64), np.ones((16, 2), np.float32))),
        wire.message(Image.from_array(np.ones((1, 2, 3), np.float32), transpose=False)),
        b"".join(wire.message(part) for part in list(to_wire(some_kspace()))[1:]),
        wire.error_message("it broke"),
    ],
    ids=["acquisition", "image", "recon data", "error"],
)
def test_every_truncation_is_an_end_of_stream(content: bytes) -> None:
    step = max(1, len(content) // 200)
    for length in range(0, len(content), step):
        with pytest.raises(EOFError, match=r"stream ends after \d+ of \d+ bytes of"):
            wire.read_message(wire.Reader(io.BytesIO(content[:length]).read))
    wire.read_message(wire.Reader(io.BytesIO(content).read))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (struct.pack("<H", 777), "message id 777 after 0 bytes is unknown; known are .*1008"),
        (struct.pack("<HQ", wire.ERROR, 2**40), "an ERROR claims 1099511627776 bytes"),
        (struct.pack("<HI", wire.TEXT, 2**31), "a TEXT claims 2147483648 bytes"),
        (struct.pack("<HQ", wire.RECON_DATA, 2**20), "claims 1048576 encoding spaces"),
        (struct.pack("<HQQ", wire.RECON_DATA, 1, 99), "claims 99 dimensions"),
        (struct.pack("<HQQ7Q", wire.RECON_DATA, 1, 7, *[2**16] * 7), "RECON_DATA claims shape"),
        (struct.pack("<HQQ7Q", wire.RECON_DATA, 1, 7, 2**34, *[1] * 6), "RECON_DATA claims 137438953472 bytes"),
        (struct.pack("<HQQ7Q", wire.RECON_DATA, 1, 7, 0, *[2**62] * 6), "RECON_DATA claims shape"),
        (struct.pack("<HI", wire.CONFIG, 2**20 + 1), "a configuration claims 1048577 bytes; at most 1048576"),
        (struct.pack("<HI", wire.HEADER, 2**24 + 1), "a header claims 16777217 bytes"),
        (struct.pack("<H3Q", wire.QUERY, 0, 1, 2**21), "a QUERY claims 2097152 bytes"),
        (struct.pack("<H2Q", wire.RESPONSE, 1, 2**21), "a RESPONSE claims 2097152 bytes"),
        (struct.pack("<H13Q", wire.BUCKET, *[2**30] * 13), "a BUCKET claims"),
        (struct.pack("<H13Q", wire.BUCKET, 2, 340, *[0] * 11), "claims 2 readouts and 340 bytes of headers of 340"),
        (struct.pack("<H13Q", wire.BUCKET, *[0] * 10, 2, 40, 0), "claims 2 waveforms and 40 bytes of headers of 40"),
        (struct.pack("<HQQ2Q", wire.RECON_DATA, 1, 2, 1, 1), "has 2 dimensions; expected 7"),
    ],
)
def test_implausible_sizes_are_refused_before_anything_is_read(content: bytes, text: str) -> None:
    reader = wire.Reader(io.BytesIO(content + b"\0" * 64).read)
    with pytest.raises(ValueError, match=text):
        wire.read_message(reader)


def test_unknown_image_types_are_refused() -> None:
    content = bytearray(wire.message(Image.from_array(np.ones((1, 2, 3), np.float32), transpose=False)))
    content[4:6] = struct.pack("<H", 99)
    with pytest.raises(ValueError, match="IMAGE of series 0 has data type 99; 1 to 8 are known"):
        wire.read_message(wire.Reader(io.BytesIO(bytes(content)).read))


def test_huge_images_are_refused() -> None:
    image = Image.from_array(np.ones((1, 2, 3), np.float32), transpose=False)
    content = bytearray(wire.message(image))
    offset = content.index(struct.pack("<3H", 3, 2, 1))
    content[offset : offset + 6] = struct.pack("<3H", 65535, 65535, 65535)
    with pytest.raises(ValueError, match=r"an IMAGE of shape \(1, 65535, 65535, 65535\) claims \d+ bytes"):
        wire.read_message(wire.Reader(io.BytesIO(bytes(content)).read))


@pytest.mark.parametrize("value", [-5, 2**31 - 1])
def test_integer_images_have_32_bits_on_the_wire(value: int) -> None:
    image = Image.from_array(np.full((1, 2, 3), value, np.int64), transpose=False)
    content = wire.message(image)
    assert content[-24:] == struct.pack("<6i", *[value] * 6)
    (found,) = through_the_wire(image)
    np.testing.assert_array_equal(found.data, image.data)
    image.data[0, 0, 0, 0] = 2**31
    image.image_series_index = 7
    with pytest.raises(ValueError, match="an IMAGE of series 7 has voxels beyond 32-bit integers"):
        wire.message(image)


@pytest.mark.parametrize(
    ("metadata", "text"),
    [
        (b"<ismrmrdMeta>", "of series 4 cannot be read: no element found"),
        (b"<other/>", "of series 4 cannot be read: not a list of names and values in <ismrmrdMeta>"),
        (b'<!DOCTYPE a [<!ENTITY b "c">]><ismrmrdMeta>&b;</ismrmrdMeta>', "of series 4 have a document type"),
    ],
)
def test_metadata_of_images_must_be_a_plain_list(metadata: bytes, text: str) -> None:
    image = Image.from_array(np.ones((1, 2, 3), np.float32), transpose=False, image_series_index=4)
    content = wire.message(image)
    content = content[:200] + struct.pack("<Q", len(metadata)) + metadata + content[208:]
    with pytest.raises(ValueError, match=text):
        wire.read_message(wire.Reader(io.BytesIO(content).read))


def test_a_readout_beyond_what_scanners_have_is_refused() -> None:
    content = bytearray(wire.message(Acquisition.from_array(np.ones((1, 2), np.complex64))))
    struct.pack_into("<3H", content, 2 + 34, 65535, 65535, 65535)
    with pytest.raises(ValueError, match="an ACQUISITION claims 34358690140 bytes; at most 1073741824"):
        wire.read_message(wire.Reader(io.BytesIO(bytes(content)).read))


def test_a_lack_of_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    content = wire.message(list(to_wire(some_kspace()))[1])

    def none_left(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(np, "empty", none_left)
    with pytest.raises(ValueError, match="wire: no memory for RECON_DATA of 960 bytes"):
        wire.read_message(wire.Reader(io.BytesIO(content).read))


@pytest.mark.parametrize(
    "sent",
    [
        wire.FileName("default.xml"),
        wire.Configuration(b"<configuration/>"),
        wire.ScanHeaderText(b"<ismrmrdHeader/>"),
        wire.Query(7, "gadgetron::info"),
        wire.Response(7, "4.7"),
        wire.Failure("it broke: σ"),
        wire.Close(),
        "a text: σ",
    ],
)
def test_control_messages_survive_the_wire(sent: Any) -> None:
    reader = wire.Reader(io.BytesIO(wire.message(sent)).read)
    assert wire.read_message(reader) == sent
    with pytest.raises(EOFError, match="stream ends after 0 of 2 bytes of a message id"):
        wire.read_message(reader)


def test_a_file_name_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="a file name of 1024 bytes; at most 1023"):
        wire.message(wire.FileName("x" * 1024))


@st.composite
def runs_of_readouts(draw: st.DrawFn) -> list[ReadoutBlock]:
    """Runs of one to four readouts, each run of its own shape, empty ones and trajectories included."""
    shapes = st.tuples(st.integers(1, 4), st.integers(0, 3), st.integers(0, 5), st.integers(0, 2))
    rng = np.random.default_rng(0)
    counter = 0
    found = []
    for count, coils, length, axes in draw(st.lists(shapes, min_size=1, max_size=5)):
        headers = np.zeros(count, dtype=HEADER_DTYPE)
        headers["scan_counter"] = np.arange(counter, counter + count)
        counter += count
        samples = rng.standard_normal((count, coils, length)).astype(np.complex64)
        path = rng.standard_normal((count, length, axes)).astype(np.float32)
        block = ReadoutBlock(headers, samples, path)
        found.append(ReadoutBlock(stated_headers(block), samples, path))
    return found


@settings(max_examples=40, deadline=None)
@given(runs=runs_of_readouts(), chunks=st.lists(st.integers(1, 900), min_size=1, max_size=6))
def test_readouts_are_the_same_however_the_bytes_arrive(runs: list[ReadoutBlock], chunks: list[int]) -> None:
    source = io.BytesIO(b"".join(wire.message(run) for run in runs) + wire.message("between") + wire.close_message())
    sizes = itertools.cycle(chunks)
    reader = wire.Reader(lambda count: source.read(min(count, next(sizes))))
    found = []
    while isinstance(item := wire.read_message(reader), ReadoutBlock):
        found.append(item)
    assert item == "between"
    assert wire.read_message(reader) == wire.Close()
    assert [readout for run in runs for readout in bytes_of(run)] == [
        readout for block in found for readout in bytes_of(block)
    ]


def bytes_of(block: ReadoutBlock) -> list[tuple[bytes, bytes, bytes]]:
    fields = zip(block.headers, block.samples, block.trajectory, strict=True)
    return [(header.tobytes(), samples.tobytes(), path.tobytes()) for header, samples, path in fields]


def test_what_arrives_together_is_one_block_of_limited_length() -> None:
    headers = np.zeros(3000, dtype=HEADER_DTYPE)
    sent = ReadoutBlock(headers, np.zeros((3000, 0, 0), np.complex64), np.zeros((3000, 0, 0), np.float32))
    reader = wire.Reader(io.BytesIO(wire.message(sent)).read)
    assert len(wire.read_message(reader)) == 1024


def test_items_without_a_message_are_refused() -> None:
    with pytest.raises(TypeError, match="an item of type dict has no message"):
        wire.message({})


def test_a_wrong_first_message_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a configuration"):
        wire.read_text(wire.Reader(io.BytesIO(struct.pack("<H", 9)).read), wire.CONFIG, "a configuration")


def test_a_sample_variance_without_its_data_is_an_error() -> None:
    variance, _ = to_wire(some_kspace())
    with pytest.raises(ValueError, match=r"ended between a sample variance \(series 9002\) and its RECON_DATA"):
        list(items_of(iter([variance])))


def test_a_sidecar_without_its_metadata_is_an_error() -> None:
    covariance, _ = to_wire(some_kspace())
    covariance.image_series_index = 9000
    with pytest.raises(ValueError, match="the sidecar of series 9000 to 9002 lacks the metadata 'samples'"):
        list(items_of(iter([covariance])))
