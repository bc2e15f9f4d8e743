"""The closed-form variance of the zero-filled image: what makes it a control variate."""

from torch import Tensor


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
