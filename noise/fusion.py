"""A predicted σ map put right by a few probes, and put together with what they say themselves."""

from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from voxelsigma.noise.prior import Prior
from voxelsigma.noise.sigma import SigmaMap, root_bias
from voxelsigma.noise.voxels import neighbourhood_mean

WINDOWS: Final = (33, 17)
"""Sides of the squares over which the prediction is compared with the probes, after the whole object."""


def measured_variance(found: SigmaMap) -> Tensor:
    r"""The unbiased :math:`\hat\sigma^2` of a map, shape `(...)`, float64."""
    return (found.sigma.double() * root_bias(found.degrees_of_freedom)).square()


def corrected(prior: Prior, found: SigmaMap, inside: Tensor, together: float) -> Prior:
    r"""Multiply a prediction by a slowly varying factor, so that the probes' energy is what it says.

    First the whole object, then squares of `WINDOWS`: the ratio r of measured to predicted variance, over that which
    the prior expects, :math:`\nu_0 / (\nu_0 - 2)`, on average over the square's voxels of the object, its logarithm
    shrunk by how much of its scatter over the object is more than the probes' own randomness (James & Stein, Proc
    Fourth Berkeley Symp 1961):

    .. math:: \log s_0 \leftarrow \log s_0 + \frac{\tau^2}{\tau^2 + e_i} \log r_i, \qquad
        e_i = \frac{2 A}{N_i \bar\nu}, \quad \tau^2 = \overline{(\log r)^2 - e}

    Parameters
    ----------
    prior
        The prediction, shape `(y, x)`.
    found
        What the probes say, of the same kind of map.
    inside
        Voxels of the object, shape `(y, x)`, boolean.
    together
        A, voxels whose energies fluctuate together, at least 1.
    """
    known = inside & (prior.variance > 0)
    if not bool(known.any()):
        return prior
    weight = known.double()
    # under the prior the mean of the true variance over s0 is not 1 but ν0 / (ν0 - 2)
    expected = (1 - 2 / prior.freedom.double().clamp_min(4)).clamp(max=1)
    measured = torch.where(known, measured_variance(found) * expected, 0)
    variance = prior.variance.double()
    freedom = float(found.degrees_of_freedom[known].double().mean())
    for window in (None, *WINDOWS):
        ratio = torch.where(known, measured / torch.where(known, variance, 1), 0)
        if window is None:
            change = (ratio.sum() / weight.sum()).clamp_min(1e-12).log().expand_as(ratio)
        else:
            count = neighbourhood_mean(weight, window)
            around = neighbourhood_mean(ratio, window) / count.clamp_min(1e-12)
            change = around.clamp_min(1e-12).log()
            doubt = 2 * together / (count * window**2 * freedom).clamp_min(1)
            scatter = (change.square() - doubt)[known].mean().clamp_min(0)
            change = torch.where(known, change * scatter / (scatter + doubt), 0)
        variance = variance * change.exp()
    return replace(prior, variance=variance)


def fused(found: SigmaMap, prior: Prior) -> SigmaMap:
    r"""The posterior of σ² under a prior: both variances weighted with their degrees of freedom.

    .. math:: \hat\sigma^2 = \frac{\nu \bar s + \nu_0 s_0}{\nu + \nu_0}, \qquad
        \frac{(\nu + \nu_0)\hat\sigma^2}{\sigma^2} \sim \chi^2_{\nu + \nu_0}

    (conjugate to the sum of squares; Smyth, Stat Appl Genet Mol Biol 2004, eq. 3).

    Parameters
    ----------
    found
        What the probes say.
    prior
        The prediction, of the same kind of map; where its variance is 0 it says nothing.
    """
    says = prior.variance > 0
    worth = torch.where(says, prior.freedom.double(), 0)
    freedom = found.degrees_of_freedom.double()
    total = freedom + worth
    variance = (freedom * measured_variance(found) + worth * prior.variance.double()) / total
    return replace(found, sigma=variance.sqrt() / root_bias(total), degrees_of_freedom=total)
