"""A complex voxel's two components, each regressed on the covariate, and what their errors have in common."""

from dataclasses import dataclass

import torch
from torch import Tensor

from voxelsigma.noise.moments import Moments, projected
from voxelsigma.noise.voxels import neighbourhood_mean


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    r"""What S probes say of u and w along a phase, :math:`a = \Re(e^{-i\phi} u)`, :math:`b = \Re(e^{-i\phi} w)`.

    Parameters
    ----------
    count
        Number of probes S.
    a_a, b_b, a_b
        Sums of a², b² and a b, shape `(...)`.
    gain
        Each voxel's own :math:`\hat g = \sum a b / \sum b^2`, 0 where w is.
    rest
        Variance of what it leaves, :math:`\sum (a - \hat g b)^2 / (S - 1)`.
    """

    count: int
    a_a: Tensor
    b_b: Tensor
    a_b: Tensor
    gain: Tensor
    rest: Tensor


def component(sums: Moments, direction: Tensor) -> Component:
    r"""Regress the component of u along a phase on that of w.

    Parameters
    ----------
    sums
        Sums over S probes, at least 2.
    direction
        Phase factor :math:`e^{i\phi}`, shape `(...)`, complex.
    """
    a_a = projected(sums.u_u, sums.u_abs, direction)
    b_b = projected(sums.w_w, sums.w_abs, direction)
    a_b = projected(sums.u_w, sums.u_wc, direction)
    gain = quotient(a_b, b_b)
    # one real coefficient of `count` real observations; rounding may leave less than nothing of a perfect fit
    rest = ((a_a - gain * a_b) / (sums.count - 1)).clamp_min(0)
    return Component(count=sums.count, a_a=a_a, b_b=b_b, a_b=a_b, gain=gain, rest=rest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quadratures:
    """A complex voxel: what of u and w is in phase, a and b, and what is across, q and c.

    Parameters
    ----------
    in_phase, across
        Of a with b, and of q with c.
    a_q, q_b, a_c, b_c
        Sums of products of one with the other, shape `(...)`.
    """

    in_phase: Component
    across: Component
    a_q: Tensor
    q_b: Tensor
    a_c: Tensor
    b_c: Tensor


def quadratures(sums: Moments, direction: Tensor) -> Quadratures:
    """Both components of complex voxels, along a phase and across it.

    Parameters
    ----------
    sums, direction
        As of `component`.
    """
    turn, apart = direction.conj().square(), sums.u_wc.imag / 2
    a_q, mean, b_c = ((turn * one).imag / 2 for one in (sums.u_u, sums.u_w, sums.w_w))
    parts = (component(sums, turned) for turned in (direction, 1j * direction))
    return Quadratures(in_phase=next(parts), across=next(parts), a_q=a_q, q_b=mean + apart, a_c=mean - apart, b_c=b_c)


def shared_remainder(both: Quadratures) -> Tensor:
    r"""Covariance of the variances of what the covariate leaves of both quadratures, shape `(...)`.

    .. math:: \operatorname{Cov} = \frac{2 E[e_a e_q]^2}{S - 1}
    """
    count, gain, across = both.in_phase.count, both.in_phase.gain, both.across.gain
    left = (both.a_q - gain * both.q_b - across * both.a_c + gain * across * both.b_c) / (count - 1)
    # by chance it is not 0: take that off, and of several voxels, so that little is left of chance
    product = both.in_phase.rest * both.across.rest
    common = neighbourhood_mean(left.square() - product / (count - 1), 5).clamp_min(0)
    return 2 * torch.minimum(common, product) / (count - 1)


def crossed_gains(both: Quadratures) -> Tensor:
    r"""Covariance of the gains of both quadratures, shape `(...)`.

    .. math:: \operatorname{Cov}(\hat g_a, \hat g_q) = \frac{g_{ac} \, g_{qb}}{S}, \qquad e_a = g_{ac} c + \dots

    b and its quadrature c are independent, so that a gain errs by what its component has of the other one: where a
    network turns phases, one errs as the other does, with the other sign.
    """
    # less what b and c have in common by chance
    of_c = quotient(both.a_c - both.in_phase.gain * both.b_c, both.across.b_b)
    of_b = quotient(both.q_b - both.across.gain * both.b_c, both.in_phase.b_b)
    return neighbourhood_mean(of_c * of_b, 5) / both.in_phase.count


def quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Quotient, 0 where the denominator is 0."""
    zero = denominator == 0
    safe = torch.where(zero, torch.ones_like(denominator), denominator)
    return torch.where(zero, torch.zeros_like(numerator), numerator / safe)
