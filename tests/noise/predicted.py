"""A reconstruction whose noise is known, and predictions of it, made for the tests."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from voxelsigma.noise.certificate import RegionEnergies, regions
from voxelsigma.noise.fusion import fused, independent_map, measured_variance
from voxelsigma.noise.instant import FEWEST, Instant, Priors, instant_sketch
from voxelsigma.noise.linearize import Linearization
from voxelsigma.noise.moments import Moments
from voxelsigma.noise.prior import Prior
from voxelsigma.noise.probes import ProbeSource
from voxelsigma.noise.sigma import MapKind, SigmaMap
from voxelsigma.noise.sketch import Covariate, Sketch, Stopping

SIDE = 64
WORTH = 40.0
GUESS = 1 + torch.linspace(-0.5, 0.5, SIDE, dtype=torch.float64)[:, None] * torch.linspace(0.2, 1, SIDE)
# the truth scatters around the guess as if that were worth so many squares
TRUTH = GUESS * torch.from_numpy(WORTH / np.random.default_rng(1).chisquare(WORTH, (SIDE, SIDE))).sqrt()
WHITE = ProbeSource(variance=torch.full((SIDE, SIDE), 2.0), coils=2, seed=5, dtype=torch.complex128)


def normal(batch: Tensor, coil: int) -> Tensor:
    """Nearly normal and independent from voxel to voxel, of variance 1 per component."""
    return torch.fft.fft2(batch[:, coil], norm="ortho")


def push(batch: Tensor) -> Tensor:
    return TRUTH * (0.8 * normal(batch, 0) + 0.6 * normal(batch, 1))


# uniform in magnitude, so that the whole square is the object
JACOBIAN = Linearization(value=torch.polar(torch.ones_like(GUESS), GUESS), push=push)
COVARIATE = Covariate(push=lambda batch: normal(batch, 0), variance=torch.full((SIDE, SIDE), 2.0).double())


def priors(factor: Tensor | float = 1.0, worth: float = WORTH) -> Priors:
    """What is known before any probe, but for a factor of σ; of another worth, with the same mean."""
    mean = WORTH / (WORTH - 2)
    variance = (GUESS * factor).square() * mean * (1 - 2 / worth)
    freedom = torch.full_like(variance, worth)
    return {
        "magnitude": Prior(variance=variance, freedom=freedom),
        "complex": Prior(variance=2 * variance, freedom=freedom),
    }


def knowing(worth: float) -> Priors:
    """What somebody says who knows of the truth as much as he states."""
    drawn = np.random.default_rng(2).chisquare(worth, (2, SIDE, SIDE)) / worth
    freedom = torch.full_like(TRUTH, worth)
    return {
        "magnitude": Prior(variance=TRUTH.square() * torch.from_numpy(drawn[0]), freedom=freedom),
        "complex": Prior(variance=2 * TRUTH.square() * torch.from_numpy(drawn[1]), freedom=freedom),
    }


def half(factor: float) -> Tensor:
    """A factor on one half of the voxels."""
    return torch.where(torch.arange(SIDE)[:, None] < SIDE // 2, factor, torch.ones_like(GUESS))


class Predictor:
    """Says the same, or by the number of probes; remembers what it was asked."""

    def __init__(self, says: Priors | Callable[[int], Priors]) -> None:
        self.says = says
        self.sums: list[Moments] = []

    def __call__(self, state: Sketch) -> Priors:
        self.sums.append(state.sums.copy())
        return self.says(state.sums.count) if callable(self.says) else self.says

    @property
    def asked(self) -> list[int]:
        return [one.count for one in self.sums]


def follow(state: Sketch) -> Priors:
    """The best that can be said of what was seen: that with what was known before."""
    best = {kind: fused(state.map(kind), prior) for kind, prior in priors().items()}
    return {kind: Prior(variance=measured_variance(one), freedom=one.degrees_of_freedom) for kind, one in best.items()}


def follow_independently(state: Sketch) -> Priors:
    """The same, of estimates in which no voxel leans on others."""
    best = {kind: fused(independent_map(state, kind), prior) for kind, prior in priors().items()}
    return {kind: Prior(variance=measured_variance(one), freedom=one.degrees_of_freedom) for kind, one in best.items()}


def instant(
    predict: Callable[[Sketch], Priors],
    stopping: Stopping,
    covariate: Covariate | None = None,
    *,
    fewest: int = FEWEST,
    chunk: int = 8,
) -> Instant:
    return instant_sketch(
        JACOBIAN,
        WHITE,
        stopping,
        predict,
        scale=GUESS.square(),
        fewest=fewest,
        covariate=covariate,
        chunk=chunk,
    )


def truth(kind: MapKind) -> Tensor:
    return TRUTH * (2**0.5 if kind == "complex" else 1)


def pushed(first: int, last: int) -> tuple[Tensor, Tensor]:
    """Pushed probes of these numbers, and their covariates."""
    probes = torch.cat([WHITE.block(number) for number in range(first // 8, -(-last // 8))])
    return push(probes), normal(probes, 0)


def corrected(prior: Prior, kind: MapKind, count: int) -> Prior:
    """A prior as the first so many probes correct it."""
    u, _ = pushed(0, count)
    energies = RegionEnergies(regions(torch.ones_like(GUESS) > 0), GUESS.square(), JACOBIAN.value)
    energies.add(u[:count])
    turned = JACOBIAN.value.conj() * u[:count]
    return energies.corrected(prior, (turned.real if kind == "magnitude" else turned.abs()).square().mean(dim=0), kind)


def equal(one: SigmaMap, other: SigmaMap) -> bool:
    tensors = ("sigma", "degrees_of_freedom", "explained")
    same = all(torch.equal(getattr(one, name), getattr(other, name)) for name in tensors)
    return same and (one.kind, one.probes) == (other.kind, other.probes)


def same_sums(one: Moments, other: Moments) -> bool:
    names = ("u_abs", "u_u", "w_abs", "w_w", "u_wc", "u_w")
    return one.count == other.count and all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)


def covered(found: SigmaMap) -> float:
    low, high = found.interval()
    return float(((low <= truth(found.kind)) & (truth(found.kind) <= high)).double().mean())


def error(found: SigmaMap) -> float:
    """Root mean square of the relative error."""
    return float((found.sigma / truth(found.kind) - 1).square().mean().sqrt())
