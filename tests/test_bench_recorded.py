"""Times of a recorded sketch: what counts as a road's own, and what the bench does for itself."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from voxelsigma.noise.linearize import Linearization
from voxelsigma.noise.probes import ProbeSource
from voxelsigma.noise.sketch import Covariate, Sketch

ROOT = Path(__file__).resolve().parents[1]
SIZE = 6
PUSH, KEEP, BETWEEN, LOOK = 1.0, 100.0, 10_000.0, 1_000_000.0


class Clock:
    """Stands still but where it is told to go."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture(scope="module")
def module() -> Iterator[Any]:
    """`bench`, which is no part of the installed package, from the source tree."""
    if not (ROOT / "bench" / "recorded.py").is_file():
        pytest.skip(f"{ROOT / 'bench'} is not there")
    sys.path.insert(0, str(ROOT))
    yield importlib.import_module("bench.recorded")
    sys.path.remove(str(ROOT))


@pytest.fixture
def clock(module: Any, monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module.time, "perf_counter", made)
    return made


def looked_at(module: Any, clock: Clock, counts: tuple[int, ...]) -> list[tuple[int, float]]:
    """Counts and seconds of a sketch of an identity whose every part takes a time of its own."""

    def push(probes: Tensor) -> Tensor:
        clock.passes(PUSH)
        return probes[:, 0]

    seen: list[tuple[int, float]] = []

    def look(state: Sketch, seconds: float) -> None:
        seen.append((state.sums.count, seconds))
        clock.passes(LOOK)

    image = torch.ones(SIZE, SIZE, dtype=torch.complex64)
    module.sketched(
        Linearization(value=image, push=push),
        ProbeSource(variance=torch.full((SIZE, SIZE), 2.0), coils=1, seed=1),
        Covariate(push=lambda probes: probes[:, 0], variance=torch.full((SIZE, SIZE), 2.0)),
        counts,
        look,
        keep=lambda pushed: clock.passes(KEEP),
        between=lambda state: clock.passes(BETWEEN),
    )
    return seen


def test_what_comes_between_two_looks_counts_and_looks_do_not(module: Any, clock: Clock) -> None:
    """After 8, 16, 24, … probes of a block each there have been as many steps; only some are looked at."""
    counts = (8, 32, 40)
    expected = [(count, count // 8 * (KEEP + BETWEEN)) for count in counts]
    assert looked_at(module, clock, counts) == expected
    # the rest of what passed is pushes, which are counted apart, and looks
    assert clock.now == 5 * (PUSH + KEEP + BETWEEN) + 3 * LOOK


def test_pushes_are_replayed_for_nothing(module: Any, clock: Clock) -> None:
    made = iter(torch.arange(3.0).unbind())

    def push(_: Tensor) -> Tensor:
        clock.passes(PUSH)
        return next(made)

    recorded, probes = module.Recorded(push), torch.zeros(8)
    first = [recorded(probes) for _ in range(3)]
    assert [recorded.seconds(count) for count in (8, 16, 24)] == [PUSH, 2 * PUSH, 3 * PUSH]
    again = recorded.replayed()
    assert [again(probes) for _ in range(3)] == first
    assert clock.now == 3 * PUSH
