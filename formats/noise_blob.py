"""Noise covariances as Gadgetron's storage service keeps them: an array with metadata in one self-contained blob.

In this order, little-endian: the six bytes `SFNDAM`, uint32 version (1), uint32 type (7, complex float), uint32 number
of dimensions, one uint64 each, uint64 length of the metadata, the samples, and JSON with `channels`, `labels`,
`sampleCount`, `noiseDwellTimeUs` and `receiverNoiseBandwidth`. Read in C order the array is :math:`E[n n^H]`.
"""

import json
import struct
from typing import Any, Final

import numpy as np

from voxelsigma.noise.covariance import GADGETRON_BANDWIDTH, ComplexArray, NoiseCovariance

MAGIC: Final = b"SFNDAM"
VERSION: Final = 1
COMPLEX_FLOAT: Final = 7
MOST_CHANNELS: Final = 1024
MOST_META_BYTES: Final = 2**20
MOST_BYTES: Final = 8 * MOST_CHANNELS**2 + MOST_META_BYTES + 1024
"""No blob of a noise covariance is larger than this."""

_LEADER = struct.Struct("<6sIII")
_SHAPE = struct.Struct("<QQQ")


def encode_noise_blob(covariance: NoiseCovariance) -> bytes:
    """The blob of a covariance, as Gadgetron's NoiseAdjust writes and reads it."""
    meta = json.dumps(
        {
            "channels": covariance.coils,
            "labels": list(covariance.labels),
            "noiseDwellTimeUs": covariance.dwell_time_us,
            "receiverNoiseBandwidth": covariance.bandwidth,
            "sampleCount": covariance.samples,
        }
    ).encode()
    return (
        _LEADER.pack(MAGIC, VERSION, COMPLEX_FLOAT, 2)
        + _SHAPE.pack(covariance.coils, covariance.coils, len(meta))
        + np.ascontiguousarray(covariance.matrix, dtype="<c8").tobytes()
        + meta
    )


def decode_noise_blob(
    blob: bytes, *, bandwidth: float = GADGETRON_BANDWIDTH, source: str = "stored covariance"
) -> NoiseCovariance:
    """Read a covariance's blob; of its metadata only the dwell time must be there.

    Parameters
    ----------
    blob
        All of its bytes.
    bandwidth
        Relative receiver noise bandwidth, of the imaging header: the blob's own is not used, as in NoiseAdjust.
    source
        Where it came from, in words.

    Returns
    -------
        The covariance; its number of samples is 0 if the blob does not state it.

    Raises
    ------
    ValueError
        If the bytes are no such blob; names the field, the value found and what is valid.
    """
    coils, meta_bytes = _sizes(blob)
    start = _LEADER.size + _SHAPE.size
    stop = start + 8 * coils**2
    matrix = _hermitian(np.frombuffer(blob[start:stop], dtype="<c8").reshape(coils, coils))
    meta = _meta(blob[stop : stop + meta_bytes])
    channels = _count(meta, "channels")
    if channels not in (0, coils):
        raise ValueError(f"noise blob: channels is {channels}; its matrix has {coils}")
    samples = _count(meta, "sampleCount")
    return NoiseCovariance(
        matrix=matrix,
        samples=samples,
        effective_samples=float(samples),
        dwell_time_us=_dwell(meta),
        bandwidth=bandwidth,
        labels=_labels(meta, coils),
        source=source,
    )


def _sizes(blob: bytes) -> tuple[int, int]:
    """Coils and bytes of metadata, checked against each other, the limits and the blob's length."""
    if blob[: len(MAGIC)] != MAGIC:
        raise ValueError(f"noise blob: starts with {blob[:6]!r}; expected {MAGIC!r}")
    if len(blob) < _LEADER.size:
        raise ValueError(f"noise blob: ends after {len(blob)} of {_LEADER.size} bytes of its leader")
    _, version, kind, dimensions = _LEADER.unpack_from(blob)
    if version != VERSION:
        raise ValueError(f"noise blob: version is {version}; expected {VERSION}")
    if kind != COMPLEX_FLOAT:
        raise ValueError(f"noise blob: type is {kind}; expected {COMPLEX_FLOAT} (complex float)")
    if dimensions != 2:
        raise ValueError(f"noise blob: number of dimensions is {dimensions}; expected 2")
    start = _LEADER.size + _SHAPE.size
    if len(blob) < start:
        raise ValueError(f"noise blob: ends after {len(blob)} of {start} bytes before its data")
    rows, columns, meta_bytes = _SHAPE.unpack_from(blob, _LEADER.size)
    if rows != columns or not 1 <= rows <= MOST_CHANNELS:
        raise ValueError(
            f"noise blob: dimensions are {rows} x {columns}; expected a square of 1 to {MOST_CHANNELS} channels"
        )
    if meta_bytes > MOST_META_BYTES:
        raise ValueError(f"noise blob: metadata length is {meta_bytes}; expected at most {MOST_META_BYTES} bytes")
    expected = start + 8 * rows * columns + meta_bytes
    if len(blob) != expected:
        raise ValueError(f"noise blob: has {len(blob)} bytes; its dimensions and metadata length state {expected}")
    return int(rows), int(meta_bytes)


def _hermitian(matrix: ComplexArray) -> ComplexArray:
    """The matrix in double precision, without the rounding that keeps it from being Hermitian."""
    if not np.isfinite(matrix).all():
        raise ValueError("noise blob: matrix holds NaN or Inf; expected finite values")
    wide = matrix.astype(np.complex128)
    deviation, largest = float(np.abs(wide - wide.conj().T).max()), float(np.abs(wide).max())
    if deviation > 1e-3 * largest:
        raise ValueError(
            f"noise blob: matrix deviates by {deviation:.3g} from a Hermitian one (largest value {largest:.3g})"
        )
    return np.asarray((wide + wide.conj().T) / 2)


def _meta(text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"noise blob: metadata is not JSON ({type(error).__name__})") from None
    if not isinstance(found, dict):
        raise ValueError(f"noise blob: metadata is a JSON {type(found).__name__}; expected an object")
    return found


def _count(meta: dict[str, Any], name: str) -> int:
    """A number of something that may be absent: 0 then."""
    value = meta.get(name, 0)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**62:
        raise ValueError(f"noise blob: {name} is {_short(value)}; expected a whole number, 0 or above")
    return value


def _dwell(meta: dict[str, Any]) -> float:
    value = meta.get("noiseDwellTimeUs")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
        raise ValueError(
            f"noise blob: noiseDwellTimeUs is {_short(value)}; expected microseconds, 0 or above (0 is unknown)"
        )
    return float(value)


def _labels(meta: dict[str, Any], coils: int) -> tuple[str, ...]:
    """Coil names; none where there is not one for each channel, since they could not be told apart."""
    labels = meta.get("labels") or []
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"noise blob: labels is {_short(labels)}; expected a list of texts")
    return tuple(labels) if len(labels) == coils else ()


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of too many digits
        text = "a very large number"
    return text if len(text) <= 80 else text[:77] + "..."
