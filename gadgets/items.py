"""What travels between gadgets inside a process."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from voxelsigma.formats.readouts import Headers, ReadoutBlock
from voxelsigma.noise.covariance import NoiseCovariance

__all__ = [
    "Item",
    "KSpace",
    "NoiseCovariance",
    "OversampledReadout",
    "ReadoutBlock",
    "Sensitivities",
    "VolumeKey",
    "Whitening",
]

Item: TypeAlias = Any
"""A `ReadoutBlock`, `NoiseCovariance`, `KSpace`, `Sensitivities`, `ismrmrd.Image`, or anything a gadget lets pass."""

Stream: TypeAlias = Iterator[Item]


@dataclass(frozen=True, slots=True, order=True)
class VolumeKey:
    """The counters that name a volume."""

    slice: int = 0
    contrast: int = 0
    phase: int = 0
    repetition: int = 0
    set: int = 0

    def __str__(self) -> str:
        """In words, for messages: the counters that are not 0, and always the slice."""
        named = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return ", ".join(f"{name} {value}" for name, value in named.items() if value or name == "slice")

    def counters(self) -> tuple[int, ...]:
        """The counters as numbers, in a fixed order."""
        return (self.slice, self.contrast, self.phase, self.repetition, self.set)


@dataclass(frozen=True, slots=True, kw_only=True)
class Whitening:
    """How k-space was whitened, and how well the covariance was known.

    Parameters
    ----------
    source
        Where the covariance came from.
    samples, effective_samples
        Noise samples per coil it was estimated from; 0 if unknown.
    coils
        Number of coils whitened.
    dwell_time_us, bandwidth
        Of the noise measurement.
    scale
        Factor applied after the inverse Cholesky factor.
    calibrated
        False if the covariance was estimated from the imaging data.
    measured_variance
        Complex variance of the whitened data where they show no object, 2 if the scale is right; None if not judged.
    """

    source: str
    samples: int
    effective_samples: float
    coils: int
    dwell_time_us: float
    bandwidth: float
    scale: float
    calibrated: bool
    measured_variance: float | None = None


@dataclass(frozen=True, slots=True)
class OversampledReadout:
    """An asymmetric echo before readout oversampling was removed: where its noise was white.

    Parameters
    ----------
    size
        Samples of the oversampled readout.
    start, stop
        The acquired ones.
    """

    size: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KSpace:
    """Cartesian k-space of one slice or volume.

    Parameters
    ----------
    data
        Averaged samples, shape `(coils, k2, k1, k0)`, complex64; 0 where not sampled. The origin is at n//2 of
        each axis.
    variance
        Complex noise variance of each sample, shape `(k2, k1, k0)`, float32: 2/n for a whitened sample averaged from n
        readouts; 0 where not sampled.
    reference
        Reference lines on the same matrix, shape `(coils, k2, k1, k0)`; None if there are none.
    reference_lines
        Where there are some, shape `(k2, k1)`, boolean.
    headers
        Header of a readout of each line, shape `(k2, k1)`; `number_of_samples` is 0 where none was sampled.
    limits
        First and last encoded position of k2, k1, k0, as indices of the matrix.
    encoded_fov_mm, recon_fov_mm
        Fields of view `(z, y, x)`, the encoded one after removal of readout oversampling.
    recon_matrix
        Wanted matrix `(z, y, x)`.
    whitening
        None if the data were not whitened: no σ can be told then.
    incomplete
        Empty, or what is missing, in words.
    partial_fourier
        Empty, or which axes were sampled asymmetrically and zero-filled, in words.
    readout
        Set where an asymmetric echo makes `variance` the diagonal of a covariance that is not diagonal.
    """

    data: npt.NDArray[np.complex64]
    variance: npt.NDArray[np.float32]
    reference: npt.NDArray[np.complex64] | None
    reference_lines: npt.NDArray[np.bool_]
    headers: Headers
    limits: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    encoded_fov_mm: tuple[float, float, float]
    recon_fov_mm: tuple[float, float, float]
    recon_matrix: tuple[int, int, int]
    whitening: Whitening | None
    incomplete: str = ""
    partial_fourier: str = ""
    readout: OversampledReadout | None = None

    @property
    def central_header(self) -> np.void:
        """Header of the sampled line nearest the centre of k-space."""
        sampled = np.argwhere(self.headers["number_of_samples"] > 0)
        centre = np.array(self.headers.shape) // 2
        nearest = sampled[np.argmin(((sampled - centre) ** 2).sum(axis=1))]
        header: np.void = self.headers[tuple(nearest)]
        return header

    @property
    def key(self) -> VolumeKey:
        """Counters of the volume."""
        return volume_key(self.central_header)

    @property
    def volumetric(self) -> bool:
        """Whether there are two phase encoding axes."""
        return self.data.shape[1] > 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sensitivities:
    """Coil sensitivities of one slice or volume, over the encoded field of view.

    Parameters
    ----------
    maps
        Shape `(coils, z, y, x)`, complex64, unit norm over coils.
    key
        The volume they belong to.
    method
        How they were estimated, in words.
    """

    maps: npt.NDArray[np.complex64]
    key: VolumeKey
    method: str


def volume_key(header: np.void) -> VolumeKey:
    """Counters of a readout's volume."""
    counters = header["idx"]
    return VolumeKey(**{name: int(counters[name]) for name in VolumeKey.__dataclass_fields__})
