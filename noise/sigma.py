"""From second-order sums to a σ map with its error: plain mean and control variate."""

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import numpy as np
import scipy.stats
import torch
from torch import Tensor

from voxelsigma.noise.moments import Moments, projected

MapKind: TypeAlias = Literal["magnitude", "complex"]

POOLED_PROBES: Final = 32
"""Probes at which a voxel's own gain and that of its 3 × 3 neighbourhood count alike."""

FEWEST_FOR_COMPLEX: Final = 8
"""Probes below which the complex map is a plain mean, with or without a control variate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SigmaMap:
    r"""A map of noise standard deviations and how well it is known.

    Parameters
    ----------
    sigma
        Standard deviation per voxel, shape `(...)`, in the image's units, corrected for the bias of the
        square root.
    degrees_of_freedom
        ν of the χ² distribution that :math:`\nu \hat\sigma^2 / \sigma^2` follows, shape `(...)`; infinite for an
        exact map.
    kind
        `magnitude`: of the in-phase component :math:`\Re(e^{-i\phi} u)`; `complex`: :math:`\sqrt{E|u|^2}`.
    probes
        Number of probes; 0 for an exact map.
    explained
        Part r² of the variance that the control variate explains, shape `(...)`; 0 without one.
    """

    sigma: Tensor
    degrees_of_freedom: Tensor
    kind: MapKind
    probes: int
    explained: Tensor

    def relative_error(self) -> Tensor:
        r"""Relative standard error of σ, :math:`1/\sqrt{2\nu}`, shape `(...)`; the sketch's part alone."""
        return (2 * self.degrees_of_freedom).rsqrt()

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        r"""Confidence interval :math:`\hat\sigma\sqrt{\nu / \chi^2_\nu}` of σ, lower and upper, shape `(...)` each."""
        freedom = self.degrees_of_freedom.cpu().double()
        finite = torch.where(freedom.isfinite(), freedom, torch.ones_like(freedom)).numpy()
        raw = (self.sigma.cpu().double() * root_bias(freedom)).numpy()
        bounds = (
            raw * np.sqrt(finite / scipy.stats.chi2.ppf(tail, finite)) for tail in ((1 + level) / 2, (1 - level) / 2)
        )
        exact = ~freedom.isfinite()
        lower, upper = (torch.where(exact, self.sigma.cpu().double(), torch.from_numpy(bound)) for bound in bounds)
        return lower, upper


def exact_map(variance: Tensor, kind: MapKind) -> SigmaMap:
    """Wrap a variance that is known exactly, shape `(...)`."""
    return SigmaMap(
        sigma=variance.sqrt(),
        degrees_of_freedom=torch.full_like(variance, torch.inf),
        kind=kind,
        probes=0,
        explained=torch.zeros_like(variance),
    )


def sigma_map(
    sums: Moments,
    kind: MapKind,
    *,
    direction: Tensor,
    covariate_variance: Tensor | None = None,
    complex_linear: bool = False,
) -> SigmaMap:
    r"""Estimate σ from the sums of a sketch.

    Plain, magnitude: :math:`\hat\sigma^2 = \sum a^2 / S`; complex: :math:`\sum |u|^2 / S`; a complex-linear
    reconstruction's magnitude is half of the latter. With a control variate, amplitudes are regressed on the
    zero-filled image w of the same probes, whose variance is known:

    .. math:: \hat\sigma^2 = \frac{\sum a^2}{S} + (h g)^2 \Big(E[b^2] - \frac{\sum b^2}{S}\Big), \qquad
        g = \frac{\sum a b}{\sum b^2}

    and for the complex map u on :math:`(w, w^*)`. Its expectation is σ² for any gain that is not of the same probes,
    and at h = 1 it is :math:`g^2 E[b^2] + \sum (a - g b)^2 / S`, a sum of squares. At few probes g leans towards that
    of the neighbours, and the factor h ≤ 1, of an r² pooled over neighbours, shrinks it, so that a covariate that
    explains nothing costs nothing.

    Parameters
    ----------
    sums
        Sums over S probes.
    kind
        Which map.
    direction
        Phase factor :math:`e^{i\phi}` of the reconstructed voxels, shape `(...)`, complex.
    covariate_variance
        :math:`E|w|^2`, shape `(...)`, real; None for the plain mean.
    complex_linear
        Whether the reconstruction is complex-linear.
    """
    halved = complex_linear and kind == "magnitude"
    if kind == "magnitude" and not complex_linear:
        variance, freedom, explained = _magnitude(sums, direction, covariate_variance)
    else:
        variance, freedom, explained = _complex(sums, covariate_variance, complex_linear=complex_linear)
    if halved:
        variance = variance / 2
    return SigmaMap(
        sigma=variance.clamp_min(0).sqrt() / root_bias(freedom),
        degrees_of_freedom=freedom,
        kind=kind,
        probes=sums.count,
        explained=explained,
    )


def root_bias(freedom: Tensor) -> Tensor:
    r"""Mean of :math:`\sqrt{\chi^2_\nu/\nu}`: :math:`\sqrt{2/\nu}\,\Gamma((\nu+1)/2)/\Gamma(\nu/2)`; 1 at infinity."""
    # beyond, the logarithms of Γ cancel to less than their own rounding; 1 - 1/(4ν) is exact to 1e-9
    nu = freedom.double().clamp(max=1e4)
    exact = (2 / nu).sqrt() * torch.exp(torch.lgamma((nu + 1) / 2) - torch.lgamma(nu / 2))
    return torch.where(freedom > 1e4, 1 - 0.25 / freedom, exact)


def _magnitude(sums: Moments, direction: Tensor, covariate_variance: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Variance, degrees of freedom and explained part of the in-phase component."""
    count = sums.count
    a_a = projected(sums.u_u, sums.u_abs, direction)
    freedom = torch.full_like(a_a, count - 1)
    if covariate_variance is None:
        return a_a / count, freedom, torch.zeros_like(a_a)
    b_b = projected(sums.w_w, sums.w_abs, direction)
    a_b = projected(sums.u_w, sums.u_wc, direction)
    # a voxel's own gain is noisy at few probes, its neighbours' is another: between them by the number of probes
    share = count / (count + POOLED_PROBES)
    gain = share * _divide(a_b, b_b) + (1 - share) * _divide(_box(a_b, 3), _box(b_b, 3))
    # no gain may explain more than there is: the estimate stays positive
    most = _divide(a_a, b_b).clamp_min(0).sqrt()
    gain = gain.clamp(-most, most)
    # degrees of freedom of the regression: one real coefficient of `count` real observations
    explained = _pooled_explained(a_b.square(), a_a * b_b, 1 / count)
    # the gain of S real pairs has the variance (1 - r²)/(S - 2): none that is finite at 2 probes
    factor = _shrinkage(explained, count - 2)
    shrunk = (gain * factor).square()
    variance = a_a / count + shrunk * (covariate_variance / 2 - b_b / count)
    return variance, count / (1 - (explained * factor).square()).clamp_min(1e-6) - 1, explained


def _complex(
    sums: Moments, covariate_variance: Tensor | None, *, complex_linear: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Variance, degrees of freedom and explained part of the complex voxel."""
    count = sums.count
    if complex_linear:
        circularity = torch.zeros_like(sums.u_abs)
    else:
        kappa = _divide(sums.u_u.abs(), sums.u_abs).square()
        # |κ|² of circular noise averages 1/S: take that off
        circularity = ((count * kappa - 1) / max(count - 1, 1)).clamp(0, 1)
    freedom = 2 * count / (1 + circularity)
    # two complex coefficients of so few probes would cost more than they explain
    too_few = not complex_linear and count < FEWEST_FOR_COMPLEX
    if covariate_variance is None or too_few:
        return sums.u_abs / count, freedom, torch.zeros_like(sums.u_abs)
    gain, fitted = _regress_complex(sums, complex_linear=complex_linear)
    parameters = 1 if complex_linear else 2
    explained = _pooled_explained(fitted, sums.u_abs, parameters / count)
    factor = _shrinkage(explained, (count - parameters - 1) / parameters)
    variance = sums.u_abs / count + factor.square() * (gain * covariate_variance - fitted / count)
    return variance, freedom / (1 - (explained * factor).square()).clamp_min(1e-6) - 1, explained


def _regress_complex(sums: Moments, *, complex_linear: bool) -> tuple[Tensor, Tensor]:
    r"""Least squares of u on w, or on (w, w*): :math:`|\alpha|^2 + |\beta|^2` and the fitted energy."""
    if complex_linear:
        gain = _divide(sums.u_wc, sums.w_abs)
        return gain.abs().square(), (gain.conj() * sums.u_wc).real
    # normal equations: [[Σ|w|², Σw*²], [Σw², Σ|w|²]] (α, β) = (Σ w* u, Σ w u)
    determinant = sums.w_abs.square() - sums.w_w.abs().square()
    # a voxel whose covariate lies on one line (or vanishes) has no second coefficient to give
    regular = determinant > 1e-9 * sums.w_abs.square()
    alpha = torch.where(
        regular,
        _divide(sums.w_abs * sums.u_wc - sums.w_w.conj() * sums.u_w, determinant),
        _divide(sums.u_wc, sums.w_abs),
    )
    beta = torch.where(
        regular,
        _divide(sums.w_abs * sums.u_w - sums.w_w * sums.u_wc, determinant),
        torch.zeros_like(alpha),
    )
    fitted = (alpha.conj() * sums.u_wc + beta.conj() * sums.u_w).real
    return alpha.abs().square() + beta.abs().square(), fitted.clamp_min(0)


def _pooled_explained(explained: Tensor, total: Tensor, chance: float) -> Tensor:
    """Explained part of the energy, pooled over a neighbourhood of 5 × 5 voxels, less what chance explains."""
    pooled = _divide(_box(explained), _box(total))
    return ((pooled - chance) / max(1 - chance, 1e-6)).clamp(0, 1)


def _shrinkage(explained: Tensor, observations: float) -> Tensor:
    """Factor on the gain: near 1 where r² stands out of its own noise, near 0 where it does not."""
    if observations <= 0:
        return torch.zeros_like(explained)
    return _divide(explained, explained + (1 - explained) / observations)


def _box(values: Tensor, size: int = 5) -> Tensor:
    """Sum over size × size neighbours in the last two axes; fewer at the border, none beyond it."""
    flat = values.reshape(-1, 1, *values.shape[-2:])
    # average pooling with padding counted: the common factor cancels in every quotient
    return torch.nn.functional.avg_pool2d(flat, size, stride=1, padding=size // 2).reshape(values.shape)


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Quotient, 0 where the denominator is 0."""
    zero = denominator == 0
    safe = torch.where(zero, torch.ones_like(denominator), denominator)
    return torch.where(zero, torch.zeros_like(numerator), numerator / safe)
