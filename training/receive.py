"""Random receive coils: their sensitivities, and what correlated noise makes of them."""

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from voxelsigma.formats.coils import coil_sensitivities, random_noise_covariance, unit_norm


def draw_sensitivities(coils: int, shape: tuple[int, int], rng: np.random.Generator) -> NDArray[np.complex64]:
    """Unit-norm maps of an array that is up to a third larger than the field of view and not centred on it."""
    around = [int(n * rng.uniform(1, 1.33)) for n in shape]
    first = [int(rng.integers(0, m - n + 1)) for m, n in zip(around, shape, strict=True)]
    maps = coil_sensitivities(coils, (around[0], around[1]), rng=rng)
    return unit_norm(maps[:, first[0] : first[0] + shape[0], first[1] : first[1] + shape[1]])


def draw_covariance(coils: int, correlation: float, rng: np.random.Generator) -> NDArray[np.complex64]:
    """A noise covariance whose neighbouring coils correlate by up to `correlation`, their levels within about 2."""
    return random_noise_covariance(coils, correlation=float(rng.uniform(0, correlation)), rng=rng)


def whitened_coils(
    sensitivities: NDArray[np.complex64], covariance: NDArray[np.complex64]
) -> tuple[NDArray[np.complex64], NDArray[np.float32]]:
    r"""What whitening makes of coils: unit-norm sensitivities, and the factor that it puts on the image.

    .. math:: L^{-1} (S \rho + n) = \frac{L^{-1} S}{\|L^{-1} S\|} \, \|L^{-1} S\| \rho + L^{-1} n,
        \qquad \Psi = L L^H

    Parameters
    ----------
    sensitivities
        Shape `(coils, y, x)`, complex.
    covariance
        Noise covariance :math:`\Psi`, shape `(coils, coils)`, positive definite.

    Returns
    -------
        Unit-norm sensitivities `(coils, y, x)`, 0 where no coil sees anything, and their norm before that `(y, x)`.
    """
    factor = np.linalg.cholesky(covariance.astype(np.complex128))
    # (coils, y, x) -> (coils, voxels) and back
    columns = sensitivities.reshape(len(sensitivities), -1)
    whitened = scipy.linalg.solve_triangular(factor, columns, lower=True).reshape(sensitivities.shape)
    maps = whitened.astype(np.complex64)
    return unit_norm(maps), np.linalg.norm(maps, axis=0).astype(np.float32)
