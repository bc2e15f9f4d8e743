"""From second-order sums to a σ map with its error: plain mean and control variate."""

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import numpy as np
import scipy.stats
import torch
from torch import Tensor

from voxelsigma.noise.moments import Moments, projected
from voxelsigma.noise.voxels import neighbourhood_mean

MapKind: TypeAlias = Literal["magnitude", "complex"]

FEWEST_FOR_COMPLEX: Final = 8
"""Probes below which the complex map is a plain mean, with or without a control variate."""

_REGION: Final = 15
_PROBES_OF_TRUST: Final = 2
_FARTHEST: Final = 2
_ROUNDING: Final = 1e-9


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
        """Confidence interval of σ, its lower and upper `bound`, shape `(...)` each."""
        return self.bound((1 - level) / 2), self.bound((1 + level) / 2)

    def bound(self, level: float) -> Tensor:
        r"""What σ is below with probability p, :math:`\hat\sigma\sqrt{\nu / \chi^2_{\nu, 1 - p}}`, shape `(...)`."""
        freedom = self.degrees_of_freedom.cpu().double()
        finite = torch.where(freedom.isfinite(), freedom, torch.ones_like(freedom)).numpy()
        raw = (self.sigma.cpu().double() * root_bias(freedom)).numpy()
        found = torch.from_numpy(raw * np.sqrt(finite / scipy.stats.chi2.ppf(1 - level, finite)))
        return torch.where(freedom.isfinite(), found, self.sigma.cpu().double())


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
    inside: Tensor | None = None,
) -> SigmaMap:
    r"""Estimate σ from the sums of a sketch.

    Plain, magnitude: :math:`\hat\sigma^2 = \sum a^2 / S`; complex: :math:`\sum |u|^2 / S`; a complex-linear
    reconstruction's magnitude is half of the latter. With a control variate, amplitudes are regressed on the
    zero-filled image w of the same probes, whose variance is known:

    .. math:: \hat\sigma^2 = (\tilde g^2 + v) \, E[b^2] + \frac{\sum (a - \hat g b)^2}{S - 1}, \qquad
        \hat g = \frac{\sum a b}{\sum b^2}

    where :math:`\tilde g` lies between a voxel's own gain and that of its neighbours, by what the probes tell of
    either, and v is its variance (`_leaning_gain`). A sum of squares, positive by construction. Where an r² pooled over
    neighbours says that the covariate explains next to nothing, the plain mean takes over, so that it costs nothing.
    For the complex map u is regressed on :math:`(w, w^*)`, with a gain that is shrunk by such an r².

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
    inside
        Voxels of the object, shape `(...)`: they lean on each other alone, and so do the others. None for one kind.
    """
    halved = complex_linear and kind == "magnitude"
    if kind == "magnitude" and not complex_linear:
        variance, freedom, explained = _magnitude(sums, direction, covariate_variance, inside)
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


def _magnitude(
    sums: Moments, direction: Tensor, covariate_variance: Tensor | None, inside: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Variance, degrees of freedom and explained part of the in-phase component."""
    count = sums.count
    a_a = projected(sums.u_u, sums.u_abs, direction)
    freedom = torch.full_like(a_a, count - 1)
    if covariate_variance is None:
        return a_a / count, freedom, torch.zeros_like(a_a)
    b_b = projected(sums.w_w, sums.w_abs, direction)
    a_b = projected(sums.u_w, sums.u_wc, direction)
    known = covariate_variance / 2
    explained = _pooled_explained(a_b.square(), a_a * b_b, 1 / count)
    own = _divide(a_b, b_b)
    # one real coefficient of `count` real observations; rounding may leave less than nothing of a perfect fit
    rest = ((a_a - own * a_b) / (count - 1)).clamp_min(0)
    kind = torch.ones_like(rest, dtype=torch.bool) if inside is None else inside.to(rest.device)
    gain, doubt = _leaning_gain(own, a_b, b_b, known, rest, kind)
    controlled = (gain.square() + doubt) * known + rest
    # what the neighbours are trusted with is itself an estimate from these probes
    trust = 1 + _PROBES_OF_TRUST / count
    spread = trust * (known.square() * doubt * (4 * gain.square() + 2 * doubt) + 2 * rest.square() / (count - 1))
    # where the covariate explains next to nothing it is not asked
    asked = _shrinkage(explained, count - 2).square()
    plain = a_a / count
    variance = asked * controlled + (1 - asked) * plain
    deviation = asked * spread.sqrt() + (1 - asked) * plain * (2 / (count - 1)) ** 0.5
    least = 1e-6 * variance.square() / count
    freedom = _divide(2 * variance.square(), torch.maximum(deviation.square(), least)).clamp_min(1)
    without = (b_b == 0) | (variance == 0)
    return torch.where(without, plain, variance), torch.where(without, count - 1, freedom), explained


def _leaning_gain(
    own: Tensor, a_b: Tensor, b_b: Tensor, known: Tensor, rest: Tensor, kind: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Gain of each voxel, between its own and its neighbours', and its variance.

    True gains scatter around those of their 5 × 5 neighbours with a variance τ²; a voxel's own is known to
    :math:`v = E[e^2]/\sum b^2`, the neighbours' to v'. Then the best guess, and its variance, are

    .. math:: \tilde g = g' + w (\hat g - g'), \quad w = \frac{\tau^2 + v'}{\tau^2 + v' + v}, \quad
        E[(\tilde g - g)^2] = w v

    with :math:`\tau^2 + v + v' = E[(\hat g - g')^2]`, averaged over 15 × 15 voxels (empirical Bayes; Efron &
    Morris, J Am Stat Assoc 1973). With ever more probes :math:`w \to 1`.
    """
    usual = _divide(_among(kind, rest, 5), _among(kind, torch.ones_like(rest), 5))
    around = (25 * _among(kind, b_b, 5) - b_b).clamp_min(0)
    # of a voxel that is alone among its kind nothing but rounding is left
    around = torch.where(around > _ROUNDING * b_b, around, 0)
    theirs = _divide(25 * _among(kind, a_b, 5) - a_b, around)
    doubt, their_doubt = _divide(usual, b_b), _divide(usual, around)
    excess = torch.where(around > 0, (own - theirs).square() - doubt - their_doubt, 0)
    scatter = _divide(_among(kind, excess * known, _REGION), _among(kind, known, _REGION)).clamp_min(0)
    trusted = scatter + their_doubt
    share = torch.where(around > 0, _divide(trusted, trusted + doubt), 1)
    # nothing to be in doubt of: the fit is perfect
    share = torch.where(trusted + doubt > 0, share, 1)
    # a voxel unlike its neighbours keeps near what it says itself (limited translation, Efron & Morris)
    farthest = _FARTHEST * doubt.sqrt()
    shift = ((1 - share) * (theirs - own)).clamp(-farthest, farthest)
    return own + shift, share * doubt


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
    pooled = _divide(neighbourhood_mean(explained, 5), neighbourhood_mean(total, 5))
    return ((pooled - chance) / max(1 - chance, 1e-6)).clamp(0, 1)


def _shrinkage(explained: Tensor, observations: float) -> Tensor:
    """Factor on the gain: near 1 where r² stands out of its own noise, near 0 where it does not."""
    if observations <= 0:
        return torch.zeros_like(explained)
    return _divide(explained, explained + (1 - explained) / observations)


def _among(kind: Tensor, values: Tensor, size: int) -> Tensor:
    """Sum over size × size neighbours of the same kind as the voxel, by the number of all."""
    alike, others = (neighbourhood_mean(values * chosen, size) for chosen in (kind, ~kind))
    return torch.where(kind, alike, others)


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Quotient, 0 where the denominator is 0."""
    zero = denominator == 0
    safe = torch.where(zero, torch.ones_like(denominator), denominator)
    return torch.where(zero, torch.zeros_like(numerator), numerator / safe)
