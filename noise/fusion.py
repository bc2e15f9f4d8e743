"""What is expected of a σ map, and what further probes say, put together."""

from dataclasses import replace

import torch
from torch import Tensor

from voxelsigma.noise.prior import Prior
from voxelsigma.noise.quadratures import Component, component, crossed_gains, quadratures, shared_remainder
from voxelsigma.noise.sigma import LEAST_SHARE, MapKind, SigmaMap, root_bias
from voxelsigma.noise.sketch import Sketch
from voxelsigma.noise.voxels import neighbourhood_mean

_NEIGHBOURS = 5
_SMALLEST = 1e-300


def measured_variance(found: SigmaMap) -> Tensor:
    r"""The unbiased :math:`\hat\sigma^2` of a map, shape `(...)`, float64."""
    return (found.sigma.double() * root_bias(found.degrees_of_freedom)).square()


def fused(found: SigmaMap, prior: Prior) -> SigmaMap:
    r"""The posterior of σ² under a prior: both variances weighted with their degrees of freedom.

    .. math:: \hat\sigma^2 = \frac{\nu \bar s + \nu_0 s_0}{\nu + \nu_0}, \qquad
        \frac{(\nu + \nu_0)\hat\sigma^2}{\sigma^2} \sim \chi^2_{\nu + \nu_0}

    (conjugate to the sum of squares; Smyth, Stat Appl Genet Mol Biol 2004, eq. 3). True if the errors of the two have
    nothing in common: of either kind of map take `independent_map`, not a sketch's own.

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


def independent_map(state: Sketch, kind: MapKind) -> SigmaMap:
    r"""The map of a sketch in which no voxel leans on its neighbours: to be fused with a prediction.

    For either kind of map `Sketch.map` moves the control variate's gains towards those of the neighbours, and errs
    where a voxel is unlike them. So does a prediction: together both would count one error as two. Here a voxel has
    its own gain alone; of the component in phase, a,

    .. math:: \hat\sigma^2 = \frac{\sum a^2}{S} + q \hat g^2 \Big(E[b^2] - \frac{\sum b^2}{S}\Big), \qquad
        \hat g = \frac{\sum a b}{\sum b^2}, \qquad
        \frac1\nu = \frac{2 r^2 (1 - r^2)}{S - 2} + \frac{(1 - r^2)^2}{S - 1} + \frac{(1 - q)^2 r^4}{S}

    with the explained part r² pooled over neighbours, which says what an estimate is worth, not what it is, and
    :math:`q = r^2 / (r^2 + (1 - r^2)/(S - 2))`, near 0 where r² does not stand out of its own noise. The gain's error,
    the residual's and that of what is not controlled add up. Never below :math:`(1 - q) \sum a^2 / S`. The complex map
    is the sum of that and of the same of the other quadrature; to the variances of both is added what their errors have
    in common, of the remainders (`shared_remainder`) and of the gains (`crossed_gains`), which may be negative.

    Parameters
    ----------
    state
        Sums of probes that the prediction has not seen.
    kind
        Which map.
    """
    if state.covariate_variance is None or state.complex_linear:
        return state.map(kind)
    count, known = state.sums.count, state.covariate_variance / 2
    if kind == "magnitude":
        variance, spread, explained, carried, _ = _own_gain(component(state.sums, state.direction), known)
    else:
        both = quadratures(state.sums, state.direction)
        parts = [_own_gain(one, known) for one in (both.in_phase, both.across)]
        variance, spread, explained, carried, _ = (one + other for one, other in zip(*parts, strict=True))
        shared = shared_remainder(both) + parts[0][-1] * parts[1][-1] * crossed_gains(both)
        spread = (spread + shared).clamp(min=LEAST_SHARE * spread)
    if state.covariate_freedom is not None:
        spread = spread + carried.square() / state.covariate_freedom
    share = torch.where(variance > 0, spread / variance.square().clamp_min(_SMALLEST), 1 / count)
    freedom = 1 / share.clamp_min(1e-6 / count)
    return SigmaMap(
        sigma=variance.clamp_min(0).sqrt() / root_bias(freedom),
        degrees_of_freedom=freedom,
        kind=kind,
        probes=count,
        explained=torch.where(variance > 0, explained / variance.clamp_min(_SMALLEST), 0),
    )


def _own_gain(part: Component, known: Tensor) -> tuple[Tensor, ...]:
    """Of the component along a phase: variance, half of its estimate's variance, what is explained, carried, and slope.

    Carried is the part that stands on the covariate's variance, the slope that of the estimate with the gain.
    """
    # by rounding a sum of squares may be less than nothing
    count, gain, a_a, b_b = part.count, part.gain, part.a_a.clamp_min(0), part.b_b.clamp_min(0)
    both = neighbourhood_mean(a_a * b_b, _NEIGHBOURS).clamp_min(_SMALLEST)
    # one real coefficient explains 1/S of anything
    by_chance = 1 / count
    explained = ((neighbourhood_mean(part.a_b.square(), _NEIGHBOURS) / both - by_chance) / (1 - by_chance)).clamp(0, 1)
    explained = torch.where(b_b > 0, explained, 0)
    rest, least = 1 - explained, max(count - 2, 1)
    asked = explained / (explained + rest / least).clamp_min(_SMALLEST)
    variance = (a_a / count + asked * gain.square() * (known - b_b / count)).clamp_min(0)
    spread = 2 * explained * rest / least + rest.square() / (count - 1) + ((1 - asked) * explained).square() / count
    return (
        variance,
        spread * variance.square(),
        explained * variance,
        asked * gain.square() * known,
        2 * asked * gain * known,
    )


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
