"""Pushes that are made once and seen by several sketches, with the time that each takes."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

from voxelsigma.noise.linearize import Linearization
from voxelsigma.noise.probes import BLOCK_SIZE, ProbeSource
from voxelsigma.noise.sketch import Covariate, Sketch, Stopping, sketch

T = TypeVar("T")


@dataclass
class Stopwatch:
    """Seconds spent in some functions."""

    spent: float = 0.0

    def around(self, function: Callable[..., T]) -> Callable[..., T]:
        def timed(*arguments: Any, **named: Any) -> T:
            begun = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self.spent += time.perf_counter() - begun

        return timed


class Recorded:
    """Pushes, what came of them, and how long each block took."""

    def __init__(self, push: Callable[[Tensor], Tensor]) -> None:
        self._push = push
        self._blocks: list[Tensor] = []
        self._seconds: list[float] = []

    def __call__(self, probes: Tensor) -> Tensor:
        begun = time.perf_counter()
        self._blocks.append(self._push(probes))
        self._seconds.append(time.perf_counter() - begun)
        return self._blocks[-1]

    def seconds(self, probes: int) -> float:
        """What so many probes took."""
        return sum(self._seconds[: probes // BLOCK_SIZE])

    def replayed(self) -> Callable[[Tensor], Tensor]:
        """The same pushes once more, for nothing."""
        blocks = iter(self._blocks)
        return lambda probes: next(blocks)


def sketched(
    linearization: Linearization,
    source: ProbeSource,
    covariate: Covariate,
    counts: Sequence[int],
    look: Callable[[Sketch, float], None],
    *,
    keep: Callable[[Tensor], None] | None = None,
    between: Callable[[Sketch], object] | None = None,
) -> None:
    """A sketch block by block; at some counts it is looked at, with the seconds beside the pushes.

    Parameters
    ----------
    linearization, source, covariate
        As of `voxelsigma.noise.sketch.sketch`.
    counts
        After how many probes it is looked at; the last one ends it.
    look
        Given the sketch and the seconds that it, `keep` and `between` have taken so far; its own do not count.
    keep
        Given every batch of pushed probes.
    between
        Given the sketch after every block, before it is looked at.
    """
    push, spent, begun = Stopwatch(), 0.0, time.perf_counter()

    def enough(state: Sketch) -> bool:
        nonlocal spent, begun
        if between is not None:
            between(state)
        spent += time.perf_counter() - begun
        if state.sums.count in counts:
            look(state, spent - push.spent)
        begun = time.perf_counter()
        return False

    timed = replace(linearization, push=push.around(linearization.push))
    sketch(timed, source, Stopping(probes=counts[-1]), covariate=covariate, chunk=BLOCK_SIZE, keep=keep, enough=enough)
