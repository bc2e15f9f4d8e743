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
        found = _in_phase(sums, direction, covariate_variance, inside)
    else:
        found = _both_quadratures(sums, direction, covariate_variance, inside)
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


@dataclass(frozen=True, slots=True)
class _Estimate:
    """An estimate of a variance, its own variance, and the part r² that the covariate explains, `(...)` each.

    `carried` is the part that stands on the covariate's variance, and errs as that does. `slope` is how much of a
    gain's error is in the estimate, `trusted` the share of its own in it, `unlike` how far that is from the
    neighbours', and `scatter` the variance of true ones.
    """

    variance: Tensor
    spread: Tensor
    explained: Tensor
    carried: Tensor
    slope: Tensor
    trusted: Tensor
    unlike: Tensor
    scatter: Tensor

    def freedom(self, count: int, covariate_freedom: Tensor | None) -> Tensor:
        """Degrees of freedom; rounding may leave a spread of next to nothing."""
        least = 1e-6 * self.variance.square() / count
        doubt = 0 if covariate_freedom is None else 2 * self.carried.square() / covariate_freedom
        found = _divide(2 * self.variance.square(), torch.maximum(self.spread + doubt, least))
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
    return _Estimate(variance, 2 * variance.square() / freedom, *[nothing] * 6)


def _in_phase(sums: Moments, direction: Tensor, covariate_variance: Tensor, inside: Tensor | None) -> _Estimate:
    """The component along a phase, with control variate."""
    count = sums.count
    a_a, b_b, a_b = _along(sums, direction)
    known = covariate_variance / 2
    explained = _pooled_explained(a_b.square(), a_a * b_b, 1 / count)
    own, rest = _own_fit(a_a, b_b, a_b, count)
    kind = torch.ones_like(rest, dtype=torch.bool) if inside is None else inside.to(rest.device)
    gain, doubt, trusted, unlike, scatter = _leaning_gain(own, a_b, b_b, known, rest, kind)
    controlled = (gain.square() + doubt) * known + rest
    # what the neighbours are trusted with is itself an estimate from these probes
    trust = 1 + _PROBES_OF_TRUST / count
    spread = trust * (known.square() * doubt * (4 * gain.square() + 2 * doubt) + 2 * rest.square() / (count - 1))
    # where the covariate explains next to nothing it is not asked
    asked = _shrinkage(explained, count - 2).square()
    plain = a_a / count
    plain_spread = 2 * plain.square() / (count - 1)
    variance = asked * controlled + (1 - asked) * plain
    deviation = asked * spread.sqrt() + (1 - asked) * plain_spread.sqrt()
    without = (b_b == 0) | (variance == 0)
    return _Estimate(
        variance=torch.where(without, plain, variance),
        spread=torch.where(without, plain_spread, deviation.square()),
        explained=explained,
        carried=torch.where(without, 0, asked * gain.square() * known),
        unlike=unlike,
        scatter=scatter,
        trusted=trusted,
        slope=torch.where(without, 0, 2 * asked * gain * known),
    )


def _both_quadratures(sums: Moments, direction: Tensor, covariate_variance: Tensor, inside: Tensor | None) -> _Estimate:
    """The complex voxel as the sum of what is in phase and what is not, each with a gain of its own."""
    parts = [_in_phase(sums, turned, covariate_variance, inside) for turned in (direction, 1j * direction)]
    variance = parts[0].variance + parts[1].variance
    across = crossed_gains(sums, direction)
    # a voxel that is unlike its neighbours in one quadrature may be so in the other
    kind = torch.ones_like(variance, dtype=torch.bool) if inside is None else inside.to(variance.device)
    alike = _divide(_among(kind, parts[0].unlike * parts[1].unlike, _REGION), _among(kind, across * 0 + 1, _REGION))
    most = (parts[0].scatter * parts[1].scatter).sqrt()
    alike = torch.minimum(torch.maximum(alike - across, -most), most)
    own, theirs = parts[0].trusted * parts[1].trusted, (1 - parts[0].trusted) * (1 - parts[1].trusted)
    of_gains = parts[0].slope * parts[1].slope * (own * across + theirs * alike)
    shared = shared_remainder(sums, direction) + of_gains
    apart = parts[0].spread + parts[1].spread
    spread = (apart + 2 * shared).clamp(min=LEAST_SHARE * apart)
    explained = sum(_divide(part.variance, variance) * part.explained for part in parts)
    assert isinstance(explained, Tensor)
    carried = parts[0].carried + parts[1].carried
    nothing = torch.zeros_like(variance)
    return _Estimate(variance, spread, explained, carried, *[nothing] * 4)


def shared_remainder(sums: Moments, direction: Tensor) -> Tensor:
    r"""Covariance of the variances of what the covariate leaves of both quadratures, shape `(...)`.

    .. math:: \operatorname{Cov} = \frac{2 E[e_a e_q]^2}{S - 1}

    Parameters
    ----------
    sums, direction
        As of `sigma_map`.
    """
    count = sums.count
    gains, rests, (a_q, q_b, a_c, b_c) = _both(sums, direction)
    left = (a_q - gains[0] * q_b - gains[1] * a_c + gains[0] * gains[1] * b_c) / (count - 1)
    # by chance it is not 0: take that off, and of several voxels, so that little is left of chance
    product = rests[0] * rests[1]
    common = neighbourhood_mean(left.square() - product / (count - 1), 5).clamp_min(0)
    return 2 * torch.minimum(common, product) / (count - 1)


def crossed_gains(sums: Moments, direction: Tensor) -> Tensor:
    r"""Covariance of the gains of both quadratures, shape `(...)`.

    .. math:: \operatorname{Cov}(\hat g_a, \hat g_q) = \frac{g_{ac} \, g_{qb}}{S}, \qquad e_a = g_{ac} c + \dots

    b and its quadrature c are independent, so that a gain errs by what its component has of the other one: where a
    network turns phases, one errs as the other does, with the other sign.

    Parameters
    ----------
    sums, direction
        As of `sigma_map`.
    """
    gains, _, (_, q_b, a_c, b_c) = _both(sums, direction)
    b_b, c_c = (_along(sums, turned)[1] for turned in (direction, 1j * direction))
    # less what b and c have in common by chance
    partial = _divide(a_c - gains[0] * b_c, c_c) * _divide(q_b - gains[1] * b_c, b_b)
    return neighbourhood_mean(partial, 5) / sums.count


def _both(sums: Moments, direction: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Own gains and remainders of both quadratures, and sums of products of one with the other: aq, qb, ac, bc."""
    fits = [_own_fit(*_along(sums, turned), sums.count) for turned in (direction, 1j * direction)]
    turn, apart = direction.conj().square(), sums.u_wc.imag / 2
    a_q, across, b_c = ((turn * one).imag / 2 for one in (sums.u_u, sums.u_w, sums.w_w))
    return [gain for gain, _ in fits], [rest for _, rest in fits], [a_q, across + apart, across - apart, b_c]


def _along(sums: Moments, direction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of a², b² and a b of the components along a phase."""
    return (
        projected(sums.u_u, sums.u_abs, direction),
        projected(sums.w_w, sums.w_abs, direction),
        projected(sums.u_w, sums.u_wc, direction),
    )


def _own_fit(a_a: Tensor, b_b: Tensor, a_b: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Each voxel's own gain, and the variance of what it leaves."""
    gain = _divide(a_b, b_b)
    # one real coefficient of `count` real observations; rounding may leave less than nothing of a perfect fit
    return gain, ((a_a - gain * a_b) / (count - 1)).clamp_min(0)


def _leaning_gain(
    own: Tensor, a_b: Tensor, b_b: Tensor, known: Tensor, rest: Tensor, kind: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    r"""Gain of each voxel, between its own and its neighbours', its variance, w, its distance from theirs, τ².

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
    unlike = torch.where(around > 0, own - theirs, 0)
    return own + shift, share * doubt, share, unlike, scatter


def _circular(sums: Moments, covariate_variance: Tensor, *, halved: bool) -> _Estimate:
    """Of a complex-linear reconstruction: one complex gain, and half of the variance in phase."""
    count = sums.count
    gain = _divide(sums.u_wc, sums.w_abs)
    fitted = (gain.conj() * sums.u_wc).real
    explained = _pooled_explained(fitted, sums.u_abs, 1 / count)
    factor = _shrinkage(explained, count - 2)
    plain = sums.u_abs / count
    carried = factor.square() * gain.abs().square() * covariate_variance
    variance = (plain + carried - factor.square() * fitted / count).clamp_min(0)
    freedom = 2 * count / (1 - (explained * factor).square()).clamp_min(1e-6) - 1
    part = 2 if halved else 1
    nothing = torch.zeros_like(variance)
    return _Estimate(
        variance / part, 2 * (variance / part).square() / freedom, explained, carried / part, *[nothing] * 4
    )


def _circularity(sums: Moments, *, complex_linear: bool) -> Tensor:
    r""":math:`|\kappa|^2`, the circularity quotient of the noise."""
    if complex_linear:
        return torch.zeros_like(sums.u_abs)
    kappa = _divide(sums.u_u.abs(), sums.u_abs).square()
    # |κ|² of circular noise averages 1/S: take that off
    return ((sums.count * kappa - 1) / max(sums.count - 1, 1)).clamp(0, 1)


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
