"""A noise covariance from the imaging data themselves, where no noise was measured."""

import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from voxelsigma.noise.covariance import (
    ComplexArray,
    NoiseCovariance,
    effective_samples,
    estimate_covariance,
)
from voxelsigma.noise.fourier import ifft_centred

EDGE_FRACTION: Final = 0.05
"""Outermost part of the acquired lines that counts as edge (Dalmaz et al., ICML 2025)."""

FLAT_BAND: Final = 0.65
"""Part of an oversampled readout's field of view in which the receiver's filter is flat."""

EMPTY_RATIO: Final = 2.0
"""A readout position is free of object if the central lines show less than this times the quietest."""


def edge_covariance(
    samples: ComplexArray,
    distances: npt.NDArray[np.floating[Any]],
    dwell_time_us: float,
    *,
    oversampled: bool,
) -> NoiseCovariance:
    """Estimate the noise covariance from the outermost lines, where the readout crosses no object.

    An inverse FFT along the readout takes the lines to hybrid space. There, of the outermost 5 % of the lines,
    only the positions count that hold no object (judged on the central lines) and that lie in the flat
    part of the receiver's band. Plain outer k-space, as published, overestimates: on a sharp-edged
    phantom it gives 4 to 7 instead of 2.

    Parameters
    ----------
    samples
        Imaging readouts, shape `(readouts, coils, k0)`, complex.
    distances
        Distance of each readout from the centre of k-space in the phase encoding plane, shape
        `(readouts,)`, any unit.
    dwell_time_us
        Dwell time of the readouts in microseconds.
    oversampled
        Whether the readout is oversampled, so that its outer field of view meets the receiver's filter.

    Returns
    -------
        The covariance, marked as not calibrated. Its bandwidth is 1 and its dwell time the imaging one:
        the scale of `gadgetron_scale` is then √2, a variance of 2.

    Raises
    ------
    ValueError
        If fewer samples than coils are left.
    """
    hybrid = ifft_centred(samples)
    central = np.argsort(distances, kind="stable")[: max(1, len(hybrid) // 4)]
    empty = empty_positions(hybrid[central], oversampled=oversampled)
    outermost = np.argsort(-distances, kind="stable")[: math.ceil(EDGE_FRACTION * len(samples))]
    noise = hybrid[outermost][..., empty]
    return NoiseCovariance(
        matrix=estimate_covariance(noise),
        samples=noise.shape[0] * noise.shape[-1],
        effective_samples=effective_samples(noise),
        dwell_time_us=dwell_time_us,
        bandwidth=1.0,
        source="edge of k-space",
        calibrated=False,
    )


def empty_positions(central: ComplexArray, *, oversampled: bool) -> npt.NDArray[np.bool_]:
    """Readout positions without object, inside the receiver's flat band.

    Parameters
    ----------
    central
        The central lines in hybrid space, shape `(lines, coils, x)`: they show most of the object.
    oversampled
        Whether the readout is oversampled.

    Returns
    -------
        Shape `(x,)`, boolean: where the lines' power is at most twice that of the emptiest twentieth.
    """
    length = central.shape[-1]
    # central: (lines, coils, x) -> (x,)
    profile = np.mean(np.abs(central) ** 2, axis=(0, 1))
    offset = np.abs(np.arange(length) - length // 2)
    flat = offset < (FLAT_BAND if oversampled else 1.0) * length / 2
    floor = np.percentile(profile[flat], 5)
    empty: npt.NDArray[np.bool_] = flat & (profile <= EMPTY_RATIO * floor)
    return empty
