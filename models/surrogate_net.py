"""The network that says how a reconstruction passes noise on: filters of the zero-filled image, voxel by voxel."""

from typing import Final

import torch
from torch import Tensor

from voxelsigma.models.feature_unet import FeatureUNet
from voxelsigma.noise.response import REACH, Response
from voxelsigma.noise.surrogate import Surrogate

OFFSETS: Final = tuple((y, x) for y in range(-REACH, REACH + 1) for x in range(-REACH, REACH + 1))
"""7 × 7 voxels, of both filters."""


class SurrogateNet(FeatureUNet):
    r"""From `scan_features` to the filters of a `Surrogate`.

    .. math:: \min_\theta \sum_{s,i} \frac{(a_{s,i} - b_{s,i})^2}{e_i}, \qquad
        b = \Re\big(e^{-i\phi} (h_\theta * w + h'_\theta * w')\big)

    over the probes of many scans, with :math:`a = \Re(e^{-i\phi} u)` and the local energy e: kernel prediction (Bako et
    al., ACM Trans Graph 2017). What it says is a control variate and so cannot be wrong, only of little use.

    Parameters
    ----------
    given
        Number of features.
    channels, levels
        Of the `FeatureUNet`.
    """

    def __init__(self, *, given: int, channels: int = 32, levels: int = 3) -> None:
        super().__init__(given=given, wanted=2 * len(OFFSETS), channels=channels, levels=levels)
        assert self.last.bias is not None
        with torch.no_grad():
            self.last.bias[OFFSETS.index((0, 0))] = 1

    def forward(self, features: Tensor) -> Tensor:
        """Weights of h and h', `(batch, 2, offsets, y, x)`, from features `(batch, given, y, x)`."""
        return self.maps(features).unflatten(1, (2, len(OFFSETS)))

    @torch.no_grad()
    def surrogate(self, features: Tensor) -> Surrogate:
        """The stand-in for the Jacobian of one scan, from its features `(given, y, x)`."""
        weight = self.last.weight
        near, again = self(features.unsqueeze(0).to(weight.device, weight.dtype))[0].to(features.device)
        return Surrogate(near=Response(offsets=OFFSETS, weights=near), again=Response(offsets=OFFSETS, weights=again))
