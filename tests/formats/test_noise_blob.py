"""The blob in which Gadgetron keeps noise covariances: its bytes, and whatever else may come in their place."""

import json
import struct

import numpy as np
import pytest

from voxelsigma.formats.noise_blob import MOST_BYTES, decode_noise_blob, encode_noise_blob
from voxelsigma.noise.covariance import NoiseCovariance

MATRIX = np.array([[2, 1 + 1j], [1 - 1j, 3]])

COVARIANCE = NoiseCovariance(
    matrix=MATRIX,
    samples=1000,
    effective_samples=900.0,
    dwell_time_us=20.0,
    bandwidth=0.8,
    labels=("A", "B"),
    source="noise readouts",
)


def handmade(
    meta: object = None,
    *,
    matrix: np.ndarray[tuple[int, ...], np.dtype[np.complex128]] = MATRIX,
    leader: tuple[int, int, int] = (1, 7, 2),
    dims: tuple[int, int] | None = None,
    text: bytes | None = None,
) -> bytes:
    """A blob, put together number by number."""
    text = json.dumps({"noiseDwellTimeUs": 20.0} if meta is None else meta).encode() if text is None else text
    dims = matrix.shape[0], matrix.shape[1] if dims is None else dims[1]
    return (
        b"SFNDAM"
        + struct.pack("<III", *leader)
        + struct.pack("<QQ", *dims)
        + struct.pack("<Q", len(text))
        + b"".join(struct.pack("<ff", value.real, value.imag) for value in matrix.ravel())
        + text
    )


def test_the_bytes_are_gadgetrons() -> None:
    blob = encode_noise_blob(COVARIANCE)
    assert blob[:6] == b"SFNDAM"
    assert struct.unpack_from("<III", blob, 6) == (1, 7, 2)
    rows, columns, length = struct.unpack_from("<QQQ", blob, 18)
    assert (rows, columns) == (2, 2)
    # in C order, element (0, 1) is E[n_0 n_1*]
    assert struct.unpack_from("<8f", blob, 42) == (2, 0, 1, 1, 1, -1, 3, 0)
    meta = blob[42 + 32 :]
    assert len(meta) == length
    assert json.loads(meta) == {
        "channels": 2,
        "labels": ["A", "B"],
        "sampleCount": 1000,
        "noiseDwellTimeUs": 20.0,
        "receiverNoiseBandwidth": 0.8,
    }


def test_a_handmade_blob_is_read() -> None:
    meta = {
        "channels": 2,
        "labels": ["A", "B"],
        "sampleCount": 512,
        "noiseDwellTimeUs": 12.5,
        "receiverNoiseBandwidth": 0.5,
    }
    found = decode_noise_blob(handmade(meta), bandwidth=0.9, source="a test")
    np.testing.assert_array_equal(found.matrix, MATRIX)
    assert (found.samples, found.effective_samples, found.dwell_time_us) == (512, 512.0, 12.5)
    assert (found.labels, found.source, found.calibrated) == (("A", "B"), "a test", True)
    # the bandwidth is the imaging header's, never the blob's
    assert found.bandwidth == 0.9


def test_what_was_written_is_read() -> None:
    found = decode_noise_blob(encode_noise_blob(COVARIANCE))
    np.testing.assert_array_equal(found.matrix, COVARIANCE.matrix)
    assert (found.samples, found.dwell_time_us, found.labels) == (1000, 20.0, ("A", "B"))
    assert found.bandwidth == 0.793


def test_only_the_matrix_and_the_dwell_time_are_needed() -> None:
    found = decode_noise_blob(handmade())
    assert (found.samples, found.effective_samples, found.labels) == (0, 0.0, ())
    assert found.dwell_time_us == 20


def test_labels_that_are_not_one_for_each_channel_are_left_out() -> None:
    assert decode_noise_blob(handmade({"noiseDwellTimeUs": 1, "labels": ["A"]})).labels == ()


def test_rounding_in_the_matrix_is_taken_out() -> None:
    rounded = MATRIX + np.array([[0, 1e-6], [0, 1e-6j]])
    found = decode_noise_blob(handmade(matrix=rounded))
    np.testing.assert_array_equal(found.matrix, found.matrix.conj().T)


@pytest.mark.parametrize(
    ("blob", "complaint"),
    [
        (b"", "starts with b''"),
        (b"<html>nothing here</html>", "starts with b'<html>'"),
        (handmade()[:10], "ends after 10 of 18 bytes of its leader"),
        (handmade()[:30], "ends after 30 of 42 bytes before its data"),
        (handmade(leader=(2, 7, 2)), "version is 2; expected 1"),
        (handmade(leader=(1, 8, 2)), "type is 8; expected 7"),
        (handmade(leader=(1, 7, 2**32 - 1)), "number of dimensions is 4294967295; expected 2"),
        (handmade(dims=(2, 3)), "dimensions are 2 x 3; expected a square"),
        (handmade(matrix=np.zeros((0, 0), np.complex128)), "dimensions are 0 x 0"),
        (handmade()[:18] + struct.pack("<QQQ", 2**63, 2**63, 0), "dimensions are 9223372036854775808"),
        (handmade()[:18] + struct.pack("<QQQ", 2, 2, 2**60), "metadata length is 1152921504606846976"),
        (handmade()[:-1], "has 99 bytes; its dimensions and metadata length state 100"),
        (handmade() + b"x", "has 101 bytes"),
        (handmade(matrix=np.array([[1, np.nan], [np.nan, 1]], np.complex128)), "matrix holds NaN or Inf"),
        (handmade(matrix=np.array([[1, 0.5], [0, 1]], np.complex128)), "matrix deviates by 0.5 from a Hermitian"),
        (handmade(text=b"{"), r"metadata is not JSON \(JSONDecodeError\)"),
        (handmade(text=b"\xff\xfe\xfd"), "metadata is not JSON"),
        (handmade(text=b"[" * 100_000), r"metadata is not JSON \(RecursionError\)"),
        (handmade([1]), "metadata is a JSON list; expected an object"),
        (handmade({}), "noiseDwellTimeUs is None"),
        (handmade({"noiseDwellTimeUs": -1}), "noiseDwellTimeUs is -1"),
        (handmade({"noiseDwellTimeUs": True}), "noiseDwellTimeUs is True"),
        (handmade(text=b'{"noiseDwellTimeUs": NaN}'), "noiseDwellTimeUs is nan"),
        (handmade(text=b'{"noiseDwellTimeUs": 1e999}'), "noiseDwellTimeUs is inf"),
        (handmade(text=b'{"noiseDwellTimeUs": 1' + b"0" * 1000 + b"}"), "noiseDwellTimeUs is 1000"),
        (handmade({"noiseDwellTimeUs": 1, "channels": 3}), "channels is 3; its matrix has 2"),
        (handmade({"noiseDwellTimeUs": 1, "sampleCount": "many"}), "sampleCount is 'many'"),
        (handmade({"noiseDwellTimeUs": 1, "labels": [1, 2]}), r"labels is \[1, 2\]"),
    ],
)
def test_what_is_wrong_is_named(blob: bytes, complaint: str) -> None:
    with pytest.raises(ValueError, match=f"noise blob: {complaint}"):
        decode_noise_blob(blob)


def test_any_bytes_are_read_or_refused() -> None:
    rng = np.random.default_rng(0)
    whole = np.frombuffer(encode_noise_blob(COVARIANCE), np.uint8)
    for length in range(len(whole)):
        with pytest.raises(ValueError, match="noise blob"):
            decode_noise_blob(whole[:length].tobytes())
    refused = 0
    for _ in range(3000):
        bad = whole.copy()
        places = rng.integers(0, len(bad), rng.integers(1, 8))
        bad[places] = rng.integers(0, 256, len(places))
        try:
            decode_noise_blob(bad.tobytes())
        except ValueError as error:
            assert str(error).startswith("noise blob: ")  # noqa: PT017
            refused += 1
    assert refused > 1000


def test_the_largest_blob_is_allowed() -> None:
    large = NoiseCovariance(
        matrix=np.eye(1024, dtype=np.complex128),
        samples=1,
        effective_samples=1,
        dwell_time_us=1,
        labels=tuple(f"{number:08d}" for number in range(1024)),
    )
    blob = encode_noise_blob(large)
    assert len(blob) <= MOST_BYTES
    assert decode_noise_blob(blob).coils == 1024
