"""A linear stand-in for a Jacobian, cheap enough that its variance is known from many more probes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from voxelsigma.noise.response import Response, fit_responses
from voxelsigma.noise.voxels import object_mask

FIRST_CHEAP: Final = 48
CHEAP_PER_PROBE: Final = 2
"""Cheap probes, through the stand-in alone: so many at once, and two for each one through the reconstruction."""

_REACHES: Final = ((2, 1), (2, 0), (0, 0))
_EXACT: Final = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Surrogate:
    r"""The zero-filled image of a probe and the same encoded and zero-filled once more, each through a filter.

    .. math:: c_i = \sum_\delta h_i(\delta) \, w_{i+\delta} + \sum_\delta h'_i(\delta) \, w'_{i+\delta},
        \qquad w = A^H v, \quad w' = A^H A \, w

    Data consistency brings to a voxel what was aliased into far ones, which no filter of w alone can: w' has it. No
    filter changes what is expected of σ: a good one explains more of it.

    Parameters
    ----------
    near, again
        h and h'.
    """

    near: Response
    again: Response

    def __call__(self, images: Tensor, second: Tensor) -> Tensor:
        """Of w and w', shape `(probes, y, x)`."""
        return self.near(images).add_(self.again(second))


def adapted(
    learned: Surrogate, pushed: Tensor, images: Tensor, second: Tensor, image: Tensor, direction: Tensor
) -> Surrogate:
    """A surrogate that was learned from other scans, to which the first probes of this one add what it lacks.

    What is added, and a factor on what is learned that varies with the image, follow from `fit_responses` on w, w' and
    the surrogate's own image. So a surrogate that does not fit this scan costs next to nothing.

    Parameters
    ----------
    learned
        From other scans; both filters at the offsets of 7 × 7 voxels.
    pushed, images, second
        First probes u, their w and w', shape `(probes, y, x)`.
    image, direction
        The reconstruction and its phase factor, shape `(y, x)`.
    """
    inside = object_mask(image)
    given = (images, second, learned(images, second))
    found = fit_responses(pushed, given, image, direction, reaches=_REACHES)
    if found is None:
        return learned
    near, again, own = found
    # beside the object w itself is the covariate
    factor = torch.where(inside, own.weights[0], 0)
    return Surrogate(near=_sum(near, learned.near, factor), again=_sum(again, learned.again, factor))


def _sum(added: Response, learned: Response, factor: Tensor) -> Response:
    """`added` + factor · `learned`, whose offsets are all there is."""
    weights = factor.to(learned.weights) * learned.weights
    places = [learned.offsets.index(offset) for offset in added.offsets]
    weights[places] += added.weights.to(weights)
    return Response(offsets=learned.offsets, weights=weights)


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
