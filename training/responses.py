"""What a surrogate is taught: probes pushed through a reconstruction, and their zero-filled images, scan by scan."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from voxelsigma.models.network import Network
from voxelsigma.models.normal_equations import normal_operator
from voxelsigma.models.predictor import OF_SCAN, plane_features
from voxelsigma.models.surrogate_net import assembled
from voxelsigma.noise.linearize import linearize
from voxelsigma.noise.probes import BLOCK_SIZE
from voxelsigma.noise.voxels import object_mask, phase_factor
from voxelsigma.training.compare import plane_of
from voxelsigma.training.example import Example
from voxelsigma.training.stored import Layout, StoredScan, stored
from voxelsigma.training.targets import probes_of

PROBES_A_STEP: Final = 4
"""Of those of a scan that one step of training sees."""

_SMALLEST: Final = 0.05
_LEAST_ENERGY: Final = 0.03


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ResponseTarget(StoredScan):
    r"""One scan: what a surrogate net sees, and what a few probes became.

    Parameters
    ----------
    features
        Of `scan_features`, shape `(features, y, x)`, float16.
    pushed
        :math:`a = \Re(e^{-i\phi} u)`, shape `(probes, y, x)`, float16: by the zero-filled image's largest deviation, as
        the next.
    images
        w of the same probes, real and imaginary part, shape `(probes, 2, y, x)`, float16.
    direction
        :math:`e^{i\phi}`, real and imaginary part, shape `(2, y, x)`, float16.
    sensitivities
        Real and imaginary part, shape `(coils, 2, y, x)`, float16; of a real reconstruction turned as w is.
    sampled
        Positions of k-space, shape `(y, x)`.
    inside
        Voxels of the object that coils see, shape `(y, x)`.
    """

    layout: ClassVar[Layout] = {
        "features": ("float16", (OF_SCAN,)),
        "pushed": ("float16", (BLOCK_SIZE,)),
        "images": ("float16", (BLOCK_SIZE, 2)),
        "direction": ("float16", (2,)),
        "sensitivities": ("float16", (-1, 2)),
        "sampled": ("bool", ()),
        "inside": ("bool", ()),
    }
    features: NDArray[np.float16]
    pushed: NDArray[np.float16]
    images: NDArray[np.float16]
    direction: NDArray[np.float16]
    sensitivities: NDArray[np.float16]
    sampled: NDArray[np.bool_]


@torch.no_grad()
def measure_response(network: Network, scan: Example, *, seed: int, number: int = 0) -> ResponseTarget:
    """Push a block of probes through the reconstruction of one scan.

    Parameters
    ----------
    network
        The network, on the device of the scan.
    scan
        Without a batch axis.
    seed, number
        Seed of the run and number of the scan in it: the probes follow from both.

    Raises
    ------
    ValueError
        If the reconstruction cannot be linearised, or what it gives is not finite.
    """
    plane = plane_of(scan)
    linearization = linearize(network.bind(plane), scan.kspace)
    value = linearization.value
    own = plane.covariate()
    covariate = own if value.is_complex() else plane.covariate(scan.kspace)
    batch = probes_of(plane, scan, seed=seed, counters=(number, 0)).block(0)
    direction = phase_factor(value).to(scan.sensitivities.dtype)
    turn = torch.ones_like(direction)
    if not value.is_complex():
        turn = phase_factor(own.push(scan.kspace.unsqueeze(0))[0]).to(direction.dtype)
    # where coils see little there is nothing to be learned
    least = _SMALLEST * covariate.variance.max()
    scale = covariate.variance.max().rsqrt().float()

    def parts(values: Tensor) -> NDArray[np.float16]:
        return stored(torch.view_as_real(values.resolve_conj()).movedim(-1, -3), np.float16)

    return ResponseTarget(
        features=stored(plane_features(plane, scan.kspace, value, covariate), np.float16),
        pushed=stored((direction.conj() * linearization.push(batch)).real * scale, np.float16),
        images=parts(covariate.push(batch) * scale),
        direction=parts(direction),
        sensitivities=parts(turn * plane.sensitivities_on(plane.size, plane.field_of_view)),
        sampled=(plane.weights > 0).cpu().numpy(),
        inside=(object_mask(value) & (covariate.variance > least)).cpu().numpy(),
    )


@dataclass(frozen=True, slots=True)
class ResponseScan:
    """A scan to learn from; fields as of `ResponseTarget`."""

    features: Tensor
    pushed: Tensor
    images: Tensor
    direction: Tensor
    sensitivities: Tensor
    sampled: Tensor
    inside: Tensor

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "ResponseScan":
        """Move all tensors to a device, and to a real type if one is given."""
        own = (self.features, self.pushed, self.images, self.direction, self.sensitivities, self.sampled, self.inside)
        return ResponseScan(*(one.to(device, dtype) for one in own))


def response_drawer(scans: Sequence[Path], *, seed: int) -> Callable[[int], ResponseScan]:
    """Scans by the numbers of steps: which one, and which of its probes, follow from the seed and the number alone.

    Parameters
    ----------
    scans
        Files of `ResponseTarget`.
    seed
        Of the run.
    """

    def draw(number: int) -> ResponseScan:
        # not the streams that scans and predictions' crops are drawn from
        rng = np.random.default_rng([seed, number, 4])
        scan = ResponseTarget.load(scans[int(rng.integers(len(scans)))])
        probes = rng.permutation(len(scan.pushed))[:PROBES_A_STEP]
        own = (scan.features, scan.pushed[probes], scan.images[probes], scan.direction, scan.sensitivities)
        return ResponseScan(*(torch.from_numpy(one.astype(np.float32)) for one in (*own, scan.sampled, scan.inside)))

    return draw


@dataclass(frozen=True, slots=True)
class ResponseLoss:
    r"""What a surrogate leaves of the probes, :math:`(a - b)^2` by their local energy, mean over the object.

    See `SurrogateNet` and `fit.Loss`.

    Parameters
    ----------
    stages
        Of the `SurrogateNet`.
    """

    stages: tuple[float, ...]

    def __call__(
        self, network: nn.Module, example: ResponseScan, rng: np.random.Generator, *, progress: float = 1.0
    ) -> Tensor:
        """Loss of a scan."""
        del rng, progress
        images, direction, sensitivities = (
            torch.complex(*one.unbind(dim=-3)) for one in (example.images, example.direction, example.sensitivities)
        )
        weights = network(example.features.unsqueeze(0))[0].to(example.images.dtype)
        surrogate = assembled(weights, self.stages, normal_operator(sensitivities, example.sampled))
        found = (direction.conj() * surrogate(images)).real
        energy = avg_pool2d(
            example.pushed.square().mean(dim=0, keepdim=True), 5, stride=1, padding=2, count_include_pad=False
        ).clamp_min(_LEAST_ENERGY)
        left = ((example.pushed - found).square() / energy).mean(dim=0)
        return (left * example.inside).sum() / example.inside.sum().clamp_min(1)
