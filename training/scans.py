"""Fully sampled measured scans as examples: whitened, with sensitivities and a reference of their own."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from voxelsigma.models.encoding import SenseEncoding
from voxelsigma.models.espirit import EspiritSettings, espirit
from voxelsigma.noise.covariance import whitened_variance_factor, whitening_matrix
from voxelsigma.noise.edge import edge_covariance
from voxelsigma.noise.fourier import fft_centred, ifft_centred
from voxelsigma.training.example import Example
from voxelsigma.training.head_slices import dilated_support, object_voxels
from voxelsigma.training.sampling import ExampleSettings, draw_mask, log_uniform
from voxelsigma.training.volumes import LARGEST_COMPRESSION

ComplexArray = NDArray[np.complex64]
Lines = NDArray[np.bool_]

_CALIBRATION: Final = EspiritSettings(iterations=20)
# Of the lines of the matrix, the share that must be measured at either side of the centre.
_LEAST_SIDE: Final = 0.6
_NOISE_SLICES: Final = 3
# Rayleigh noise of unit deviation exceeds this in 3 of 10,000 voxels.
_ABOVE_NOISE: Final = 4.0


class ScanFile(Protocol):
    """A file of fully sampled slices of one shape, checked but not read."""

    @property
    def name(self) -> str:
        """Its path in the data folder, without ending."""

    @property
    def path(self) -> Path:
        """Where it is."""

    @property
    def slices(self) -> int:
        """How many there are."""

    @property
    def positions(self) -> Sequence[int]:
        """Of every slice its place in the object, which repetitions, contrasts and phases share."""

    @property
    def coils(self) -> int:
        """How many there are."""

    def read(self, number: int) -> tuple[ComplexArray, Lines]:
        """Whitened k-space `(coils, k1, k0)` of a slice, and its measured lines `(k1,)`.

        Raises
        ------
        ValueError, OSError
            If it is damaged or cannot be whitened.
        """


@dataclass(frozen=True, slots=True, eq=False)
class MeasuredSlice:
    """A fully sampled slice that examples are drawn from.

    Parameters
    ----------
    kspace
        Whitened k-space, shape `(coils, k1, k0)`, noise of variance 2 on the measured lines.
    lines
        Measured lines, shape `(k1,)`; the others are zero-filled.
    sensitivities
        Shape `(coils, y, x)`, unit norm.
    image
        Unit-norm coil combination, shape `(y, x)`, in SNR units: the scan's own noise is in it.
    """

    kspace: ComplexArray
    lines: Lines
    sensitivities: ComplexArray
    image: ComplexArray

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return self.kspace.nbytes + self.sensitivities.nbytes + self.image.nbytes


def prepare_slice(kspace: ComplexArray, lines: Lines) -> MeasuredSlice:
    """Sensitivities by ESPIRiT from the central lines of whitened k-space `(coils, k1, k0)`, and the combined image.

    Raises
    ------
    ValueError
        If samples are not finite, all are zero, or the centre is smaller than ESPIRiT's kernel.
    """
    _check_finite(kspace)
    if not kspace.any():
        raise ValueError("all samples are zero; expected k-space")
    samples = torch.from_numpy(kspace)
    maps = espirit(samples, (kspace.shape[1], kspace.shape[2]), _CALIBRATION).contiguous()
    image = SenseEncoding(maps, torch.ones(1)).adjoint(samples)
    return MeasuredSlice(kspace, lines, maps.numpy(), image.numpy())


def draw_scan(scan: MeasuredSlice, settings: ExampleSettings, rng: np.random.Generator) -> Example:
    r"""Draw one example of a measured slice: a mask, and noise that lowers its SNR.

    .. math:: y = M \, \frac{y_0 + a n}{\sqrt{1 + a^2}}, \qquad \rho = \frac{\rho_0}{\sqrt{1 + a^2}},
        \qquad n \sim \mathcal{CN}(0, 2)

    with the measured k-space :math:`y_0` and image :math:`\rho_0`, and :math:`a^2 = (s_0/s)^2 - 1` where the drawn
    SNR s is below the scan's own :math:`s_0`, else a = 0: noise cannot be taken away. The noise in y again has
    variance 2.

    The target is no truth: it keeps the scan's own noise, of deviation :math:`1/\sqrt{1 + a^2}`, part of that in y.

    Parameters
    ----------
    scan
        The slice.
    settings
        Masks, SNR and `support_share` to draw from.
    rng
        Source of all randomness.

    Returns
    -------
        The example, without batch axis.

    Raises
    ------
    ValueError
        If the settings' centre does not fit the matrix and acceleration.
    """
    shape = (scan.kspace.shape[1], scan.kspace.shape[2])
    sampled = (draw_mask(shape, settings, rng) & scan.lines[:, None]).astype(np.float32)[None]
    magnitude = np.abs(scan.image)
    own = float(magnitude[object_voxels(magnitude)].mean())
    wanted = log_uniform(settings.snr, rng)
    added = np.sqrt(max((own / wanted) ** 2 - 1, 0.0))
    kspace, maps, image = scan.kspace, scan.sensitivities, scan.image
    if rng.random() < settings.support_share:
        support = dilated_support(magnitude, int(rng.integers(2, 7)), least=_ABOVE_NOISE)
        maps, image = maps * support, image * support
    if added > 0:
        noise = rng.standard_normal((*kspace.shape, 2), dtype=np.float32).view(np.complex64)[..., 0]
        kspace = kspace + np.float32(added) * noise
    scale = np.float32(1 / np.sqrt(1 + added**2))
    return Example(
        kspace=torch.from_numpy(kspace * (scale * sampled)),
        sensitivities=torch.from_numpy(maps),
        mask=torch.from_numpy(sampled),
        target=torch.from_numpy(image * scale),
    )


class Whitening:
    """Whitening matrix `(coils, coils)` of a file, made at its first use."""

    __slots__ = ("_matrix",)

    def __init__(self) -> None:
        self._matrix: ComplexArray | None = None

    def matrix(self, make: Callable[[], ComplexArray]) -> ComplexArray:
        """The matrix, made by `make` the first time."""
        if self._matrix is None:
            self._matrix = make()
        return self._matrix


def edge_whitening(plane: Callable[[int], ComplexArray], slices: int, lines: Lines, size: int) -> ComplexArray:
    """Whitening matrix `(coils, coils)` from the outermost measured lines of up to three slices without a noise scan.

    Parameters
    ----------
    plane
        Gives the measured k-space `(coils, k1, k0)` of a slice, with the readout's oversampling.
    slices
        How many there are; the noise is taken from the first, the middle and the last.
    lines
        Measured lines, shape `(k1,)`.
    size
        Readout samples without oversampling.

    Raises
    ------
    ValueError
        If fewer noise samples than coils are found, or the covariance is singular.
    """
    chosen = np.unique(np.linspace(0, slices - 1, _NOISE_SLICES).round().astype(int))
    planes = [plane(int(number)) for number in chosen]
    oversampled = size < planes[0].shape[-1]
    # planes: (coils, k1, k0) -> (k1, coils, k0)
    readouts = np.concatenate([np.moveaxis(plane, 0, 1)[lines] for plane in planes])
    _check_finite(readouts)
    distances = np.tile(np.abs(np.flatnonzero(lines) - len(lines) // 2).astype(np.float64), len(planes))
    found = edge_covariance(readouts, distances, 1.0, oversampled=oversampled)
    # few samples make the whitened noise too strong on average
    bias = whitened_variance_factor(found.coils, found.effective_samples)
    return np.asarray(whitening_matrix(found.matrix, float(np.sqrt(2 / bias))))


def whitened_plane(plane: ComplexArray, matrix: ComplexArray) -> ComplexArray:
    """Whiten k-space `(coils, k1, k0)`.

    Raises
    ------
    ValueError
        If samples are not finite.
    """
    _check_finite(plane)
    return np.asarray(np.tensordot(matrix, plane, axes=1), dtype=np.complex64)


def _check_finite(samples: ComplexArray) -> None:
    if not np.isfinite(samples).all():
        raise ValueError("holds NaN or Inf samples; expected finite samples")


def without_oversampling(kspace: ComplexArray, size: int) -> ComplexArray:
    """Crop the field of view of the readout, the last axis, to `size` of its voxels; noise stays white."""
    length = kspace.shape[-1]
    if size == length:
        return kspace
    first = length // 2 - size // 2
    return np.asarray(fft_centred(ifft_centred(kspace)[..., first : first + size]), dtype=np.complex64)


def check_fully_sampled(lines: Lines) -> None:
    """Refuse lines `(k1,)` that make no reference image.

    Raises
    ------
    ValueError
        If lines are missing between the first and the last, or much of a side is.
    """
    measured, size = np.flatnonzero(lines), len(lines)
    if not measured.size:
        raise ValueError("no line is sampled; expected a fully sampled scan")
    first, last = int(measured[0]), int(measured[-1])
    if measured.size < last + 1 - first:
        raise ValueError(
            f"{measured.size} of the {last + 1 - first} lines between the first and the last are sampled; "
            "expected a fully sampled scan"
        )
    if min(size // 2 - first, last + 1 - size // 2) < _LEAST_SIDE * (size // 2):
        raise ValueError(
            f"lines {first} to {last} of {size} are sampled; expected at least {_LEAST_SIDE:.0%} of those at either "
            f"side of the centre {size // 2}"
        )


def check_stored(dataset: Any, path: Path, name: str) -> None:
    """Refuse a dataset that claims more than its file can hold, before anything is allocated for it."""
    claimed = int(np.prod(dataset.shape, dtype=object)) * dataset.id.get_type().get_size()
    stored = min(dataset.id.get_storage_size(), path.stat().st_size)
    most = stored * (1 if dataset.id.get_create_plist().get_nfilters() == 0 else LARGEST_COMPRESSION)
    if claimed > most:
        raise ValueError(
            f"{path}: dataset '{name}' of shape {dataset.shape} claims {claimed} bytes; the file holds {stored} of it"
        )


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Name the file in every error, and turn the HDF5 library's own for damaged files into OSError."""
    try:
        yield
    except np.linalg.LinAlgError:
        raise ValueError(
            f"{path}: noise covariance: not positive definite; a coil without signal, or linearly dependent coils, "
            "cannot be whitened"
        ) from None
    except (ValueError, OSError) as error:
        if str(error).startswith(str(path)):
            raise
        kind = ValueError if isinstance(error, ValueError) else OSError
        raise kind(f"{path}: {error}") from error
    except (RuntimeError, KeyError, TypeError) as error:
        raise OSError(f"{path}: damaged ({error})") from error
