"""Monte Carlo: repeat the reconstruction with fresh noise added, and look at the spread."""

from collections.abc import Callable

import torch
from torch import Tensor

from voxelsigma.noise.sigma import MapKind, SigmaMap, root_bias
from voxelsigma.noise.voxels import phase_factor


def monte_carlo(
    reconstruction: Callable[[Tensor], Tensor],
    kspace: Tensor,
    variance: Tensor,
    trials: int,
    *,
    generator: torch.Generator,
    kind: MapKind = "magnitude",
    scale: float = 1.0,
) -> SigmaMap:
    r"""Standard deviation over trials of :math:`f(y + \alpha n)`, divided by α, with n as the scan's noise.

    .. math:: \hat\sigma^2 = \frac{1}{N-1} \sum_t |x_t - \bar x|^2

    of the in-phase component for the magnitude map and of the complex voxel for the complex one: the
    pseudo-multiple-replica method (Robson et al., Magn Reson Med 2008), which holds for any
    reconstruction, linear or not, and which a sketch must agree with at small α.

    Parameters
    ----------
    reconstruction
        From k-space `(coils, k1, k0)` to an image `(...)`.
    kspace
        Measured data, shape `(coils, k1, k0)`, complex.
    variance
        Complex noise variance of each sample, shape `(k1, k0)`; 0 where nothing was sampled.
    trials
        Number of trials N, at least 2.
    generator
        Source of the noise.
    kind
        Which map.
    scale
        α: noise is added at α times its own level.

    Raises
    ------
    ValueError
        If there are fewer than 2 trials.
    """
    if trials < 2:
        raise ValueError(f"monte_carlo: {trials} trials; a variance needs at least 2")
    with torch.no_grad():
        spread, pseudo = _spreads(reconstruction, kspace, scale * (variance / 2).sqrt(), trials, generator, kind)
    # |κ|: 1 for a single component, 0 for circular noise
    kappa = torch.where(spread > 0, pseudo.abs() / spread, 1).clamp(max=1)
    freedom = 2 * (trials - 1) / (1 + kappa.square())
    return SigmaMap(
        sigma=(spread / (trials - 1)).sqrt() / scale / root_bias(freedom),
        degrees_of_freedom=freedom,
        kind=kind,
        probes=trials,
        explained=torch.zeros_like(spread),
    )


def _spreads(
    reconstruction: Callable[[Tensor], Tensor],
    kspace: Tensor,
    deviation: Tensor,
    trials: int,
    generator: torch.Generator,
    kind: MapKind,
) -> tuple[Tensor, Tensor]:
    r"""Sums :math:`\sum |x_t - \bar x|^2` and :math:`\sum (x_t - \bar x)^2` over the trials."""
    direction = phase_factor(reconstruction(kspace))
    deviation = deviation.to(kspace.real.dtype)
    mean, spread, pseudo = torch.zeros(()), torch.zeros(()), torch.zeros(())
    for trial in range(1, trials + 1):
        parts = torch.randn((2, *kspace.shape), generator=generator, dtype=deviation.dtype)
        noise = torch.complex(parts[0], parts[1]).to(kspace.device) * deviation
        image = reconstruction(kspace + noise).to(torch.complex128)
        value = (direction.conj() * image).real if kind == "magnitude" else image
        # Welford's update: no sum of squares that could cancel
        delta = value - mean
        mean = mean + delta / trial
        spread = spread + (delta * (value - mean).conj()).real
        pseudo = pseudo + delta * (value - mean)
    return spread, pseudo
