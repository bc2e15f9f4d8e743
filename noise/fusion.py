"""What is expected of a σ map, and what further probes say, put together."""

from dataclasses import replace

import torch
from torch import Tensor

from voxelsigma.noise.prior import Prior
from voxelsigma.noise.sigma import MapKind, SigmaMap, root_bias


def measured_variance(found: SigmaMap) -> Tensor:
    r"""The unbiased :math:`\hat\sigma^2` of a map, shape `(...)`, float64."""
    return (found.sigma.double() * root_bias(found.degrees_of_freedom)).square()


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


def expected(prior: Prior, kind: MapKind, probes: int) -> SigmaMap:
    """The map that a prior alone makes.

    Parameters
    ----------
    prior
        The expectation, shape `(...)`.
    kind
        Of which map.
    probes
        How many probes it was made of.
    """
    freedom = prior.freedom.double()
    return SigmaMap(
        sigma=prior.variance.double().sqrt() / root_bias(freedom),
        degrees_of_freedom=freedom,
        kind=kind,
        probes=probes,
        explained=torch.zeros_like(freedom),
    )
