"""A σ map from a prediction and a handful of probes, or from the full sketch where the two disagree."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from torch import Tensor

from voxelsigma.noise.certificate import TOLERANCE, Certificate, RegionEnergies, regions
from voxelsigma.noise.fusion import corrected, fused
from voxelsigma.noise.linearize import Linearization
from voxelsigma.noise.prior import Prior
from voxelsigma.noise.probes import ProbeSource
from voxelsigma.noise.sigma import MapKind, SigmaMap
from voxelsigma.noise.sketch import Covariate, Sketch, Stopping, sketch
from voxelsigma.noise.voxels import object_mask, phase_factor

FEWEST: Final = 8
"""Probes that check a prediction: the first block, from which the control variate's filter is learned too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Instant:
    """What came of a prediction.

    Parameters
    ----------
    sketch
        Of the probes that were pushed.
    certificate
        The last test of the prediction.
    priors
        The prediction, by the kind of map; empty where it was dropped.
    """

    sketch: Sketch
    certificate: Certificate
    priors: Mapping[MapKind, Prior]

    @property
    def certified(self) -> bool:
        """Whether the prediction is part of the maps."""
        return bool(self.priors)

    def map(self, kind: MapKind = "magnitude") -> SigmaMap:
        """The σ map of one kind: fused, or the plain sketch's where the prediction was dropped."""
        found = self.sketch.map(kind)
        if kind not in self.priors:
            return found
        return fused(found, corrected(self.priors[kind], found, self.sketch.inside, self.certificate.together))


def instant_sketch(
    linearization: Linearization,
    probes: ProbeSource,
    stopping: Stopping,
    priors: Mapping[MapKind, Prior],
    *,
    fewest: int = FEWEST,
    covariate: Covariate | None = None,
    kind: MapKind = "magnitude",
    chunk: int | None = None,
    tolerance: float = TOLERANCE,
    keep: Callable[[Tensor], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Instant:
    """Check a prediction with the first probes, and stop as soon as the two together are good enough.

    The prediction is tested (`RegionEnergies.certificate`) after `fewest` probes, and again after every further step.
    While it passes, the map is corrected and fused, and its error is what `stopping.target_error` is compared with;
    without a target, `fewest` probes are enough. Once it fails it is dropped, and the sketch goes on to its own end,
    with the probes that were already pushed.

    Parameters
    ----------
    linearization, probes, stopping, covariate, kind, chunk, keep, progress, clock
        As of `sketch`.
    priors
        The predicted variances; that of the magnitude map is tested.
    fewest
        Probes before the first test, at least 2.
    tolerance
        Largest relative error of σ in any region that is let pass.

    Raises
    ------
    ValueError
        If there are fewer than 2 probes, or no prediction of the map that is asked for.
    """
    if fewest < 2:
        raise ValueError(f"instant: {fewest} probes cannot test a prediction; expected at least 2")
    for needed in ("magnitude", kind):
        if needed not in priors:
            raise ValueError(f"instant: no prediction of the {needed} map; there are {', '.join(priors) or 'none'}")
    inside = object_mask(linearization.value)
    energies = RegionEnergies(regions(inside), priors["magnitude"].variance, phase_factor(linearization.value))
    judge = _Judge(energies, priors, stopping.target_error, fewest, kind, tolerance)

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
    """Decides after every step of a sketch."""

    energies: RegionEnergies
    priors: Mapping[MapKind, Prior]
    target: float | None
    fewest: int
    kind: MapKind
    tolerance: float
    certificate: Certificate | None = field(default=None)

    def __call__(self, state: Sketch) -> bool:
        if state.sums.count < self.fewest:
            return False
        found = self.verdict(state)
        if self.target is None:
            return found.certified
        return float(found.map(self.kind).relative_error()[state.inside].median()) <= self.target

    def verdict(self, state: Sketch) -> Instant:
        """The prediction's share in what was seen so far."""
        if self.certificate is None or (self.certificate.passed and self.certificate.probes < state.sums.count):
            self.certificate = self.energies.certificate(self.tolerance)
        passed = self.certificate.passed
        return Instant(sketch=state, certificate=self.certificate, priors=self.priors if passed else {})
