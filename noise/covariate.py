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


def coil_correlation(
    variance: Tensor, rows: Tensor, columns: Tensor, *, steps: tuple[Tensor | None, Tensor | None] = (None, None)
) -> Tensor:
    r"""Correlation of the noise of two voxels of a zero-filled coil image, by their distance.

    .. math:: p(d) = E[z_{i+d}\, z_i^*] = \sum_k \operatorname{Var}_k \, P_{i+d,k} P^*_{i,k}

    the same for every i, since the rows of P are plane waves.

    Parameters
    ----------
    variance
        Complex noise variance of each sample, shape `(k1, k0)`.
    rows, columns
        From k-space to the image along y and x, shapes `(y, k1)` and `(x, k0)`, complex.
    steps
        Of plane waves along y and x, from voxel to voxel: :math:`e^{2\pi i k_m F/n}`, n voxels of the part F of the
        encoded field of view, shapes `(k1,)` and `(k0,)`. None for what two rows of the matrix say, and where there is
        but one, 1: a voxel as wide as the field of view carries the frequency 0 alone.

    Returns
    -------
        Distances -2 `REACH` to 2 `REACH` along y and x, shape `(4 REACH + 1, 4 REACH + 1)`, complex128.
    """
    waves = [_products(matrix.to(torch.complex128), step) for matrix, step in zip((rows, columns), steps, strict=True)]
    return waves[0] @ variance.to(torch.complex128) @ waves[1].mT


def _products(matrix: Tensor, step: Tensor | None) -> Tensor:
    """:math:`P_{i+d} P_i^*` for all distances, shape `(distances, k)`."""
    power = matrix[0].abs().square()
    if step is None:
        # of neighbours, as the image may be narrower than the largest distance; a lone voxel is its own
        product = matrix[min(1, len(matrix) - 1)] * matrix[0].conj()
        step = torch.where(power > 0, product / power.clamp_min(torch.finfo(torch.float64).tiny), 1)
    distances = torch.arange(-2 * REACH, 2 * REACH + 1, device=matrix.device)
    return power * step.to(matrix) ** distances.unsqueeze(1)
