"""The wire format: recorded bytes, truncations, implausible sizes, round trips."""

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ismrmrd import Acquisition, Image

from voxelsigma.formats.simulate import Simulation, simulate
from voxelsigma.gadgets import wire
from voxelsigma.gadgets.items import (
    KSpace,
    NoiseCovariance,
    OversampledReadout,
    Sensitivities,
    VolumeKey,
    Whitening,
)
from voxelsigma.gadgets.wire_items import FromWire, to_wire


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
    found = through_the_wire(scan.blocks[1])
    assert all(isinstance(item, Acquisition) for item in found)
    np.testing.assert_array_equal(np.stack([item.data for item in found]), scan.blocks[1].samples)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.float32, np.float64, np.complex64, np.complex128])
def test_images_survive_the_wire(dtype: Any) -> None:
    image = Image.from_array(np.arange(12).reshape(1, 3, 4).astype(dtype), transpose=False)
    image.attribute_string = "<ismrmrdMeta><meta><name>a</name><value>b</value></meta></ismrmrdMeta>"
    (found,) = through_the_wire(image)
    assert found.data.dtype == dtype
    np.testing.assert_array_equal(found.data, image.data)
    assert found.meta["a"] == "b"


@pytest.mark.parametrize(
    "content",
    [
        wire.message(
            next(iter(to_wire(simulate(Simulation(matrix=(1, 16, 16), coils=2, reference_lines=4)).blocks[0])))
        ),
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
        (struct.pack("<H", 777), "message id 777 is unknown"),
        (struct.pack("<HQ", wire.ERROR, 2**40), "an ERROR claims 1099511627776 bytes"),
        (struct.pack("<HI", wire.TEXT, 2**31), "a TEXT claims 2147483648 bytes"),
        (struct.pack("<HQ", wire.RECON_DATA, 2**20), "claims 1048576 encoding spaces"),
        (struct.pack("<HQQ", wire.RECON_DATA, 1, 99), "claims 99 dimensions"),
        (struct.pack("<HQQ7Q", wire.RECON_DATA, 1, 7, *[2**16] * 7), "RECON_DATA claims shape"),
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
    with pytest.raises(ValueError, match="IMAGE data type 99 is unknown"):
        wire.read_message(wire.Reader(io.BytesIO(bytes(content)).read))


def test_huge_images_are_refused() -> None:
    image = Image.from_array(np.ones((1, 2, 3), np.float32), transpose=False)
    content = bytearray(wire.message(image))
    offset = content.index(struct.pack("<3H", 3, 2, 1))
    content[offset : offset + 6] = struct.pack("<3H", 65535, 65535, 65535)
    with pytest.raises(ValueError, match="an IMAGE claims"):
        wire.read_message(wire.Reader(io.BytesIO(bytes(content)).read))


def test_items_without_a_message_are_refused() -> None:
    with pytest.raises(TypeError, match="an item of type dict has no message"):
        wire.message({})


def test_a_wrong_first_message_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a configuration"):
        wire.read_text(wire.Reader(io.BytesIO(struct.pack("<H", 9)).read), wire.CONFIG, "a configuration")


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [
        ("snr_raw", "Acquisition", 69),
        ("snr_whitened", "Acquisition", 68),
        ("snr_recondata", "ReconData", 1),
        ("snr_recondata_ref", "ReconData", 1),
    ],
)
def test_recordings_of_a_server_are_read(shared_data: Path, name: str, kind: str, count: int) -> None:
    with (shared_data / "wire" / f"{name}.bin").open("rb") as file:
        reader = wire.Reader(file.read)
        wire.read_text(reader, wire.CONFIG, "a configuration")
        wire.read_text(reader, wire.HEADER, "a header")
        found = []
        while not isinstance(item := wire.read_message(reader), wire.Close):
            found.append(type(item).__name__)
    assert found == [kind] * count
