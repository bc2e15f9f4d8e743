"""A linear stand-in for a Jacobian, cheap enough that its variance is known from many more probes."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

import torch
from torch import Tensor

from voxelsigma.noise.inverse import Operator
from voxelsigma.noise.response import Response, fit_responses
from voxelsigma.noise.voxels import object_mask

FIRST_CHEAP: Final = 48
CHEAP_PER_PROBE: Final = 2
"""Cheap probes, through the stand-in alone: so many at once, and two for each one through the reconstruction."""

_REACHES: Final = ((1, 1), (1, 0), (0, 0))
_EXACT: Final = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A step of a `Surrogate`.

    Parameters
    ----------
    operator
        P, linear, of images `(probes, y, x)`.
    kept, passed
        Filters h of where it stands, h' of that behind the operator.
    first, second
        Filters g of the zero-filled image and g' of that behind the first stage's operator; None for none.
    """

    operator: Operator
    kept: Response
    passed: Response
    first: Response | None = None
    second: Response | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Surrogate:
    r"""An unrolled reconstruction whose networks are filters, for each voxel its own.

    .. math:: z_0 = w, \qquad
        z_k = h_k * z_{k-1} + h'_k * P_k z_{k-1} + g_k * w + g'_k * P_1 w, \qquad c = z_K

    with :math:`w = A^H v`. Data consistency, :math:`P_k` (:math:`A^H A`, or a regularised inverse of it), brings to a
    voxel what was aliased into far ones, which no filter can. It changes nothing that is expected of σ: a good one
    explains more of it. Complex-linear, with real filters, so that of the noise of c a half is in phase.

    Parameters
    ----------
    stages
        At least one; the first has filters h and h' alone.
    """

    stages: tuple[Stage, ...]

    def second(self, images: Tensor) -> Tensor:
        """The zero-filled images of probes `(probes, y, x)` behind the first operator."""
        return self.stages[0].operator(images)

    def __call__(self, images: Tensor, second: Tensor | None = None) -> Tensor:
        """Of zero-filled images, shape `(probes, y, x)`, and of `second` of them, if that is known."""
        second = self.second(images) if second is None else second
        found = self.stages[0].kept(images) + self.stages[0].passed(second)
        for stage in self.stages[1:]:
            found = stage.kept(found) + stage.passed(stage.operator(found))
            for response, seen in ((stage.first, images), (stage.second, second)):
                if response is not None:
                    found = found + response(seen)
        return found


def adapted(
    learned: Surrogate,
    pushed: Tensor,
    images: Tensor,
    second: Tensor,
    own: Tensor,
    image: Tensor,
    direction: Tensor,
) -> Surrogate:
    """A surrogate that was learned from other scans, to which the first probes of this one add what it lacks.

    What is added, and a factor on what is learned that varies with the image, follow from `fit_responses` on w, the
    same behind the first operator, and the surrogate's own image. So a surrogate that does not fit this scan costs next
    to nothing.

    Parameters
    ----------
    learned
        From other scans.
    pushed, images, second, own
        First probes u, their w, those behind the first operator, and what the surrogate makes of them, shape
        `(probes, y, x)`.
    image, direction
        The reconstruction and its phase factor, shape `(y, x)`.
    """
    inside = object_mask(image)
    found = fit_responses(pushed, (images, second, own), image, direction, reaches=_REACHES)
    if found is None:
        return learned
    near, again, scale = found
    *before, last = learned.stages
    # beside the object w itself is the covariate
    factor = torch.where(inside, scale.weights[0], 0)
    last = replace(
        last,
        kept=_scaled(last.kept, factor),
        passed=_scaled(last.passed, factor),
        first=None if last.first is None else _scaled(last.first, factor),
        second=None if last.second is None else _scaled(last.second, factor),
    )
    if before:
        last = replace(last, first=_sum(near, last.first), second=_sum(again, last.second))
    else:
        last = replace(last, kept=_sum(near, last.kept), passed=_sum(again, last.passed))
    return replace(learned, stages=(*before, last))


def _scaled(response: Response, factor: Tensor) -> Response:
    return Response(offsets=response.offsets, weights=factor.to(response.weights) * response.weights)


def _sum(one: Response, other: Response | None) -> Response:
    """Both filters at once."""
    if other is None:
        return one
    larger, smaller = (one, other) if len(one.offsets) > len(other.offsets) else (other, one)
    weights = larger.weights.clone()
    weights[[larger.offsets.index(offset) for offset in smaller.offsets]] += smaller.weights.to(weights)
    return Response(offsets=larger.offsets, weights=weights)


@dataclass(slots=True, kw_only=True)
class SimulatedVariance:
    r"""Variance of a surrogate, from cheap probes and from that of the filtered zero-filled image, which is known.

    .. math:: E|c|^2 \approx \Big( |g|^2 - \frac{e}{\sum |n|^2} \Big) E|n|^2 + e, \qquad
        g = \frac{\sum c n^*}{\sum |n|^2}, \quad e = \frac{1}{N - 1} \sum_s |c_s - g n_s|^2, \qquad
        \nu_c = \frac{2 N}{1 - \rho^4}

    with ρ, the correlation of c and n: one control variate for another (multilevel Monte Carlo; Giles, Acta Numerica
    2015).

    Parameters
    ----------
    draw
        Cheap probes of a number: c and n, `(probes, y, x)` each.
    known
        :math:`E|n|^2`, shape `(y, x)`.
    """

    draw: Callable[[int], tuple[Tensor, Tensor]]
    known: Tensor
    count: int = field(default=0, init=False)
    _blocks: int = field(default=0, init=False)
    _sums: list[Tensor] = field(default_factory=list, init=False)

    def until(self, count: int) -> None:
        """Push cheap probes until there are so many."""
        while self.count < count:
            for one, near in zip(*self.draw(self._blocks), strict=True):
                c, n = one.to(torch.complex128), near.to(torch.complex128)
                products = ((c * c.conj()).real, (n * n.conj()).real, c * n.conj())
                if not self._sums:
                    self._sums = [torch.zeros_like(product) for product in products]
                for total, product in zip(self._sums, products, strict=True):
                    total.add_(product)
                self.count += 1
            self._blocks += 1

    def estimate(self) -> tuple[Tensor, Tensor]:
        """The variance and its degrees of freedom, shape `(y, x)` each."""
        c_c, n_n, c_n = self._sums
        tiny = torch.finfo(n_n.dtype).tiny
        explained = torch.where(n_n > 0, c_n.abs().square() / n_n.clamp_min(tiny), 0)
        rest = ((c_c - explained) / (self.count - 1)).clamp_min(0)
        # a gain's square is too large by its own error
        gain = torch.where(n_n > 0, (explained - rest).clamp_min(0) / n_n.clamp_min(tiny), 0)
        variance = gain * self.known + rest
        left = 1 - (1 - rest / variance.clamp_min(tiny)).square()
        return variance, 2 * self.count / left.clamp_min(2 * self.count / _EXACT)
