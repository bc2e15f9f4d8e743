"""What a real server sent, against counts, offsets and values that were found in the bytes by hand."""

import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gadgetron.types.image_array import ImageArray
from ismrmrd import Waveform

from voxelsigma.formats.readouts import HEADER_DTYPE, ReadoutBlock
from voxelsigma.gadgets import wire

Recording = Callable[[str], tuple[bytes, list[Any]]]

SNR_ITEMS, WAV_ITEMS = 6719, 1702
"""Where the items begin: behind a configuration of 144 bytes and a header of 6,563 or 1,546."""
READOUT_HEAD, WAVEFORM_HEAD, IMAGE_HEAD, SAMPLING = 340, 40, 198, 56


@pytest.fixture
def recording(shared_data: Path) -> Recording:
    """Bytes and items of a recording, CLOSE left out; every byte must have been read."""

    def read(name: str) -> tuple[bytes, list[Any]]:
        content = (shared_data / "wire" / f"{name}.bin").read_bytes()
        reader = wire.Reader(io.BytesIO(content).read)
        found = []
        while not isinstance(item := wire.read_message(reader), wire.Close):
            found.append(item)
        assert reader.total == len(content)
        assert not reader.buffered
        return content, found

    return read


def complexes(content: bytes, offset: int, count: int) -> Any:
    return np.frombuffer(content, "<c8", count, offset)


@pytest.mark.parametrize(
    "name",
    [
        "snr_raw",
        "snr_whitened",
        "snr_bucket",
        "snr_imagearray",
        "snr_recondata",
        "snr_recondata_ref",
        "wav_raw",
        "wav_bucket",
    ],
)
def test_writing_again_gives_the_same_bytes(recording: Recording, name: str) -> None:
    content, items = recording(name)
    assert isinstance(items[0], wire.Configuration)
    assert isinstance(items[1], wire.ScanHeaderText)
    assert len(items[0].xml) == 144
    assert items[0].xml == content[6:150]
    assert b"".join(map(wire.message, items)) + wire.close_message() == content


@pytest.mark.parametrize(
    ("name", "start", "count", "coils", "length"),
    [
        ("snr_raw", SNR_ITEMS, 69, 14, 384),
        ("snr_whitened", SNR_ITEMS, 68, 14, 384),
        ("wav_raw", WAV_ITEMS, 129, 8, 256),
    ],
)
def test_readouts(recording: Recording, name: str, start: int, count: int, coils: int, length: int) -> None:
    content, items = recording(name)
    blocks = [item for item in items if isinstance(item, ReadoutBlock)]
    samples = np.concatenate([block.samples for block in blocks])
    headers = np.concatenate([block.headers for block in blocks])
    assert samples.shape == (count, coils, length)
    assert samples.dtype == np.complex64
    assert all(block.trajectory.shape == (len(block), length, 0) for block in blocks)
    step = 2 + READOUT_HEAD + 8 * coils * length
    for number in (0, 1, count // 2, count - 1):
        at = start + number * step
        assert content[at : at + 2] == b"\xf0\x03"
        np.testing.assert_array_equal(
            samples[number].ravel(), complexes(content, at + 2 + READOUT_HEAD, coils * length)
        )
        version, flags, _, counter = struct.unpack_from("<HQII", content, at + 2)
        found = headers[number]
        assert (found["version"], found["flags"], found["scan_counter"]) == (version, flags, counter)
        assert struct.unpack_from("<3H", content, at + 2 + 34)[::2] == (length, coils)
    assert np.abs(samples).max() > 0


def test_the_first_readout_of_each_scan_is_noise(recording: Recording) -> None:
    for name, noise in (("snr_raw", 1), ("snr_whitened", 0), ("wav_raw", 1)):
        blocks = [item for item in recording(name)[1] if isinstance(item, ReadoutBlock)]
        flags = np.concatenate([block.headers["flags"] for block in blocks])
        # bit 19: ACQ_IS_NOISE_MEASUREMENT
        assert np.flatnonzero(flags & np.uint64(1 << 18)).tolist() == [0][:noise]


def test_waveforms_behind_readouts(recording: Recording) -> None:
    content, items = recording("wav_raw")
    waveforms = items[-3:]
    for number, waveform in enumerate(waveforms):
        at = WAV_ITEMS + 129 * (2 + READOUT_HEAD + 8 * 8 * 256) + number * (2 + WAVEFORM_HEAD + 4 * 40)
        assert content[at : at + 2] == b"\x02\x04"
        assert isinstance(waveform, Waveform)
        assert waveform.data.shape == (2, 20)
        assert waveform.data.dtype == np.uint32
        np.testing.assert_array_equal(waveform.data.ravel(), np.frombuffer(content, "<u4", 40, at + 2 + WAVEFORM_HEAD))
        assert waveform.data[0, :3].tolist() == [0, 1, 2]


def test_a_bucket_with_reference_lines(recording: Recording) -> None:
    content, (_, _, bucket) = recording("snr_bucket")
    assert isinstance(bucket, wire.Bucket)
    (data,), (reference,) = bucket.data, bucket.reference
    assert data.samples.shape == (36, 14, 192)
    assert reference.samples.shape == (48, 14, 192)
    assert bucket.waveforms == ()
    heads = SNR_ITEMS + 2 + 13 * 8
    samples = heads + 36 * READOUT_HEAD
    np.testing.assert_array_equal(data.samples.ravel(), complexes(content, samples, 36 * 14 * 192))
    np.testing.assert_array_equal(data.headers, np.frombuffer(content, HEADER_DTYPE, 36, heads))
    # a count of spaces, nine counts of values, 36 lines and eight zeros of two bytes
    heads = samples + 36 * 14 * 192 * 8 + 8 + 9 * 8 + (36 + 8) * 2
    samples = heads + 48 * READOUT_HEAD
    np.testing.assert_array_equal(reference.samples.ravel(), complexes(content, samples, 48 * 14 * 192))
    assert reference.headers["idx"]["kspace_encode_step_1"].tolist() == list(range(30, 78))
    (lines,), (reference_lines,) = bucket.data_stats, bucket.reference_stats
    assert lines["kspace_encode_step_1"] == tuple(range(0, 106, 3))
    assert reference_lines["kspace_encode_step_1"] == tuple(range(30, 78))
    assert {name: found for name, found in lines.items() if name != "kspace_encode_step_1"} == dict.fromkeys(
        ["kspace_encode_step_2", "slice", "phase", "contrast", "repetition", "set", "segment", "average"], (0,)
    )


def test_a_bucket_with_waveforms(recording: Recording) -> None:
    content, (_, _, bucket) = recording("wav_bucket")
    (data,) = bucket.data
    assert data.samples.shape == (128, 8, 128)
    assert bucket.reference == bucket.reference_stats == ()
    samples = WAV_ITEMS + 2 + 13 * 8 + 128 * READOUT_HEAD
    np.testing.assert_array_equal(data.samples.ravel(), complexes(content, samples, 128 * 8 * 128))
    # all headers, then all samples, stand before the two bytes of CLOSE
    waves = np.frombuffer(content, "<u4", 3 * 40, len(content) - 2 - 3 * 160)
    np.testing.assert_array_equal(np.concatenate([found.data.ravel() for found in bucket.waveforms]), waves)
    assert [found.data.shape for found in bucket.waveforms] == [(2, 20)] * 3


def test_image_arrays(recording: Recording) -> None:
    content, (_, _, *arrays) = recording("snr_imagearray")
    assert [type(found) for found in arrays] == [ImageArray] * 3
    assert [len(found.meta[0]) for found in arrays] == [3982, 3903, 3892]
    at = SNR_ITEMS
    for found, text, lines in zip(arrays, (3982, 3903, 3892), (0, 144, 144), strict=True):
        assert found.data.shape == (192, 144, 1, 1, 1, 1, 1)
        assert found.data.dtype == np.complex64
        voxels = at + 2 + 8 * 8
        np.testing.assert_array_equal(found.data.ravel(order="F"), complexes(content, voxels, 192 * 144))
        head = voxels + 8 * 192 * 144 + 4 * 8
        assert found.headers.shape == (1, 1, 1)
        assert bytes(found.headers[0, 0, 0]) == content[head : head + IMAGE_HEAD]
        meta = head + IMAGE_HEAD + 8 + 8
        assert found.meta == [content[meta : meta + text].decode("ascii")]
        assert found.waveform is None
        # two marks; where there are lines, five dimensions and their sizes
        at = meta + text + 2 + (6 * 8 + lines * READOUT_HEAD if lines else 0)
        assert (found.acq_headers is None) == (lines == 0)
        if lines:
            assert found.acq_headers.shape == (144, 1, 1, 1, 1)
            assert bytes(found.acq_headers[143, 0, 0, 0, 0]) == content[at - READOUT_HEAD : at]
    assert content[at:] == b"\4\0"


@pytest.mark.parametrize(("name", "lines"), [("snr_recondata", 144), ("snr_recondata_ref", 48)])
def test_recon_data(recording: Recording, name: str, lines: int) -> None:
    content, (_, _, found) = recording(name)
    assert isinstance(found, wire.ReconData)
    (bit,) = found.bits
    assert bit.reference is not None
    at = SNR_ITEMS + 2 + 8
    # the centre, line 54, is moved to the middle of the matrix, 72
    for buffer, k1, sampled in ((bit.data, 144, range(18, 124, 3)), (bit.reference, lines, range(48, 96))):
        assert buffer.data.shape == (1, 1, 1, 14, 1, k1, 192)
        assert buffer.headers.shape == (1, 1, 1, 1, 144)
        assert struct.unpack_from("<8Q", content, at) == (7, 192, k1, 1, 14, 1, 1, 1)
        at += 64
        np.testing.assert_array_equal(buffer.data.ravel(), complexes(content, at, k1 * 14 * 192))
        # two marks of what Cartesian data lack, five dimensions and their sizes
        at += 8 * k1 * 14 * 192 + 2 + 6 * 8
        np.testing.assert_array_equal(buffer.headers.ravel(), np.frombuffer(content, HEADER_DTYPE, 144, at))
        assert np.flatnonzero(buffer.headers["number_of_samples"]).tolist() == list(sampled)
        at += 144 * READOUT_HEAD
        assert struct.unpack_from("<3H", content, at + 24) == tuple(buffer.sampling.encoded_matrix) == (192, 144, 1)
        at += SAMPLING + 1
    # the mark in front of the reference is counted with the data, and the reference has none behind it
    assert at - 1 == len(content) - 2
    assert (buffer.trajectory, buffer.density) == (None, None)
