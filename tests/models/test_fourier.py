"""Centred Fourier transforms on tensors."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from voxelsigma.models.fourier import centred_combination, fft_centred, ifft_centred
from voxelsigma.noise import fourier as on_arrays

sizes = st.integers(1, 9)
seeds = st.integers(0, 2**32 - 1)


def array(shape: tuple[int, ...], seed: int) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.standard_normal(shape) + 1j * rng.standard_normal(shape))


@settings(deadline=None, max_examples=30)
@given(rows=sizes, columns=sizes, seed=seeds)
def test_transform_is_the_centred_orthonormal_sum(rows: int, columns: int, seed: int) -> None:
    image = array((2, rows, columns), seed)
    k1, k0 = np.arange(rows) - rows // 2, np.arange(columns) - columns // 2
    along_y = np.exp(-2j * np.pi * np.outer(k1, k1) / rows) / np.sqrt(rows)
    along_x = np.exp(-2j * np.pi * np.outer(k0, k0) / columns) / np.sqrt(columns)
    expected = along_y @ image.numpy() @ along_x.T
    np.testing.assert_allclose(fft_centred(image).numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(fft_centred(image, [-2]).numpy(), along_y @ image.numpy(), atol=1e-12)
    np.testing.assert_allclose(fft_centred(image, [-1]).numpy(), image.numpy() @ along_x.T, atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(rows=sizes, columns=sizes, seed=seeds)
def test_inverse_is_the_adjoint_and_keeps_energy(rows: int, columns: int, seed: int) -> None:
    image, kspace = array((rows, columns), seed), array((rows, columns), seed + 1)
    torch.testing.assert_close(ifft_centred(fft_centred(image)), image)
    torch.testing.assert_close(fft_centred(ifft_centred(kspace)), kspace)
    left = torch.vdot(fft_centred(image).flatten(), kspace.flatten())
    right = torch.vdot(image.flatten(), ifft_centred(kspace).flatten())
    torch.testing.assert_close(left, right)
    torch.testing.assert_close(fft_centred(image).norm(), image.norm())


@settings(deadline=None, max_examples=15)
@given(rows=sizes, columns=sizes, seed=seeds)
def test_tensors_and_arrays_have_one_convention(rows: int, columns: int, seed: int) -> None:
    image = array((rows, columns), seed)
    np.testing.assert_allclose(fft_centred(image, [-1]).numpy(), on_arrays.fft_centred(image.numpy(), -1), atol=1e-12)
    np.testing.assert_allclose(ifft_centred(image, [-2]).numpy(), on_arrays.ifft_centred(image.numpy(), -2), atol=1e-12)


def test_origin_is_at_half_the_size() -> None:
    for size in (8, 9):
        image = torch.zeros(size, dtype=torch.complex128)
        image[size // 2] = 1
        torch.testing.assert_close(fft_centred(image, [-1]), torch.full_like(image, size**-0.5))


@settings(deadline=None, max_examples=30)
@given(rows=sizes, columns=sizes, seed=seeds)
def test_combination_without_shifts_is_that_with_them(rows: int, columns: int, seed: int) -> None:
    factors, kspace = array((3, rows, columns), seed), array((2, 3, rows, columns), seed + 1)
    given_kspace = kspace.clone()
    expected = (factors * ifft_centred(kspace)).sum(dim=-3)
    torch.testing.assert_close(centred_combination(factors)(kspace), expected)
    assert torch.equal(kspace, given_kspace)
