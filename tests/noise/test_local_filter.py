"""Filters that differ from voxel to voxel: what they are, their derivatives, and what those keep."""

from typing import Any

import pytest
import torch
from torch import Tensor

from voxelsigma.noise.local_filter import Offsets, filtered, shifted, square

LOPSIDED: Offsets = ((0, 0), (2, -1), (-1, 3), (0, 1))


def complex_normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.complex128)


def real_normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def explicit(images: Tensor, weights: Tensor, offsets: Offsets) -> Tensor:
    """Voxel by voxel."""
    rows, columns = images.shape[-2:]
    found = torch.zeros_like(images)
    for y in range(rows):
        for x in range(columns):
            for weight, (down, right) in zip(weights[:, y, x], offsets, strict=True):
                if 0 <= y + down < rows and 0 <= x + right < columns:
                    found[:, y, x] += weight * images[:, y + down, x + right]
    return found


@pytest.mark.parametrize("reach", [0, 1, 2, 3])
def test_a_square_is_all_offsets_within_reach(reach: int) -> None:
    offsets = square(reach)
    assert len(set(offsets)) == len(offsets) == (2 * reach + 1) ** 2
    assert max(max(abs(y), abs(x)) for y, x in offsets) == reach
    assert offsets[len(offsets) // 2] == (0, 0)


def test_shifted_images_are_those_at_the_offset() -> None:
    images = real_normal(2, 3, 4, 5, seed=1)
    for (down, right), found in zip(LOPSIDED, shifted(images, LOPSIDED), strict=True):
        for y in range(4):
            for x in range(5):
                there = 0 <= y + down < 4 and 0 <= x + right < 5
                expected = images[..., y + down, x + right] if there else torch.zeros(2, 3).double()
                assert torch.equal(found[..., y, x], expected)


@pytest.mark.parametrize("offsets", [square(0), square(1), square(3), LOPSIDED], ids=["one", "3", "7", "lopsided"])
# narrower than a filter reaches, too
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (9, 7)])
def test_it_is_the_sum_over_its_offsets(offsets: Offsets, shape: tuple[int, int]) -> None:
    images, weights = complex_normal(3, *shape, seed=2), real_normal(len(offsets), *shape, seed=3)
    before = images.clone(), weights.clone()
    torch.testing.assert_close(filtered(images, weights, offsets), explicit(images, weights, offsets))
    assert torch.equal(images, before[0])
    assert torch.equal(weights, before[1])


def test_beyond_the_border_there_is_nothing() -> None:
    found = filtered(torch.full((1, 5, 6), 1 - 2j).to(torch.complex64), torch.ones(9, 5, 6), square(1))
    there = torch.full((5, 6), 9.0)
    there[[0, -1]] = there[:, [0, -1]] = 6
    there[[0, 0, -1, -1], [0, -1, 0, -1]] = 4
    assert found.dtype == torch.complex64
    assert torch.equal(found[0], (1 - 2j) * there)


def test_probes_have_nothing_to_do_with_each_other() -> None:
    images, weights = complex_normal(3, 6, 5, seed=4), real_normal(25, 6, 5, seed=5)
    together = filtered(images, weights, square(2))
    for image, found in zip(images, together, strict=True):
        assert torch.equal(filtered(image.unsqueeze(0), weights, square(2))[0], found)
    assert filtered(images[:0], weights, square(2)).shape == (0, 6, 5)


@pytest.mark.parametrize("offsets", [square(1), LOPSIDED], ids=["3", "lopsided"])
def test_derivatives(offsets: Offsets) -> None:
    images = complex_normal(2, 4, 3, seed=6).requires_grad_()
    weights = real_normal(len(offsets), 4, 3, seed=7).requires_grad_()
    assert torch.autograd.gradcheck(lambda one, other: filtered(one, other, offsets), (images, weights))
    # each alone
    for given in ((images, weights.detach()), (images.detach(), weights)):
        assert torch.autograd.gradcheck(lambda one, other: filtered(one, other, offsets), given)


@pytest.mark.parametrize("offsets", [square(2), LOPSIDED], ids=["5", "lopsided"])
def test_the_gradient_is_the_adjoint(offsets: Offsets) -> None:
    """The same for a shape that is narrower than the filter reaches."""
    for shape in ((2, 2), (8, 5)):
        images, cotangents = complex_normal(3, *shape, seed=8).requires_grad_(), complex_normal(3, *shape, seed=9)
        weights = real_normal(len(offsets), *shape, seed=10)
        found = filtered(images, weights, offsets)
        (back,) = torch.autograd.grad(found, images, cotangents)
        torch.testing.assert_close(
            torch.vdot(cotangents.flatten(), found.flatten()), torch.vdot(back.flatten(), images.flatten())
        )


def test_autograd_keeps_no_shifted_copies() -> None:
    images = complex_normal(2, 8, 8, seed=11).requires_grad_()
    weights = real_normal(49, 8, 8, seed=12).requires_grad_()
    kept: list[int] = []

    def pack(tensor: Tensor) -> Any:
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        filtered(images, weights, square(3))
    assert set(kept) == {images.data_ptr(), weights.data_ptr()}
