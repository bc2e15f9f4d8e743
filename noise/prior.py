"""A predicted σ map as a prior: what it says, what that is worth, and how well it fits what was measured."""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

FEWEST_FREEDOM: Final = 4
"""Worth up to which σ² has no variance under a prior: of any number of voxels a few make up the mean."""


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

    def mean(self) -> Tensor:
        r"""What σ² is on average, :math:`s_0 \, \nu_0 / (\nu_0 - 2)`, shape `(...)`.

        More than :math:`s_0`, for σ² scatters upwards the further. Of :math:`\nu_0 \le 2` it is infinite, and means of
        probes' energies never settle; up to `FEWEST_FREEDOM` they do, but no number of voxels tells when. Where nothing
        is predicted it is 0.
        """
        freedom = self.freedom.to(self.variance.dtype)
        # 1 + 2/(ν0 - 2): of large ν0 nothing cancels
        mean = torch.where(freedom > 2, self.variance * (1 + 2 / (freedom - 2)), torch.inf)
        return torch.where((self.variance > 0) | self.variance.isnan(), mean, 0)

    def vague(self) -> Tensor:
        """Where too little is known for its mean to be compared with anything, shape `(...)`, boolean."""
        return (self.variance > 0) & (self.freedom <= FEWEST_FREEDOM)


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
