"""Noise covariance and whitening."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voxelsigma.noise.covariance import (
    GADGETRON_BANDWIDTH,
    NoiseCovariance,
    covariance_bias,
    covariance_error,
    effective_samples,
    estimate_covariance,
    gadgetron_scale,
    whiten,
    whitening_matrix,
)

Complex = npt.NDArray[np.complexfloating[Any, Any]]

seeds = st.integers(0, 2**32 - 1)
coil_numbers = st.integers(1, 12)


def white(shape: tuple[int, ...], seed: int) -> Complex:
    rng = np.random.default_rng(seed)
    return np.asarray(rng.standard_normal(shape) + 1j * rng.standard_normal(shape))


def random_covariance(coils: int, seed: int) -> Complex:
    mixing = white((coils, coils), seed) + 2 * np.eye(coils)
    return np.asarray(mixing @ mixing.conj().T)


def moving_average(noise: Complex, kernel: tuple[float, ...]) -> Complex:
    """Filter along the readout, valid part only: stationary noise of known autocorrelation."""
    windows = np.lib.stride_tricks.sliding_window_view(noise, len(kernel), axis=-1)
    return np.asarray(windows @ np.array(kernel))


@settings(deadline=None, max_examples=25)
@given(coils=coil_numbers, readouts=st.integers(1, 5), length=st.integers(13, 40), seed=seeds)
def test_estimate_is_the_sum_of_outer_products_over_n_minus_one(
    coils: int, readouts: int, length: int, seed: int
) -> None:
    noise = white((readouts, coils, length), seed).astype(np.complex64)
    expected = np.zeros((coils, coils), dtype=np.complex128)
    for readout in noise.astype(np.complex128):
        for sample in readout.T:
            expected += np.outer(sample, sample.conj())
    expected /= readouts * length - 1
    estimate = estimate_covariance(noise)
    assert estimate.dtype == np.complex128
    np.testing.assert_allclose(estimate, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(estimate, estimate.conj().T, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("length", [1, 4, 8])
def test_no_more_samples_than_coils_are_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"{length} noise samples for 8 coils; more samples than coils .* least 80"):
        estimate_covariance(white((1, 8, length), 0))
    assert estimate_covariance(white((1, 8, 9), 0)).shape == (8, 8)


@settings(deadline=None, max_examples=25)
@given(coils=coil_numbers, scale=st.floats(0.1, 10), seed=seeds)
def test_whitening_matrix_whitens(coils: int, scale: float, seed: int) -> None:
    covariance = random_covariance(coils, seed)
    matrix = whitening_matrix(covariance, scale)
    assert matrix.dtype == np.complex64
    # lower triangular, as Gadgetron's: the first virtual coil is the first coil
    np.testing.assert_array_equal(matrix, np.tril(matrix))
    wide = matrix.astype(np.complex128)
    # complex64 entries of an inverse: the rounding grows with the condition of the covariance
    tolerance = 1e-6 * max(1.0, float(np.linalg.cond(covariance)))
    np.testing.assert_allclose(wide @ covariance @ wide.conj().T, scale**2 * np.eye(coils), atol=tolerance * scale**2)


def test_whitening_is_the_inverse_cholesky_factor() -> None:
    covariance = random_covariance(5, 3)
    expected = 1.5 * np.linalg.inv(np.linalg.cholesky(covariance))
    np.testing.assert_allclose(whitening_matrix(covariance, 1.5), expected, rtol=1e-5, atol=1e-6)


def test_covariance_without_an_inverse_is_refused() -> None:
    dead = np.diag([1.0, 0.0, 2.0]).astype(np.complex128)
    with pytest.raises(ValueError, match=r"not positive definite \(smallest eigenvalue 0\); a coil without signal"):
        whitening_matrix(dead, 1.0)
    with pytest.raises(ValueError, match=r"not positive definite \(smallest eigenvalue -1\)"):
        whitening_matrix(np.diag([1.0, -1.0]).astype(np.complex128), 1.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1j * np.nan])
def test_covariance_that_is_not_finite_is_refused(bad: complex) -> None:
    covariance = np.eye(3, dtype=np.complex128)
    covariance[0, 1] = bad
    with pytest.raises(ValueError, match="holds NaN or Inf; expected finite values"):
        whitening_matrix(covariance, 1.0)


@pytest.mark.parametrize(
    ("dwell", "noise_dwell", "bandwidth", "expected"),
    [
        (5.0, 5.0, 1.0, math.sqrt(2)),
        (5.0, 5.0, GADGETRON_BANDWIDTH, math.sqrt(2 * 0.793)),
        (3.0, 6.0, 0.793, math.sqrt(0.793)),
        (8.0, 2.0, 0.5, 2.0),
        (0.0, 5.0, 0.793, 1.0),
        (5.0, 0.0, 0.793, 1.0),
        (0.0, 0.0, 0.793, 1.0),
    ],
)
def test_gadgetron_scale(dwell: float, noise_dwell: float, bandwidth: float, expected: float) -> None:
    assert gadgetron_scale(dwell, noise_dwell, bandwidth) == pytest.approx(expected, rel=1e-15)


def test_whitened_noise_has_unit_deviation_per_component() -> None:
    coils, readouts, length = 6, 64, 128
    mixing = np.linalg.cholesky(random_covariance(coils, 1))
    noise = np.einsum("ab,rbk->rak", mixing, white((readouts, coils, length), 2)) / math.sqrt(2)
    matrix = whitening_matrix(estimate_covariance(noise), gadgetron_scale(4.0, 4.0, 1.0))
    whitened = whiten(noise, matrix)
    # whitened by its own covariance: exact but for the N - 1 and for complex64
    assert np.mean(whitened.real**2 + whitened.imag**2) == pytest.approx(2, rel=1e-3)
    # 49152 samples a component: 5 standard errors are 1.6 %; false alarm 1e-6
    assert np.mean(whitened.real**2) == pytest.approx(1, rel=0.016)
    assert np.mean(whitened.imag**2) == pytest.approx(1, rel=0.016)


@settings(deadline=None, max_examples=25)
@given(coils=coil_numbers, readouts=st.integers(1, 5), length=st.integers(1, 20), seed=seeds)
def test_whitening_a_block_is_whitening_each_readout(coils: int, readouts: int, length: int, seed: int) -> None:
    samples, matrix = white((readouts, coils, length), seed), white((coils, coils), seed + 1)
    whitened = whiten(samples, matrix)
    assert whitened.flags.c_contiguous
    for before, after in zip(samples, whitened, strict=True):
        np.testing.assert_allclose(after, matrix @ before, rtol=1e-12, atol=1e-12)


def test_whitening_keeps_single_precision() -> None:
    assert whiten(white((2, 3, 4), 0).astype(np.complex64), np.eye(3, dtype=np.complex64)).dtype == np.complex64


def test_white_noise_counts_in_full() -> None:
    noise = white((64, 4, 128), 5)
    # each lag adds at most a few chance correlations of 1/(N C) = 3e-5
    assert effective_samples(noise) == pytest.approx(64 * 128, rel=2e-3)
    assert effective_samples(noise) <= 64 * 128


def test_chance_correlations_of_few_white_samples_are_taken_off() -> None:
    counted = [effective_samples(noise) / 128 for noise in white((300, 4, 2, 32), 13)]
    # ten chance correlations of 1/256 each would count 7 % of the samples away; what is above their own mean, e^-1 of
    # it, takes 2.8 %. A single draw spreads by 2.5 %, the mean of 300 by 0.15 %
    assert np.mean(counted) > 0.96


@pytest.mark.parametrize("decay", [0.3, 0.6])
def test_autoregressive_noise_counts_as_its_closed_form(decay: float) -> None:
    innovations = white((96, 4, 320), 6)
    noise = np.empty_like(innovations)
    noise[..., 0] = innovations[..., 0] / math.sqrt(1 - decay**2)
    for index in range(1, innovations.shape[-1]):
        noise[..., index] = decay * noise[..., index - 1] + innovations[..., index]
    # 1 + 2 Σ a^{2k} = (1 + a²)/(1 - a²)
    expected = 96 * 320 * (1 - decay**2) / (1 + decay**2)
    # 4 × 30720 samples give the correlations to 0.4 %; finite readouts take 1/320 of each lag. 2 % is > 4 of both
    assert effective_samples(noise) == pytest.approx(expected, rel=0.02)


def test_filtered_noise_counts_as_its_closed_form_whatever_the_coils_mix() -> None:
    noise = moving_average(white((96, 4, 322), 7), (0.5, 1.0, 0.5))
    # autocorrelation of the kernel: 2/3 and 1/6 of its energy
    expected = 96 * 320 / (1 + 2 * ((2 / 3) ** 2 + (1 / 6) ** 2))
    counted = effective_samples(noise)
    assert counted == pytest.approx(expected, rel=0.02)
    mixing = np.linalg.cholesky(random_covariance(4, 8))
    mixed = np.einsum("ab,rbk->rak", mixing, noise)
    assert effective_samples(np.asarray(mixed)) == pytest.approx(counted, rel=1e-9)


def test_phase_ramps_of_the_noise_change_nothing() -> None:
    # a receiver's filter need not be centred: the autocorrelation is then complex
    noise = moving_average(white((32, 3, 130), 9), (1.0, 1.0, 0.5))
    turned = noise * np.exp(0.7j * np.arange(noise.shape[-1]))
    assert effective_samples(turned) == pytest.approx(effective_samples(noise), rel=1e-9)


def test_effective_samples_tell_the_spread_of_a_variance() -> None:
    noise = moving_average(white((4000, 1, 258), 10), (0.5, 1.0, 0.5))
    variances = np.mean(np.abs(noise[:, 0]) ** 2, axis=-1)
    spread = np.var(variances) / np.mean(variances) ** 2
    # spread of the spread of 4000 values: √(2/4000) = 2.2 %; 5 of them and the 1/256 of the ends: false alarm 1e-6
    assert spread * effective_samples(noise) / 4000 == pytest.approx(1, rel=0.12)


def test_bias_and_error_of_a_covariance() -> None:
    assert covariance_bias(8, 400) == pytest.approx(1.02)
    assert covariance_error(400) == pytest.approx(0.025)


def test_bias_is_what_an_estimated_covariance_does_to_a_combined_image() -> None:
    coils, samples, trials = 6, 240, 600
    signal = white((coils,), 12)
    ratios = []
    for calibration in white((trials, 1, coils, samples), 11) / math.sqrt(2):
        matrix = whitening_matrix(estimate_covariance(calibration), 1.0).astype(np.complex128)
        # the voxel is combined with its whitened, normalised sensitivities and taken to have variance 1
        weights = matrix @ signal / np.linalg.norm(matrix @ signal)
        ratios.append(np.linalg.norm(weights.conj() @ matrix) ** 2)
    # a single ratio spreads by about √(2/N) = 9 % in σ², 4.5 % in σ; the mean of 600 by 0.2 %: 5 of them
    assert math.sqrt(np.mean(ratios)) == pytest.approx(covariance_bias(coils, samples), abs=0.01)


def test_number_of_coils_is_that_of_the_matrix() -> None:
    covariance = NoiseCovariance(
        matrix=np.eye(7, dtype=np.complex128), samples=100, effective_samples=90.0, dwell_time_us=5.0
    )
    assert covariance.coils == 7
    assert covariance.bandwidth == GADGETRON_BANDWIDTH
    assert covariance.calibrated
    assert covariance.applied_scale is None
