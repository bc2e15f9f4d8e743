"""Functionals, correlations and spectra against a linear reconstruction whose covariance is known."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from voxelsigma.noise.functionals import (
    FunctionalNoise,
    Functionals,
    effective_voxels,
    functional_noise,
    independent_sum,
    noise_correlation,
    voxel_sigma,
)
from voxelsigma.noise.moments import moments
from voxelsigma.noise.sigma import root_bias, sigma_map
from voxelsigma.noise.spectrum import Spectrum, noise_power_spectrum

seeds = st.integers(0, 2**32 - 1)
SHAPE = (6, 7)
VOXELS = 42


def random_complex(shape: tuple[int, ...], seed: int) -> Tensor:
    """Circular, E|z|² = 2."""
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randn((2, *shape), generator=generator, dtype=torch.float64)
    return torch.complex(parts[0], parts[1])


class Dense:
    """u = P v + Q v*: a real-linear map of white noise with E|v|² = 2, as dense matrices; Q = 0 is complex-linear."""

    def __init__(self, *, complex_linear: bool, seed: int = 0) -> None:
        self.complex_linear = complex_linear
        self.p = random_complex((VOXELS, 30), seed) / 8
        self.q = torch.zeros_like(self.p) if complex_linear else random_complex((VOXELS, 30), seed + 1) / 16
        phase = random_complex(SHAPE, seed + 2)
        self.direction = phase / phase.abs()
        # E[c cᴴ] and E[c cᵀ] of c = e^{-iφ} u
        turn = self.direction.flatten().conj()
        p, q = turn[:, None] * self.p, turn[:, None] * self.q
        self.hermitian = 2 * (p @ p.mH + q @ q.mH)
        self.plain = 2 * (p @ q.mT + q @ p.mT)
        self.in_phase = (self.hermitian + self.plain).real / 2

    def probes(self, count: int, seed: int, size: int = 64) -> list[Tensor]:
        v = random_complex((count, 30), seed)
        return list((v @ self.p.mT + v.conj() @ self.q.mT).reshape(count, *SHAPE).split(size))


@pytest.fixture(params=[True, False], ids=["complex_linear", "real_linear"])
def dense(request: pytest.FixtureRequest) -> Dense:
    return Dense(complex_linear=request.param)


def some_weights(rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn((rows, *SHAPE), generator=generator, dtype=torch.float64)
    return weights * (torch.rand((rows, *SHAPE), generator=generator) < 0.6)


# --- functionals


def test_functionals_are_their_sums() -> None:
    images, weights, phase = random_complex((5, *SHAPE), 1), some_weights(3, 2), random_complex(SHAPE, 3)
    direction = phase / phase.abs()
    found = Functionals.dense(weights)
    torch.testing.assert_close(found.of(images), torch.einsum("ryx,pyx->pr", weights.to(images.dtype), images))
    turned = torch.einsum("ryx,pyx->pr", weights, (direction.conj() * images).real)
    torch.testing.assert_close(found.of(images, direction).real, turned)
    labels = torch.randint(0, 4, SHAPE, generator=torch.Generator().manual_seed(4))
    counts = torch.bincount(labels.flatten(), minlength=4)[1:]
    means = Functionals.of_labels(labels, 1.0 / counts).of(images)
    for row in range(3):
        torch.testing.assert_close(means[:, row], images[:, labels == row + 1].mean(dim=1))


def test_sigma_of_functionals_is_the_closed_form(dense: Dense) -> None:
    """6 functionals, 20,000 probes: 5 standard errors, false alarm 4e-6."""
    weights = some_weights(6, 5)
    flat = weights.flatten(start_dim=1)
    linear = dense.complex_linear
    functionals = Functionals.dense(weights)
    found = functional_noise(dense.probes(20_000, 6), functionals, dense.direction, complex_linear=linear)
    covariance = flat @ dense.in_phase @ flat.mT
    nu = 40_000 if linear else 19_999
    assert found.sigma.degrees_of_freedom.tolist() == [nu] * 6
    torch.testing.assert_close(found.sigma.sigma, covariance.diagonal().sqrt(), rtol=5 / math.sqrt(2 * nu), atol=0)
    scale = covariance.diagonal().sqrt()
    # an entry's standard error is at most √2/√ν of its deviations' product; 21 entries, false alarm 1e-5
    error = (found.covariance - covariance) / (scale[:, None] * scale[None, :])
    assert float(error.abs().max()) < 5 * math.sqrt(2 / nu)
    torch.testing.assert_close(found.correlation().diagonal(), torch.ones(6, dtype=torch.float64))
    assert float(torch.linalg.eigvalsh(found.covariance)[0]) >= -1e-12


def test_sigma_of_complex_functionals_is_the_closed_form(dense: Dense) -> None:
    weights = random_complex((4, *SHAPE), 7)
    flat = weights.flatten(start_dim=1) * dense.direction.flatten()
    found = functional_noise(
        dense.probes(20_000, 8),
        Functionals.dense(weights),
        None,
        kind="complex",
        complex_linear=dense.complex_linear,
    )
    expected = flat @ dense.hermitian @ flat.mH
    # 20,000 degrees of freedom at least: 5 standard errors, false alarm 2e-6
    torch.testing.assert_close(found.sigma.sigma, expected.diagonal().real.sqrt(), rtol=0.025, atol=0)
    scale = expected.diagonal().real.sqrt()
    assert float(((found.covariance - expected) / (scale[:, None] * scale[None, :])).abs().max()) < 5 / math.sqrt(1e4)


def test_the_stated_interval_covers(dense: Dense) -> None:
    """95 % of 1,500 repetitions at 16 probes: binomial, 4 standard errors = 2.3 %, false alarm 6e-5."""
    weights = some_weights(1, 9)
    truth = float((weights.flatten() @ dense.in_phase @ weights.flatten()).sqrt())
    probes = torch.cat(dense.probes(16 * 1500, 10)).split(16)
    functionals = Functionals.dense(weights)
    inside = 0
    for part in probes:
        found = functional_noise([part], functionals, dense.direction, complex_linear=dense.complex_linear)
        lower, upper = found.sigma.interval()
        inside += bool(lower[0] <= truth <= upper[0])
    assert inside / 1500 == pytest.approx(0.95, abs=0.023)


def test_one_voxel_is_the_sigma_maps_voxel(dense: Dense) -> None:
    probes = dense.probes(40, 11, size=16)
    linear = dense.complex_linear
    expected = sigma_map(
        moments(torch.cat(probes), None), "magnitude", direction=dense.direction, complex_linear=linear
    )
    every = Functionals.dense(torch.eye(VOXELS, dtype=torch.float64).reshape(VOXELS, *SHAPE))
    found = functional_noise(probes, every, dense.direction, complex_linear=linear).sigma
    torch.testing.assert_close(found.sigma, expected.sigma.flatten())
    for one, other in zip(found.interval(), expected.interval(), strict=True):
        torch.testing.assert_close(one, other.flatten())
    again = voxel_sigma(probes, dense.direction, complex_linear=linear)
    torch.testing.assert_close(again.sigma, expected.sigma)


@settings(deadline=None, max_examples=20)
@given(seed=seeds, factor=st.floats(1e-3, 1e3), count=st.integers(2, 20), linear=st.booleans())
def test_sigma_scales_with_its_weights(seed: int, factor: float, count: int, linear: bool) -> None:
    probes, weights = random_complex((count, *SHAPE), seed), some_weights(3, seed)
    direction = torch.ones(SHAPE, dtype=torch.complex128)
    one, other = (
        functional_noise([probes], Functionals.dense(scale * weights), direction, complex_linear=linear)
        for scale in (1.0, -factor)
    )
    torch.testing.assert_close(other.sigma.sigma, factor * one.sigma.sigma)
    torch.testing.assert_close(other.covariance, factor**2 * one.covariance)


@settings(deadline=None, max_examples=20)
@given(seed=seeds, counts=st.lists(st.integers(2, 30), min_size=1, max_size=4))
def test_variances_of_independent_planes_add(seed: int, counts: list[int]) -> None:
    direction = torch.ones(SHAPE, dtype=torch.complex128)
    parts: list[FunctionalNoise] = [
        functional_noise(
            [random_complex((count, *SHAPE), seed + plane)], Functionals.dense(some_weights(2, seed + plane)), direction
        )
        for plane, count in enumerate(counts)
    ]
    found = independent_sum(parts)
    torch.testing.assert_close(found.covariance, torch.stack([part.covariance for part in parts]).sum(dim=0))
    freedom = found.sigma.degrees_of_freedom
    torch.testing.assert_close((found.sigma.sigma * root_bias(freedom)).square(), found.covariance.diagonal())
    smallest = min(count - 1 for count in counts)
    assert bool((freedom >= smallest * (1 - 1e-9)).all())
    assert bool((freedom <= sum(count - 1 for count in counts) * (1 + 1e-9)).all())
    if len(parts) == 1:
        torch.testing.assert_close(found.sigma.sigma, parts[0].sigma.sigma)


def test_a_functional_that_a_plane_does_not_touch_adds_nothing() -> None:
    direction = torch.ones(SHAPE, dtype=torch.complex128)
    probes = random_complex((10, *SHAPE), 12)
    weights = some_weights(2, 13)
    weights[1] = 0
    one = functional_noise([probes], Functionals.dense(weights), direction)
    two = functional_noise([probes], Functionals.dense(weights.flip(0)), direction)
    both = independent_sum([one, two])
    assert both.sigma.sigma[0] == one.sigma.sigma[0]
    nothing = independent_sum([one, one])
    assert float(nothing.sigma.sigma[1]) == 0
    assert float(nothing.correlation()[1, 1]) == 0


def test_effective_voxels_of_known_correlations() -> None:
    # independent voxels of any deviations: n; the same noise in all: 1
    assert effective_voxels(10, 10 * 0.01 * 4, 0.4) == pytest.approx(10)
    assert effective_voxels(10, 10 * 0.01 * 4, 4.0) == pytest.approx(1)
    assert math.isnan(effective_voxels(10, 0.0, 0.0))


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_probes_are_refused(count: int) -> None:
    direction = torch.ones(SHAPE, dtype=torch.complex128)
    batches = [random_complex((1, *SHAPE), 1)] * count
    functionals = Functionals.dense(torch.ones(1, *SHAPE))
    for question in (
        lambda: functional_noise(batches, functionals, direction),
        lambda: voxel_sigma(batches, direction),
        lambda: noise_correlation(batches, direction, (0, 0)),
        lambda: noise_power_spectrum(batches, direction),
    ):
        with pytest.raises(ValueError, match=f"{count} pushed probes; a variance needs at least 2"):
            question()


# --- correlation


def test_correlation_is_the_closed_form(dense: Dense) -> None:
    """42 voxels, 20,000 probes: 5 standard errors, false alarm 2e-5."""
    y, x = 2, 3
    linear = dense.complex_linear
    found = noise_correlation(dense.probes(20_000, 14), dense.direction, (y, x), complex_linear=linear)
    deviation = dense.in_phase.diagonal().sqrt()
    number = y * SHAPE[1] + x
    expected = dense.in_phase[number] / (deviation[number] * deviation)
    assert found.observations == (40_000 if linear else 20_000)
    assert float((found.coefficient.flatten() - expected).abs().max()) < 5 / math.sqrt(found.observations)
    assert float(found.coefficient[y, x]) == pytest.approx(1)


def test_the_interval_of_a_correlation_covers(dense: Dense) -> None:
    """95 % of 1,000 repetitions at 16 probes; 4 standard errors are 2.8 %, false alarm 6e-5; a wider one is allowed."""
    deviation = dense.in_phase.diagonal().sqrt()
    expected = (dense.in_phase[0] / (deviation[0] * deviation)).reshape(SHAPE)
    inside = 0
    for part in torch.cat(dense.probes(16_000, 15)).split(16):
        lower, upper = noise_correlation(
            [part], dense.direction, (0, 0), complex_linear=dense.complex_linear
        ).interval()
        inside += bool(lower[0, 1] <= expected[0, 1] <= upper[0, 1])
    assert 0.95 - 0.028 <= inside / 1000 <= (1.0 if dense.complex_linear else 0.95 + 0.028)


def test_a_correlation_with_few_probes_or_no_noise_is_told_so() -> None:
    direction = torch.ones(SHAPE, dtype=torch.complex128)
    probes = random_complex((2, *SHAPE), 16)
    probes[:, 1, 1] = 0
    found = noise_correlation([probes], direction, (0, 0))
    assert float(found.coefficient[1, 1]) == 0
    lower, upper = found.interval()
    assert (float(lower.max()), float(upper.min())) == (-1, 1)


# --- spectrum


def stationary(count: int, shape: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    """Circulant complex noise by a filter with complex, lopsided response, and E|c|² spectrum in `fft` order."""
    rows, columns = (torch.fft.fftfreq(length, dtype=torch.float64) for length in shape)
    response = torch.exp(-8 * (rows[:, None] - 0.1).square() - 5 * columns[None, :].square())
    white = torch.fft.fft2(random_complex((count, *shape), seed), norm="ortho")
    return torch.fft.ifft2(white * response, norm="ortho"), 2 * response.square()


@pytest.mark.parametrize("complex_linear", [False, True])
@pytest.mark.parametrize("shape", [(12, 16), (9, 15)])
def test_spectrum_is_the_filters(complex_linear: bool, shape: tuple[int, int]) -> None:
    """All frequencies, 4,000 probes, within the χ² interval of level 1 - 1e-7: false alarm 2e-5."""
    spacing = (1.5, 0.5)
    direction = torch.full(shape, 1j, dtype=torch.complex128).exp()
    draws, power = stationary(4000, shape, 17)
    found = noise_power_spectrum(
        (draws * direction).split(100), direction, spacing=spacing, complex_linear=complex_linear
    )
    mirrored = power.roll((-1, -1), dims=(0, 1)).flip((0, 1))
    expected = torch.fft.fftshift((power + mirrored) / 4) * spacing[0] * spacing[1]
    nu = found.degrees_of_freedom.numpy()
    ratio = (found.power / expected).numpy() * nu
    assert (ratio > scipy.stats.chi2.ppf(0.5e-7, nu)).all()
    assert (ratio < scipy.stats.chi2.isf(0.5e-7, nu)).all()
    assert int((nu == (8000 if complex_linear else 4000)).sum()) == (4 if shape == (12, 16) else 1)
    np.testing.assert_allclose(found.frequencies[1], np.fft.fftshift(np.fft.fftfreq(shape[1], 0.5)))
    # the rings: closed form within 5 of their own standard errors
    radius = torch.hypot(found.frequencies[0][:, None], found.frequencies[1][None, :])
    width = float(found.radial_frequency[1])
    for ring, centre in enumerate(found.radial_frequency.tolist()):
        mean = float(expected[(radius / width).round() == ring].mean())
        assert found.radial_power[ring] == pytest.approx(mean, abs=5 * float(found.radial_error[ring])), centre


def variance_of(draws: Tensor, taper: Tensor) -> float:
    return float((taper * draws.real.square().mean(dim=0)).sum() / taper.sum())


def test_the_spectrums_integral_is_the_variance() -> None:
    shape = (10, 14)
    draws = random_complex((20, *shape), 18) * torch.linspace(0.2, 3, 14)
    direction = torch.ones(shape, dtype=torch.complex128)
    for spacing in ((1.0, 1.0), (0.3, 2.5)):
        plain: Spectrum = noise_power_spectrum([draws], direction, spacing=spacing)
        assert plain.variance == pytest.approx(variance_of(draws, torch.ones(shape)))
        hann = noise_power_spectrum([draws], direction, spacing=spacing, window="hann")
        rows, columns = (torch.from_numpy(np.sin(np.pi * (np.arange(n) + 0.5) / n) ** 4) for n in shape)
        assert hann.variance == pytest.approx(variance_of(draws, rows[:, None] * columns[None, :]))


def test_spectra_of_batches_are_those_of_all() -> None:
    draws = random_complex((24, 8, 8), 19)
    direction = torch.ones((8, 8), dtype=torch.complex128)
    whole, parts = (noise_power_spectrum(draws.split(size), direction) for size in (24, 5))
    torch.testing.assert_close(whole.power, parts.power)
    torch.testing.assert_close(whole.radial_error, parts.radial_error)


def test_a_spectrum_of_a_few_voxels_is_refused() -> None:
    draws = random_complex((4, 3, 9), 20)
    with pytest.raises(ValueError, match="at least 4 x 4 voxels, got 3 x 9"):
        noise_power_spectrum([draws], torch.ones((3, 9), dtype=torch.complex128))
