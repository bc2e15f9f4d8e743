"""Noise covariance from the edge of k-space."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from voxelsigma.noise.covariance import estimate_covariance, gadgetron_scale, whiten, whitening_matrix
from voxelsigma.noise.edge import edge_covariance
from voxelsigma.noise.fourier import fft_centred

Complex = npt.NDArray[np.complexfloating[Any, Any]]

LINES, COILS, LENGTH = 512, 4, 512

# 26 lines by 76 positions: N = 1976 samples of 4 coils. The mean power is known to 1/√(4 N) = 1.1 %, the matrix to
# √(4/N) = 4.5 % (Frobenius); tolerances are 5 and 2 of these: false alarm below 1e-5
POWER_TOLERANCE = 0.055
MATRIX_TOLERANCE = 0.09


def true_covariance() -> Complex:
    mixing = np.random.default_rng(0).standard_normal((2, COILS, COILS))
    lower = np.tril(0.3 * (mixing[0] + 1j * mixing[1])) + np.diag([1.0, 0.8, 1.3, 1.1])
    return np.asarray(lower @ lower.conj().T)


def sharp_object() -> Complex:
    """K-space of a box with hard edges in the middle half of the readout, seen by smooth coils: (lines, coils, k0)."""
    y = (np.arange(LINES) - LINES // 2) / LINES
    x = (np.arange(LENGTH) - LENGTH // 2) / LENGTH
    box = (np.abs(y)[:, None] < 0.31) & (np.abs(x) < 0.24)
    corners = np.array([-1 - 1j, -1 + 1j, 1 - 1j, 1 + 1j])
    maps = 1 / (x + 1j * y[:, None] - corners[:, None, None])
    image = 400 * maps * box
    return np.moveaxis(fft_centred(fft_centred(image, axis=1), axis=2), 0, 1)


def noise(seed: int, *, rolled_off: bool = False) -> Complex:
    """Readouts of the true covariance; with a receiver's filter that lets half through outside the flat band."""
    rng = np.random.default_rng(seed)
    parts = rng.standard_normal((2, LINES, COILS, LENGTH)) / math.sqrt(2)
    hybrid = np.einsum("ab,rbk->rak", np.linalg.cholesky(true_covariance()), parts[0] + 1j * parts[1])
    if rolled_off:
        offset = np.abs(np.arange(LENGTH) - LENGTH // 2)
        hybrid = hybrid * np.where(offset < 0.7 * LENGTH / 2, 1.0, 0.5)
    return np.asarray(fft_centred(np.asarray(hybrid)))


DISTANCES = np.abs(np.arange(LINES) - LINES // 2).astype(np.float64)


def test_object_and_noise_give_the_covariance_of_the_noise() -> None:
    samples = (sharp_object() + noise(1)).astype(np.complex64)
    covariance = edge_covariance(samples, DISTANCES, 5.0, oversampled=True)
    truth = true_covariance()
    power = np.trace(covariance.matrix).real / np.trace(truth).real
    assert power == pytest.approx(1, abs=POWER_TOLERANCE)
    assert np.linalg.norm(covariance.matrix - truth) < MATRIX_TOLERANCE * np.linalg.norm(truth)
    # plain outer k-space, as published, takes the object's edges for noise
    outermost = samples[np.argsort(-DISTANCES)[:26]]
    assert np.trace(estimate_covariance(outermost)).real > 1.5 * np.trace(truth).real


def test_it_is_marked_as_not_calibrated_and_whitens_to_variance_two() -> None:
    covariance = edge_covariance(sharp_object() + noise(2), DISTANCES, 5.0, oversampled=True)
    assert not covariance.calibrated
    assert covariance.source == "edge of k-space"
    assert covariance.dwell_time_us == 5.0
    assert covariance.samples > 10 * COILS
    assert 0.9 * covariance.samples < covariance.effective_samples <= covariance.samples
    scale = gadgetron_scale(5.0, covariance.dwell_time_us, covariance.bandwidth)
    whitened = whiten(noise(3), whitening_matrix(covariance.matrix, scale))
    assert np.mean(np.abs(whitened) ** 2) == pytest.approx(2, rel=0.07)


def test_only_the_outermost_lines_count() -> None:
    # something faint and noise-like in the inner lines, 1.7 times the noise: no object, but no edge either
    samples = noise(8)
    samples[DISTANCES < 0.9 * LINES / 2] *= 1.3
    covariance = edge_covariance(sharp_object() + samples, DISTANCES, 5.0, oversampled=True)
    power = np.trace(covariance.matrix).real / np.trace(true_covariance()).real
    assert power == pytest.approx(1, abs=POWER_TOLERANCE)


def test_positions_of_a_faint_object_do_not_count() -> None:
    # a line thinner than a voxel, in a quarter of the flat band: five times the noise in every line of k-space
    x = (np.arange(LENGTH) - LENGTH // 2) / LENGTH
    faint = np.zeros((LINES, COILS, LENGTH), dtype=np.complex128)
    faint[:, :, (x > 0.24) & (x < 0.29)] = np.sqrt(5 * np.diag(true_covariance()).real)[:, None]
    samples = sharp_object() + fft_centred(faint) + noise(9)
    covariance = edge_covariance(samples, DISTANCES, 5.0, oversampled=True)
    power = np.trace(covariance.matrix).real / np.trace(true_covariance()).real
    # a quarter fewer positions: 1.3 % of a standard error
    assert power == pytest.approx(1, abs=1.2 * POWER_TOLERANCE)


def test_order_of_the_readouts_does_not_matter() -> None:
    samples, order = sharp_object() + noise(4), np.random.default_rng(5).permutation(LINES)
    straight = edge_covariance(samples, DISTANCES, 5.0, oversampled=True)
    shuffled = edge_covariance(samples[order], DISTANCES[order], 5.0, oversampled=True)
    # of the two lines at the last rank's distance either may be taken
    assert shuffled.samples == straight.samples
    assert np.linalg.norm(shuffled.matrix - straight.matrix) < 0.05 * np.linalg.norm(straight.matrix)


def test_an_oversampled_readout_is_judged_inside_the_flat_band_of_the_filter() -> None:
    samples = sharp_object() + noise(6, rolled_off=True)
    truth = np.trace(true_covariance()).real
    inside = edge_covariance(samples, DISTANCES, 5.0, oversampled=True)
    assert np.trace(inside.matrix).real == pytest.approx(truth, rel=POWER_TOLERANCE)
    everywhere = edge_covariance(samples, DISTANCES, 5.0, oversampled=False)
    assert np.trace(everywhere.matrix).real < 0.8 * truth


def test_too_few_readouts_are_refused() -> None:
    # 5 % of 2 lines is 1 line; of 8 positions 5 are in the flat band
    samples = noise(7)[:2, :, :8]
    with pytest.raises(ValueError, match=r"noise covariance: \d noise samples for 4 coils"):
        edge_covariance(samples[:, :, :4], DISTANCES[:2], 5.0, oversampled=True)
