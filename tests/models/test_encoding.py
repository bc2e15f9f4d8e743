"""The SENSE encoding operator."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from voxelsigma.models.encoding import SenseEncoding

TOLERANCE = {torch.complex64: 1e-6, torch.complex128: 1e-12}


def random_mask(*shape: int) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.4).double()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("batch", [(), (3,)])
def test_adjoint(complex_normal: Callable[..., Tensor], dtype: torch.dtype, batch: tuple[int, ...]) -> None:
    maps = complex_normal(*batch, 4, 13, 10, seed=2).to(dtype)
    mask = random_mask(*batch, *((1,) if batch else ()), 13, 10).to(dtype.to_real())
    operator = SenseEncoding(maps, mask)
    image = complex_normal(*batch, 13, 10, seed=3).to(dtype)
    kspace = complex_normal(*batch, 4, 13, 10, seed=4).to(dtype)
    encoded, combined = operator.forward(image), operator.adjoint(kspace)
    assert encoded.shape == kspace.shape
    assert combined.shape == image.shape
    assert encoded.dtype == combined.dtype == dtype
    left = torch.vdot(encoded.flatten(), kspace.flatten())
    right = torch.vdot(image.flatten(), combined.flatten())
    scale = float(encoded.norm() * kspace.norm())
    assert float((left - right).abs()) < TOLERANCE[dtype] * scale


def test_operator_is_its_dense_matrix(
    complex_normal: Callable[..., Tensor], dense_encoding: Callable[[Tensor], Tensor]
) -> None:
    maps, mask = complex_normal(3, 7, 6, seed=5), random_mask(7, 6)
    operator = SenseEncoding(maps, mask)
    dense = mask.flatten().repeat(3).unsqueeze(1) * dense_encoding(maps)
    image, kspace = complex_normal(7, 6, seed=6), complex_normal(3, 7, 6, seed=7)
    torch.testing.assert_close(operator.forward(image).flatten(), dense @ image.flatten())
    torch.testing.assert_close(operator.adjoint(kspace).flatten(), dense.mH @ kspace.flatten())


def test_boolean_masks_are_masks(complex_normal: Callable[..., Tensor]) -> None:
    maps, mask, image = complex_normal(2, 6, 6, seed=8), random_mask(6, 6), complex_normal(6, 6, seed=9)
    boolean = SenseEncoding(maps, mask > 0)
    torch.testing.assert_close(boolean.forward(image), SenseEncoding(maps, mask).forward(image))
    assert not bool(boolean.forward(image)[:, mask == 0].any())


def test_norm_is_at_most_one_with_unit_norm_coils(
    smooth_maps: Callable[[int, int, int], Tensor], dense_encoding: Callable[[Tensor], Tensor]
) -> None:
    maps, mask = smooth_maps(4, 8, 9), random_mask(8, 9)
    dense = mask.flatten().repeat(4).unsqueeze(1) * dense_encoding(maps)
    assert float(torch.linalg.matrix_norm(dense, 2)) <= 1 + 1e-12
    full = SenseEncoding(maps, torch.ones(8, 9))
    image = torch.ones(8, 9, dtype=torch.complex128)
    torch.testing.assert_close(full.adjoint(full.forward(image)), image)


def test_gradient_is_the_adjoint(complex_normal: Callable[..., Tensor]) -> None:
    operator = SenseEncoding(complex_normal(2, 4, 3, seed=10), random_mask(4, 3))
    image = complex_normal(4, 3, seed=11).requires_grad_()
    assert torch.autograd.gradcheck(operator.forward, (image,))
    kspace = complex_normal(2, 4, 3, seed=12)
    (gradient,) = torch.autograd.grad((kspace.conj() * operator.forward(image)).real.sum(), image)
    torch.testing.assert_close(gradient, operator.adjoint(kspace))
