r"""The coils' noise covariance, and the whitening that makes noise white with unit deviation per component.

All of this follows Gadgetron's NoiseAdjust to the last factor (Kellman & McVeigh, Magn Reson Med 2005): with
:math:`\Psi = \sum n n^H / (N-1) = L L^H`, whitened samples are :math:`y = s\,L^{-1} x` with
:math:`s = \sqrt{2\, t_\text{acq} / t_\text{noise}\, b}`.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import scipy.linalg

ComplexArray = npt.NDArray[np.complexfloating[Any, Any]]

GADGETRON_BANDWIDTH: Final = 0.793
"""relativeReceiverNoiseBandwidth where the header has none, as in Gadgetron."""

CORRELATION_LAGS: Final = 10
"""A receiver's filter correlates a few neighbouring samples; beyond, an estimate is only its own noise."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NoiseCovariance:
    r"""A coil noise covariance and where it comes from.

    Parameters
    ----------
    matrix
        :math:`\Psi = E[n n^H]`, shape `(coils, coils)`, Hermitian, complex128, squared units of the raw data.
    samples
        Noise samples per coil that it was estimated from; 0 if unknown.
    effective_samples
        The same, less what the samples' autocorrelation takes away.
    dwell_time_us
        Dwell time of the noise samples in microseconds; 0 if unknown.
    bandwidth
        Relative receiver noise bandwidth.
    labels
        Coil names in channel order; empty if unknown.
    source
        Where it comes from, in words for a log or a map's metadata: `noise readouts`, `edge of k-space`, …
    calibrated
        False if it was estimated from the imaging data themselves: maps made from it are `uncalibrated`.
    applied_scale
        Scale with which this stream was whitened by it; None if it was not.
    measured_variance
        Complex variance of the whitened data where they show no object, 2 if the scale is right; None if not judged.
    """

    matrix: ComplexArray
    samples: int
    effective_samples: float
    dwell_time_us: float
    bandwidth: float = GADGETRON_BANDWIDTH
    labels: tuple[str, ...] = field(default=())
    source: str = "noise readouts"
    calibrated: bool = True
    applied_scale: float | None = None
    measured_variance: float | None = None

    @property
    def coils(self) -> int:
        """Number of coils."""
        return int(self.matrix.shape[0])


def estimate_covariance(noise: ComplexArray) -> ComplexArray:
    r"""Sample covariance of noise whose mean is known to be zero, with Gadgetron's normalisation.

    .. math:: \Psi = \frac{1}{N-1} \sum_{t=1}^{N} n_t n_t^H

    Parameters
    ----------
    noise
        Noise readouts, shape `(readouts, coils, k0)`, complex; N = readouts · k0.

    Returns
    -------
        Shape `(coils, coils)`, complex128.

    Raises
    ------
    ValueError
        If there are not more samples than coils: the estimate would be singular.
    """
    readouts, coils, length = noise.shape
    samples = readouts * length
    if samples <= coils:
        raise ValueError(
            f"noise covariance: {samples} noise samples for {coils} coils; "
            f"more samples than coils are needed, at least {10 * coils} for a useful estimate"
        )
    # noise: (readouts, coils, k0) -> (coils, samples)
    columns = np.moveaxis(noise, 1, 0).reshape(coils, samples).astype(np.complex128)
    return (columns @ columns.conj().T) / (samples - 1)


def effective_samples(noise: ComplexArray) -> float:
    r"""Number of independent samples that estimate a variance as well as these correlated ones.

    .. math:: N_\text{eff} = N \Big/ \Big(1 + 2 \sum_{k=1}^{K} |\rho_k|^2\Big)

    with the autocorrelation :math:`\rho_k` along the readout, averaged over decorrelated coils, less what
    an estimate from finitely many white samples shows on average.

    Parameters
    ----------
    noise
        Noise readouts, shape `(readouts, coils, k0)`, complex.
    """
    readouts, coils, length = noise.shape
    samples = readouts * length
    white = whiten(noise, np.linalg.inv(np.linalg.cholesky(estimate_covariance(noise))))
    power = float(np.mean(np.abs(white) ** 2))
    total = 1.0
    for lag in range(1, min(CORRELATION_LAGS, length - 1) + 1):
        products = white[..., lag:] * white[..., :-lag].conj()
        correlation = float(np.abs(products.sum())) / (samples * coils * power)
        total += 2 * max(correlation**2 - 1 / (samples * coils), 0.0)
    return samples / total


def gadgetron_scale(dwell_time_us: float, noise_dwell_time_us: float, bandwidth: float) -> float:
    r"""Scale of whitened samples that gives noise a standard deviation of 1 per real component.

    .. math:: s = \sqrt{2\, t_\text{acq} / t_\text{noise}\, b}

    and 1 if either dwell time is 0, as Gadgetron does.

    Parameters
    ----------
    dwell_time_us, noise_dwell_time_us
        Dwell times of the imaging and of the noise readouts, in the same unit.
    bandwidth
        Relative receiver noise bandwidth, of the imaging header.
    """
    if dwell_time_us == 0 or noise_dwell_time_us == 0:
        return 1.0
    return math.sqrt(2 * dwell_time_us / noise_dwell_time_us * bandwidth)


def whitening_matrix(covariance: ComplexArray, scale: float) -> npt.NDArray[np.complex64]:
    r"""Matrix :math:`W = s\,L^{-1}` with :math:`L L^H = \Psi`, so that :math:`W \Psi W^H = s^2 I`.

    Raises
    ------
    ValueError
        If the covariance is not positive definite or not finite.
    """
    if not np.isfinite(covariance).all():
        raise ValueError("noise covariance: holds NaN or Inf; expected finite values")
    try:
        factor = np.linalg.cholesky(covariance.astype(np.complex128))
    except np.linalg.LinAlgError:
        smallest = float(np.linalg.eigvalsh(covariance).min())
        raise ValueError(
            f"noise covariance: not positive definite (smallest eigenvalue {smallest:.3g}); "
            "a coil without signal, or linearly dependent coils, cannot be whitened"
        ) from None
    identity = np.eye(len(covariance), dtype=np.complex128)
    inverse = scipy.linalg.solve_triangular(factor, identity, lower=True)
    return (scale * inverse).astype(np.complex64)


def whiten(samples: ComplexArray, matrix: ComplexArray) -> ComplexArray:
    """Apply a whitening matrix to readouts, as one matrix product over the whole block.

    Parameters
    ----------
    samples
        Shape `(readouts, coils, k0)`, complex.
    matrix
        Shape `(coils, coils)`, complex.

    Returns
    -------
        Shape `(readouts, coils, k0)`, in the precision of the operands.
    """
    readouts, coils, length = samples.shape
    # (readouts, coils, k0) -> (coils, readouts * k0): one large product is many times faster than a
    # broadcast product over readouts
    columns = np.moveaxis(samples, 1, 0).reshape(coils, readouts * length)
    return np.ascontiguousarray(np.moveaxis((matrix @ columns).reshape(coils, readouts, length), 0, 1))


def covariance_bias(coils: int, samples: float) -> float:
    r"""Factor on σ that whitening with a covariance estimated from few samples calls for: :math:`1 + p/N`.

    That of a reconstruction without aliasing. Where unregularised SENSE separates r voxels, :math:`1 + (p - r)/N`
    would do: the factor is on the safe side by r/N.
    """
    return 1 + coils / samples


def covariance_error(samples: float) -> float:
    r"""Relative standard error of a whole σ map from the covariance's own randomness: :math:`1/(2\sqrt N)`."""
    return 1 / (2 * math.sqrt(samples))


def whitened_variance_factor(coils: int, samples: float) -> float:
    r"""Factor on the variance of data whitened with a covariance estimated from N samples of p coils.

    The inverse of a complex Wishart matrix W of N samples has the mean :math:`\Psi^{-1} / (N - p)`. With
    :math:`\hat\Psi = W / (N - 1)` new noise, whitened by :math:`\hat\Psi`, so has on average the variance

    .. math:: \frac{1}{p} E \operatorname{tr}(\hat\Psi^{-1} \Psi) = \frac{N - 1}{N - p}

    (N - p - 1 in the place of N - p belongs to real samples).

    Parameters
    ----------
    coils, samples
        p and the independent samples N; 0 samples, an unknown number, give 1.
    """
    if samples <= 0:
        return 1.0
    return max(samples - 1, 1.0) / max(samples - coils, 1.0)


def noise_power_ratio(first: NoiseCovariance, second: NoiseCovariance) -> float:
    r"""How much more noise power per unit bandwidth one covariance states than another, averaged over their coils.

    .. math:: \frac{1}{p} \operatorname{tr}\big((t_1 \hat\Psi_1)^{-1}\, t_2 \hat\Psi_2\big) \frac{N_1 - p}{N_1 - 1}

    A covariance is proportional to the receiver's bandwidth, the inverse of the dwell time t. The last
    factor takes away what the inverse of an estimate from N samples has too much (`whitened_variance_factor`).

    Parameters
    ----------
    first, second
        Covariances of the same coils in the same order. Where neither dwell time is known they are taken as equal.

    Returns
    -------
        1 if both are estimates of the same noise.

    Raises
    ------
    ValueError
        If they have different numbers of coils, only one dwell time is known, or the first is singular.
    """
    if first.coils != second.coils:
        raise ValueError(f"{first.coils} and {second.coils} coils")
    dwells = first.dwell_time_us, second.dwell_time_us
    if 0 in dwells and any(dwells):
        raise ValueError(f"dwell times of {dwells[0]:g} and {dwells[1]:g} us, of which 0 is unknown")
    stretch = dwells[1] / dwells[0] if all(dwells) else 1.0
    try:
        solved = np.linalg.solve(first.matrix, second.matrix)
    except np.linalg.LinAlgError:
        raise ValueError("a covariance that is singular") from None
    ratio = float(np.trace(solved).real) / first.coils * stretch
    return ratio / whitened_variance_factor(first.coils, first.effective_samples)


def noise_power_error(first: NoiseCovariance, second: NoiseCovariance) -> float:
    r"""Relative standard error of `noise_power_ratio`, :math:`\sqrt{(1/N_1 + 1/N_2)/p}`; unknown counts add nothing."""
    counts = [covariance.effective_samples for covariance in (first, second) if covariance.effective_samples > 0]
    return math.sqrt(sum(1 / count for count in counts) / first.coils)
