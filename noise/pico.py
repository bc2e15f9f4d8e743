"""Image-space probing: the diagonal of a linear reconstruction's covariance, or the sketch where that is cheaper."""

import hashlib
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal

import numpy as np
import torch
from torch import Tensor

from voxelsigma.noise.chunking import default_chunk
from voxelsigma.noise.linearize import Linearization
from voxelsigma.noise.probes import BLOCK_SIZE, ProbeSource
from voxelsigma.noise.sigma import SigmaMap, root_bias
from voxelsigma.noise.sketch import Covariate, Stopping, sketch
from voxelsigma.noise.voxels import neighbourhood_mean, object_mask

PILOT_SKETCH: Final = 4
"""Sketch probes that decide, against the first block of image probes, which estimator goes on."""

FLOOR: Final = 0.01
"""A variance below this part of the uncoupled one is noise of the estimator: it is set to that."""

NEIGHBOURHOOD: Final = 5
"""Voxels a side over which coefficients and the estimator's own variance are pooled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probing:
    r"""What image-space probing needs of a linear reconstruction :math:`x = G y`, :math:`\Sigma = G C G^H`.

    Parameters
    ----------
    size
        Grid on which probe images q live, `(y, x)`.
    samples
        From probe images `(probes, y, x)` to real `(1 + controls, probes, y_out, x_out)`: first an unbiased sample
        of :math:`\operatorname{diag} \Sigma`, then controls, correlated with it and of known mean.
    means
        Mean of each control, shape `(controls, y_out, x_out)`.
    uncoupled
        The variance that voxels would have if none was coupled with another, shape `(y_out, x_out)`; 0 where no coil
        sees anything.
    solves
        Least-squares problems solved for a probe, in those of a pushed probe of the sketch.
    """

    size: tuple[int, int]
    samples: Callable[[Tensor], Tensor]
    means: Tensor
    uncoupled: Tensor
    solves: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageProbes:
    r"""Blocks of random-phase images q, :math:`|q_j| = 1`, so that :math:`E[q q^H] = I` and :math:`E[q q^T] = 0`.

    A block is a pure function of (seed, counters, block number), and independent of the k-space probes of the same.

    Parameters
    ----------
    size
        Grid, `(y, x)`.
    seed, counters
        As in `ProbeSource`.
    dtype, device
        Of the probes.
    """

    size: tuple[int, int]
    seed: int
    counters: Sequence[int] = ()
    dtype: torch.dtype = torch.complex64
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def block(self, number: int) -> Tensor:
        """Draw block `number`: `BLOCK_SIZE` probe images, shape `(probes, y, x)`."""
        packed = struct.pack(f"<{2 + len(self.counters)}q", self.seed, *self.counters, number)
        key = int.from_bytes(hashlib.blake2b(packed, digest_size=16, person=b"image probes").digest(), "little")
        turns = np.random.Generator(np.random.Philox(key=key)).random((BLOCK_SIZE, *self.size), dtype=np.float32)
        angles = torch.from_numpy(turns).to(self.device, self.dtype.to_real()) * (2 * torch.pi)
        return torch.polar(torch.ones_like(angles), angles)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeSums:
    r"""First and second sums over probes of a sample and its controls, per voxel, in double precision.

    Parameters
    ----------
    count
        Number of probes S.
    first
        :math:`\sum_s x_s`, shape `(1 + controls, y, x)`.
    second
        :math:`\sum_s x_s x_s^T`, shape `(1 + controls, 1 + controls, y, x)`.
    """

    count: int
    first: Tensor
    second: Tensor

    def __add__(self, other: "ProbeSums") -> "ProbeSums":
        """Sums over both sets of probes."""
        return ProbeSums(
            count=self.count + other.count, first=self.first + other.first, second=self.second + other.second
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearEstimate:
    """Both σ maps of a linear reconstruction, and how they came about.

    Parameters
    ----------
    magnitude, complex
        The maps; the second is √2 times the first. Their `probes` are those of the chosen estimator.
    estimator
        Which estimator gave them.
    image_probes, sketch_probes
        Probes spent on each, pilots included.
    image_variance, sketch_variance
        Relative variance of σ² that one solve of each leaves, median over the object, by the first probes; NaN
        where those of the sketch were not needed.
    """

    magnitude: SigmaMap
    complex: SigmaMap
    estimator: Literal["pico", "sketch"]
    image_probes: int
    sketch_probes: int
    image_variance: float
    sketch_variance: float


def estimate_linear(
    linearization: Linearization,
    probing: Probing,
    probes: ProbeSource,
    stopping: Stopping,
    *,
    covariate: Covariate | None = None,
    estimator: Literal["auto", "pico"] = "auto",
    chunk: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> LinearEstimate:
    """σ of a linear reconstruction by image-space probing or by the sketch, whichever is nearer to the target.

    The first block of image probes and `PILOT_SKETCH` probes of the sketch tell, from one number each for the whole
    object, how much variance a solve leaves; the better one goes on and the other's probes are dropped. That number
    decides nothing for a single voxel, so either map stays as unbiased as it is alone. Time is counted in solves, so
    that the choice does not depend on a clock. Where the first block is enough, the sketch is not asked.

    Parameters
    ----------
    linearization
        Of the reconstruction, for the sketch; its value tells where the object is.
    probing
        The same reconstruction, for image-space probing.
    probes
        Of the sketch. Image probes take their seed, counters, data type and device.
    stopping
        When to stop; `probes` are those of the estimator that goes on.
    covariate
        Control variate of the sketch, None for none.
    estimator
        `pico` for image-space probing without asking.
    chunk
        Probes at a time; None chooses from the size of a probe and the device.
    progress, clock
        As for `sketch`.
    """
    if stopping.probes < 2:
        raise ValueError(f"pico: {stopping.probes} probes; a variance needs at least 2")
    start = clock()
    seen = object_mask(linearization.value).to(probing.uncoupled.device) & (probing.uncoupled > 0)
    size = chunk or default_chunk(linearization)
    run = _Run(probing=probing, source=image_probes(probing, probes), stopping=stopping, seen=seen, size=size)
    pilot = run.blocks(None, 0, min(BLOCK_SIZE, stopping.probes))
    found = variance_map(pilot, probing)
    image_variance = _variance_per_solve(found, seen) * probing.solves
    sketch_variance, tried = float("nan"), 0
    enough = pilot.count >= stopping.probes or run.enough(found, clock() - start)
    if progress is not None:
        progress(pilot.count, stopping.probes)
    if estimator == "auto" and not enough:
        sketch_variance, tried = _sketch_pilot(linearization, probes, covariate, seen, size), PILOT_SKETCH
    if sketch_variance < image_variance:
        left = None if stopping.time_budget is None else max(0.0, stopping.time_budget - (clock() - start))
        best = sketch(
            linearization,
            probes,
            replace(stopping, time_budget=left),
            covariate=covariate,
            chunk=chunk,
            progress=progress,
            clock=clock,
        )
        magnitude = best.map("magnitude")
        name: Literal["pico", "sketch"] = "sketch"
    else:
        sums = pilot
        while sums.count < stopping.probes and not run.enough(found, clock() - start):
            sums = run.blocks(sums, sums.count // BLOCK_SIZE, stopping.probes)
            found = variance_map(sums, probing)
            if progress is not None:
                progress(sums.count, stopping.probes)
        magnitude, name = found, "pico"
    return LinearEstimate(
        magnitude=magnitude,
        complex=replace(magnitude, sigma=magnitude.sigma * 2**0.5, kind="complex"),
        estimator=name,
        image_probes=pilot.count if name == "sketch" else magnitude.probes,
        sketch_probes=tried + (magnitude.probes if name == "sketch" else 0),
        image_variance=image_variance,
        sketch_variance=sketch_variance,
    )


def image_probes(probing: Probing, probes: ProbeSource) -> ImageProbes:
    """Probe images that belong to the same image as the k-space probes of a sketch."""
    return ImageProbes(
        size=probing.size, seed=probes.seed, counters=probes.counters, dtype=probes.dtype, device=probes.device
    )


def probe_sums(samples: Tensor) -> ProbeSums:
    """Sums over a batch of samples and controls, `(1 + controls, probes, y, x)`."""
    wide = samples.double()
    return ProbeSums(count=wide.shape[1], first=wide.sum(dim=1), second=torch.einsum("asyx,bsyx->abyx", wide, wide))


def variance_map(sums: ProbeSums, probing: Probing) -> SigmaMap:
    r"""Magnitude σ map from the sums of image-space probing.

    Hutchinson's estimator of a diagonal, with random phases (Bekas, Kokiopoulou & Saad 2007; for the noise of
    reconstructions Dalmaz et al. 2026):

    .. math:: \operatorname{diag}(\Sigma) = E[q^* \odot \Sigma q], \qquad
        \operatorname{Var} \Re(q_i^* (\Sigma q)_i) = \tfrac12 \sum_{j \ne i} |\Sigma_{ij}|^2 .

    Controls c of known mean m take off what they explain, :math:`e - \beta^T (c - m)`, with :math:`\beta` fitted over
    neighbouring voxels, so that it hardly knows the voxel's own sample (bias of order 1/S over the voxels pooled).
    The mean is unbiased and may be negative at few probes; below `FLOOR` of the uncoupled variance it is set to that,
    the only bias upwards, which needs an estimate that is off by nearly all of its value.

    The mean of S such terms is nearly normal. Its relative variance V, the residuals' pooled over neighbours, is stated
    as :math:`\nu = 2/V` degrees of freedom: the χ² interval with so many agrees with the normal one to second order.

    Parameters
    ----------
    sums
        Over S probes, at least 2.
    probing
        Of what they are.
    """
    count, alive = sums.count, probing.uncoupled > 0
    mean = sums.first / count
    spread = sums.second / count - mean.unsqueeze(0) * mean.unsqueeze(1)
    pooled = neighbourhood_mean(spread, NEIGHBOURHOOD)
    deviation, shift = pooled[0, 0], torch.zeros_like(mean[0])
    controls = len(probing.means)
    if controls:
        gain = _solve_small(pooled[1:, 1:], pooled[1:, 0])
        deviation = deviation - (gain * pooled[1:, 0]).sum(dim=0)
        shift = (gain * (mean[1:] - probing.means)).sum(dim=0)
    estimate = mean[0] - shift
    variance = torch.where(alive, torch.maximum(estimate, FLOOR * probing.uncoupled), 0)
    voxels = neighbourhood_mean(alive.double(), NEIGHBOURHOOD)
    around = neighbourhood_mean(variance, NEIGHBOURHOOD) / voxels.clamp_min(1e-9)
    # one mean a voxel and the coefficients of a neighbourhood are fitted
    freedom = (count - 1) / count - controls / (count * NEIGHBOURHOOD**2)
    single = deviation.clamp_min(0) / voxels.clamp_min(1e-9) / freedom
    relative = torch.where(alive, single / around.square().clamp_min(1e-300) / count, 0)
    nu = torch.where(alive, 2 / relative.clamp_min(1e-12), torch.inf)
    return SigmaMap(
        sigma=(variance / 2).sqrt() / root_bias(nu),
        degrees_of_freedom=nu,
        kind="magnitude",
        probes=count,
        explained=torch.where(pooled[0, 0] > 0, 1 - deviation / pooled[0, 0], 0).clamp(0, 1),
    )


def sample_covariance(probes: ProbeSource) -> Callable[[Tensor], Tensor]:
    r"""The covariance :math:`T \operatorname{diag}(\operatorname{Var}) T^H` that k-space probes are drawn with.

    T is what the noise passed before it became this k-space, the identity if nothing. On `(..., coils, k1, k0)`.
    """
    variance, through = probes.variance, probes.through
    if through is None:
        return lambda kspace: variance.to(kspace.device, kspace.real.dtype) * kspace

    def apply(kspace: Tensor) -> Tensor:
        start = torch.zeros((*kspace.shape[:-2], *variance.shape), dtype=kspace.dtype, device=kspace.device)
        adjoint = torch.func.vjp(through, start)[1]
        return through(variance.to(kspace.device, kspace.real.dtype) * adjoint(kspace)[0])

    return apply


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """Image-space probing that goes on block by block."""

    probing: Probing
    source: ImageProbes
    stopping: Stopping
    seen: Tensor
    size: int

    def blocks(self, sums: ProbeSums | None, first: int, limit: int) -> ProbeSums:
        """Add one step of whole blocks, a chunk at a time, summed block by block: no chunk size changes the map."""
        steps = max(1, self.size // BLOCK_SIZE) if sums is not None else 1
        for number in range(first, first + steps):
            left = limit - (0 if sums is None else sums.count)
            if left <= 0:
                break
            block = self.source.block(number)[:left]
            parts = [self.probing.samples(part) for part in block.split(self.size)]
            step = probe_sums(torch.cat(parts, dim=1))
            sums = step if sums is None else sums + step
        assert sums is not None
        return sums

    def enough(self, found: SigmaMap, seconds: float) -> bool:
        """Whether the time is up or the target reached."""
        if self.stopping.time_budget is not None and seconds >= self.stopping.time_budget:
            return True
        target = self.stopping.target_error
        return target is not None and float(found.relative_error()[self.seen].median()) <= target


def _variance_per_solve(found: SigmaMap, seen: Tensor) -> float:
    return float((2 * found.probes / found.degrees_of_freedom)[seen].median())


def _sketch_pilot(
    linearization: Linearization, probes: ProbeSource, covariate: Covariate | None, seen: Tensor, size: int
) -> float:
    r"""Relative variance of σ² that one probe of the sketch leaves: :math:`1 - r^4`, 1 without control variate."""
    if covariate is None:
        return 1.0
    pilot = sketch(linearization, probes, Stopping(probes=PILOT_SKETCH), covariate=covariate, chunk=size)
    explained = pilot.map("magnitude").explained[seen].median()
    return 1 - float(explained) ** 2


def _solve_small(matrices: Tensor, right: Tensor) -> Tensor:
    """Least-squares coefficients per voxel, `(k, k, y, x)` and `(k, y, x)` to `(k, y, x)`; 0 where undetermined."""
    scale = matrices.diagonal().permute(2, 0, 1).clamp_min(0).sqrt()
    usable = scale > 1e-12 * scale.amax()
    inverse = torch.where(usable, 1 / torch.where(usable, scale, 1), 0)
    unit = matrices * inverse.unsqueeze(0) * inverse.unsqueeze(1)
    ridge = torch.eye(len(right), dtype=unit.dtype, device=unit.device) * 1e-9
    system = unit.permute(2, 3, 0, 1) + ridge + torch.diag_embed((~usable).to(unit.dtype).permute(1, 2, 0))
    solved = torch.linalg.solve(system, (right * inverse).permute(1, 2, 0).unsqueeze(-1)).squeeze(-1)
    return solved.permute(2, 0, 1) * inverse
