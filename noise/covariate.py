"""The closed-form variance of the zero-filled image: what makes it a control variate."""

import torch
from torch import Tensor

from voxelsigma.noise.response import REACH


def zero_filled_variance(sensitivities: Tensor, variance: Tensor) -> Tensor:
    r"""Variance of the zero-filled, coil-combined image under whitened noise, in closed form.

    .. math:: E|w_i|^2 = \sum_c |S_{c,i}|^2 \cdot \frac{1}{N} \sum_k \operatorname{Var}_k

    with :math:`\operatorname{Var}_k = 2/n_k` on the sampled positions: half of it for any projected component.

    Parameters
    ----------
    sensitivities
        Coil sensitivities on the grid of the image, shape `(coils, y, x)`, complex.
    variance
        Complex noise variance of each sample, shape `(k1, k0)`; 0 where nothing was sampled. N is the
        number of its entries.

    Returns
    -------
        Variance per voxel, shape `(y, x)`, in SNR units squared (2 = one per real component).
    """
    return sensitivities.abs().square().sum(dim=0) * variance.mean()


def coil_correlation(variance: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    r"""Correlation of the noise of two voxels of a zero-filled coil image, by their distance.

    .. math:: p(d) = E[z_{i+d}\, z_i^*] = \sum_k \operatorname{Var}_k \, P_{i+d,k} P^*_{i,k}

    the same for every i, since the rows of P are plane waves.

    Parameters
    ----------
    variance
        Complex noise variance of each sample, shape `(k1, k0)`.
    rows, columns
        From k-space to the image along y and x, shapes `(y, k1)` and `(x, k0)`, complex.

    Returns
    -------
        Distances -2 `REACH` to 2 `REACH` along y and x, shape `(4 REACH + 1, 4 REACH + 1)`, complex128.
    """
    waves = [_products(matrix.to(torch.complex128)) for matrix in (rows, columns)]
    return waves[0] @ variance.to(torch.complex128) @ waves[1].mT


def _products(matrix: Tensor) -> Tensor:
    """:math:`P_{i+d} P_i^*` for all distances, shape `(distances, k)`."""
    # of neighbours, as the image may be narrower than the largest distance
    step = matrix[1] * matrix[0].conj()
    power = matrix[0].abs().square()
    turn = torch.where(power > 0, step / power.clamp_min(torch.finfo(torch.float64).tiny), 1)
    distances = torch.arange(-2 * REACH, 2 * REACH + 1, device=matrix.device)
    return power * turn ** distances.unsqueeze(1)
