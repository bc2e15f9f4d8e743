"""The network that says how a reconstruction passes noise on: a short unrolled one of filters, voxel by voxel."""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from voxelsigma.models.feature_unet import FeatureUNet
from voxelsigma.noise.inverse import Operator, regularised_inverse
from voxelsigma.noise.local_filter import Offsets, square
from voxelsigma.noise.response import REACH, Response
from voxelsigma.noise.surrogate import Stage, Surrogate

BEGUN: Final = (REACH, REACH)
"""Voxels to either side that the filters h and h' of the first stage see, 7 × 7."""

FURTHER: Final = (2, 2, 1)
"""The same of h, h' and g of every further one."""

MOST_STAGES: Final = 8
SMALLEST_WEIGHT: Final = 1e-3
LARGEST_WEIGHT: Final = 100.0

GRADIENT_STAGES: Final = (0.0, 0.0)
SOLVED_STAGES: Final = (0.02, 0.5, 2.5)
"""Of networks whose data consistency is a gradient step, and of those that solve for the data."""


class SurrogateNet(FeatureUNet):
    r"""From `scan_features` to the filters of a `Surrogate`.

    .. math:: \min_\theta \sum_{s,i} \frac{(a_{s,i} - b_{s,i})^2}{e_i}, \qquad b = \Re(e^{-i\phi} c)

    over the probes of many scans, with :math:`a = \Re(e^{-i\phi} u)`, the surrogate's image c and the local energy
    e: kernel prediction (Bako et al., ACM Trans Graph 2017) for a linear unrolled reconstruction. What it says is a
    control variate, and decides about the error of σ, not about what is expected of it.

    Parameters
    ----------
    given
        Number of features.
    channels, levels
        Of the `FeatureUNet`.
    stages
        Of each stage of the surrogate the λ of its operator, :math:`(1 + \lambda) (A^H A + \lambda)^{-1}` in the first
        and :math:`\lambda (A^H A + \lambda)^{-1}` in further ones; 0 for :math:`A^H A` itself.

    Raises
    ------
    ValueError
        If there are no stages, too many, or a λ is neither 0 nor within `SMALLEST_WEIGHT` and `LARGEST_WEIGHT`.
    """

    def __init__(
        self, *, given: int, channels: int = 32, levels: int = 3, stages: Sequence[float] = GRADIENT_STAGES
    ) -> None:
        check_stages(stages)
        sizes = _sizes(stages)
        super().__init__(given=given, wanted=sum(sizes), channels=channels, levels=levels)
        self.stages = tuple(float(one) for one in stages)
        assert self.last.bias is not None
        with torch.no_grad():
            # each stage keeps what it is given
            first, _, *others = self.last.bias.split(sizes)
            for kept in (first, *others[:: len(FURTHER)]):
                kept[len(kept) // 2] = 1

    def forward(self, features: Tensor) -> Tensor:
        """All weights, `(batch, weights, y, x)`, from features `(batch, given, y, x)`; see `assembled`."""
        return self.maps(features)

    @torch.no_grad()
    def surrogate(self, features: Tensor, normal: Operator) -> Surrogate:
        """The stand-in for the Jacobian of one scan, from its features `(given, y, x)`; see `assembled`."""
        weight = self.last.weight
        found = self(features.unsqueeze(0).to(weight.device, weight.dtype))[0].to(features.device)
        return assembled(found, self.stages, normal)


def assembled(weights: Tensor, stages: Sequence[float], normal: Operator) -> Surrogate:
    """The surrogate that the weights of one scan make, differentiable in them.

    Parameters
    ----------
    weights
        Of a `SurrogateNet`, shape `(weights, y, x)`.
    stages
        Its own.
    normal
        :math:`A^H A` of images `(probes, y, x)`, with eigenvalues from 0 to 1.
    """
    near, again, *others = weights.split(_sizes(stages))
    first, *further = (_operator(normal, weight, first=place == 0) for place, weight in enumerate(stages))
    found = [Stage(operator=first, kept=_response(near, BEGUN[0]), passed=_response(again, BEGUN[1]))]
    for operator in further:
        filters, others = others[: len(FURTHER)], others[len(FURTHER) :]
        kept, passed, beside = (_response(one, reach) for one, reach in zip(filters, FURTHER, strict=True))
        found.append(Stage(operator=operator, kept=kept, passed=passed, first=beside))
    return Surrogate(stages=tuple(found))


def check_stages(stages: Sequence[float]) -> None:
    """Whether they are those of a surrogate.

    Raises
    ------
    ValueError
        If not.
    """
    if not 1 <= len(stages) <= MOST_STAGES:
        raise ValueError(f"predictor: surrogate_stages must be 1 to {MOST_STAGES} numbers, got {len(stages)}")
    for one in stages:
        if one != 0 and not SMALLEST_WEIGHT <= one <= LARGEST_WEIGHT:
            raise ValueError(
                f"predictor: surrogate_stages must each be 0, or {SMALLEST_WEIGHT} to {LARGEST_WEIGHT:g}, got {one}"
            )


def _sizes(stages: Sequence[float]) -> list[int]:
    """Weights of every filter, in their order."""
    further = [len(square(reach)) for reach in FURTHER]
    return [*(len(square(reach)) for reach in BEGUN), *further * (len(stages) - 1)]


def _operator(normal: Operator, weight: float, *, first: bool) -> Operator:
    if weight == 0:
        return normal
    solve, scale = regularised_inverse(normal, weight), 1 + weight if first else weight
    return lambda images: scale * solve(images)


def _response(weights: Tensor, reach: int) -> Response:
    offsets: Offsets = square(reach)
    return Response(offsets=offsets, weights=weights)
