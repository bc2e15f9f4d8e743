"""A σ map from a handful of probes and what a network makes of them, or from the full sketch where they disagree."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, TypeAlias

import torch
from torch import Tensor

from voxelsigma.noise.certificate import TOLERANCE, Certificate, RegionEnergies, regions
from voxelsigma.noise.fusion import expected, fused, independent_map, measured_variance
from voxelsigma.noise.linearize import Linearization
from voxelsigma.noise.moments import Moments, projected
from voxelsigma.noise.prior import Prior, marginal_loss
from voxelsigma.noise.probes import BLOCK_SIZE, ProbeSource
from voxelsigma.noise.sigma import MapKind, SigmaMap
from voxelsigma.noise.sketch import Covariate, Sketch, Stopping, sketch
from voxelsigma.noise.voxels import neighbourhood_mean, object_mask, phase_factor

FEWEST: Final = BLOCK_SIZE
"""Probes of the first prediction: the first block, from which the control variate's filter is learned too."""

PREDICTED_AT: Final = (8, 16, 32)
"""Numbers of probes at which a prediction is made; beyond, what further probes say is added to the last one."""

_LEAST_WORTH = 2 * FEWEST
_AROUND = 15
_MUCH = 2
_DOUBT: Final = math.log(2) / 2
_MOST_DOUBT: Final = 12
_SURE: Final = 0.8

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
        The last test of a prediction: of both maps the one that is further off.
    priors
        The last prediction, by the kind of map, as the probes correct it; empty where it was dropped.
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
        """The σ map of one kind: predicted and fused with later probes, or the sketch's own where that knows more."""
        own = self.sketch.map(kind)
        if kind not in self.priors:
            return own
        best = _predicted(self.sketch, self.before, self.priors[kind], kind)
        better = _better(best, own, self.priors[kind], self.sketch.inside)
        return replace(
            best,
            sigma=torch.where(better, best.sigma, own.sigma),
            degrees_of_freedom=torch.where(better, best.degrees_of_freedom, own.degrees_of_freedom),
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

    Both maps are predicted and tested (`RegionEnergies.certificate`) at the counts of `PREDICTED_AT`, and tested again
    with every doubling of the probes and before it ends, however many are pushed at a time. While they pass, the probes
    correct their level (`RegionEnergies.corrected`), later ones what they state to be worth, and their error is what
    `stopping.target_error` is compared with; without a target, `fewest` probes are enough if the map is worth twice
    those of a first prediction. Once one fails they are dropped, and the sketch goes on to its own end, with the probes
    that were already pushed.

    Parameters
    ----------
    linearization, probes, stopping, covariate, kind, chunk, keep, progress, clock
        As of `sketch`.
    predict
        Makes the predictions, each of which is tested.
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
    judge = Judge(
        energies=energies,
        predict=predict,
        target=stopping.target_error,
        fewest=fewest,
        kind=kind,
        tolerance=tolerance,
    )

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
        looks=(*_doubled(stopping.probes), fewest),
        progress=progress,
        clock=clock,
    )
    return judge.verdict(found)


def _doubled(most: int) -> list[int]:
    """8, 16, 32, and so on."""
    return [FEWEST << times for times in range((most // FEWEST).bit_length())]


@dataclass(slots=True, kw_only=True)
class Judge:
    """Predicts, tests and decides after every step of a sketch: its `enough`.

    Parameters
    ----------
    energies
        Of the probes, which are added as they are pushed.
    predict, fewest, kind, tolerance
        As of `instant_sketch`.
    target
        Relative error of σ, as the median over the object, that is enough; None for none.
    """

    energies: RegionEnergies
    predict: Predict
    target: float | None = None
    fewest: int = FEWEST
    kind: MapKind = "magnitude"
    tolerance: float = TOLERANCE
    _predictions: Priors = field(default_factory=dict, init=False)
    _before: Moments | None = field(default=None, init=False)
    _certificate: Certificate | None = field(default=None, init=False)
    _corrected: Priors = field(default_factory=dict, init=False)
    _doubts: dict[MapKind, float] = field(default_factory=dict, init=False)

    def __call__(self, state: Sketch) -> bool:
        """Whether the sketch has seen enough."""
        known = self._certificate
        # not after every step: how long one is must not matter
        if known is None or (known.passed and state.sums.count >= 2 * known.probes):
            known = self._judge(state)
        # and none is relied upon that was not tested with all probes
        return self._enough(self._instant(state, known)) and self._enough(self.verdict(state))

    def verdict(self, state: Sketch) -> Instant:
        """The prediction's share in what was seen so far, by a test with all of it."""
        known = self._certificate
        if known is None or (known.passed and known.probes < state.sums.count):
            known = self._judge(state)
        return self._instant(state, known)

    def _instant(self, state: Sketch, known: Certificate) -> Instant:
        assert self._before is not None
        return Instant(sketch=state, certificate=known, priors=self._corrected, before=self._before)

    def _enough(self, found: Instant) -> bool:
        state = found.sketch
        # until then it may still turn out to be wrong
        if found.certified and state.sums.count < self.fewest:
            return False
        if self.target is None and not found.certified:
            return False
        freedom = found.map(self.kind).degrees_of_freedom[state.inside].median()
        # a prediction that knows next to nothing saves no probes, however right it is
        return float(freedom) >= (_LEAST_WORTH if self.target is None else 1 / (2 * self.target**2))

    def _judge(self, state: Sketch) -> Certificate:
        """Predict if it is time to, test the prediction, and correct it by the probes."""
        before, count = self._before, state.sums.count
        if before is None or any(before.count < one <= count for one in PREDICTED_AT):
            # what was found out of the last one, until there are probes that this one has not seen
            if before is not None:
                self._doubts = {
                    kind: self._doubt(self._level(state, kind), state, before, kind) for kind in self._corrected
                }
            self._predictions, before = self.predict(state), state.sums.copy()
        tests = (
            self.energies.certificate(_mean_energy(state, one, kind), self.tolerance, kind=kind)
            for kind, one in self._predictions.items()
        )
        known = max(tests, key=lambda one: one.worst)
        levels = {kind: self._level(state, kind) for kind in self._predictions if known.passed}
        self._corrected = {kind: _less(one, self._doubt(one, state, before, kind)) for kind, one in levels.items()}
        self._before, self._certificate = before, known
        return known

    def _level(self, state: Sketch, kind: MapKind) -> Prior:
        return self.energies.corrected(self._predictions[kind], _energy(state, kind), kind)

    def _doubt(self, prior: Prior, state: Sketch, before: Moments, kind: MapKind) -> float:
        later = _later(state, before, kind)
        return self._doubts.get(kind, 1.0) if later is None else _believed(prior, later, state.inside)


def _predicted(state: Sketch, before: Moments, prior: Prior, kind: MapKind) -> SigmaMap:
    """A prediction, and what probes add that it has not seen."""
    later = _later(state, before, kind)
    if later is None:
        return expected(prior, kind, state.sums.count)
    return replace(fused(later, prior), probes=state.sums.count)


def _later(state: Sketch, before: Moments, kind: MapKind) -> SigmaMap | None:
    """What probes say that a prediction has not seen; None where there are none."""
    later = state.sums - before
    return None if later.count < BLOCK_SIZE else independent_map(replace(state, sums=later), kind)


def _believed(prior: Prior, later: SigmaMap, inside: Tensor) -> float:
    r"""Which part g of its worth :math:`\nu_0` a prediction has by probes that it has not seen, at most 1.

    Of the powers :math:`2^{-k/2}` that which minimises `marginal_loss` over the object. The probes' own degrees of
    freedom are estimates, and up to a fifth too many where few probes lie behind them: that is not put down to the
    prediction.
    """
    measured = measured_variance(later)
    known = inside & (prior.variance > 0) & (measured > 0)
    freedom = _SURE * later.degrees_of_freedom
    given = prior.variance[known].log(), prior.freedom[known].log(), measured[known], freedom[known]

    def loss(step: int) -> float:
        return float(marginal_loss(given[0], given[1] - step * _DOUBT, *given[2:]).sum())

    step, least = 0, loss(0)
    while step < _MOST_DOUBT and (further := loss(step + 1)) < least:
        step, least = step + 1, further
    return math.exp(-step * _DOUBT)


def _less(prior: Prior, part: float) -> Prior:
    return prior if part == 1 else replace(prior, freedom=part * prior.freedom)


def _better(best: SigmaMap, own: SigmaMap, prior: Prior, inside: Tensor) -> Tensor:
    r"""Where in the object a prediction is worth more than all the probes without it, shape `(y, x)`.

    By the mean of 1/ν, the map's squared error, over 15 × 15 neighbours: the degrees of freedom of a sketch's own map
    are estimates, which are large where its σ happens to come out small, so that voxel by voxel the luckier of the two
    would be taken. Where the sketch knows twice as much and more that is no luck. Beside the object nothing tests it.
    """
    ours, theirs = best.degrees_of_freedom, own.degrees_of_freedom
    asked = inside & (prior.variance > 0) & (_MUCH * ours >= theirs)
    lost = neighbourhood_mean(torch.where(asked, 1 / ours - 1 / theirs, 0), _AROUND)
    return asked & (lost <= 0)


def _mean_energy(state: Sketch, prior: Prior, kind: MapKind) -> Tensor:
    """What the energy of a probe is to be on average if a prediction is right, shape `(y, x)`.

    Of voxels of which it says next to nothing that is what was measured: there the map is the sketch's own, and the
    near-infinite mean of one would speak for a whole region.
    """
    return torch.where(prior.vague(), measured_variance(state.map(kind)), prior.mean())


def _energy(state: Sketch, kind: MapKind) -> Tensor:
    """Mean energy of the probes, shape `(y, x)`."""
    sums = state.sums
    total = projected(sums.u_u, sums.u_abs, state.direction) if kind == "magnitude" else sums.u_abs
    return total / sums.count
