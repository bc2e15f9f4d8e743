"""Messages with whole arrays, and the bytes of every message against the stock writers and readers."""

import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gadgetron.types.image_array as stock_image_array
import gadgetron.types.recon_data as stock_recon_data
import ismrmrd
import numpy as np
import pytest
from gadgetron.types.acquisition_bucket import read_acquisition_bucket
from gadgetron.types.image_array import ImageArray
from ismrmrd import Acquisition, AcquisitionHeader, Image, ImageHeader, Waveform

from voxelsigma.formats.readouts import HEADER_DTYPE, ReadoutBlock, block_of
from voxelsigma.gadgets import wire

RNG = np.random.default_rng(1)
STATISTICS = (
    "kspace_encode_step_1",
    "kspace_encode_step_2",
    "slice",
    "phase",
    "contrast",
    "repetition",
    "set",
    "segment",
    "average",
)

# numpy's view of what the stock readers do with headers
stock_warning = pytest.mark.filterwarnings("ignore:A builtin ctypes object gave a PEP3118 format:RuntimeWarning")


class Pipe:
    """What the stock readers and writers take for a connection."""

    def __init__(self, content: bytes = b"") -> None:
        self._file = io.BytesIO(content)
        self.read = self._file.read

    def write(self, content: Any) -> None:
        self._file.write(bytes(content))

    @property
    def content(self) -> bytes:
        return self._file.getvalue()


def received(content: bytes) -> Any:
    """The one item that some bytes hold."""
    reader = wire.Reader(io.BytesIO(content).read)
    found = wire.read_message(reader)
    assert reader.total == len(content)
    return found


def an_acquisition(axes: int = 2, **fields: Any) -> Acquisition:
    data = (RNG.standard_normal((3, 5)) * (1 + 2j)).astype(np.complex64)
    return Acquisition.from_array(data, RNG.standard_normal((5, axes)).astype(np.float32), scan_counter=4, **fields)


def a_waveform(number: int = 0) -> Waveform:
    return Waveform.from_array(np.arange(8, dtype=np.uint32).reshape(2, 4) + number, waveform_id=number)


def an_image(dtype: Any = np.float32) -> Image:
    image = Image.from_array(np.arange(24).reshape(2, 1, 3, 4).astype(dtype), transpose=False, image_series_index=3)
    image.meta = ismrmrd.Meta({"DataRole": ["Image", "σ"], "comment": "x"})
    return image


def headers_of(kind: Any, shape: tuple[int, ...]) -> Any:
    found = np.empty(shape, dtype=object)
    for number, index in enumerate(np.ndindex(shape)):
        found[index] = kind(measurement_uid=number)
    return found


def an_image_array(**changes: Any) -> ImageArray:
    values: dict[str, Any] = {
        "data": RNG.standard_normal((4, 3, 1, 2, 2, 1, 1)).astype(np.complex64),
        "headers": headers_of(ImageHeader, (2, 1, 1)),
        "meta": ["<ismrmrdMeta/>", ""],
        "waveform": None,
        "acq_headers": headers_of(AcquisitionHeader, (3, 1, 2, 1, 1)),
    }
    return ImageArray(**{**values, **changes})


@pytest.mark.filterwarnings("ignore:This function currently returns a result that is inconsistent:UserWarning")
@pytest.mark.parametrize(
    ("item", "identifier"),
    [
        (an_acquisition(), wire.ACQUISITION),
        (an_acquisition(axes=0), wire.ACQUISITION),
        (a_waveform(), wire.WAVEFORM),
        *[
            (an_image(dtype), wire.IMAGE)
            for dtype in (np.uint16, np.int16, np.uint32, np.float32, np.float64, np.complex64, np.complex128)
        ],
    ],
)
def test_single_items_have_the_bytes_of_ismrmrd(item: Any, identifier: int) -> None:
    content = wire.message(item)
    assert content == struct.pack("<H", identifier) + item.to_bytes()
    found = received(content)
    if isinstance(item, Acquisition):
        assert isinstance(found, ReadoutBlock)
        np.testing.assert_array_equal(found.samples[0], item.data)
        np.testing.assert_array_equal(found.trajectory[0], item.traj)
        assert bytes(item.getHead()) == found.headers.tobytes()
    else:
        assert found == item
    again = type(item).from_bytes(content[2:])
    assert again == item
    assert wire.message(found) == content


def test_items_of_a_stream_have_the_bytes_of_the_protocol_serializer() -> None:
    if not hasattr(ismrmrd, "ProtocolSerializer"):
        pytest.skip("ismrmrd-python has no ProtocolSerializer before 1.15")
    items = [an_acquisition(), an_acquisition(), a_waveform(), an_image(), "a text"]
    pipe = io.BytesIO()
    with ismrmrd.ProtocolSerializer(pipe) as serializer:
        for item in items:
            serializer.serialize(item)
    ours = [wire.message(item) for item in items]
    assert b"".join(ours) + wire.close_message() == pipe.getvalue()
    reader = wire.Reader(io.BytesIO(pipe.getvalue()).read)
    found = []
    while not isinstance(item := wire.read_message(reader), wire.Close):
        found.append(item)
    assert [type(item).__name__ for item in found] == ["ReadoutBlock", "Waveform", "Image", "str"]
    stock = list(ismrmrd.ProtocolDeserializer(io.BytesIO(pipe.getvalue())).deserialize())
    assert stock == items


@stock_warning
@pytest.mark.parametrize("name", ["snr_recondata", "snr_recondata_ref"])
def test_recon_data_have_the_bytes_of_the_package(shared_data: Path, name: str) -> None:
    content = (shared_data / "wire" / f"{name}.bin").read_bytes()[6719:-2]
    stock = stock_recon_data.read_recon_data(Pipe(content[2:]))
    ours = received(content)
    bit, theirs = ours.bits[0], stock.bits[0]
    for buffer, expected in ((bit.data, theirs.data), (bit.reference, theirs.ref)):
        np.testing.assert_array_equal(buffer.data, expected.data.T)
        assert buffer.headers.shape == expected.headers.shape[::-1]
        for index in ((0, 0, 0, 0, 30), (0, 0, 0, 0, 72)):
            assert buffer.headers[index].tobytes() == bytes(expected.headers[index[::-1]])
        assert bytes(buffer.sampling) == bytes(expected.sampling)
        assert buffer.data.flags.writeable
    pipe = Pipe()
    stock_recon_data.write_recon_data(pipe, stock)
    assert pipe.content == wire.message(ours) == content


@stock_warning
def test_recon_data_with_trajectories_have_the_bytes_of_the_package() -> None:
    data = RNG.standard_normal((1, 1, 1, 2, 1, 3, 5)).astype(np.complex64)
    headers = np.zeros((1, 1, 1, 1, 3), dtype=HEADER_DTYPE)
    headers["scan_counter"] = [[[[[1, 2, 3]]]]]
    path = RNG.standard_normal((1, 1, 1, 1, 3, 5, 2)).astype(np.float32)
    sampling = stock_recon_data.SamplingDescription()
    sampling.encoded_FOV[:] = 1, 2, 3
    buffer = wire.ReconBuffer(data, headers, sampling, path, path[..., 0])
    content = wire.message(wire.ReconData((wire.ReconBit(buffer, None),)))
    stock = stock_recon_data.read_recon_data(Pipe(content[2:]))
    np.testing.assert_array_equal(stock.bits[0].data.trajectory, path.T)
    pipe = Pipe()
    stock_recon_data.write_recon_data(pipe, stock)
    assert pipe.content == content
    (bit,) = received(content).bits
    np.testing.assert_array_equal(bit.data.trajectory, path)
    np.testing.assert_array_equal(bit.data.density, path[..., 0])
    np.testing.assert_array_equal(bit.data.headers, headers)
    assert bit.reference is None


@stock_warning
@pytest.mark.parametrize("changes", [{}, {"acq_headers": None}])
def test_image_arrays_have_the_bytes_of_the_package(changes: dict[str, Any]) -> None:
    sent = an_image_array(**changes)
    pipe = Pipe()
    stock_image_array.write_image_array(pipe, sent)
    assert wire.message(sent) == pipe.content
    found = received(pipe.content)
    stock = stock_image_array.read_image_array(Pipe(pipe.content[2:]))
    np.testing.assert_array_equal(found.data, stock.data)
    assert found.data.shape == stock.data.shape == (4, 3, 1, 2, 2, 1, 1)
    assert found.meta == stock.meta
    for name in ("headers", "acq_headers"):
        ours, theirs = getattr(found, name), getattr(stock, name)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert [bytes(entry) for entry in ours.ravel()] == [bytes(entry) for entry in theirs.ravel()]
    assert wire.message(found) == pipe.content


def test_waveforms_of_an_image_array_come_with_the_sizes_of_their_samples() -> None:
    sent = an_image_array(waveform=[a_waveform(0), a_waveform(5)], acq_headers=None)
    content = wire.message(sent)
    wave = a_waveform(5)
    assert content.endswith(bytes(wave.getHead()) + struct.pack("<3Q", 2, 4, 2) + wave.data.tobytes() + b"\0")
    found = received(content)
    assert found.waveform == sent.waveform
    assert wire.message(found) == content
    # the sizes in front of the samples must be those of the header
    broken = content.replace(struct.pack("<3Q", 2, 4, 2), struct.pack("<3Q", 2, 4, 1))
    with pytest.raises(
        ValueError, match=r"a WAVEFORM of 2 channels and 4 samples comes with samples of shape \(4, 1\)"
    ):
        received(broken)


def test_metadata_of_an_image_array_leave_in_ascii() -> None:
    found = received(wire.message(an_image_array(meta=["σ = 1", "<a>ü</a>"])))
    assert found.meta == ["&#963; = 1", "<a>&#252;</a>"]


def test_headers_of_an_image_array_may_be_a_list() -> None:
    found = received(wire.message(an_image_array(headers=[ImageHeader(measurement_uid=9)])))
    assert found.headers.shape == (1,)
    assert found.headers[0].measurement_uid == 9
    # headers that were read can be changed, each for itself
    found = received(wire.message(an_image_array()))
    found.headers[0, 0, 0].image_index = 5
    assert found.headers[1, 0, 0].image_index == 0


def test_an_image_array_without_data_is_refused() -> None:
    with pytest.raises(ValueError, match="an image array without data cannot be sent"):
        wire.message(ImageArray(headers=[], meta=[]))
    with pytest.raises(ValueError, match="an array without axes cannot be sent"):
        wire.message(an_image_array(data=np.complex64(1)))


def test_arrays_without_dimensions_are_empty_ones() -> None:
    none = struct.pack("<Q", 0)
    found = received(struct.pack("<H", wire.IMAGE_ARRAY) + none + none + none + b"\0" + b"\1" + none)
    assert found.data.size == found.headers.size == found.acq_headers.size == 0
    assert (found.meta, found.waveform) == ([], None)
    sampling = bytes(stock_recon_data.SamplingDescription())
    content = struct.pack("<HQ", wire.RECON_DATA, 1) + none + b"\0\0" + none + sampling + b"\0"
    (bit,) = received(content).bits
    assert (bit.data.data.shape, bit.data.headers.shape) == ((0,) * 7, (0,) * 5)
    (bit,) = received(wire.message(received(content))).bits
    assert bit.data.data.shape == (0,) * 7


def test_recon_data_without_slices() -> None:
    buffer = wire.ReconBuffer(
        np.zeros((0, 1, 1, 2, 1, 3, 5), np.complex64),
        np.zeros((0, 1, 1, 1, 3), HEADER_DTYPE),
        stock_recon_data.SamplingDescription(),
    )
    (bit,) = received(wire.message(wire.ReconData((wire.ReconBit(buffer, buffer),)))).bits
    assert bit.data.data.shape == bit.reference.data.shape == (0, 1, 1, 2, 1, 3, 5)
    assert received(wire.message(wire.ReconData(()))).bits == ()


def test_headers_of_recon_data_must_fit_the_data() -> None:
    buffer = wire.ReconBuffer(
        np.zeros((1, 1, 1, 2, 1, 3, 5), np.complex64),
        np.zeros((1, 1, 1, 1, 4), HEADER_DTYPE),
        stock_recon_data.SamplingDescription(),
    )
    with pytest.raises(ValueError, match=r"has headers of shape \(1, 1, 1, 1, 4\)"):
        received(wire.message(wire.ReconData((wire.ReconBit(buffer, None),))))


@pytest.mark.parametrize("mark", [2, 255])
def test_an_optional_part_is_there_or_not(mark: int) -> None:
    content = wire.message(an_image_array(acq_headers=None))
    with pytest.raises(ValueError, match=f"an optional part is marked {mark}; expected 0 or 1"):
        received(content[:-1] + bytes([mark]))


def a_bucket(*waveforms: Waveform) -> wire.Bucket:
    statistics: dict[str, tuple[int, ...]] = {name: tuple(range(number)) for number, name in enumerate(STATISTICS)}
    blocks = block_of([an_acquisition(), an_acquisition()]), block_of([an_acquisition(axes=0)])
    return wire.Bucket(blocks, (blocks[1],), waveforms, (statistics, statistics), (statistics,))


def test_a_bucket_without_waveforms_is_what_the_package_reads() -> None:
    sent = a_bucket()
    content = wire.message(sent)
    stock = read_acquisition_bucket(Pipe(content[2:]))
    assert [found.traj.shape for found in stock.data] == [(5, 2), (5, 2), (5, 0)]
    np.testing.assert_array_equal(stock.data[1].data, sent.data[0].samples[1])
    np.testing.assert_array_equal(stock.data[1].traj, sent.data[0].trajectory[1])
    np.testing.assert_array_equal(stock.ref[0].data, sent.reference[0].samples[0])
    assert stock.datastats[1].average == set(range(8))


def test_a_bucket_with_waveforms_survives_the_wire() -> None:
    sent = a_bucket(a_waveform(0), a_waveform(3))
    found = received(wire.message(sent))
    assert found.waveforms == sent.waveforms
    assert (found.data_stats, found.reference_stats) == (sent.data_stats, sent.reference_stats)
    assert [block.samples.shape for block in found.data] == [(2, 3, 5), (1, 3, 5)]
    for ours, theirs in zip((*found.data, *found.reference), (*sent.data, *sent.reference), strict=True):
        np.testing.assert_array_equal(ours.samples, theirs.samples)
        np.testing.assert_array_equal(ours.trajectory, theirs.trajectory)
        np.testing.assert_array_equal(ours.headers, theirs.headers)


def test_an_empty_bucket() -> None:
    found = received(wire.message(wire.Bucket((), ())))
    assert found == wire.Bucket((), ()) or not (found.data or found.reference or found.waveforms or found.data_stats)
    # byte counts of zero: not even the number of spaces
    assert received(struct.pack("<H13Q", wire.BUCKET, *[0] * 13)).data_stats == ()


def test_a_bucket_states_the_shape_that_its_readouts_have() -> None:
    block = block_of([an_acquisition()])
    cropped = ReadoutBlock(block.headers, block.samples[..., 1:4], block.trajectory[:, 1:4])
    found = received(wire.message(wire.Bucket((cropped,), ())))
    assert found.data[0].headers["number_of_samples"].tolist() == [3]
    np.testing.assert_array_equal(found.data[0].samples, cropped.samples)


def change(offset: int, value: int, layout: str = "<Q") -> Callable[[bytearray], None]:
    return lambda content: struct.pack_into(layout, content, offset, value)


@pytest.mark.parametrize(
    ("tamper", "text"),
    [
        (change(2 + 16, 11), "BUCKET headers claim 360 bytes of samples; 11 are given"),
        (change(2 + 24, 81), "BUCKET headers claim 80 bytes of trajectories; 81 are given"),
        (change(2 + 64, 20), "BUCKET statistics claims 144 bytes; at most 20 are accepted"),
        (change(2 + 64, 160), "BUCKET statistics claim more than the 160 bytes that are given"),
        (change(2 + 64, 300), "BUCKET statistics take 296 bytes; 300 are given"),
        (change(2 + 96, 63), "BUCKET waveforms claim more than the 63 bytes that are given"),
        (change(-2, 0, "<H"), ""),
    ],
)
def test_counts_of_a_bucket_that_contradict_each_other(tamper: Callable[[bytearray], None], text: str) -> None:
    content = bytearray(wire.message(a_bucket(a_waveform(), a_waveform())))
    tamper(content)
    if not text:
        received(bytes(content))
        return
    with pytest.raises(ValueError, match=text):
        received(bytes(content) + b"\0" * 100)
