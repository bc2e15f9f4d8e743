"""Second-order sums of pushed probes: all that a sketch remembers, whatever the number of probes."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    r"""Sums over probes of products of pushed probes u and covariates w, per voxel, in double precision.

    From these six both maps follow: with :math:`a = \Re(e^{-i\phi} u)` and :math:`b = \Re(e^{-i\phi} w)`,

    .. math:: \sum a b = \tfrac12 \Re\Big(\sum u w^* + e^{-2i\phi} \sum u w\Big).

    Parameters
    ----------
    count
        Number of probes S.
    u_abs, w_abs
        :math:`\sum |u|^2` and :math:`\sum |w|^2`, shape `(...)`, float64.
    u_u, w_w, u_wc, u_w
        :math:`\sum u^2`, :math:`\sum w^2`, :math:`\sum u w^*` and :math:`\sum u w`, complex128.
    """

    count: int
    u_abs: Tensor
    u_u: Tensor
    w_abs: Tensor
    w_w: Tensor
    u_wc: Tensor
    u_w: Tensor

    def __add__(self, other: "Moments") -> "Moments":
        """Moments of both sets of probes together."""
        return Moments(
            count=self.count + other.count,
            **{name: getattr(self, name) + getattr(other, name) for name in _SUMS},
        )

    def __sub__(self, other: "Moments") -> "Moments":
        """Moments of the probes that are not among the other's, which are the first of these."""
        return Moments(
            count=self.count - other.count,
            **{name: getattr(self, name) - getattr(other, name) for name in _SUMS},
        )

    def copy(self) -> "Moments":
        """The same sums, which nobody adds to."""
        return Moments(count=self.count, **{name: getattr(self, name).clone() for name in _SUMS})


_SUMS = ("u_abs", "u_u", "w_abs", "w_w", "u_wc", "u_w")


def moments(pushed: Tensor, covariate: Tensor | None) -> Moments:
    """Sum over a batch of probes.

    Parameters
    ----------
    pushed
        Pushed probes u, shape `(probes, ...)`, complex or real.
    covariate
        Their covariates w, same shape; None counts as 0.
    """
    return accumulate(_nothing(pushed), pushed, covariate)


def accumulate(total: Moments, pushed: Tensor, covariate: Tensor | None) -> Moments:
    """Add a batch of probes to sums, which are written into: a sketch needs no memory that grows or moves.

    The probes are added one by one, in an order that no size of batches changes.

    Parameters
    ----------
    total
        Sums so far; their tensors become those of the answer.
    pushed, covariate
        As of `moments`.
    """
    for number, probe in enumerate(pushed):
        u = probe.to(torch.complex128)
        total.u_abs.add_((u * u.conj()).real)
        total.u_u.addcmul_(u, u)
        if covariate is None:
            continue
        w = covariate[number].to(torch.complex128)
        total.w_abs.add_((w * w.conj()).real)
        total.w_w.addcmul_(w, w)
        total.u_wc.addcmul_(u, w.conj())
        total.u_w.addcmul_(u, w)
    return replace(total, count=total.count + len(pushed))


def _nothing(pushed: Tensor) -> Moments:
    """Sums over no probes of the shape of these."""

    def zeros(dtype: torch.dtype) -> Tensor:
        return torch.zeros(pushed.shape[1:], dtype=dtype, device=pushed.device)

    squares = {name: zeros(torch.float64) for name in ("u_abs", "w_abs")}
    return Moments(count=0, **squares, **{name: zeros(torch.complex128) for name in ("u_u", "w_w", "u_wc", "u_w")})


def projected(plain: Tensor, conjugated: Tensor, direction: Tensor) -> Tensor:
    r"""Sum of products of in-phase components: :math:`\tfrac12 \Re(\sum u w^* + e^{-2i\phi} \sum u w)`.

    Parameters
    ----------
    plain
        :math:`\sum u w`, complex.
    conjugated
        :math:`\sum u w^*`, complex or real.
    direction
        :math:`e^{i\phi}`, complex.
    """
    return 0.5 * (conjugated.real + (direction.conj() ** 2 * plain).real)
