"""The sketch: σ from random probes pushed through the Jacobian of a reconstruction."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from voxelsigma.noise.chunking import default_chunk
from voxelsigma.noise.heap import FlatHeap
from voxelsigma.noise.inverse import Operator
from voxelsigma.noise.linearize import Linearization
from voxelsigma.noise.moments import Moments, accumulate, moments
from voxelsigma.noise.probes import BLOCK_SIZE, ProbeSource
from voxelsigma.noise.response import Response, fit_response, unexplained
from voxelsigma.noise.sigma import MapKind, SigmaMap, sigma_map
from voxelsigma.noise.surrogate import (
    CHEAP_PER_PROBE,
    FIRST_CHEAP,
    SimulatedVariance,
    Surrogate,
    adapted,
)
from voxelsigma.noise.voxels import object_mask, phase_factor

logger = logging.getLogger("voxelsigma.sketch")

_WORTH_IT = 0.9
_CHEAP = -1
"""Last counter of probes that are pushed through a surrogate alone; those of images are 0 and more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Covariate:
    """A linear image of the same probes whose variance is known: the control variate.

    Parameters
    ----------
    push
        From probes `(probes, coils, k1, k0)` to images w, `(probes, y, x)`.
    variance
        :math:`E|w|^2`, shape `(y, x)`, real.
    filtered_variance
        :math:`E|c|^2` behind a filter, in closed form: then a filter that fits the reconstruction is learned from the
        first block of probes. None where it is not known: w itself is the covariate.
    correlation
        p of `coil_correlation`; None where it is not known.
    normal
        :math:`A^H A` of images `(probes, y, x)` on the grid of w, with eigenvalues from 0 to 1; None where nobody says.
    learned
        A surrogate of the reconstruction, for the filter of w alone; None for none.
    """

    push: Callable[[Tensor], Tensor]
    variance: Tensor
    filtered_variance: Callable[[Response], Tensor] | None = None
    correlation: Tensor | None = None
    normal: Operator | None = None
    learned: Surrogate | None = None


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
    covariate_freedom
        Degrees of freedom of that variance, shape `(y, x)`; None where it is known exactly.
    complex_linear
        Whether the reconstruction is complex-linear.
    inside
        Voxels of the object, shape `(y, x)`.
    """

    sums: Moments
    direction: Tensor
    covariate_variance: Tensor | None
    complex_linear: bool
    inside: Tensor
    covariate_freedom: Tensor | None = None

    def map(self, kind: MapKind = "magnitude") -> SigmaMap:
        """Estimate the σ map of one kind."""
        return sigma_map(
            self.sums,
            kind,
            direction=self.direction,
            covariate_variance=self.covariate_variance,
            covariate_freedom=self.covariate_freedom,
            complex_linear=self.complex_linear,
            inside=self.inside,
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
    enough: Callable[[Sketch], bool] | None = None,
    looks: Sequence[int] = (),
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
    enough
        Asked after every step; what it says ends the sketch too.
    looks
        Numbers of probes after which a step ends, in whole blocks, however many might be pushed at a time.
    progress, clock
        Told (probes done, probes at most) after every step; monotonic seconds.
    """
    if stopping.probes < 2:
        raise ValueError(f"sketch: {stopping.probes} probes; a variance needs at least 2")
    size = chunk or default_chunk(linearization)
    blocks_per_step = max(1, size // BLOCK_SIZE)
    direction = phase_factor(linearization.value)
    seen = object_mask(linearization.value)
    control = None if covariate is None else _Control(covariate, probes, linearization.value, direction)
    state: Sketch | None = None
    heap = FlatHeap(linearization.value.device)
    start, block, done = clock(), 0, 0
    while done < stopping.probes:
        heap.before_step()
        ahead = [-(-(look - done) // BLOCK_SIZE) for look in looks if look > done]
        following = block + min([blocks_per_step, *ahead])
        batch = _joined(list(probes.blocks(block, following)))[: stopping.probes - done]
        block = following
        pushed = _joined([linearization.push(part) for part in batch.split(size)])
        if keep is not None:
            keep(pushed)
        images = None if control is None else control(batch, pushed, size)
        done += len(batch)
        state = Sketch(
            sums=moments(pushed, images) if state is None else accumulate(state.sums, pushed, images),
            direction=direction,
            covariate_variance=None if control is None else control.variance,
            covariate_freedom=None if control is None else control.freedom,
            complex_linear=linearization.complex_linear,
            inside=seen,
        )
        # the next probes need the memory
        del batch, pushed, images
        if progress is not None:
            progress(done, stopping.probes)
        late = stopping.time_budget is not None and clock() - start >= stopping.time_budget
        if late or (stopping.target_error is not None and _error(state, kind, seen) <= stopping.target_error):
            break
        if enough is not None and enough(state):
            break
    assert state is not None
    return state


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Batches as one; one alone is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _error(state: Sketch, kind: MapKind, voxels: Tensor) -> float:
    """Median relative standard error of a map over some voxels."""
    return float(state.map(kind).relative_error()[voxels].median())


class _Control:
    """The covariate of every batch, through what the first block of probes teaches: a filter, or a surrogate."""

    def __init__(self, covariate: Covariate, probes: ProbeSource, image: Tensor, direction: Tensor) -> None:
        self.variance = covariate.variance
        self.freedom: Tensor | None = None
        self._covariate = covariate
        self._probes = probes
        self._image = image
        self._direction = direction
        self._response: Response | None = None
        self._surrogate: Surrogate | None = None
        self._simulated: SimulatedVariance | None = None
        self._seen = 0

    def __call__(self, batch: Tensor, pushed: Tensor, size: int) -> Tensor:
        """Covariate images of a batch of probes."""
        images = _joined([self._covariate.push(part) for part in batch.split(size)])
        first = [] if self._seen else self._learn(pushed[:BLOCK_SIZE], images[:BLOCK_SIZE])
        self._seen += len(batch)
        if self._surrogate is None or self._simulated is None:
            return images if self._response is None else self._response(images)
        self._simulated.until(FIRST_CHEAP + CHEAP_PER_PROBE * self._seen)
        self.variance, self.freedom = self._simulated.estimate()
        others = images[sum(map(len, first)) :]
        return _joined([*first, *(self._surrogate(one) for one in others.split(size) if len(one))])

    def _learn(self, pushed: Tensor, images: Tensor) -> list[Tensor]:
        """Choose by the first block; what the surrogate makes of it, if it is that."""
        if self._covariate.filtered_variance is None or len(pushed) < BLOCK_SIZE:
            return []
        self._response = fit_response(pushed, images, self._image, self._direction)
        if self._response is None:
            return []
        self.variance = self._covariate.filtered_variance(self._response)
        learned = self._covariate.learned
        if learned is None:
            return []
        second = learned.second(images)
        own = learned(images, second)
        # what is no number anywhere would be none in the whole map
        if bool(own.isfinite().all()):
            fitting = adapted(learned, pushed, images, second, own, self._image, self._direction)
            own = fitting(images, second)
        if not bool(own.isfinite().all()):
            logger.warning("the learned surrogate is not finite: the sketch goes on with the filter of this scan")
            return []
        left = (unexplained(pushed, one, self._image, self._direction) for one in (own, self._response(images)))
        if next(left) > _WORTH_IT * next(left):
            return []
        self._surrogate = fitting
        self._simulated = SimulatedVariance(draw=self._drawn, known=self.variance)
        return [own]

    def _drawn(self, number: int) -> tuple[Tensor, Tensor]:
        """A block of cheap probes: through the surrogate, and through the filter whose variance is known."""
        assert self._surrogate is not None
        assert self._response is not None
        # of no other use of the same source
        batch = replace(self._probes, counters=(*self._probes.counters, _CHEAP)).block(number)
        images = self._covariate.push(batch)
        return self._surrogate(images), self._response(images)
