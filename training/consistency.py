"""What Noise2Recon and VORTEX share: added noise, and consistency under what was done to the data."""

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from voxelsigma.models.encoding import SenseEncoding
from voxelsigma.training.checks import check_choice, check_number, check_range
from voxelsigma.training.examples import Example
from voxelsigma.training.losses import quantile, relative_error
from voxelsigma.training.supervised import supervised_error

NoiseUnit = Literal["image", "noise"]

# meddlr's TopMagnitudeNormalizer: the image is 1 at this quantile of the zero-filled magnitude
_TOP = 0.95


def check_consistency(
    owner: str, *, weight: float, noise: tuple[float, float], noise_unit: str, supervised_consistency: bool
) -> None:
    """Refuse hyperparameters that both objectives have.

    Raises
    ------
    ValueError
        One of them is of the wrong type or out of range.
    """
    check_number(owner, "weight", weight, 0)
    check_range(owner, "noise", noise)
    check_choice(owner, "noise_unit", noise_unit, get_args(NoiseUnit))
    check_choice(owner, "supervised_consistency", supervised_consistency, (False, True))


def semi_supervised(
    network: nn.Module,
    example: Example,
    augmented: Callable[[], Tensor],
    *,
    weight: float,
    supervised_consistency: bool,
) -> Tensor:
    r"""Supervised error of a batch with a target, consistency error of one without.

    .. math::
        L = \begin{cases} \|f(y) - \rho\| \;(+\; \lambda \|f(T y) - \bar f(y)\|) & \text{with target} \\
        \lambda \|f(T y) - \bar f(y)\| & \text{without} \end{cases}

    :math:`\bar f(y)` is a constant: no gradient goes through it. Errors are those of `relative_error`.

    Parameters
    ----------
    network
        Called with `(kspace, sensitivities, mask)`.
    example
        A batch.
    augmented
        Gives the k-space :math:`T y`; called only where it is needed.
    weight
        :math:`\lambda`.
    supervised_consistency
        Whether batches with a target get the consistency term too.
    """
    supervised = None if example.target is None else supervised_error(network, example, example.target)
    if supervised is not None and not supervised_consistency:
        return supervised
    with torch.no_grad():
        reference = network(example.kspace, example.sensitivities, example.mask)
    images = network(augmented(), example.sensitivities, example.mask)
    consistency = weight * relative_error(network, images, reference)
    return consistency if supervised is None else supervised + consistency


def with_noise(example: Example, kspace: Tensor, deviations: NDArray[np.float64], rng: np.random.Generator) -> Tensor:
    r"""K-space with added noise on sampled positions, :math:`y + M\,\sigma (n_1 + i n_2)`.

    Parameters
    ----------
    example
        A batch, for its mask.
    kspace
        Shape `(batch, coils, k1, k0)`, complex.
    deviations
        :math:`\sigma` per real component, shape `(batch,)`; 1 is the scan's own noise.
    rng
        Draws standard normal numbers, shape `(batch, coils, k1, k0, 2)`.

    Returns
    -------
        Same shape as the k-space.
    """
    noise = rng.standard_normal((*kspace.shape, 2), dtype=np.float32)
    noise *= deviations.astype(np.float32)[:, None, None, None, None]
    added = torch.view_as_complex(torch.from_numpy(noise)).to(kspace)
    return kspace + example.mask * added


def noise_scale(example: Example, unit: NoiseUnit) -> NDArray[np.float64]:
    r"""What noise of 1 is in whitened units, for each scan of a batch.

    The data are whitened: noise has standard deviation 1 per real component in k-space, and the image is in SNR units.
    The papers instead scale each scan so that the 95th percentile of its zero-filled magnitude :math:`|A^H y|` is 1,
    and give noise in that unit (their Fourier transform is orthonormal, as ours). So

    .. math:: \sigma_\mathrm{whitened} = \sigma_\mathrm{image} \cdot P_{95}(|A^H y|)

    On simulated heads at R = 6 the percentile is 1.2 to 1.4 times the object's mean SNR: at SNR 20 the papers' range
    of 0.2 to 0.5 is about 5 to 13 times the scan's own noise.

    Parameters
    ----------
    example
        A batch.
    unit
        `image` for the papers' unit, `noise` for that of the whitened noise.

    Returns
    -------
        Shape `(batch,)`.
    """
    if unit == "noise":
        return np.ones(len(example.kspace))
    zero_filled = SenseEncoding(example.sensitivities, example.mask).adjoint(example.kspace)
    top = quantile(zero_filled.abs().flatten(1), _TOP)
    return np.asarray(top.cpu().numpy(), dtype=np.float64)
