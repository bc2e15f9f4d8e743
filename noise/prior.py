"""A predicted σ map as a prior: what it says, what that is worth, and how well it fits what was measured."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Prior:
    r"""A guess at a variance, and what it is worth: a scaled inverse χ² distribution.

    .. math:: \nu_0 s_0 / \sigma^2 \sim \chi^2_{\nu_0}

    Parameters
    ----------
    variance
        :math:`s_0`, shape `(...)`, in the units of the map's variance.
    freedom
        :math:`\nu_0`, shape `(...)`: the guess is worth as much as so many squared normal numbers.
    """

    variance: Tensor
    freedom: Tensor


def marginal_loss(log_variance: Tensor, log_freedom: Tensor, measured: Tensor, freedom: Tensor | float) -> Tensor:
    r"""Negative log-likelihood of a mean of ν squares under a prior, but for what depends on neither of its numbers.

    .. math:: \bar s / s_0 \sim F_{\nu, \nu_0}, \qquad
        -\log p = \tfrac{\nu + \nu_0}{2} \log(\nu_0 + \nu \bar s / s_0) - \tfrac{\nu_0}{2} \log \nu_0
        + \tfrac{\nu}{2} \log s_0 - \log\Gamma\tfrac{\nu + \nu_0}{2} + \log\Gamma\tfrac{\nu_0}{2}

    exact for any ν, so that many scans with few probes teach more than few with many; as :math:`\nu_0 \to \infty` it
    is ν/2 times the gamma likelihood :math:`\log s_0 + \bar s / s_0`.

    Parameters
    ----------
    log_variance, log_freedom
        Logarithms of :math:`s_0` and :math:`\nu_0`, shape `(...)`.
    measured
        :math:`\bar s`, shape `(...)`, above 0.
    freedom
        ν, the degrees of freedom of what was measured.
    """
    count = torch.as_tensor(freedom, dtype=log_variance.dtype, device=log_variance.device)
    prior = log_freedom.exp()
    ratio = measured.log() - log_variance
    # log(ν0 + ν s/s0) - log ν0: of large ν0 nothing cancels
    beyond = torch.nn.functional.softplus(count.log() + ratio - log_freedom)
    return (
        prior / 2 * beyond
        + count / 2 * (beyond + log_freedom - ratio)
        - torch.lgamma((count + prior) / 2)
        + torch.lgamma(prior / 2)
    )
