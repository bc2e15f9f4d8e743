"""When a sketch with a prediction ends."""

from dataclasses import replace

import pytest
import torch
from tests.noise.predicted import (
    COVARIATE,
    GUESS,
    JACOBIAN,
    SIDE,
    WHITE,
    Predictor,
    equal,
    half,
    instant,
    knowing,
    priors,
    pushed,
)
from torch import Tensor

from voxelsigma.noise.instant import instant_sketch
from voxelsigma.noise.sketch import Covariate, Stopping, sketch

COVARIATES = pytest.mark.parametrize("covariate", [None, COVARIATE], ids=["plain", "covariate"])


def test_the_target_is_met_by_a_prediction() -> None:
    worths = {8: 40.0, 16: 60.0, 32: 200.0}
    predict = Predictor(lambda count: priors(worth=worths[count]))
    # 1/sqrt(2 · 200) = 5 %
    found = instant(predict, Stopping(probes=512, target_error=0.051))
    assert found.certified
    assert predict.asked == [8, 16, 32]
    assert found.sketch.sums.count == 32
    # and a little more for the level, which the probes correct
    assert 0.05 <= float(found.map().relative_error().median()) <= 0.051


def test_the_target_counts_later_probes() -> None:
    found = instant(Predictor(knowing(60.0)), Stopping(probes=512, target_error=0.06))
    # 1/sqrt(2 (S - 32 - 1 + 60)) reaches 6 % with 139 squares, and a few for the level, which the probes correct
    assert found.certified
    assert found.sketch.sums.count == 120
    assert float(found.map().relative_error().median()) <= 0.06


def test_the_map_that_decides_can_be_chosen() -> None:
    given = {**priors(), "complex": replace(priors()["complex"], freedom=torch.full((SIDE, SIDE), 200.0).double())}
    for kind, count in (("complex", 8), ("magnitude", 64)):
        found = instant_sketch(
            JACOBIAN,
            WHITE,
            Stopping(probes=64, target_error=0.052),
            lambda _: given,
            scale=GUESS.square(),
            kind="complex" if kind == "complex" else "magnitude",
            chunk=8,
        )
        assert found.sketch.sums.count == count


@COVARIATES
def test_the_target_of_a_dropped_prediction_is_the_sketches_own(covariate: Covariate | None) -> None:
    stopping = Stopping(probes=512, target_error=0.06)
    found = instant(Predictor(priors(half(1.6))), stopping, covariate)
    alone = sketch(JACOBIAN, WHITE, stopping, covariate=covariate)
    assert 8 < found.sketch.sums.count == alone.sums.count < 512
    assert equal(found.map(), alone.map())


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_a_time_budget_ends_it(factor: float) -> None:
    ticks = iter(range(100))
    predict = Predictor(priors(factor))
    found = instant_sketch(
        JACOBIAN,
        WHITE,
        Stopping(probes=512, target_error=1e-3, time_budget=1),
        predict,
        scale=GUESS.square(),
        chunk=8,
        clock=lambda: next(ticks),
    )
    assert found.sketch.sums.count == found.certificate.probes == 8
    assert predict.asked == [8]
    assert found.certified == (factor == 1)


def test_what_is_kept_and_told_is_what_was_pushed() -> None:
    kept: list[Tensor] = []
    told: list[int] = []
    instant_sketch(
        JACOBIAN,
        WHITE,
        Stopping(probes=24),
        Predictor(priors(2.0)),
        scale=GUESS.square(),
        chunk=8,
        keep=kept.append,
        progress=lambda done, limit: told.append(done),
    )
    assert torch.equal(torch.cat(kept), pushed(0, 24)[0])
    assert told == [8, 16, 24]
