"""From second-order sums to σ maps: the plain mean and the control variate, and the error that they state."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.noise.draws import complex_normal, phases, rms_error

from voxelsigma.noise.moments import moments
from voxelsigma.noise.sigma import MapKind, root_bias, sigma_map

seeds = st.integers(0, 2**32 - 1)


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
