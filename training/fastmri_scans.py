"""Fully sampled multi-coil scans as fastMRI stores them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np

from voxelsigma.formats.hdf5 import open_hdf5
from voxelsigma.formats.header import parse_header
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

_AXES: Final = "(slices, coils, readout, phase encoding)"


@dataclass(frozen=True, slots=True, eq=False)
class FastmriScan:
    """A fastMRI file, checked but not read.

    Parameters
    ----------
    name, path
        See `ScanFile`.
    shape
        Of `kspace`, (slices, coils, readout, phase encoding).
    size
        Readout samples without oversampling.
    lines
        Measured columns; the others are zero padding.
    """

    name: str
    path: Path
    shape: tuple[int, int, int, int]
    size: int
    lines: Lines
    _whitening: Whitening = field(default_factory=Whitening)

    @property
    def slices(self) -> int:
        """How many there are."""
        return self.shape[0]

    @property
    def positions(self) -> range:
        """See `ScanFile`."""
        return range(self.slices)

    @property
    def coils(self) -> int:
        """How many there are."""
        return self.shape[1]

    def read(self, number: int) -> tuple[ComplexArray, Lines]:
        """See `ScanFile`; the noise is taken from the outermost lines of up to three slices."""
        with reading(self.path), open_hdf5(self.path, "fastMRI k-space") as file:
            matrix = self._whitening.matrix(
                lambda: edge_whitening(lambda one: _plane(file, one), self.slices, self.lines, self.size)
            )
            plane = without_oversampling(_plane(file, number), self.size)
        return whitened_plane(plane, matrix), self.lines


def open_fastmri(path: Path, name: str) -> FastmriScan:
    """Check a fastMRI file.

    Parameters
    ----------
    path
        The file: a dataset `kspace` (slices, coils, readout, phase encoding), complex, centred, zero-padded along the
        phase encoding; optionally `ismrmrd_header`, which tells the readout's oversampling, as, without it, does
        the size of `reconstruction_rss`.
    name
        See `ScanFile`.

    Raises
    ------
    FileNotFoundError, OSError
        If it cannot be read, or is damaged.
    ValueError
        If it is not such a file, holds less than it claims, or is not fully sampled.
    """
    with reading(path), open_hdf5(path, "fastMRI k-space") as file:
        kspace = _kspace(file, path)
        size = _readout_size(file, kspace.shape[2])
        # the padding is the same in all slices and coils
        middle = kspace[kspace.shape[0] // 2, 0]
        lines = np.asarray((middle != 0).any(axis=0))
        check_fully_sampled(lines)
        return FastmriScan(name, path, tuple(map(int, kspace.shape)), size, lines)  # type: ignore[arg-type]


def _kspace(file: Any, path: Path) -> Any:
    """The dataset, its type and shape checked."""
    found = file.get("kspace")
    if not isinstance(found, h5py.Dataset):
        raise ValueError(f"has no dataset 'kspace'; found {', '.join(file) or 'none'}")
    if found.dtype.kind != "c":
        raise ValueError(f"dataset 'kspace' is {found.dtype}; expected complex64")
    if found.ndim != 4 or 0 in found.shape:
        raise ValueError(f"dataset 'kspace' has shape {found.shape}; expected {_AXES}")
    check_stored(found, path, "kspace")
    return found


def _readout_size(file: Any, length: int) -> int:
    """Readout samples without oversampling."""
    if "ismrmrd_header" in file:
        text = file["ismrmrd_header"][()]
        encoding = parse_header(text if isinstance(text, bytes) else str(text).encode()).encodings[0]
        if encoding.encoded_matrix[2] != length:
            raise ValueError(
                f"dataset 'kspace' has {length} readout samples; its header states {encoding.encoded_matrix[2]}"
            )
        return max(1, round(length * min(1.0, encoding.recon_fov_mm[2] / encoding.encoded_fov_mm[2])))
    if "reconstruction_rss" in file and file["reconstruction_rss"].ndim == 3:
        return min(length, max(1, int(file["reconstruction_rss"].shape[1])))
    return length


def _plane(file: Any, number: int) -> ComplexArray:
    """K-space of a slice, as measured, `(coils, k1, k0)`."""
    samples = file["kspace"][number].astype(np.complex64, copy=False)
    # (coils, readout, phase encoding) -> (coils, k1, k0)
    return np.ascontiguousarray(np.swapaxes(samples, 1, 2))
