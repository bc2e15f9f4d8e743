"""Centred Fourier transforms on numpy arrays."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voxelsigma.noise.fourier import fft_centred, ifft_centred

sizes = st.integers(1, 12)


@settings(deadline=None, max_examples=30)
@given(size=sizes, other=sizes, axis=st.sampled_from([0, 1, -1, -2]), seed=st.integers(0, 2**32 - 1))
def test_transform_is_the_centred_orthonormal_sum(size: int, other: int, axis: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = (size, other) if axis in (0, -2) else (other, size)
    array = rng.standard_normal(shape) + 1j * rng.standard_normal(shape)
    kept = array.copy()
    index = np.arange(size) - size // 2
    matrix = np.exp(-2j * np.pi * np.outer(index, index) / size) / np.sqrt(size)
    expected = np.moveaxis(np.tensordot(matrix, array, axes=(1, axis)), 0, axis)
    np.testing.assert_allclose(fft_centred(array, axis), expected, atol=1e-12)
    np.testing.assert_allclose(ifft_centred(expected, axis), array, atol=1e-12)
    # the transform may work in place on its own copy, never on the caller's array
    np.testing.assert_array_equal(array, kept)


@pytest.mark.parametrize("kind", [np.complex64, np.complex128])
def test_precision_is_kept(kind: type[np.complexfloating]) -> None:
    array = np.ones((3, 8), dtype=kind)
    assert fft_centred(array).dtype == kind
    assert ifft_centred(array).dtype == kind
