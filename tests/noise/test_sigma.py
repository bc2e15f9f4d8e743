"""From second-order sums to σ maps: estimators, degrees of freedom, intervals."""

import dataclasses
import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from voxelsigma.noise.moments import Moments, accumulate, moments, projected
from voxelsigma.noise.sigma import MapKind, SigmaMap, exact_map, root_bias, sigma_map

seeds = st.integers(0, 2**32 - 1)

SUMS = tuple(field.name for field in dataclasses.fields(Moments) if field.name != "count")


def complex_normal(shape: tuple[int, ...], seed: int) -> Tensor:
    """Circular, E|z|² = 2."""
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randn((2, *shape), generator=generator, dtype=torch.float64)
    return torch.complex(parts[0], parts[1])


def phases(shape: tuple[int, ...], seed: int) -> Tensor:
    values = complex_normal(shape, seed)
    return values / values.abs()


def rms_error(estimate: Tensor, truth: Tensor | float) -> float:
    return float((estimate / truth - 1).square().mean().sqrt())


# --- sums


@settings(deadline=None, max_examples=20)
@given(first=st.integers(1, 9), second=st.integers(1, 9), seed=seeds)
def test_moments_of_two_batches_add_up(first: int, second: int, seed: int) -> None:
    u, w = complex_normal((2, first + second, 3, 4), seed)
    together = moments(u, w)
    apart = moments(u[:first], w[:first]) + moments(u[first:], w[first:])
    assert together.count == apart.count == first + second
    for field in dataclasses.fields(Moments):
        torch.testing.assert_close(getattr(apart, field.name), getattr(together, field.name), rtol=1e-12, atol=1e-12)


def same(one: Moments, other: Moments) -> bool:
    return one.count == other.count and all(torch.equal(getattr(one, name), getattr(other, name)) for name in SUMS)


@settings(deadline=None, max_examples=20)
@given(parts=st.lists(st.integers(1, 5), min_size=1, max_size=4), covariate=st.booleans(), seed=seeds)
def test_sums_in_place_are_those_of_all_probes(parts: list[int], covariate: bool, seed: int) -> None:
    u, w = complex_normal((2, sum(parts), 3, 4), seed)
    total: Moments | None = None
    for u_part, w_part in zip(u.split(parts), w.split(parts), strict=True):
        given_w = w_part if covariate else None
        total = moments(u_part, given_w) if total is None else accumulate(total, u_part, given_w)
    assert total is not None
    # one by one in the same order: not even rounding differs
    assert same(total, moments(u, w if covariate else None))


@settings(deadline=None, max_examples=20)
@given(first=st.integers(1, 9), second=st.integers(1, 9), seed=seeds)
def test_the_difference_is_of_the_later_probes(first: int, second: int, seed: int) -> None:
    u, w = complex_normal((2, first + second, 3, 4), seed)
    later = moments(u, w) - moments(u[:first], w[:first])
    expected = moments(u[first:], w[first:])
    assert later.count == second
    for name in SUMS:
        torch.testing.assert_close(getattr(later, name), getattr(expected, name), rtol=1e-12, atol=1e-12)


def test_a_copy_stays_when_probes_are_added() -> None:
    u, w = complex_normal((2, 6, 3, 4), 3)
    total = moments(u[:4], w[:4])
    kept = total.copy()
    assert same(kept, total)
    more = accumulate(total, u[4:], w[4:])
    # the sums are written into, whatever the old ones say of their number
    assert more.u_abs is total.u_abs
    assert same(kept, moments(u[:4], w[:4]))
    assert same(more, moments(u, w))
    # a difference is no view either
    later = more - kept
    accumulate(more, u, w)
    torch.testing.assert_close(later.u_w, moments(u[4:], w[4:]).u_w)


@settings(deadline=None, max_examples=20)
@given(count=st.integers(1, 9), seed=seeds)
def test_projected_is_the_sum_of_products_of_in_phase_components(count: int, seed: int) -> None:
    (u, w), direction = complex_normal((2, count, 3, 4), seed), phases((3, 4), seed + 1)
    a, b = (direction.conj() * u).real, (direction.conj() * w).real
    sums = moments(u, w)
    torch.testing.assert_close(projected(sums.u_w, sums.u_wc, direction), (a * b).sum(dim=0))
    torch.testing.assert_close(projected(sums.u_u, sums.u_abs, direction), (a * a).sum(dim=0))
    torch.testing.assert_close(projected(sums.w_w, sums.w_abs, direction), (b * b).sum(dim=0))


def test_moments_are_double_and_without_a_covariate_zero() -> None:
    u = complex_normal((5, 2, 2), 0).to(torch.complex64)
    sums = moments(u, None)
    assert sums.u_abs.dtype == torch.float64
    assert sums.u_u.dtype == torch.complex128
    torch.testing.assert_close(sums.u_abs, u.to(torch.complex128).abs().square().sum(dim=0))
    for empty in (sums.w_abs, sums.w_w, sums.u_wc, sums.u_w):
        assert not bool(empty.any())


# --- plain estimates


def test_plain_maps_are_the_means() -> None:
    u, direction = complex_normal((20, 4, 5), 1), phases((4, 5), 2)
    in_phase = (direction.conj() * u).real
    sums = moments(u, None)
    magnitude = sigma_map(sums, "magnitude", direction=direction)
    torch.testing.assert_close(magnitude.sigma, in_phase.square().mean(dim=0).sqrt() / root_bias(torch.tensor(19.0)))
    torch.testing.assert_close(magnitude.degrees_of_freedom, torch.full((4, 5), 19.0, dtype=torch.float64))
    whole = sigma_map(sums, "complex", direction=direction)
    torch.testing.assert_close(whole.sigma * root_bias(whole.degrees_of_freedom), u.abs().square().mean(dim=0).sqrt())
    linear = sigma_map(sums, "magnitude", direction=direction, complex_linear=True)
    torch.testing.assert_close(linear.sigma, (u.abs().square().mean(dim=0) / 2).sqrt() / root_bias(torch.tensor(40.0)))
    torch.testing.assert_close(linear.degrees_of_freedom, torch.full((4, 5), 40.0, dtype=torch.float64))
    for result in (magnitude, whole, linear):
        assert result.probes == 20
        assert not bool(result.explained.any())
    assert (magnitude.kind, whole.kind, linear.kind) == ("magnitude", "complex", "magnitude")


@pytest.mark.parametrize("circularity", [0.0, 0.5, 0.9, 1.0])
def test_degrees_of_freedom_of_a_plain_complex_map_follow_the_circularity(circularity: float) -> None:
    count = 400
    parts = complex_normal((count, 40, 40), 3)
    # var(re) - var(im) = κ · 2
    u = torch.complex(parts.real * math.sqrt(1 + circularity), parts.imag * math.sqrt(1 - circularity))
    result = sigma_map(moments(u, None), "complex", direction=torch.ones(40, 40, dtype=torch.complex128))
    expected = 2 * count / (1 + circularity**2)
    assert float(result.degrees_of_freedom.mean()) == pytest.approx(expected, rel=0.01)
    # 1600 voxels give their own spread to 1/√3200 = 1.8 %; 5 of them: false alarm 1e-6
    assert rms_error(result.sigma, math.sqrt(2)) == pytest.approx(1 / math.sqrt(2 * expected), rel=0.09)


# --- control variate


def test_regression_on_amplitudes_is_its_formula() -> None:
    # one map-wide r² of nearly 1 and many probes: shrinkage is out of sight
    count = 4000
    w, rest, direction = complex_normal((count, 1, 1), 4), complex_normal((count, 1, 1), 5), phases((1, 1), 6)
    u = 1.5 * w + 0.1 * rest
    result = sigma_map(moments(u, w), "magnitude", direction=direction, covariate_variance=torch.full((1, 1), 2.0))
    a, b = (direction.conj() * u).real, (direction.conj() * w).real
    gain = (a * b).sum() / (b * b).sum()
    expected = gain**2 * 1.0 + (a - gain * b).square().mean()
    assert float(result.sigma) == pytest.approx(float(expected.sqrt()), rel=1e-5)
    assert float(result.explained) == pytest.approx(1.5**2 / (1.5**2 + 0.1**2), abs=1e-3)


def test_complex_map_regresses_each_quadrature_on_its_own() -> None:
    count = 500
    w, rest, direction = complex_normal((count, 1, 1), 7), complex_normal((count, 1, 1), 8), phases((1, 1), 22)
    in_phase, across = (direction.conj() * w).real, (direction.conj() * w).imag
    u = direction * (1.2 * in_phase + 0.4j * across + 0.05 * rest)
    result = sigma_map(moments(u, w), "complex", direction=direction, covariate_variance=torch.full((1, 1), 2.0))
    expected = 0.0
    for found, known in (((direction.conj() * u).real, in_phase), ((direction.conj() * u).imag, across)):
        gain = (found * known).sum() / (known * known).sum()
        expected += float(gain**2 + (found - gain * known).square().mean())
    biased = float(result.sigma * root_bias(result.degrees_of_freedom))
    assert biased == pytest.approx(math.sqrt(expected), rel=1e-4)
    assert float(result.sigma) == pytest.approx(math.sqrt(1.2**2 + 0.4**2 + 2 * 0.05**2), rel=5e-3)


@pytest.mark.parametrize("kind", ["magnitude", "complex"])
@pytest.mark.parametrize("complex_linear", [False, True])
def test_covariate_that_explains_everything_leaves_no_error(kind: MapKind, complex_linear: bool) -> None:
    w, direction = complex_normal((8, 6, 6), 9), torch.full((6, 6), 1j).exp()
    turned = direction.conj() * w
    u = (0.7 - 1.1j) * w if complex_linear else direction * torch.complex(0.7 * turned.real, 1.1 * turned.imag)
    variance = torch.full((6, 6), 2.0)
    result = sigma_map(
        moments(u, w), kind, direction=direction, covariate_variance=variance, complex_linear=complex_linear
    )
    parts = {"magnitude": (0.7**2 + 1.1**2) if complex_linear else 0.7**2, "complex": 0.7**2 + 1.1**2}
    deviation = math.sqrt(parts[kind] * (2 if complex_linear and kind == "complex" else 1))
    assert rms_error(result.sigma, deviation) < 1e-3
    assert bool((result.relative_error() < 0.01).all())


@pytest.mark.parametrize("slope", [0.0, 0.6])
def test_stated_error_of_a_complex_map_whose_quadratures_share_noise(slope: float) -> None:
    """Noise along a line that is neither in phase nor out of it, beside what the covariate explains."""
    count, shape = 32, (64, 64)
    w, rest, direction = complex_normal((count, *shape), 23), complex_normal((count, *shape), 24), phases(shape, 25)
    line = complex_normal((1, 1), 26)
    u = 0.8 * w + 0.5 * rest + 2 * slope * (line / line.abs()) * direction * rest.roll(1, dims=0).real
    found = sigma_map(moments(u, w), "complex", direction=direction, covariate_variance=torch.full(shape, 2.0))
    truth = math.sqrt(2 * 0.8**2 + 2 * 0.5**2 + 4 * slope**2)
    # 4096 voxels give the measured error to 1.1 %; where all gains are alike it is stated some % too large
    assert 0.86 < rms_error(found.sigma, truth) / float(found.relative_error().median()) < 1.07


@pytest.mark.parametrize("kind", ["magnitude", "complex"])
@pytest.mark.parametrize("correlation", [0.4, 0.7, 0.9])
def test_stated_error_is_the_error_with_a_covariate(kind: MapKind, correlation: float) -> None:
    count, shape = 64, (64, 64)
    w, rest = complex_normal((count, *shape), 10), complex_normal((count, *shape), 11)
    u = correlation * w + math.sqrt(1 - correlation**2) * rest
    direction = torch.ones(shape, dtype=torch.complex128)
    truth = 1.0 if kind == "magnitude" else math.sqrt(2)
    variance = torch.full(shape, 2.0)
    result = sigma_map(moments(u, w), kind, direction=direction, covariate_variance=variance)
    plain = sigma_map(moments(u, None), kind, direction=direction)
    measured, stated = rms_error(result.sigma, truth), float(result.relative_error().median())
    # 4096 voxels give the measured error to 1.1 %; where all gains are alike it is stated some % too large
    assert 0.87 * stated < measured < 1.04 * stated
    gain = math.sqrt(1 - correlation**4)
    # the gain is the same everywhere, and neighbours tell it: what is left is the rest's own error
    assert (1 - correlation**2) * rms_error(plain.sigma, truth) * 0.9 < measured < gain * rms_error(plain.sigma, truth)
    assert float(result.explained.mean()) == pytest.approx(correlation**2, abs=0.01)


@pytest.mark.parametrize("kind", ["magnitude", "complex"])
@pytest.mark.parametrize("complex_linear", [False, True])
def test_covariate_that_explains_nothing_costs_nothing(kind: MapKind, complex_linear: bool) -> None:
    count, shape = 16, (96, 96)
    u, w = complex_normal((count, *shape), 12), complex_normal((count, *shape), 13)
    direction = torch.ones(shape, dtype=torch.complex128)
    truth = 1.0 if kind == "magnitude" else math.sqrt(2)
    results = [
        sigma_map(moments(u, w), kind, direction=direction, covariate_variance=variance, complex_linear=complex_linear)
        for variance in (None, torch.full(shape, 2.0))
    ]
    plain, varied = (rms_error(result.sigma, truth) for result in results)
    # both see the same probes, so their quotient is known far better than each: to about 0.2 %
    assert varied < 1.02 * plain


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(2, 12),
    mixing=st.floats(-3, 3),
    scale=st.sampled_from([0.0, 1e-12, 1e-3, 1.0, 1e6]),
    known=st.sampled_from([0.0, 1e-3, 2.0, 1e4]),
    kind=st.sampled_from(["magnitude", "complex"]),
    complex_linear=st.booleans(),
    seed=seeds,
)
def test_maps_are_finite_and_positive_for_any_covariate(
    count: int, mixing: float, scale: float, known: float, kind: MapKind, complex_linear: bool, seed: int
) -> None:
    w, rest = scale * complex_normal((count, 5, 6), seed), complex_normal((count, 5, 6), seed + 1)
    # some voxels no covariate reaches, and some no noise at all
    w[:, :2] = 0
    u = mixing * w + rest
    u[:, :, :1] = 0
    variance = torch.full((5, 6), known).double() * scale**2
    variance[:2] = 0
    result = sigma_map(
        moments(u, w),
        kind,
        direction=phases((5, 6), seed + 2),
        covariate_variance=variance,
        complex_linear=complex_linear,
    )
    assert bool(result.sigma.isfinite().all())
    assert bool((result.sigma[2:, 1:] > 0).all())
    assert bool((result.sigma >= 0).all())
    assert bool((result.degrees_of_freedom >= 1 - 1e-9).all())
    assert bool(((result.explained >= 0) & (result.explained <= 1)).all())
    lower, upper = result.interval()
    assert bool((lower <= result.sigma * (1 + 1e-9)).all())
    assert bool((upper >= result.sigma * (1 - 1e-9)).all())


def test_where_the_covariate_is_zero_the_map_is_the_plain_one() -> None:
    u, w = complex_normal((16, 8, 8), 14), complex_normal((16, 8, 8), 15)
    w[:, :, :4] = 0
    variance = torch.where(torch.arange(8) < 4, 0.0, 2.0).expand(8, 8)
    direction = torch.ones(8, 8, dtype=torch.complex128)
    kinds: tuple[MapKind, ...] = ("magnitude", "complex")
    for kind in kinds:
        varied = sigma_map(moments(u, w), kind, direction=direction, covariate_variance=variance)
        plain = sigma_map(moments(u, None), kind, direction=direction)
        raw_varied = varied.sigma * root_bias(varied.degrees_of_freedom)
        raw_plain = plain.sigma * root_bias(plain.degrees_of_freedom)
        torch.testing.assert_close(raw_varied[:, :4], raw_plain[:, :4])


@pytest.mark.parametrize("scale", [1e-4, 0.3, 3.0, 1e5])
def test_maps_scale_with_their_probes(scale: float) -> None:
    """Of voxels that are alone among their kind too, whose neighbours tell nothing but rounding."""
    shape = (40, 40)
    w, rest = complex_normal((16, *shape), 18), complex_normal((16, *shape), 19)
    u = 0.8 * w + 0.6 * rest
    inside = torch.rand(shape, generator=torch.Generator().manual_seed(20)) < 0.06
    for kind in ("magnitude", "complex"):
        one, other = (
            sigma_map(
                moments(factor * u, factor * w),
                "complex" if kind == "complex" else "magnitude",
                direction=phases(shape, 21),
                covariate_variance=torch.full(shape, 2 * factor**2).double(),
                inside=inside,
            )
            for factor in (1.0, scale)
        )
        torch.testing.assert_close(other.sigma / scale, one.sigma, rtol=1e-6, atol=0)
        torch.testing.assert_close(other.degrees_of_freedom, one.degrees_of_freedom, rtol=1e-5, atol=0)


@pytest.mark.parametrize("turn", [0.0, 0.6])
def test_stated_error_where_next_to_all_is_explained(turn: float) -> None:
    """Where a network turns phases, one quadrature errs as the other does, with the other sign."""
    count, shape = 16, (64, 64)
    w, rest = complex_normal((count, *shape), 30), complex_normal((count, *shape), 31)
    # gains of their own, so that nothing is learned from neighbours
    factor = 1 + 0.5 * complex_normal(shape, 32).real
    u = factor * (complex(math.cos(turn), math.sin(turn)) * w + 0.1 * rest)
    direction = torch.ones(shape, dtype=torch.complex128)
    found = sigma_map(moments(u, w), "complex", direction=direction, covariate_variance=torch.full(shape, 2.0))
    lower, upper = found.interval()
    truth = factor.abs() * math.sqrt(2 * 1.01)
    # 4096 voxels: a standard error of 0.34 %
    assert 0.92 < float(((lower <= truth) & (truth <= upper)).double().mean()) < 0.99


@pytest.mark.parametrize("kind", ["magnitude", "complex"])
@pytest.mark.parametrize("complex_linear", [False, True])
def test_doubt_of_the_covariates_variance_is_part_of_the_error(kind: MapKind, complex_linear: bool) -> None:
    shape, worth = (32, 32), 50.0
    w, rest, direction = complex_normal((32, *shape), 27), complex_normal((32, *shape), 28), phases(shape, 29)
    sums = moments(0.9 * w + math.sqrt(1 - 0.81) * rest, w)
    sure, found = (
        sigma_map(
            sums,
            kind,
            direction=direction,
            covariate_variance=torch.full(shape, 2.0),
            covariate_freedom=doubt,
            complex_linear=complex_linear,
        )
        for doubt in (None, torch.full(shape, worth))
    )
    torch.testing.assert_close(found.sigma, sure.sigma, rtol=0.02, atol=0)
    added = 1 / found.degrees_of_freedom - 1 / (sure.degrees_of_freedom + (1 if complex_linear else 0))
    assert float(added.mean()) == pytest.approx(0.81**2 / worth, rel=0.12)


# --- bias and intervals


def test_root_bias_is_the_mean_of_a_chi_distribution() -> None:
    freedom = np.array([0.5, 1, 2, 3, 7, 15.3, 100, 999, 9999.0, 10001.0, 1e6])
    expected = np.sqrt(2 / freedom) * np.exp(
        scipy.special.gammaln((freedom + 1) / 2) - scipy.special.gammaln(freedom / 2)
    )
    np.testing.assert_allclose(root_bias(torch.from_numpy(freedom)), expected, rtol=1e-8)
    # the mean of √(χ²/ν) itself, by quadrature
    for nu in (1.0, 4.0, 31.0):
        mean = scipy.stats.chi(nu).mean() / math.sqrt(nu)
        assert float(root_bias(torch.tensor(nu))) == pytest.approx(mean, rel=1e-6)
    assert float(root_bias(torch.tensor(torch.inf))) == 1.0


@pytest.mark.parametrize("count", [2, 4, 8, 32])
def test_sigma_is_unbiased_at_few_probes(count: int) -> None:
    u = complex_normal((count, 200, 200), 16)
    result = sigma_map(moments(u, None), "complex", direction=torch.ones(200, 200, dtype=torch.complex128))
    linear = sigma_map(
        moments(u, None), "magnitude", direction=torch.ones(200, 200, dtype=torch.complex128), complex_linear=True
    )
    # 40000 voxels of relative error 1/√(4 S), at most 0.35: 0.18 % of the mean; 5 of them: false alarm 1e-6
    assert float(linear.sigma.mean()) == pytest.approx(1, abs=0.009)
    # not knowing that it is circular, ν is judged by the sample: a little low at 2 probes
    assert float(result.sigma.mean()) == pytest.approx(math.sqrt(2), rel=0.06 if count < 8 else 0.01)


@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
@pytest.mark.parametrize("freedom", [3.0, 15.0, 200.0])
def test_intervals_cover_at_their_level(level: float, freedom: float) -> None:
    rng, voxels, truth = np.random.default_rng(17), 100_000, 1.7
    raw = truth * np.sqrt(rng.chisquare(freedom, voxels) / freedom)
    nu = torch.full((voxels,), freedom, dtype=torch.float64)
    estimate = SigmaMap(
        sigma=torch.from_numpy(raw) / root_bias(nu),
        degrees_of_freedom=nu,
        kind="magnitude",
        probes=16,
        explained=torch.zeros(voxels),
    )
    lower, upper = estimate.interval(level)
    # binomial: √(p(1-p)/n) is at most 0.16 %; 5 of them a side: false alarm 1e-6
    tolerance = 5 * math.sqrt(level * (1 - level) / voxels)
    assert float(((lower <= truth) & (truth <= upper)).double().mean()) == pytest.approx(level, abs=tolerance)
    # equal tails
    assert float((lower > truth).double().mean()) == pytest.approx((1 - level) / 2, abs=tolerance)
    assert bool((lower < upper).all())


def test_relative_error_is_that_of_chi_square() -> None:
    nu = torch.tensor([0.5, 8.0, 200.0, torch.inf])
    result = SigmaMap(sigma=torch.ones(4), degrees_of_freedom=nu, kind="complex", probes=9, explained=torch.zeros(4))
    torch.testing.assert_close(result.relative_error(), torch.tensor([1.0, 0.25, 0.05, 0.0]))


def test_exact_maps_have_no_error_and_intervals_of_no_width() -> None:
    variance = torch.tensor([[4.0, 0.0], [2.25, 1.0]], dtype=torch.float64)
    result = exact_map(variance, "magnitude")
    torch.testing.assert_close(result.sigma, variance.sqrt())
    assert result.probes == 0
    assert result.kind == "magnitude"
    assert not bool(result.relative_error().any())
    for bound in result.interval(0.99):
        torch.testing.assert_close(bound, result.sigma)
