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
    corrected,
    covered,
    equal,
    error,
    follow,
    follow_independently,
    half,
    instant,
    knowing,
    priors,
    push,
    pushed,
    same_sums,
)
from torch import Tensor

from voxelsigma.noise.certificate import RegionEnergies, regions
from voxelsigma.noise.fusion import expected, fused, independent_map, measured_variance
from voxelsigma.noise.instant import FEWEST, PREDICTED_AT, instant_sketch
from voxelsigma.noise.linearize import Linearization
from voxelsigma.noise.moments import moments
from voxelsigma.noise.prior import Prior
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
        one, wanted = found.map(kind), expected(corrected(priors()[kind], kind, 8), kind, 8)
        torch.testing.assert_close(one.sigma, wanted.sigma)
        torch.testing.assert_close(one.degrees_of_freedom, wanted.degrees_of_freedom)
        assert (one.kind, one.probes) == (kind, 8)


@pytest.mark.parametrize("chunk", [3, 8, 16, 24, 32, 64])
def test_it_is_asked_at_these_counts_however_many_are_pushed_at_a_time(chunk: int) -> None:
    predict = Predictor(priors())
    found = instant(predict, Stopping(probes=72, target_error=1e-3), COVARIATE, chunk=chunk)
    assert found.certified
    assert PREDICTED_AT == (8, 16, 32)
    assert predict.asked == [8, 16, 32]
    assert found.sketch.sums.count == found.certificate.probes == 72
    assert found.before.count == 32


@pytest.mark.parametrize("fewest", [8, 12, 24, 40])
def test_no_more_are_pushed_than_are_asked_for(fewest: int) -> None:
    found = instant(Predictor(priors()), Stopping(probes=72), fewest=fewest, chunk=64)
    # whole blocks
    assert found.sketch.sums.count == -(-fewest // 8) * 8


def test_a_target_does_not_end_it_before_the_fewest() -> None:
    found = instant(Predictor(priors()), Stopping(probes=72, target_error=0.3), fewest=40)
    assert found.certified
    assert found.sketch.sums.count == 40


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
    predict = follow if covariate is None else Predictor(knowing(200.0))
    found = instant(predict, Stopping(probes=48, target_error=1e-3), covariate)
    at_32 = instant(predict, Stopping(probes=32, target_error=1e-3), covariate)
    prior = corrected(predict(at_32.sketch)[kind], kind, 48)
    u, w = pushed(32, 48)
    later = independent_map(replace(found.sketch, sums=moments(u, None if covariate is None else w)), kind)
    wanted, own = fused(later, prior), found.sketch.map(kind)
    # but for some voxels of which the probes know much more without it
    taken = found.map(kind).sigma != own.sigma
    assert taken.double().mean() > 0.97
    for name in ("sigma", "degrees_of_freedom"):
        one, two = getattr(found.map(kind), name), torch.where(taken, getattr(wanted, name), getattr(own, name))
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)
    assert found.map(kind).probes == 48
    assert torch.equal(found.map(kind).explained, found.sketch.map(kind).explained)
    if covariate is None and kind == "magnitude":
        # which is all of them with what was known before, but for the number lost with each part
        best = fused(found.sketch.map(kind), priors()[kind])
        torch.testing.assert_close(measured_variance(found.map(kind)), measured_variance(best), rtol=0.03, atol=0)


@pytest.mark.parametrize(("probes", "alone"), [(36, True), (39, True), (40, False)])
def test_less_than_a_block_of_later_probes_is_not_asked(probes: int, alone: bool) -> None:
    found = instant(Predictor(knowing(400.0)), Stopping(probes=probes, target_error=1e-3), COVARIATE)
    wanted = expected(corrected(knowing(400.0)["magnitude"], "magnitude", probes), "magnitude", probes)
    assert found.map().probes == probes
    assert torch.allclose(found.map().sigma, wanted.sigma) == alone
    assert bool((found.map().degrees_of_freedom > wanted.degrees_of_freedom + 1).all()) != alone


@pytest.mark.parametrize("probes", [8, 16, 48])
@pytest.mark.parametrize("kind", KINDS)
def test_the_error_bar_covers(probes: int, kind: MapKind) -> None:
    found = instant(follow, Stopping(probes=probes, target_error=1e-3))
    assert found.certified
    # 4096 voxels: a standard error of 0.34 %, five of them
    assert covered(found.map(kind)) == pytest.approx(0.95, abs=0.017)
    assert error(found.map(kind)) == pytest.approx(float(found.map(kind).relative_error().mean()), rel=0.06)


@pytest.mark.parametrize(("kind", "probes"), [("magnitude", 16), ("complex", 16), ("complex", 48)])
def test_the_error_bar_covers_with_a_covariate(kind: MapKind, probes: int) -> None:
    found = instant(Predictor(priors()), Stopping(probes=probes, target_error=1e-3), COVARIATE)
    assert found.certified
    assert covered(found.map(kind)) == pytest.approx(0.95, abs=0.017)


@pytest.mark.parametrize("probes", [40, 48, 128])
def test_the_error_bar_covers_where_voxels_are_unlike_their_neighbours(probes: int) -> None:
    """All that the prior does not know is from voxel to voxel: gains that lean on neighbours would miss the same."""
    found = instant(follow_independently, Stopping(probes=probes, target_error=1e-3), COVARIATE)
    assert found.certified
    assert covered(found.map()) == pytest.approx(0.95, abs=0.02)
    leaning = fused(replace(found.sketch, sums=found.sketch.sums - found.before).map(), found.priors["magnitude"])
    assert covered(leaning) < covered(found.map())
    # the control variate's information is not lost with the leaning
    blind = replace(found.sketch, sums=found.sketch.sums - found.before, covariate_variance=None).map()
    assert error(found.map()) < error(fused(blind, found.priors["magnitude"]))


@pytest.mark.parametrize("nothing", [0.0, float("nan")])
@pytest.mark.parametrize("probes", [8, 48])
def test_voxels_of_which_nothing_is_predicted_are_the_sketches_own(nothing: float, probes: int) -> None:
    beside = replace(JACOBIAN, value=torch.where(torch.arange(SIDE) < 20, 0.01, 1.0) * JACOBIAN.value)
    says = (torch.arange(SIDE) >= 20).expand(SIDE, SIDE)
    sure = knowing(400.0)
    given = {k: replace(one, variance=torch.where(says, one.variance, nothing)) for k, one in sure.items()}
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


def test_voxels_of_which_the_probes_know_more_are_the_sketches_own() -> None:
    worth = torch.where(torch.arange(SIDE) < 20, 5.0, 400.0).expand(SIDE, SIDE).double()
    little, much = priors(worth=5.0), priors(worth=400.0)
    given = {
        kind: Prior(variance=torch.where(worth == 5, little[kind].variance, one.variance), freedom=worth)
        for kind, one in much.items()
    }
    found = instant(Predictor(given), Stopping(probes=48, target_error=1e-3), COVARIATE)
    assert found.certified
    for kind in KINDS:
        own, one = found.sketch.map(kind), found.map(kind)
        for name in ("sigma", "degrees_of_freedom"):
            # those near the others are judged with them
            assert torch.equal(getattr(one, name)[:, :12], getattr(own, name)[:, :12])
        assert bool((2 * one.degrees_of_freedom >= own.degrees_of_freedom).all())
        assert (one.degrees_of_freedom > own.degrees_of_freedom)[:, 20:].double().mean() > 0.9


def test_maps_are_chosen_by_neighbourhoods_and_not_by_the_luck_of_a_voxel() -> None:
    found = instant(Predictor(priors()), Stopping(probes=8), COVARIATE)
    own, one = found.sketch.map(), found.map()
    # far below 40 at the median, and above here and there
    lucky = own.degrees_of_freedom > WORTH
    assert lucky.double().mean() > 0.02
    taken = one.sigma != own.sigma
    assert taken[lucky & (own.degrees_of_freedom < 1.9 * WORTH)].double().mean() > 0.97
    assert covered(one) == pytest.approx(0.95, abs=0.017)


@pytest.mark.parametrize("vague", [0.1, 2.0, 2.001, 4.0])
def test_a_few_voxels_of_which_next_to_nothing_is_known_do_not_speak_for_their_region(vague: float) -> None:
    worth = torch.where(torch.arange(SIDE) % 8 == 0, vague, WORTH).expand(SIDE, SIDE).double()
    given = {kind: replace(one, freedom=worth) for kind, one in priors().items()}
    found = instant(Predictor(given), Stopping(probes=64))
    assert found.certified
    assert found.sketch.sums.count == 8
    assert float(found.certificate.log_ratio.abs().max()) < 0.08


def test_a_prediction_that_knows_next_to_nothing_saves_no_probes() -> None:
    found = instant(Predictor(priors(worth=6.0)), Stopping(probes=48))
    assert found.certified
    assert found.sketch.sums.count == 24


# --- predictions that are wrong


def test_a_complex_map_that_is_wrong_alone_is_told_too() -> None:
    given = {**priors(), "complex": priors(half(1.6))["complex"]}
    found = instant(Predictor(given), Stopping(probes=64))
    assert not found.certified
    assert found.certificate.worst > 0.2


@COVARIATES
def test_beside_the_object_the_map_is_the_sketches_own(covariate: Covariate | None) -> None:
    dark = torch.arange(SIDE) < 20
    beside = replace(JACOBIAN, value=torch.where(dark, 0.01, 1.0) * JACOBIAN.value)
    given = priors(torch.where(dark, 3.0, 1.0).expand(SIDE, SIDE).double())
    found = instant_sketch(
        beside, WHITE, Stopping(probes=64), lambda _: given, scale=GUESS.square(), covariate=covariate
    )
    assert found.certified
    for kind in KINDS:
        own, one = found.sketch.map(kind), found.map(kind)
        for name in ("sigma", "degrees_of_freedom"):
            assert torch.equal(getattr(one, name)[:, :20], getattr(own, name)[:, :20])


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
    # off by so much that 32 probes do not tell for certain, but some hundreds do
    predict = Predictor(priors(half(1 / 1.154)))
    found = instant(predict, Stopping(probes=512, target_error=1e-3))
    assert not found.certified
    assert predict.asked == [8, 16, 32]
    assert 32 < found.certificate.probes < 512
    assert equal(found.map(), found.sketch.map())


def test_the_error_bar_of_a_dropped_prediction_is_the_sketches() -> None:
    found = instant(Predictor(priors(2.0)), Stopping(probes=32))
    # one of 32 numbers is not counted; 4096 voxels, five standard errors
    assert covered(found.map()) == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("factor", [1.15, 1 / 1.15, half(1.12), half(1 / 1.12)], ids=["+", "-", "half +", "half -"])
@pytest.mark.parametrize("probes", [8, 16, 48])
@pytest.mark.parametrize("kind", KINDS)
def test_the_error_bar_covers_what_is_tolerated(factor: Tensor | float, probes: int, kind: MapKind) -> None:
    found = instant(Predictor(priors(factor)), Stopping(probes=probes, target_error=1e-3))
    # dropped or not: where it is right to be off by so much, either may happen
    assert covered(found.map(kind)) == pytest.approx(0.95, abs=0.02)


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
    like = RegionEnergies(regions(torch.ones(SIDE, SIDE) > 0), GUESS.square(), torch.ones_like(GUESS))
    like.add(push(WHITE.block(0)).real)
    prior = like.corrected(priors()["magnitude"], push(WHITE.block(0)).real.square().mean(dim=0))
    torch.testing.assert_close(found.map().sigma, expected(prior, "magnitude", 8).sigma)
    # of what nobody predicted there is the sketch's own
    assert equal(found.map("complex"), found.sketch.map("complex"))
