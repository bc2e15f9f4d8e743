"""What is expected of a map, put together with what probes say."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from voxelsigma.noise.fusion import expected, fused, independent_map, measured_variance
from voxelsigma.noise.moments import moments
from voxelsigma.noise.prior import Prior
from voxelsigma.noise.sigma import MapKind, SigmaMap, root_bias
from voxelsigma.noise.sketch import Sketch

SIDE = 96


def plain(energy: Tensor, count: int, kind: MapKind = "magnitude") -> SigmaMap:
    """The map of a mean of `count` squares."""
    freedom = torch.full_like(energy, count)
    return SigmaMap(
        sigma=energy.sqrt() / root_bias(freedom),
        degrees_of_freedom=freedom,
        kind=kind,
        probes=count,
        explained=torch.zeros_like(energy),
    )


def drawn(worth: Tensor, count: int, seed: int) -> tuple[Tensor, SigmaMap, Prior]:
    """True variances that scatter around a guess as its worth says, a map of so many probes, and the guess."""
    generator = np.random.default_rng(seed)
    guess = torch.from_numpy(np.exp(generator.normal(size=(SIDE, SIDE))))
    truth = guess * worth / torch.from_numpy(generator.chisquare(worth.numpy()))
    energy = truth * torch.from_numpy(generator.chisquare(count, (SIDE, SIDE))) / count
    return truth, plain(energy, count), Prior(variance=guess, freedom=worth)


def even(worth: float) -> Tensor:
    return torch.full((SIDE, SIDE), worth, dtype=torch.float64)


def halves() -> Tensor:
    """Next to nothing is known of one half, very much of the other."""
    worth = even(6.0)
    worth[:, SIDE // 2 :] = 150.0
    return worth


def error(sigma: Tensor, truth: Tensor) -> float:
    return float((sigma / truth.sqrt() - 1).square().mean().sqrt())


def covered(found: SigmaMap, truth: Tensor, level: float) -> float:
    low, high = found.interval(level)
    return float(((low <= truth.sqrt()) & (truth.sqrt() <= high)).double().mean())


@pytest.mark.parametrize("worth", [even(6.0), even(40.0), even(400.0), halves()], ids=["6", "40", "400", "halves"])
@pytest.mark.parametrize("level", [0.5, 0.95])
def test_both_cover_what_they_say(worth: Tensor, level: float) -> None:
    truth, found, prior = drawn(worth, 8, 1)
    # 9216 voxels: a standard error of 0.52 % and 0.23 %, five of them: false alarm 1e-6
    tolerance = 5 * (level * (1 - level) / SIDE**2) ** 0.5
    for one in (expected(prior, "magnitude", 8), fused(found, prior)):
        assert covered(one, truth, level) == pytest.approx(level, abs=tolerance)


@pytest.mark.parametrize("worth", [even(15.0), even(40.0)], ids=["15", "40"])
def test_the_posterior_is_better_than_both(worth: Tensor) -> None:
    truth, found, prior = drawn(worth, 8, 1)
    together = fused(found, prior)
    alone = expected(prior, "magnitude", 8)
    assert error(together.sigma, truth) < 0.97 * min(error(alone.sigma, truth), error(found.sigma, truth))
    assert error(together.sigma, truth) == pytest.approx(float(together.relative_error().mean()), rel=0.05)


def test_it_is_the_mean_by_degrees_of_freedom() -> None:
    _, found, prior = drawn(halves(), 8, 2)
    together = fused(found, prior)
    torch.testing.assert_close(together.degrees_of_freedom, 8 + prior.freedom)
    variance = (8 * measured_variance(found) + prior.freedom * prior.variance) / (8 + prior.freedom)
    torch.testing.assert_close(measured_variance(together), variance)
    assert (together.kind, together.probes) == ("magnitude", 8)
    assert together.explained is found.explained


def test_probes_may_come_in_any_parts() -> None:
    _, first, prior = drawn(even(40.0), 8, 3)
    _, second, _ = drawn(even(40.0), 24, 4)
    both = plain((8 * measured_variance(first) + 24 * measured_variance(second)) / 32, 32)
    once = fused(both, prior)
    begun = fused(first, prior)
    twice = fused(second, Prior(variance=measured_variance(begun), freedom=begun.degrees_of_freedom))
    torch.testing.assert_close(twice.sigma, once.sigma)
    torch.testing.assert_close(twice.degrees_of_freedom, once.degrees_of_freedom)


def test_what_says_nothing_changes_nothing() -> None:
    _, found, prior = drawn(even(40.0), 8, 5)
    says = torch.ones(SIDE, SIDE, dtype=torch.bool)
    says[:30] = False
    together = fused(found, Prior(variance=torch.where(says, prior.variance, 0), freedom=prior.freedom))
    whole = fused(found, prior)
    for name in ("sigma", "degrees_of_freedom"):
        one = getattr(together, name)
        torch.testing.assert_close(one[:30], getattr(found, name)[:30])
        assert torch.equal(one[30:], getattr(whole, name)[30:])


@pytest.mark.parametrize("kind", ["magnitude", "complex"])
def test_what_is_expected_is_the_prior(kind: MapKind) -> None:
    prior = Prior(variance=torch.tensor([0.0, 1.0, 9.0]), freedom=torch.tensor([5.0, 50.0, 1000.0]))
    found = expected(prior, kind, 16)
    torch.testing.assert_close(measured_variance(found), prior.variance.double())
    torch.testing.assert_close(found.degrees_of_freedom, prior.freedom.double())
    assert found.sigma.dtype == torch.float64
    assert (found.kind, found.probes) == (kind, 16)
    assert not bool(found.explained.any())


def test_the_expected_sigma_has_no_bias() -> None:
    truth, _, prior = drawn(even(8.0), 8, 6)
    ratio = expected(prior, "magnitude", 8).sigma / truth.sqrt()
    # a relative deviation of 0.25: a standard error of 0.26 %, five of them
    assert float(ratio.mean()) == pytest.approx(1, abs=0.013)


def test_the_measured_variance_has_no_bias() -> None:
    truth, found, _ = drawn(even(1e6), 8, 8)
    # 9216 ratios of a standard deviation of 0.5: 0.5 %, four of them
    np.testing.assert_allclose(float((measured_variance(found) / truth).mean()), 1.0, atol=0.02)


# --- maps that are independent of a prediction


def complex_normal(generator: np.random.Generator, count: int) -> Tensor:
    """Of variance 1 per component."""
    parts = generator.standard_normal((2, count, SIDE, SIDE))
    return torch.complex(torch.from_numpy(parts[0]), torch.from_numpy(parts[1]))


def sketched(truth: Tensor, correlation: float, count: int, seed: int, *, covariate: bool = True) -> Sketch:
    """Of probes whose covariate is so much like them."""
    generator = np.random.default_rng(seed)
    known, other = complex_normal(generator, count), complex_normal(generator, count)
    phase = torch.polar(torch.ones(SIDE, SIDE, dtype=torch.float64), torch.full((SIDE, SIDE), 0.3).double())
    pushed = truth.sqrt() * phase * (correlation * known + (1 - correlation**2) ** 0.5 * other)
    return Sketch(
        sums=moments(pushed, phase * known if covariate else None),
        direction=phase,
        covariate_variance=torch.full((SIDE, SIDE), 2.0).double() if covariate else None,
        complex_linear=False,
        inside=torch.ones(SIDE, SIDE, dtype=torch.bool),
    )


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("count", [8, 16, 96])
def test_an_independent_map_covers_alone_and_fused(correlation: float, count: int) -> None:
    truth, _, prior = drawn(even(40.0), 8, 7)
    found = independent_map(sketched(truth, correlation, count, 9), "magnitude")
    # 9216 voxels: five standard errors are 1.1 %; of 8 probes the gain's own error is no small one
    assert covered(found, truth, 0.95) == pytest.approx(0.95, abs=0.03 if count == 8 else 0.02)
    together = fused(found, prior)
    assert covered(together, truth, 0.95) == pytest.approx(0.95, abs=0.02)
    assert error(together.sigma, truth) == pytest.approx(float(together.relative_error().mean()), rel=0.06)


@pytest.mark.parametrize(("correlation", "count", "most"), [(0.8, 16, 0.95), (0.8, 96, 0.82), (0.95, 16, 0.8)])
def test_it_is_better_than_the_plain_mean(correlation: float, count: int, most: float) -> None:
    truth, _, _ = drawn(even(40.0), 8, 7)
    state = sketched(truth, correlation, count, 9)
    plain_map = sketched(truth, correlation, count, 9, covariate=False).map()
    ratio = error(independent_map(state, "magnitude").sigma, truth) / error(plain_map.sigma, truth)
    assert ratio < most


def test_no_voxel_leans_on_others() -> None:
    truth = even(1.0)
    state = sketched(truth, 0.8, 16, 3)
    changed = truth.clone()
    changed[:, SIDE // 2 :] = 9.0
    other = sketched(changed, 0.8, 16, 3)
    # only the worth is pooled, which the scale of neighbours changes but a little
    one, two = (independent_map(each, "magnitude") for each in (state, other))
    left, right = slice(0, SIDE // 2 - 2), slice(SIDE // 2 + 2, None)
    torch.testing.assert_close(two.sigma[:, left], one.sigma[:, left])
    torch.testing.assert_close(two.sigma[:, right], 3 * one.sigma[:, right])


def test_it_is_the_regression_of_each_voxel() -> None:
    state = sketched(even(2.0), 0.95, 500, 4)
    found = independent_map(state, "magnitude")
    # r² of 0.9025 in truth
    torch.testing.assert_close(found.explained, even(0.9025), rtol=0, atol=0.02)
    torch.testing.assert_close(found.degrees_of_freedom / 500, even(1 / (1 - 0.9025**2)), rtol=0.15, atol=0)
    # 1/sqrt(2 ν), and six of them at most
    wanted = ((1 - 0.9025**2) / 1000) ** 0.5
    torch.testing.assert_close(found.sigma, even(2.0).sqrt(), rtol=6 * wanted, atol=0)
    assert float((found.sigma / 2**0.5 - 1).square().mean().sqrt()) == pytest.approx(wanted, rel=0.05)


def test_a_covariate_that_says_nothing_leaves_the_plain_mean() -> None:
    state = sketched(even(1.0), 0.0, 16, 5)
    gone = state.sums.w_abs * 0
    without = replace(state, sums=replace(state.sums, w_abs=gone, w_w=gone * 1j, u_w=gone * 1j, u_wc=gone * 1j))
    wanted = replace(state, covariate_variance=None).map()
    for name in ("sigma", "degrees_of_freedom"):
        torch.testing.assert_close(getattr(independent_map(without, "magnitude"), name), getattr(wanted, name))


@pytest.mark.parametrize(
    ("kind", "linear", "covariate"), [("complex", True, True), ("magnitude", True, True), ("magnitude", False, False)]
)
def test_other_maps_are_of_this_kind_already(kind: MapKind, linear: bool, covariate: bool) -> None:
    state = replace(sketched(even(1.0), 0.8, 16, 6, covariate=covariate), complex_linear=linear)
    found, wanted = independent_map(state, kind), state.map(kind)
    assert torch.equal(found.sigma, wanted.sigma)
    assert torch.equal(found.degrees_of_freedom, wanted.degrees_of_freedom)


def test_the_complex_map_is_the_sum_of_both_quadratures() -> None:
    state = sketched(even(1.0), 0.8, 16, 6)
    parts = [independent_map(replace(state, direction=turn * state.direction), "magnitude") for turn in (1, 1j)]
    found = independent_map(state, "complex")
    torch.testing.assert_close(measured_variance(found), sum(measured_variance(one) for one in parts))
    # with next to nothing in common their errors add up as those of independent numbers
    spreads = [measured_variance(one).square() / one.degrees_of_freedom for one in parts]
    alone = measured_variance(found).square() / (spreads[0] + spreads[1])
    assert float((found.degrees_of_freedom / alone).median()) == pytest.approx(1, abs=0.08)


def test_what_is_not_sure_of_the_covariates_variance_is_part_of_the_error() -> None:
    state = sketched(even(1.0), 0.9, 64, 7)
    doubtful = replace(state, covariate_freedom=even(100.0))
    for kind in ("magnitude", "complex"):
        sure, found = (independent_map(one, kind) for one in (state, doubtful))
        torch.testing.assert_close(found.sigma, sure.sigma, rtol=0.02, atol=0)
        # gains are near 0.9, so that 0.81 of the variance stands on it
        added = 1 / found.degrees_of_freedom - 1 / sure.degrees_of_freedom
        assert float(added.mean()) == pytest.approx(0.81**2 / 100, rel=0.15)
