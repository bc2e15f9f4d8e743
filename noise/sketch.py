"""The sketch: σ from random probes pushed through the Jacobian of a reconstruction."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from voxelsigma.noise.chunking import default_chunk
from voxelsigma.noise.linearize import Linearization
from voxelsigma.noise.moments import Moments, moments
from voxelsigma.noise.probes import BLOCK_SIZE, ProbeSource
from voxelsigma.noise.sigma import MapKind, SigmaMap, sigma_map


@dataclass(frozen=True, slots=True, kw_only=True)
class Covariate:
    """A linear image of the same probes whose variance is known: the control variate.

    Parameters
    ----------
    push
        From probes `(probes, coils, k1, k0)` to images w, `(probes, y, x)`.
    variance
        :math:`E|w|^2`, shape `(y, x)`, real.
    """

    push: Callable[[Tensor], Tensor]
    variance: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopping:
    """When a sketch has seen enough: whichever comes first, checked between blocks of probes.

    Parameters
    ----------
    probes
        Largest number of probes, at least 2.
    target_error
        Relative standard error of σ, as the median over the object; None for no target.
    time_budget
        Seconds; None for no limit.
    """

    probes: int
    target_error: float | None = None
    time_budget: float | None = None

    def seeded(self) -> "Stopping":
        r"""The same rule for a run that must be repeatable: on counts alone.

        The target becomes the number of probes at which a plain map reaches it for certain,
        :math:`1 + 1/(2 e^2)`; no clock is read.
        """
        if self.target_error is None:
            return Stopping(probes=self.probes)
        count = 1 + math.ceil(1 / (2 * self.target_error**2))
        return Stopping(probes=max(2, min(self.probes, count)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sketch:
    """What a sketch has seen, ready to give either map.

    Parameters
    ----------
    sums
        Second-order sums over the probes.
    direction
        Phase factor of the reconstructed voxels, shape `(y, x)`, complex.
    covariate_variance
        Of the control variate, shape `(y, x)`; None for the plain mean.
    complex_linear
        Whether the reconstruction is complex-linear.
    """

    sums: Moments
    direction: Tensor
    covariate_variance: Tensor | None
    complex_linear: bool

    def map(self, kind: MapKind = "magnitude") -> SigmaMap:
        """Estimate the σ map of one kind."""
        return sigma_map(
            self.sums,
            kind,
            direction=self.direction,
            covariate_variance=self.covariate_variance,
            complex_linear=self.complex_linear,
        )


def sketch(
    linearization: Linearization,
    probes: ProbeSource,
    stopping: Stopping,
    *,
    covariate: Covariate | None = None,
    kind: MapKind = "magnitude",
    chunk: int | None = None,
    keep: Callable[[Tensor], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Sketch:
    r"""Push random probes through a Jacobian until the σ map is good enough.

    .. math:: \sigma_i^2 = E|(J v)_i|^2, \qquad E[v v^H] = \operatorname{diag}(2/n_k)

    (Dalmaz et al., ICML 2025, algorithm 1). Memory does not grow with the number of probes, and the same seed gives
    the same map for every chunk size.

    Parameters
    ----------
    linearization
        Of the reconstruction at the measured data.
    probes
        Where the probes come from.
    stopping, covariate
        When to stop; the control variate, None for the plain mean.
    kind
        The map whose error decides about stopping.
    chunk
        Probes pushed at a time; None chooses from the memory that one needs, and the device.
    keep
        Given every batch of pushed probes, `(probes, ...)`, in their order.
    progress, clock
        Told (probes done, probes at most) after every step; monotonic seconds.
    """
    if stopping.probes < 2:
        raise ValueError(f"sketch: {stopping.probes} probes; a variance needs at least 2")
    size = chunk or default_chunk(linearization)
    blocks_per_step = max(1, size // BLOCK_SIZE)
    direction = phase_factor(linearization.value)
    seen = object_mask(linearization.value)
    expected = None if covariate is None else covariate.variance
    state: Sketch | None = None
    start, block, done = clock(), 0, 0
    while done < stopping.probes:
        batch = torch.cat(list(probes.blocks(block, block + blocks_per_step)))[: stopping.probes - done]
        block += blocks_per_step
        step = _push(linearization, batch, covariate, size, keep)
        done += len(batch)
        state = Sketch(
            sums=step if state is None else state.sums + step,
            direction=direction,
            covariate_variance=expected,
            complex_linear=linearization.complex_linear,
        )
        if progress is not None:
            progress(done, stopping.probes)
        late = stopping.time_budget is not None and clock() - start >= stopping.time_budget
        if late or (stopping.target_error is not None and _error(state, kind, seen) <= stopping.target_error):
            break
    assert state is not None
    return state


def _error(state: Sketch, kind: MapKind, voxels: Tensor) -> float:
    """Median relative standard error of a map over some voxels."""
    return float(state.map(kind).relative_error()[voxels].median())


def _push(
    linearization: Linearization,
    batch: Tensor,
    covariate: Covariate | None,
    size: int,
    keep: Callable[[Tensor], None] | None,
) -> Moments:
    """Sums of a batch, pushed `size` at a time and added block by block, in an order that no chunk size changes."""
    pushed = torch.cat([linearization.push(part) for part in batch.split(size)])
    if keep is not None:
        keep(pushed)
    images = None if covariate is None else torch.cat([covariate.push(part) for part in batch.split(size)])
    total: Moments | None = None
    for first in range(0, len(batch), BLOCK_SIZE):
        part = slice(first, first + BLOCK_SIZE)
        block = moments(pushed[part], None if images is None else images[part])
        total = block if total is None else total + block
    assert total is not None
    return total


def phase_factor(image: Tensor) -> Tensor:
    r"""Unit phase factor :math:`e^{i\phi}` of each voxel; 1 where the image is 0 or real."""
    if not image.is_complex():
        return torch.ones_like(image, dtype=torch.complex128)
    wide = image.to(torch.complex128)
    magnitude = wide.abs()
    return torch.where(magnitude > 0, wide / magnitude.clamp_min(torch.finfo(torch.float64).tiny), 1)


def object_mask(image: Tensor, threshold: float = 0.1) -> Tensor:
    """Voxels of the object: brighter than a tenth of the image's 99th percentile, shape `(...)`, boolean."""
    magnitude = image.abs().double().flatten()
    rank = max(1, round(0.99 * magnitude.numel()))
    bright = magnitude.kthvalue(rank).values
    return image.abs() >= threshold * bright
