"""From second-order sums to a σ map with its error: plain mean and control variate."""

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import numpy as np
import scipy.stats
import torch
from torch import Tensor

from voxelsigma.noise.moments import Moments, projected
from voxelsigma.noise.quadratures import (
    Component,
    Quadratures,
    component,
    crossed_gains,
    quadratures,
    quotient,
    shared_remainder,
)
from voxelsigma.noise.voxels import neighbourhood_mean

MapKind: TypeAlias = Literal["magnitude", "complex"]

LEAST_SHARE: Final = 0.3
"""Of the errors of both quadratures, that the error of their sum is not said to be below."""

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
    covariate_freedom: Tensor | None = None,
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
    The complex map is the sum of two such estimates, of the component in phase and of the one that is not: each
    quadrature has a gain of its own, for a network damps them differently. A complex-linear reconstruction has one
    complex gain, shrunk by such an r².

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
    covariate_freedom
        Degrees of freedom of that variance where it is an estimate from other probes; None where it is exact.
    complex_linear
        Whether the reconstruction is complex-linear.
    inside
        Voxels of the object, shape `(...)`: they lean on each other alone, and so do the others. None for one kind.
    """
    if covariate_variance is None:
        found = _plain(sums, kind, direction, complex_linear=complex_linear)
    elif complex_linear:
        found = _circular(sums, covariate_variance, halved=kind == "magnitude")
    elif kind == "magnitude":
        found = _controlled(component(sums, direction), covariate_variance, inside)
    else:
        found = _both_quadratures(quadratures(sums, direction), covariate_variance, inside)
    freedom = found.freedom(sums.count, covariate_freedom)
    return SigmaMap(
        sigma=found.variance.clamp_min(0).sqrt() / root_bias(freedom),
        degrees_of_freedom=freedom,
        kind=kind,
        probes=sums.count,
        explained=found.explained,
    )


def root_bias(freedom: Tensor) -> Tensor:
    r"""Mean of :math:`\sqrt{\chi^2_\nu/\nu}`: :math:`\sqrt{2/\nu}\,\Gamma((\nu+1)/2)/\Gamma(\nu/2)`; 1 at infinity."""
    # beyond, the logarithms of Γ cancel to less than their own rounding; 1 - 1/(4ν) is exact to 1e-9
    nu = freedom.double().clamp(max=1e4)
    exact = (2 / nu).sqrt() * torch.exp(torch.lgamma((nu + 1) / 2) - torch.lgamma(nu / 2))
    return torch.where(freedom > 1e4, 1 - 0.25 / freedom, exact)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Estimate:
    """An estimate of a variance, its own variance, and the part r² that the covariate explains, `(...)` each.

    `carried` is the part that stands on the covariate's variance, and errs as that does.
    """

    variance: Tensor
    spread: Tensor
    explained: Tensor
    carried: Tensor

    def freedom(self, count: int, covariate_freedom: Tensor | None) -> Tensor:
        """Degrees of freedom; rounding may leave a spread of next to nothing."""
        least = 1e-6 * self.variance.square() / count
        doubt = 0 if covariate_freedom is None else 2 * self.carried.square() / covariate_freedom
        found = quotient(2 * self.variance.square(), torch.maximum(self.spread + doubt, least))
        # of nothing at all nothing is known but how often it was looked at
        return torch.where(self.variance > 0, found, max(count - 1, 1)).clamp_min(1)


def _plain(sums: Moments, kind: MapKind, direction: Tensor, *, complex_linear: bool) -> _Estimate:
    """The mean of squares."""
    count = sums.count
    if kind == "magnitude" and not complex_linear:
        variance = projected(sums.u_u, sums.u_abs, direction) / count
        freedom = torch.full_like(variance, count - 1)
    else:
        variance = sums.u_abs / count
        freedom = 2 * count / (1 + _circularity(sums, complex_linear=complex_linear))
        variance = variance / 2 if kind == "magnitude" else variance
    nothing = torch.zeros_like(variance)
    return _Estimate(variance=variance, spread=2 * variance.square() / freedom, explained=nothing, carried=nothing)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Gain:
    """A gain between a voxel's own and its neighbours', and its variance `doubt`, `(...)` each: `_leaning_gain`.

    `share` is w of its own, `unlike` how far that is from the neighbours', `distance` the variance of a true one around
    those, τ² + v'.
    """

    value: Tensor
    doubt: Tensor
    share: Tensor
    unlike: Tensor
    distance: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class _Controlled(_Estimate):
    """An estimate with control variate; `slope` is how much of the gain's error is in it."""

    gain: _Gain
    slope: Tensor


def _controlled(part: Component, covariate_variance: Tensor, inside: Tensor | None) -> _Controlled:
    """The component along a phase, with control variate."""
    count, rest, known = part.count, part.rest, covariate_variance / 2
    explained = _pooled_explained(part.a_b.square(), part.a_a * part.b_b, 1 / count)
    found = _leaning_gain(part, known, _kinds(inside, rest))
    gain, doubt = found.value, found.doubt
    controlled = (gain.square() + doubt) * known + rest
    # what the neighbours are trusted with is itself an estimate from these probes
    trust = 1 + _PROBES_OF_TRUST / count
    spread = trust * (known.square() * doubt * (4 * gain.square() + 2 * doubt) + 2 * rest.square() / (count - 1))
    # where the covariate explains next to nothing it is not asked
    asked = _shrinkage(explained, count - 2).square()
    plain = part.a_a / count
    plain_spread = 2 * plain.square() / (count - 1)
    variance = asked * controlled + (1 - asked) * plain
    deviation = asked * spread.sqrt() + (1 - asked) * plain_spread.sqrt()
    without = (part.b_b == 0) | (variance == 0)
    return _Controlled(
        variance=torch.where(without, plain, variance),
        spread=torch.where(without, plain_spread, deviation.square()),
        explained=explained,
        carried=torch.where(without, 0, asked * gain.square() * known),
        gain=found,
        slope=torch.where(without, 0, 2 * asked * gain * known),
    )


def _both_quadratures(both: Quadratures, covariate_variance: Tensor, inside: Tensor | None) -> _Estimate:
    """The complex voxel as the sum of what is in phase and what is not, each with a gain of its own."""
    one, other = (_controlled(part, covariate_variance, inside) for part in (both.in_phase, both.across))
    variance, apart = one.variance + other.variance, one.spread + other.spread
    of_gains = _shared_gain(one.gain, other.gain, crossed_gains(both), _kinds(inside, variance))
    shared = shared_remainder(both) + one.slope * other.slope * of_gains
    return _Estimate(
        variance=variance,
        spread=(apart + 2 * shared).clamp(min=LEAST_SHARE * apart),
        explained=quotient(one.variance * one.explained + other.variance * other.explained, variance),
        carried=one.carried + other.carried,
    )


def _shared_gain(one: _Gain, other: _Gain, across: Tensor, kind: Tensor) -> Tensor:
    """Covariance of the errors of two leaning gains, of whose own ones that is `across`, shape `(...)`."""
    # a voxel that is unlike its neighbours in one quadrature may be so in the other
    number = _among(kind, torch.ones_like(across), _REGION)
    alike = quotient(_among(kind, one.unlike * other.unlike, _REGION), number) - across
    # by Cauchy and Schwarz
    most = (one.distance * other.distance).sqrt()
    alike = torch.minimum(torch.maximum(alike, -most), most)
    return one.share * other.share * across + (1 - one.share) * (1 - other.share) * alike


def _leaning_gain(part: Component, known: Tensor, kind: Tensor) -> _Gain:
    r"""Gain of each voxel, between its own and its neighbours'.

    True gains scatter around those of their 5 × 5 neighbours with a variance τ²; a voxel's own is known to
    :math:`v = E[e^2]/\sum b^2`, the neighbours' to v'. Then the best guess, and its variance, are

    .. math:: \tilde g = g' + w (\hat g - g'), \quad w = \frac{\tau^2 + v'}{\tau^2 + v' + v}, \quad
        E[(\tilde g - g)^2] = w v

    with :math:`\tau^2 + v + v' = E[(\hat g - g')^2]`, averaged over 15 × 15 voxels (empirical Bayes; Efron &
    Morris, J Am Stat Assoc 1973). With ever more probes :math:`w \to 1`.
    """
    own, b_b, rest = part.gain, part.b_b, part.rest
    usual = quotient(_among(kind, rest, 5), _among(kind, torch.ones_like(rest), 5))
    around = (25 * _among(kind, b_b, 5) - b_b).clamp_min(0)
    # of a voxel that is alone among its kind nothing but rounding is left
    around = torch.where(around > _ROUNDING * b_b, around, 0)
    theirs = quotient(25 * _among(kind, part.a_b, 5) - part.a_b, around)
    doubt, their_doubt = quotient(usual, b_b), quotient(usual, around)
    excess = torch.where(around > 0, (own - theirs).square() - doubt - their_doubt, 0)
    scatter = quotient(_among(kind, excess * known, _REGION), _among(kind, known, _REGION)).clamp_min(0)
    trusted = scatter + their_doubt
    share = torch.where(around > 0, quotient(trusted, trusted + doubt), 1)
    # nothing to be in doubt of: the fit is perfect
    share = torch.where(trusted + doubt > 0, share, 1)
    # a voxel unlike its neighbours keeps near what it says itself (limited translation, Efron & Morris)
    farthest = _FARTHEST * doubt.sqrt()
    shift = ((1 - share) * (theirs - own)).clamp(-farthest, farthest)
    unlike = torch.where(around > 0, own - theirs, 0)
    return _Gain(value=own + shift, doubt=share * doubt, share=share, unlike=unlike, distance=trusted)


def _circular(sums: Moments, covariate_variance: Tensor, *, halved: bool) -> _Estimate:
    """Of a complex-linear reconstruction: one complex gain, and half of the variance in phase."""
    count = sums.count
    gain = quotient(sums.u_wc, sums.w_abs)
    fitted = (gain.conj() * sums.u_wc).real
    explained = _pooled_explained(fitted, sums.u_abs, 1 / count)
    factor = _shrinkage(explained, count - 2)
    plain = sums.u_abs / count
    carried = factor.square() * gain.abs().square() * covariate_variance
    variance = (plain + carried - factor.square() * fitted / count).clamp_min(0)
    freedom = 2 * count / (1 - (explained * factor).square()).clamp_min(1e-6) - 1
    part = 2 if halved else 1
    return _Estimate(
        variance=variance / part,
        spread=2 * (variance / part).square() / freedom,
        explained=explained,
        carried=carried / part,
    )


def _circularity(sums: Moments, *, complex_linear: bool) -> Tensor:
    r""":math:`|\kappa|^2`, the circularity quotient of the noise."""
    if complex_linear:
        return torch.zeros_like(sums.u_abs)
    kappa = quotient(sums.u_u.abs(), sums.u_abs).square()
    # |κ|² of circular noise averages 1/S: take that off
    return ((sums.count * kappa - 1) / max(sums.count - 1, 1)).clamp(0, 1)


def _pooled_explained(explained: Tensor, total: Tensor, chance: float) -> Tensor:
    """Explained part of the energy, pooled over a neighbourhood of 5 × 5 voxels, less what chance explains."""
    pooled = quotient(neighbourhood_mean(explained, 5), neighbourhood_mean(total, 5))
    return ((pooled - chance) / max(1 - chance, 1e-6)).clamp(0, 1)


def _shrinkage(explained: Tensor, observations: float) -> Tensor:
    """Factor on the gain: near 1 where r² stands out of its own noise, near 0 where it does not."""
    if observations <= 0:
        return torch.zeros_like(explained)
    return quotient(explained, explained + (1 - explained) / observations)


def _kinds(inside: Tensor | None, like: Tensor) -> Tensor:
    """Which voxels are of the object, where `like` is; all of one kind without a mask."""
    return torch.ones_like(like, dtype=torch.bool) if inside is None else inside.to(like.device)


def _among(kind: Tensor, values: Tensor, size: int) -> Tensor:
    """Sum over size × size neighbours of the same kind as the voxel, by the number of all."""
    alike, others = (neighbourhood_mean(values * chosen, size) for chosen in (kind, ~kind))
    return torch.where(kind, alike, others)
