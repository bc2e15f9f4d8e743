"""How a σ predictor learns from measured scans: batches of crops, their likelihood, and the worth of what it says."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import scipy.optimize
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from voxelsigma.models.predictor import KINDS, PARTS, SigmaPredictor
from voxelsigma.models.predictor_file import CALIBRATION_RANGE
from voxelsigma.noise.prior import marginal_loss
from voxelsigma.noise.sigma import MapKind
from voxelsigma.training.targets import ScanTarget

_OUTSIDE: Final = 0.1
_SMALLEST: Final = 1e-6


@dataclass(frozen=True, slots=True)
class Crops:
    """Parts of scans, as many voxels each.

    Parameters
    ----------
    features
        Shape `(batch, FEATURES, y, x)`.
    ratio
        Measured variance over the zero-filled one, `(batch, kinds, y, x)`, above 0.
    freedom
        ν of it, `(batch, kinds, y, x)`.
    weight
        Of each voxel, `(batch, kinds, y, x)`: 1 in the object, a tenth beside it, 0 where nothing is to be learned.
    """

    features: Tensor
    ratio: Tensor
    freedom: Tensor
    weight: Tensor

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Crops":
        """Move all tensors to a device, and to a real type if one is given."""
        return Crops(*(one.to(device, dtype) for one in (self.features, self.ratio, self.freedom, self.weight)))


def crop_drawer(scans: Sequence[Path], shape: tuple[int, int], *, batch: int, seed: int) -> Callable[[int], Crops]:
    """Batches by their numbers: scans, places and flips are drawn from the seed and the number alone.

    Parameters
    ----------
    scans
        Files of `ScanTarget`.
    shape
        Voxels `(y, x)` of a crop, at most those of the smallest scan.
    batch
        Crops in a batch.
    seed
        Of the run.
    """

    def draw(number: int) -> Crops:
        # not the stream that scans are drawn from
        rng = np.random.default_rng([seed, number, 2])
        parts = [_crop(ScanTarget.load(scans[int(rng.integers(len(scans)))]), shape, rng) for _ in range(batch)]
        features, measured, freedom, zero_filled, inside, known = (
            torch.from_numpy(np.stack([part[place] for part in parts])) for place in range(6)
        )
        expected = torch.stack([PARTS[kind] * zero_filled for kind in KINDS], dim=1)
        usable = known & (expected > 0) & (measured > 0)
        ratio = torch.where(usable, measured / torch.where(usable, expected, 1), 1).clamp_min(_SMALLEST)
        share = _OUTSIDE + (1 - _OUTSIDE) * inside.unsqueeze(1)
        return Crops(features, ratio, freedom, share * usable)

    return draw


def _crop(scan: ScanTarget, shape: tuple[int, int], rng: np.random.Generator) -> list[NDArray[np.generic]]:
    """Features, measured, freedom, zero-filled variance, object and known maps of a random part, perhaps mirrored."""
    y, x = (int(rng.integers(have - want + 1)) for have, want in zip(scan.shape, shape, strict=True))
    flips = tuple(axis for axis in (-2, -1) if rng.random() < 0.5)
    known = np.array([True, not scan.real]).reshape(len(KINDS), 1, 1)
    arrays = (scan.features.astype(np.float32), scan.measured, scan.freedom, scan.zero_filled, scan.inside)
    parts = [np.flip(one[..., y : y + shape[0], x : x + shape[1]], flips).copy() for one in arrays]
    return [*parts, known]


def prediction_loss(network: nn.Module, example: Crops, rng: np.random.Generator, *, progress: float = 1.0) -> Tensor:
    """Mean `marginal_loss` of a batch over its weighted voxels; see `fit.Loss`."""
    del rng, progress
    found = network(example.features)
    loss = marginal_loss(found[:, :, 0], found[:, :, 1], example.ratio, example.freedom)
    return (loss * example.weight).sum() / example.weight.sum().clamp_min(1)


def calibrate(predictor: SigmaPredictor, scans: Sequence[ScanTarget]) -> dict[MapKind, float]:
    r"""Measure what predictions are worth on other scans than those learned from, and put it into the predictor.

    The factor g on all :math:`\nu_0` of a kind minimises `marginal_loss`, summed over the object's voxels of all scans.

    Parameters
    ----------
    predictor
        On the CPU; its `calibration` is replaced.
    scans
        Of the same network. What they have in common with those learned from (heads, coils) is not part of what they
        say a prediction is worth.

    Returns
    -------
        The factors, within `CALIBRATION_RANGE`; 1 for a map that no scan has.
    """
    predictor.calibration.fill_(1)
    trials: dict[MapKind, list[_Trial]] = {kind: [] for kind in KINDS}
    for scan in scans:
        for kind, trial in _trials(predictor, scan):
            trials[kind].append(trial)
    factors = {kind: _factor(found) if found else 1.0 for kind, found in trials.items()}
    predictor.calibration.copy_(torch.tensor([factors[kind] for kind in KINDS]))
    return factors


@dataclass(frozen=True, slots=True)
class _Trial:
    """A prediction of the known voxels of one map, and the probes that score it."""

    log_variance: Tensor
    log_freedom: Tensor
    measured: Tensor
    freedom: Tensor

    def loss(self, factor: float) -> float:
        """Loss with so much more worth."""
        worth = self.log_freedom + math.log(factor)
        return float(marginal_loss(self.log_variance, worth, self.measured, self.freedom).sum())


def _trials(predictor: SigmaPredictor, scan: ScanTarget) -> Iterator[tuple[MapKind, _Trial]]:
    """Of every map that a scan has, unless there is nothing to score."""
    inside = torch.from_numpy(scan.inside)
    priors = predictor.predict(torch.from_numpy(scan.features), torch.from_numpy(scan.zero_filled))
    for place, kind in enumerate(KINDS):
        measured, freedom = (torch.from_numpy(one[place]).double() for one in (scan.measured, scan.freedom))
        prior = priors[kind]
        known = inside & (prior.variance > 0) & (measured > 0)
        if bool(known.any()) and not (scan.real and kind == "complex"):
            logs = prior.variance[known].log(), prior.freedom[known].log()
            yield kind, _Trial(*logs, measured[known], freedom[known])


def _factor(trials: Sequence[_Trial]) -> float:
    """The best factor on ν₀."""

    def loss(log_factor: float) -> float:
        return sum(trial.loss(math.exp(log_factor)) for trial in trials)

    low, high = (math.log(limit) for limit in CALIBRATION_RANGE)
    found = scipy.optimize.minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-3})
    return math.exp(float(found.x))
