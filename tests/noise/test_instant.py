"""Maps from a prediction and a few probes."""

from dataclasses import replace

import pytest
import torch
from tests.noise.predicted import (
    COVARIATE,
    GUESS,
    JACOBIAN,
    SIDE,
    WHITE,
    WORTH,
    Predictor,
    close,
    covered,
    equal,
    follow,
    half,
    instant,
    priors,
    push,
    pushed,
    same_sums,
    truth,
)
from torch import Tensor

from voxelsigma.noise.fusion import expected, fused, measured_variance
from voxelsigma.noise.instant import FEWEST, PREDICTED_AT, instant_sketch
from voxelsigma.noise.linearize import Linearization
from voxelsigma.noise.moments import moments
from voxelsigma.noise.sigma import MapKind
from voxelsigma.noise.sketch import Covariate, Stopping, sketch

KINDS: tuple[MapKind, ...] = ("magnitude", "complex")
COVARIATES = pytest.mark.parametrize("covariate", [None, COVARIATE], ids=["plain", "covariate"])


# --- what is asked, and when


def test_without_a_target_the_first_prediction_that_passes_is_enough() -> None:
    predict = Predictor(priors())
    found = instant(predict, Stopping(probes=64))
    assert found.certified
    assert predict.asked == [8]
    assert found.sketch.sums.count == found.certificate.probes == 8
    for kind in KINDS:
        one, wanted = found.map(kind), expected(priors()[kind], kind, 8)
        torch.testing.assert_close(one.sigma, wanted.sigma)
        torch.testing.assert_close(one.degrees_of_freedom, wanted.degrees_of_freedom)
        assert (one.kind, one.probes) == (kind, 8)


@pytest.mark.parametrize(
    ("chunk", "asked"), [(8, [8, 16, 32]), (16, [16, 32]), (24, [24, 48]), (32, [32]), (64, [64]), (3, [8, 16, 32])]
)
def test_it_is_asked_at_these_counts_only(chunk: int, asked: list[int]) -> None:
    predict = Predictor(priors())
    found = instant(predict, Stopping(probes=72, target_error=1e-3), COVARIATE, chunk=chunk)
    assert found.certified
    assert PREDICTED_AT == (8, 16, 32)
    assert predict.asked == asked
    assert found.sketch.sums.count == found.certificate.probes == 72
    assert found.before.count == asked[-1]


@COVARIATES
def test_it_is_asked_with_what_was_seen_by_then(covariate: Covariate | None) -> None:
    predict = Predictor(priors())
    found = instant(predict, Stopping(probes=48, target_error=1e-3), covariate)
    for seen in predict.sums:
        u, w = pushed(0, seen.count)
        assert same_sums(seen, moments(u, None if covariate is None else w))
    # sums are added to in place: what is kept of the last prediction is not
    assert same_sums(found.before, predict.sums[-1])
    assert same_sums(found.sketch.sums, sketch(JACOBIAN, WHITE, Stopping(probes=48), covariate=covariate).sums)


def test_the_fewest_probes_are_asked_for() -> None:
    for fewest in (8, 16, 24, 64):
        predict = Predictor(priors())
        found = instant(predict, Stopping(probes=64), fewest=fewest)
        assert found.sketch.sums.count == fewest
        assert predict.asked == [count for count in PREDICTED_AT if count <= fewest]


@pytest.mark.parametrize(("probes", "fewest", "told"), [(7, 8, 7), (64, 7, 7), (2, 1, 1)])
def test_fewer_than_a_prediction_takes_are_refused(probes: int, fewest: int, told: int) -> None:
    predict = Predictor(priors())
    with pytest.raises(ValueError, match=f"instant: {told} probes; a prediction takes at least {FEWEST}"):
        instant(predict, Stopping(probes=probes), fewest=fewest)
    assert not predict.asked


# --- what comes of it


@COVARIATES
@pytest.mark.parametrize("kind", KINDS)
def test_later_probes_are_fused(covariate: Covariate | None, kind: MapKind) -> None:
    found = instant(follow, Stopping(probes=48, target_error=1e-3), covariate)
    at_32 = instant(follow, Stopping(probes=32, target_error=1e-3), covariate)
    prior = follow(at_32.sketch)[kind]
    u, w = pushed(32, 48)
    later = replace(found.sketch, sums=moments(u, None if covariate is None else w)).map(kind)
    close(found.map(kind), fused(later, prior))
    assert found.map(kind).probes == 48
    assert torch.equal(found.map(kind).explained, found.sketch.map(kind).explained)
    if covariate is None and kind == "magnitude":
        # which is all of them with what was known before, but for the number lost with each part
        best = fused(found.sketch.map(kind), priors()[kind])
        torch.testing.assert_close(measured_variance(found.map(kind)), measured_variance(best), rtol=0.03, atol=0)


@pytest.mark.parametrize(("probes", "alone"), [(36, True), (39, True), (40, False)])
def test_less_than_a_block_of_later_probes_is_not_asked(probes: int, alone: bool) -> None:
    found = instant(Predictor(priors()), Stopping(probes=probes, target_error=1e-3), COVARIATE)
    wanted = expected(priors()["magnitude"], "magnitude", probes)
    assert found.map().probes == probes
    assert torch.allclose(found.map().sigma, wanted.sigma) == alone
    assert bool((found.map().degrees_of_freedom > WORTH + 1).all()) != alone


@pytest.mark.parametrize("probes", [8, 16, 48])
@pytest.mark.parametrize("kind", KINDS)
def test_the_error_bar_covers(probes: int, kind: MapKind) -> None:
    found = instant(follow, Stopping(probes=probes, target_error=1e-3))
    assert found.certified
    # 4096 voxels: a standard error of 0.34 %, five of them
    assert covered(found.map(kind)) == pytest.approx(0.95, abs=0.017)
    error = float((found.map(kind).sigma / truth(kind) - 1).square().mean().sqrt())
    assert error == pytest.approx(float(found.map(kind).relative_error().mean()), rel=0.06)


@pytest.mark.parametrize(("kind", "probes"), [("magnitude", 16), ("complex", 16), ("complex", 48)])
def test_the_error_bar_covers_with_a_covariate(kind: MapKind, probes: int) -> None:
    found = instant(Predictor(priors()), Stopping(probes=probes, target_error=1e-3), COVARIATE)
    assert found.certified
    assert covered(found.map(kind)) == pytest.approx(0.95, abs=0.017)


def test_where_gains_lean_on_neighbours_the_error_bar_may_be_short() -> None:
    """The worst case: all that the prior does not know is from voxel to voxel, as gains scatter around neighbours'."""
    found = instant(Predictor(priors()), Stopping(probes=48, target_error=1e-3), COVARIATE)
    # 0.90: the leaning gain and the prior miss the same, which counts as two independent errors
    assert 0.88 < covered(found.map()) < 0.967


@pytest.mark.parametrize("nothing", [0.0, float("nan")])
@pytest.mark.parametrize("probes", [8, 48])
def test_voxels_of_which_nothing_is_predicted_are_the_sketches_own(nothing: float, probes: int) -> None:
    beside = replace(JACOBIAN, value=torch.where(torch.arange(SIDE) < 20, 0.01, 1.0) * JACOBIAN.value)
    says = (torch.arange(SIDE) >= 20).expand(SIDE, SIDE)
    given = {k: replace(one, variance=torch.where(says, one.variance, nothing)) for k, one in priors().items()}
    stopping = Stopping(probes=probes, target_error=1e-3)
    found = instant_sketch(beside, WHITE, stopping, lambda _: given, scale=GUESS.square(), covariate=COVARIATE, chunk=8)
    assert found.certified
    for kind in KINDS:
        own, one = found.sketch.map(kind), found.map(kind)
        for name in ("sigma", "degrees_of_freedom"):
            assert torch.equal(getattr(one, name)[:, :20], getattr(own, name)[:, :20])
            assert not torch.isclose(getattr(one, name)[:, 20:], getattr(own, name)[:, 20:], rtol=1e-9).all()


def test_a_prediction_that_is_no_number_fails() -> None:
    found = instant(Predictor(priors(float("nan"))), Stopping(probes=16))
    assert not found.certified
    assert equal(found.map(), found.sketch.map())


# --- predictions that are wrong


@COVARIATES
@pytest.mark.parametrize("factor", [half(1.6), half(1 / 1.6), 2.0], ids=["half above", "half below", "twice"])
def test_a_wrong_prediction_changes_nothing_but_is_told(covariate: Covariate | None, factor: Tensor | float) -> None:
    predict = Predictor(priors(factor))
    found = instant(predict, Stopping(probes=64), covariate)
    alone = sketch(JACOBIAN, WHITE, Stopping(probes=64), covariate=covariate)
    assert not found.certified
    assert found.certificate.worst > 0.2
    # and it is not asked again
    assert found.certificate.probes == 8
    assert predict.asked == [8]
    for kind in KINDS:
        assert equal(found.map(kind), alone.map(kind))


@pytest.mark.parametrize("turns", [16, 32])
def test_a_prediction_that_becomes_wrong_is_dropped_for_good(turns: int) -> None:
    predict = Predictor(lambda count: priors(half(1.6) if count == turns else 1.0))
    found = instant(predict, Stopping(probes=72, target_error=1e-3), COVARIATE)
    assert not found.certified
    assert found.certificate.probes == predict.asked[-1] == turns
    alone = sketch(JACOBIAN, WHITE, Stopping(probes=72), covariate=COVARIATE)
    for kind in KINDS:
        assert equal(found.map(kind), alone.map(kind))


def test_probes_beyond_the_last_prediction_test_it_too() -> None:
    # off by so much that 8 probes do not tell for certain, but some hundreds do
    predict = Predictor(priors(half(1 / 1.122)))
    found = instant(predict, Stopping(probes=512, target_error=1e-3))
    assert not found.certified
    assert predict.asked == [8, 16, 32]
    assert 32 < found.certificate.probes < 512
    assert equal(found.map(), found.sketch.map())


def test_the_error_bar_of_a_dropped_prediction_is_the_sketches() -> None:
    found = instant(Predictor(priors(2.0)), Stopping(probes=32))
    # one of 32 numbers is not counted; 4096 voxels, five standard errors
    assert covered(found.map()) == pytest.approx(0.95, abs=0.02)


# --- when it ends


def test_the_target_is_met_by_a_prediction() -> None:
    worths = {8: 40.0, 16: 60.0, 32: 200.0}
    predict = Predictor(lambda count: priors(worth=worths[count]))
    # 1/sqrt(2 · 200) = 5 %
    found = instant(predict, Stopping(probes=512, target_error=0.0501))
    assert found.certified
    assert predict.asked == [8, 16, 32]
    assert found.sketch.sums.count == 32
    assert float(found.map().relative_error().median()) == pytest.approx(0.05)


def test_the_target_counts_later_probes() -> None:
    found = instant(Predictor(priors(worth=60.0)), Stopping(probes=512, target_error=0.06))
    # 1/sqrt(2 (S - 32 - 1 + 60)) reaches 6 % with 139 squares
    assert found.certified
    assert found.sketch.sums.count == 112
    assert float(found.map().relative_error().median()) <= 0.06


def test_the_map_that_decides_can_be_chosen() -> None:
    given = {**priors(), "complex": replace(priors()["complex"], freedom=torch.full((SIDE, SIDE), 200.0).double())}
    for kind, count in (("complex", 8), ("magnitude", 64)):
        found = instant_sketch(
            JACOBIAN,
            WHITE,
            Stopping(probes=64, target_error=0.0501),
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


# --- of other kinds


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_units_of_the_scale_do_not_matter(scale: float) -> None:
    stopping = Stopping(probes=8)
    found = instant_sketch(JACOBIAN, WHITE, stopping, Predictor(priors(1.2)), scale=scale * GUESS.square(), chunk=8)
    wanted = instant(Predictor(priors(1.2)), stopping)
    torch.testing.assert_close(found.certificate.log_ratio, wanted.certificate.log_ratio)
    torch.testing.assert_close(found.certificate.error, wanted.certificate.error)


def test_a_real_image_has_one_map() -> None:
    real = Linearization(value=torch.ones_like(GUESS), push=lambda batch: push(batch).real)
    predict = Predictor({"magnitude": priors()["magnitude"]})
    found = instant_sketch(real, WHITE, Stopping(probes=64), predict, scale=GUESS.square(), chunk=8)
    assert found.certified
    torch.testing.assert_close(found.map().sigma, expected(priors()["magnitude"], "magnitude", 8).sigma)
    # of what nobody predicted there is the sketch's own
    assert equal(found.map("complex"), found.sketch.map("complex"))
