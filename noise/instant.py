"""A σ map from a handful of probes and what a network makes of them, or from the full sketch where they disagree."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, TypeAlias

import torch
from torch import Tensor

from voxelsigma.noise.certificate import TOLERANCE, Certificate, RegionEnergies, regions
from voxelsigma.noise.fusion import expected, fused
from voxelsigma.noise.linearize import Linearization
from voxelsigma.noise.moments import Moments
from voxelsigma.noise.prior import Prior
from voxelsigma.noise.probes import BLOCK_SIZE, ProbeSource
from voxelsigma.noise.sigma import MapKind, SigmaMap
from voxelsigma.noise.sketch import Covariate, Sketch, Stopping, sketch
from voxelsigma.noise.voxels import object_mask, phase_factor

FEWEST: Final = BLOCK_SIZE
"""Probes of the first prediction: the first block, from which the control variate's filter is learned too."""

PREDICTED_AT: Final = (8, 16, 32)
"""Numbers of probes at which a prediction is made; beyond, what further probes say is added to the last one."""

Priors: TypeAlias = Mapping[MapKind, Prior]

Predict: TypeAlias = Callable[[Sketch], Priors]
"""What is to be expected of both maps after what a sketch has seen; of a real image of the magnitude map alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Instant:
    """A sketch, and what was predicted on its way.

    Parameters
    ----------
    sketch
        Of all the probes that were pushed.
    certificate
        The last test of a prediction.
    priors
        The last prediction, by the kind of map; empty where it was dropped.
    before
        Sums of the probes that it was made of.
    """

    sketch: Sketch
    certificate: Certificate
    priors: Priors
    before: Moments

    @property
    def certified(self) -> bool:
        """Whether a prediction is part of the maps."""
        return bool(self.priors)

    def map(self, kind: MapKind = "magnitude") -> SigmaMap:
        """The σ map of one kind: predicted and fused with later probes, or the sketch's where nothing is predicted."""
        own = self.sketch.map(kind)
        if kind not in self.priors:
            return own
        prior, later = self.priors[kind], self.sketch.sums - self.before
        best = (
            expected(prior, kind, self.sketch.sums.count)
            if later.count < BLOCK_SIZE
            else replace(fused(replace(self.sketch, sums=later).map(kind), prior), probes=self.sketch.sums.count)
        )
        says = prior.variance > 0
        return replace(
            best,
            sigma=torch.where(says, best.sigma, own.sigma),
            degrees_of_freedom=torch.where(says, best.degrees_of_freedom, own.degrees_of_freedom),
            explained=own.explained,
        )


def instant_sketch(
    linearization: Linearization,
    probes: ProbeSource,
    stopping: Stopping,
    predict: Predict,
    *,
    scale: Tensor,
    fewest: int = FEWEST,
    covariate: Covariate | None = None,
    kind: MapKind = "magnitude",
    chunk: int | None = None,
    tolerance: float = TOLERANCE,
    keep: Callable[[Tensor], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Instant:
    """Let a network say what the maps will be, test it with the probes, and stop as soon as that is good enough.

    A prediction is made and tested (`RegionEnergies.certificate`) at the counts of `PREDICTED_AT`, and tested again
    after every further step. While it passes, its error is what `stopping.target_error` is compared with; without a
    target, `fewest` probes are enough. Once it fails it is dropped, and the sketch goes on to its own end, with the
    probes that were already pushed.

    Parameters
    ----------
    linearization, probes, stopping, covariate, kind, chunk, keep, progress, clock
        As of `sketch`.
    predict
        Makes the prediction; that of the magnitude map is tested.
    scale
        What energies are compared by, shape `(y, x)`: a variance of about theirs, such as the zero-filled image's.
    fewest
        Probes before the sketch may end, at least `FEWEST`.
    tolerance
        Largest relative error of σ in any region that is let pass.

    Raises
    ------
    ValueError
        If there are too few probes for a prediction.
    """
    if min(fewest, stopping.probes) < FEWEST:
        raise ValueError(f"instant: {min(fewest, stopping.probes)} probes; a prediction takes at least {FEWEST}")
    energies = RegionEnergies(regions(object_mask(linearization.value)), scale, phase_factor(linearization.value))
    judge = _Judge(energies, predict, stopping.target_error, fewest, kind, tolerance)

    def take(pushed: Tensor) -> None:
        energies.add(pushed)
        if keep is not None:
            keep(pushed)

    found = sketch(
        linearization,
        probes,
        Stopping(probes=stopping.probes, time_budget=stopping.time_budget),
        covariate=covariate,
        kind=kind,
        chunk=chunk,
        keep=take,
        enough=judge,
        progress=progress,
        clock=clock,
    )
    return judge.verdict(found)


@dataclass(slots=True)
class _Judge:
    """Predicts, tests and decides after every step of a sketch."""

    energies: RegionEnergies
    predict: Predict
    target: float | None
    fewest: int
    kind: MapKind
    tolerance: float
    priors: Priors = field(default_factory=dict)
    before: Moments | None = None
    certificate: Certificate | None = None

    def __call__(self, state: Sketch) -> bool:
        found = self.verdict(state)
        if self.target is None:
            return found.certified and state.sums.count >= self.fewest
        return float(found.map(self.kind).relative_error()[state.inside].median()) <= self.target

    def verdict(self, state: Sketch) -> Instant:
        """The prediction's share in what was seen so far."""
        count, seen = state.sums.count, 0 if self.before is None else self.before.count
        dropped = self.certificate is not None and not self.certificate.passed
        if not dropped and (seen == 0 or any(seen < one <= count for one in PREDICTED_AT)):
            self.priors, self.before = self.predict(state), state.sums.copy()
        if not dropped and (self.certificate is None or self.certificate.probes < count):
            self.certificate = self.energies.certificate(self.priors["magnitude"].variance, self.tolerance)
        assert self.certificate is not None
        assert self.before is not None
        priors = self.priors if self.certificate.passed else {}
        return Instant(sketch=state, certificate=self.certificate, priors=priors, before=self.before)
