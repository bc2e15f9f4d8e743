"""Fully sampled 2D multi-coil scans in ISMRMRD files."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from ismrmrd import constants
from numpy.typing import NDArray

from voxelsigma.formats.header import COUNTERS, Encoding
from voxelsigma.formats.noise_file import read_noise_file
from voxelsigma.formats.raw_file import RawFile, open_raw
from voxelsigma.formats.readouts import NOT_IMAGING, Headers
from voxelsigma.noise.covariance import gadgetron_scale, whitening_matrix
from voxelsigma.training.scans import (
    ComplexArray,
    Lines,
    Whitening,
    check_fully_sampled,
    check_stored,
    edge_whitening,
    reading,
    whitened_plane,
    without_oversampling,
)

# Readouts that are no lines of an image.
_NO_LINES: Final = (constants.ACQ_IS_NOISE_MEASUREMENT, constants.ACQ_IS_PARALLEL_CALIBRATION, *NOT_IMAGING)


@dataclass(frozen=True, slots=True, eq=False)
class IsmrmrdScan:
    """An ISMRMRD file, checked but not read.

    Parameters
    ----------
    name, path
        See `ScanFile`.
    readouts
        Of every slice, repetition, and so on: the numbers of its acquisitions, ascending.
    places
        Of every readout in `readouts`, its line of the encoded matrix.
    positions
        See `ScanFile`.
    lines
        Measured lines, shape `(k1,)`.
    size
        Readout samples without oversampling.
    coils
        How many there are.
    noise_readouts
        Whether there is a noise measurement that tells the scale.
    """

    name: str
    path: Path
    readouts: tuple[NDArray[np.int64], ...]
    places: tuple[NDArray[np.int64], ...]
    positions: tuple[int, ...]
    lines: Lines
    size: int
    coils: int
    noise_readouts: bool
    _whitening: Whitening = field(default_factory=Whitening)

    @property
    def slices(self) -> int:
        """How many there are."""
        return len(self.readouts)

    def read(self, number: int) -> tuple[ComplexArray, Lines]:
        """See `ScanFile`; without a noise measurement the noise is taken from the outermost lines of three slices."""
        with reading(self.path), open_raw(self.path) as raw:
            matrix = self._whitening.matrix(lambda: self._whitening_matrix(raw))
            plane = without_oversampling(self._plane(raw, number), self.size)
        return whitened_plane(plane, matrix), self.lines

    def _whitening_matrix(self, raw: RawFile) -> ComplexArray:
        if not self.noise_readouts:
            return edge_whitening(lambda number: self._plane(raw, number), self.slices, self.lines, self.size)
        noise = read_noise_file(self.path, bandwidth=raw.header.noise_bandwidth)
        dwell = float(raw.group["data"].fields("head")[int(self.readouts[0][0])]["sample_time_us"])
        scale = gadgetron_scale(dwell, noise.dwell_time_us, noise.bandwidth)
        return np.asarray(whitening_matrix(noise.matrix, scale))

    def _plane(self, raw: RawFile, number: int) -> ComplexArray:
        """K-space of a slice, as measured, `(coils, k1, k0)`; averages are added so that the noise stays the same."""
        rows, places = self.readouts[number], self.places[number]
        records = raw.group["data"][rows]
        head = records["head"][0]
        coils, length = int(head["active_channels"]), int(head["number_of_samples"])
        wrong = [row for row, record in zip(rows, records, strict=True) if record["data"].size != 2 * coils * length]
        if wrong:
            raise ValueError(
                f"acquisition {wrong[0]} does not hold the {coils} channels of {length} samples that its header states"
            )
        kspace = np.zeros((len(self.lines), coils, length), dtype=np.complex64)
        for place, samples in zip(places, records["data"], strict=True):
            kspace[place] += samples.astype(np.float32, copy=False).view(np.complex64).reshape(coils, length)
        averages = len(rows) / np.count_nonzero(self.lines)
        # (k1, coils, k0) -> (coils, k1, k0)
        return np.ascontiguousarray(np.moveaxis(kspace, 1, 0)) / np.float32(np.sqrt(averages))


def open_ismrmrd(path: Path, name: str) -> IsmrmrdScan:
    """Check an ISMRMRD file; of its acquisitions only the headers are read.

    Parameters
    ----------
    path
        The file.
    name
        See `ScanFile`.

    Raises
    ------
    FileNotFoundError, OSError
        If it cannot be read, or is damaged.
    ValueError
        If it is not an ISMRMRD file, holds less than it claims, or is no fully sampled 2D Cartesian scan.
    """
    with reading(path), open_raw(path) as raw:
        encoding = raw.header.encodings[0]
        if encoding.trajectory != "cartesian" or encoding.encoded_matrix[0] != 1:
            raise ValueError(
                f"the scan is {encoding.trajectory} with {encoding.encoded_matrix[0]} partitions; "
                "expected a 2D cartesian one"
            )
        check_stored(raw.group["data"], path, "data")
        heads: Headers = raw.group["data"].fields("head")[:]
        rows = np.flatnonzero(~_flagged(heads, *_NO_LINES))
        if not rows.size:
            raise ValueError("none of its acquisitions is a line of an image")
        imaging = heads[rows]
        size = _readout_size(imaging, encoding)
        readouts, places, positions, lines = _slices(rows, imaging, encoding)
        noise = heads[_flagged(heads, constants.ACQ_IS_NOISE_MEASUREMENT)]
        coils = int(imaging["active_channels"][0])
        scale = _tells_scale(noise, imaging)
        return IsmrmrdScan(name, path, readouts, places, positions, lines, size, coils, scale)


def _flagged(heads: Headers, *flags: int) -> NDArray[np.bool_]:
    return np.asarray((heads["flags"] & np.uint64(sum(1 << (flag - 1) for flag in flags))) != 0)


def _tells_scale(noise: Headers, imaging: Headers) -> bool:
    """Whether there are enough noise samples, of the same coils, and the dwell times are known."""
    if not noise.size:
        return False
    coils = int(imaging["active_channels"][0])
    if (noise["active_channels"] != coils).any():
        raise ValueError(f"its noise readouts have {noise['active_channels'][0]} channels, its lines {coils}")
    samples = int(noise["number_of_samples"].sum())
    if samples <= coils:
        raise ValueError(f"it has {samples} noise samples of {coils} coils; more samples than coils are needed")
    return bool(noise["sample_time_us"][0] > 0 and imaging["sample_time_us"][0] > 0)


def _readout_size(imaging: Headers, encoding: Encoding) -> int:
    """Readout samples without oversampling; refuses readouts that are not whole and alike."""
    encoded = encoding.encoded_matrix[2]
    size = max(1, round(encoded * min(1.0, encoding.recon_fov_mm[2] / encoding.encoded_fov_mm[2])))
    length = int(imaging["number_of_samples"][0])
    expected: dict[str, Any] = {
        "encoding_space_ref": 0,
        "active_channels": int(imaging["active_channels"][0]),
        # a readout whose oversampling was removed upstream is complete as well
        "number_of_samples": length if length in (encoded, size) else encoded,
        "center_sample": length // 2,
        "discard_pre": 0,
        "discard_post": 0,
        "trajectory_dimensions": 0,
    }
    for key, value in expected.items():
        wrong = imaging[key][imaging[key] != value]
        if wrong.size:
            raise ValueError(f"a line has {key} {wrong[0]}; expected {value} (whole, symmetric readouts of one kind)")
    if _flagged(imaging, constants.ACQ_IS_REVERSE).any():
        raise ValueError("lines are read out in both directions; expected one direction")
    return size


def _slices(
    rows: NDArray[np.int64], imaging: Headers, encoding: Encoding
) -> tuple[tuple[NDArray[np.int64], ...], tuple[NDArray[np.int64], ...], tuple[int, ...], Lines]:
    """Acquisitions, their lines and the place in the object, slice by slice, and the lines that all slices have."""
    size, limit = encoding.encoded_matrix[1], encoding.line_limit(1)
    places = imaging["idx"]["kspace_encode_step_1"].astype(np.int64) - limit.center + size // 2
    if places.min() < 0 or places.max() >= size:
        raise ValueError(
            f"lines {places.min()} to {places.max()} do not fit the encoded matrix of {size} (centre {limit.center})"
        )
    if len(places) < _least_lines(size):
        raise ValueError(f"it has {len(places)} lines for its header's matrix of {size}; expected a fully sampled scan")
    keys = np.stack([imaging["idx"][name].astype(np.int64) for name in COUNTERS], axis=1)
    found, which = np.unique(keys, axis=0, return_inverse=True)
    which = which.reshape(-1)
    expected: Lines | None = None
    readouts, placed = [], []
    for number, key in enumerate(found.tolist()):
        chosen = which == number
        counts = np.bincount(places[chosen], minlength=size)
        title = ", ".join(f"{name} {value}" for name, value in zip(COUNTERS, key, strict=True) if value) or "slice 0"
        lines = counts > 0
        try:
            check_fully_sampled(lines)
        except ValueError as error:
            raise ValueError(f"{title}: {error}") from None
        if len(set(counts[lines].tolist())) > 1:
            raise ValueError(
                f"{title}: lines are sampled {counts[lines].min()} to {counts.max()} times; expected equally"
            )
        if expected is not None and (expected != lines).any():
            raise ValueError(f"{title}: {lines.sum()} lines are sampled, {expected.sum()} of the slices before")
        expected = lines
        readouts.append(rows[chosen])
        placed.append(places[chosen])
    assert expected is not None
    positions = tuple(found[:, COUNTERS.index("slice")].tolist())
    return tuple(readouts), tuple(placed), positions, expected


def _least_lines(size: int) -> int:
    """Lines without which nothing of this size is allocated: no fully sampled slice has fewer."""
    return max(1, size // 2)
