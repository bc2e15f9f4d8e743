"""Simulated receive coils and their noise."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from voxelsigma.formats.coils import _loop_field, coil_sensitivities, random_noise_covariance, unit_norm

coil_numbers = st.integers(1, 128)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def biot_savart(distance: float, height: float, radius: float) -> NDArray[np.float64]:
    """Radial and axial field at (distance, 0, height), summed over short pieces of the loop."""
    angle = np.linspace(0, 2 * np.pi, 4001)[:-1]
    zero = np.zeros_like(angle)
    piece = radius * np.stack([-np.sin(angle), np.cos(angle), zero], axis=1) * (angle[1] - angle[0])
    arm = np.array([distance, 0, height]) - radius * np.stack([np.cos(angle), np.sin(angle), zero], axis=1)
    field = (np.cross(piece, arm) / np.linalg.norm(arm, axis=1, keepdims=True) ** 3).sum(axis=0)
    return np.asarray(field[[0, 2]])


@pytest.mark.parametrize(("distance", "height"), [(0.01, 0.4), (0.1, 0.3), (0.5, -0.4), (1.1, 0.6), (2.0, 0.05)])
def test_loop_field_is_biot_savart(distance: float, height: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("voxelsigma.formats.coils._CONDUCTOR", 0.0)
    axial, radial = _loop_field(np.array([distance]), np.array([height]), 0.3)
    expected = biot_savart(distance, height, 0.3)
    # both up to one constant: mu0 I / pi here, mu0 I / 4 pi there
    np.testing.assert_allclose(4 * np.array([radial[0], axial[0]]), expected, rtol=1e-6, atol=1e-9)


@settings(deadline=None, max_examples=30)
@given(coils=coil_numbers, shape=st.sampled_from([(16, 12), (9, 20), (4, 10, 8)]), seeded=st.booleans())
def test_any_number_of_coils_gives_finite_distinct_fields(coils: int, shape: tuple[int, ...], seeded: bool) -> None:
    maps = coil_sensitivities(coils, shape, rng=rng() if seeded else None)
    assert maps.shape == (coils, *shape)
    assert maps.dtype == np.complex64
    assert np.isfinite(maps).all()
    assert np.sqrt((np.abs(maps) ** 2).sum(axis=0)).min() > 0.05
    flat = unit_norm(maps).reshape(coils, -1)
    gram = np.abs(flat.conj() @ flat.T)
    power = np.sqrt(np.outer(np.diag(gram), np.diag(gram)))
    assert ((gram / power - np.eye(coils)) < 1 - 1e-5).all()


@pytest.mark.parametrize("shape", [(32, 32), (8, 24, 24)])
def test_root_sum_of_squares_is_one_at_the_centre(shape: tuple[int, ...]) -> None:
    maps = coil_sensitivities(12, shape)
    centre = maps.reshape(12, -1)[:, np.ravel_multi_index([n // 2 for n in shape], shape)]
    assert np.linalg.norm(centre) == pytest.approx(1, rel=1e-5)


def test_fields_are_smooth_complex_and_strongest_near_their_coil() -> None:
    maps = coil_sensitivities(8, (64, 64))
    inside = unit_norm(maps)[:, 8:56, 8:56]
    assert np.abs(np.diff(inside, axis=1)).max() < 0.12
    assert np.abs(np.diff(inside, axis=2)).max() < 0.12
    # coil 0 stands at +x, coil 2 at +y: a right angle apart in place and in the field's phase
    assert np.abs(maps[0][32, 50]) > 4 * np.abs(maps[0][32, 14])
    assert np.abs(maps[2][50, 32]) > 4 * np.abs(maps[2][14, 32])
    np.testing.assert_allclose(maps[2][32 + 9, 32], maps[0][32, 32 + 9] * -1j, rtol=1e-4)


def test_volume_contains_the_plane_of_the_same_rings() -> None:
    volume = coil_sensitivities(6, (5, 24, 24))
    np.testing.assert_allclose(volume[:, 2], coil_sensitivities(6, (24, 24)), rtol=1e-5)


def test_a_seed_fixes_the_array() -> None:
    first, again, other = (coil_sensitivities(5, (16, 16), rng=rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    np.testing.assert_array_equal(coil_sensitivities(5, (16, 16)), coil_sensitivities(5, (16, 16)))


def test_unit_norm_is_one_and_leaves_empty_voxels() -> None:
    maps = coil_sensitivities(7, (12, 12))
    maps[:, :3] = 0
    norm = (np.abs(unit_norm(maps)) ** 2).sum(axis=0)
    np.testing.assert_allclose(norm[3:], 1, rtol=1e-5)
    assert (norm[:3] == 0).all()
    assert unit_norm(maps).dtype == np.complex64


@given(
    coils=coil_numbers,
    correlation=st.floats(0, 0.8),
    spread=st.floats(0, 0.6),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None)
def test_covariance_is_hermitian_positive_definite(coils: int, correlation: float, spread: float, seed: int) -> None:
    covariance = random_noise_covariance(coils, correlation=correlation, spread=spread, rng=rng(seed))
    assert covariance.dtype == np.complex64
    np.testing.assert_array_equal(covariance, covariance.conj().T)
    assert np.linalg.eigvalsh(covariance.astype(np.complex128)).min() > 0


def test_covariance_has_the_correlations_asked_for() -> None:
    covariance = random_noise_covariance(8, correlation=0.4, spread=0.3, rng=rng())
    deviations = np.sqrt(np.diag(covariance).real)
    correlations = np.abs(covariance) / np.outer(deviations, deviations)
    np.testing.assert_allclose(correlations[0], [1, 0.4, 0.16, 0.064, 0.0256, 0.064, 0.16, 0.4], rtol=1e-4)
    many = random_noise_covariance(128, spread=0.3, rng=rng())
    assert np.log(np.diag(many).real).std() == pytest.approx(0.3, rel=0.2)


def test_impossible_values_are_refused() -> None:
    with pytest.raises(ValueError, match="coils must be from 1 to 128, got 0"):
        coil_sensitivities(0, (8, 8))
    with pytest.raises(ValueError, match=r"must be \(y, x\) or \(z, y, x\), got \(8,\)"):
        coil_sensitivities(4, (8,))
    with pytest.raises(ValueError, match="coils must be at least 1, got 0"):
        random_noise_covariance(0, rng=rng())
    with pytest.raises(ValueError, match=r"correlation must be at least 0 and below 1, got 1\.0"):
        random_noise_covariance(4, correlation=1.0, rng=rng())
    with pytest.raises(ValueError, match=r"spread must be at least 0, got -0\.1"):
        random_noise_covariance(4, spread=-0.1, rng=rng())
