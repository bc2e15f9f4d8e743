"""What a surrogate is taught: probes pushed through a reconstruction, and their zero-filled images, scan by scan."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from voxelsigma.models.network import Network
from voxelsigma.models.predictor import OF_SCAN, plane_features
from voxelsigma.models.surrogate_net import OFFSETS
from voxelsigma.noise.linearize import linearize
from voxelsigma.noise.response import REACH
from voxelsigma.noise.voxels import object_mask, phase_factor
from voxelsigma.training.compare import plane_of
from voxelsigma.training.example import Example
from voxelsigma.training.stored import Layout, load_arrays, save_arrays, stored
from voxelsigma.training.targets import probes_of

_LAYOUT: Final[Layout] = {
    "features": ("float16", (OF_SCAN,)),
    "pushed": ("float16", (-1,)),
    "images": ("float16", (-1, 2)),
    "second": ("float16", (-1, 2)),
    "phase": ("float16", (2,)),
    "inside": ("bool", ()),
}
_SMALLEST: Final = 0.05
_LEAST_ENERGY: Final = 0.03


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ResponseTarget:
    r"""One scan: what a surrogate net sees, and what a few probes became.

    Parameters
    ----------
    features
        Of `scan_features`, shape `(features, y, x)`, float16.
    pushed
        :math:`a = \Re(e^{-i\phi} u)`, shape `(probes, y, x)`, float16: by the zero-filled image's deviation, as the
        next two.
    images, second
        w and w' of the same probes, real and imaginary part, shape `(probes, 2, y, x)`, float16.
    phase
        :math:`e^{-i\phi}`, real and imaginary part, shape `(2, y, x)`, float16.
    inside
        Voxels of the object that coils see, shape `(y, x)`.
    """

    features: NDArray[np.float16]
    pushed: NDArray[np.float16]
    images: NDArray[np.float16]
    second: NDArray[np.float16]
    phase: NDArray[np.float16]
    inside: NDArray[np.bool_]

    @property
    def shape(self) -> tuple[int, int]:
        """Matrix `(y, x)`."""
        return self.inside.shape[0], self.inside.shape[1]

    def save(self, path: Path) -> None:
        """Write it as `.npz`, whole or not at all."""
        save_arrays(path, self)

    @classmethod
    def load(cls, path: Path) -> "ResponseTarget":
        """Read it back.

        Raises
        ------
        ValueError
            If the file is missing or damaged, with its name.
        """
        found = cls(**load_arrays(path, _LAYOUT))
        counts = {len(one) for one in (found.pushed, found.images, found.second)}
        if len(counts) > 1 or 0 in counts:
            raise ValueError(f"{path}: damaged (probes of 'pushed', 'images' and 'second' are {sorted(counts)})")
        return found


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
    covariate = plane.covariate(None if value.is_complex() else scan.kspace)
    assert covariate.again is not None
    batch = probes_of(plane, scan, seed=seed, counters=(number, 0)).block(0)
    images = covariate.push(batch)
    conjugated = phase_factor(value).conj().to(images.dtype)
    # where coils see little, what is relative to that would drown the rest
    least = _SMALLEST * covariate.variance.max()
    scale = covariate.variance.clamp_min(least).rsqrt().float()

    def parts(values: Tensor) -> Tensor:
        return torch.view_as_real(values.resolve_conj()).movedim(-1, -3)

    return ResponseTarget(
        features=stored(plane_features(plane, scan.kspace, value, covariate), np.float16),
        pushed=stored((conjugated * linearization.push(batch)).real * scale, np.float16),
        images=stored(parts(images * scale), np.float16),
        second=stored(parts(covariate.again(batch, images) * scale), np.float16),
        phase=stored(parts(conjugated), np.float16),
        inside=(object_mask(value) & (covariate.variance > least)).cpu().numpy(),
    )


@dataclass(frozen=True, slots=True)
class ResponseCrops:
    """Parts of scans, as many voxels each; fields as of `ResponseTarget` with a batch axis before."""

    features: Tensor
    pushed: Tensor
    images: Tensor
    second: Tensor
    phase: Tensor
    inside: Tensor

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "ResponseCrops":
        """Move all tensors to a device, and to a real type if one is given."""
        own = (self.features, self.pushed, self.images, self.second, self.phase, self.inside)
        return ResponseCrops(*(one.to(device, dtype) for one in own))


def response_drawer(
    scans: Sequence[Path], shape: tuple[int, int], *, batch: int, seed: int
) -> Callable[[int], ResponseCrops]:
    """Batches by their numbers: scans, places and flips are drawn from the seed and the number alone.

    Parameters
    ----------
    scans
        Files of `ResponseTarget`.
    shape
        Voxels `(y, x)` of a crop, at most those of the smallest scan.
    batch
        Crops in a batch.
    seed
        Of the run.
    """

    def draw(number: int) -> ResponseCrops:
        # not the streams that scans and predictions' crops are drawn from
        rng = np.random.default_rng([seed, number, 4])
        parts = [_crop(ResponseTarget.load(scans[int(rng.integers(len(scans)))]), shape, rng) for _ in range(batch)]
        return ResponseCrops(*(torch.from_numpy(np.stack(one)) for one in zip(*parts, strict=True)))

    return draw


def _crop(scan: ResponseTarget, shape: tuple[int, int], rng: np.random.Generator) -> list[NDArray[np.float32]]:
    """A random part, perhaps mirrored."""
    y, x = (int(rng.integers(have - want + 1)) for have, want in zip(scan.shape, shape, strict=True))
    flips = tuple(axis for axis in (-2, -1) if rng.random() < 0.5)
    arrays = (scan.features, scan.pushed, scan.images, scan.second, scan.phase, scan.inside)
    return [
        np.flip(one[..., y : y + shape[0], x : x + shape[1]], flips).astype(np.float32, order="C") for one in arrays
    ]


def response_loss(
    network: nn.Module, example: ResponseCrops, rng: np.random.Generator, *, progress: float = 1.0
) -> Tensor:
    r"""What a surrogate leaves of the probes, :math:`(a - b)^2` by their local energy, mean over the object.

    See `SurrogateNet` and `fit.Loss`.
    """
    del rng, progress
    weights = network(example.features)
    filtered = _filtered(weights[:, 0], example.images) + _filtered(weights[:, 1], example.second)
    # (batch, probes, y, x), in phase
    turned = filtered[:, :, 0] * example.phase[:, None, 0] - filtered[:, :, 1] * example.phase[:, None, 1]
    energy = avg_pool2d(
        example.pushed.square().mean(dim=1, keepdim=True), 5, stride=1, padding=2, count_include_pad=False
    ).clamp_min(_LEAST_ENERGY)
    left = ((example.pushed - turned).square() / energy).mean(dim=1)
    return (left * example.inside).sum() / example.inside.sum().clamp_min(1)


def _filtered(weights: Tensor, images: Tensor) -> Tensor:
    """Weights `(batch, offsets, y, x)` on images `(batch, probes, 2, y, x)`; beyond the border they are 0."""
    rows, columns = images.shape[-2:]
    padded = nn.functional.pad(images, (REACH, REACH, REACH, REACH))
    total = torch.zeros_like(images)
    for place, (y, x) in enumerate(OFFSETS):
        shifted = padded[..., REACH + y : REACH + y + rows, REACH + x : REACH + x + columns]
        total = total + weights[:, place, None, None].to(images.dtype) * shifted
    return total
