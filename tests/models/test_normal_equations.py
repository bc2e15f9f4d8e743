"""`A^H A`, on the grid of the samples and on others; the solver is tested with the network that has it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from voxelsigma.models.encoding import SenseEncoding
from voxelsigma.models.grid import Window, kspace_matrix
from voxelsigma.models.normal_equations import normal_between, normal_operator
from voxelsigma.noise.inverse import Operator

MapMaker = Callable[[int, int, int], Tensor]
Normal = Callable[..., Tensor]

ROWS, COLUMNS, COILS = 7, 6, 3
# size and part of the field of view, rows and columns
GRIDS = {
    "own": ((ROWS, COLUMNS), (1.0, 1.0)),
    "finer": ((14, 9), (1.0, 1.0)),
    "coarser": ((5, 6), (1.0, 1.0)),
    "half": ((7, 3), (1.0, 0.5)),
    "finer half": ((10, 9), (0.5, 0.75)),
}
MASKS = ["2D", "rows", "columns", "full", "none"]


def mask_of(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    random = torch.rand(ROWS, COLUMNS, generator=generator, dtype=torch.float64) < 0.5
    found = {
        "2D": random,
        "rows": random[:, :1].expand(ROWS, COLUMNS),
        "columns": random[:1].expand(ROWS, COLUMNS),
        "full": torch.ones_like(random),
        "none": torch.zeros_like(random),
    }
    return found[kind].double().contiguous()


def between(name: str) -> tuple[Tensor, Tensor]:
    """From k-space to the image along both axes."""
    size, part = GRIDS[name]
    windows = Window(0, ROWS, ROWS), Window(0, COLUMNS, COLUMNS)
    rows, columns = (kspace_matrix(*one) for one in zip(windows, size, part, strict=True))
    return rows, columns


def dense(operator: Operator, size: tuple[int, int]) -> Tensor:
    """Columns are what becomes of unit images."""
    count = size[0] * size[1]
    return operator(torch.eye(count, dtype=torch.complex128).view(-1, *size)).flatten(1).mT


@pytest.mark.parametrize("kind", MASKS)
def test_it_is_encoding_and_its_adjoint(smooth_maps: MapMaker, complex_normal: Normal, kind: str) -> None:
    """Of any batch of images, which stay as they are."""
    maps, mask = smooth_maps(COILS, ROWS, COLUMNS), mask_of(kind)
    encoding, operator = SenseEncoding(maps, mask), normal_operator(maps, mask)
    for shape in ((), (4,), (2, 3)):
        images = complex_normal(*shape, ROWS, COLUMNS, seed=2)
        before = images.clone()
        torch.testing.assert_close(operator(images), encoding.adjoint(encoding.forward(images)))
        assert torch.equal(images, before)


@pytest.mark.parametrize("kind", MASKS)
def test_between_the_same_grid_it_is_the_plain_one(smooth_maps: MapMaker, complex_normal: Normal, kind: str) -> None:
    maps, mask, images = smooth_maps(COILS, ROWS, COLUMNS), mask_of(kind), complex_normal(4, ROWS, COLUMNS, seed=3)
    before = images.clone()
    found = normal_between(maps, mask, *between("own"))(images)
    torch.testing.assert_close(found, normal_operator(maps, mask)(images))
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("kind", MASKS)
def test_between_grids_it_is_its_formula(smooth_maps: MapMaker, name: str, kind: str) -> None:
    size, _ = GRIDS[name]
    maps, mask = smooth_maps(COILS, *size), mask_of(kind)
    rows, columns = between(name)
    transform = torch.kron(rows, columns)
    largest = torch.linalg.eigvalsh(transform @ transform.mH).max()
    expected = torch.zeros(len(transform), len(transform), dtype=torch.complex128)
    for coil in maps.flatten(1):
        seen = coil.conj().unsqueeze(1) * transform
        expected += seen @ torch.diag(mask.flatten()).to(seen) @ seen.mH / largest
    found = dense(normal_between(maps, mask, rows, columns), size)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found, found.mH)
    values = torch.linalg.eigvalsh(found)
    assert float(values.min()) > -1e-12
    assert float(values.max()) < 1 + 1e-12
    if kind == "full":
        # nothing larger would do
        assert float(values.max()) > 0.9


@pytest.mark.parametrize("name", ["own", "finer"])
def test_both_are_differentiable(smooth_maps: MapMaker, complex_normal: Normal, name: str) -> None:
    """They are Hermitian, so that a gradient goes through them as an image does."""
    size, _ = GRIDS[name]
    maps, mask = smooth_maps(COILS, *size), mask_of("2D")
    operator = normal_operator(maps, mask) if name == "own" else normal_between(maps, mask, *between(name))
    images, cotangents = complex_normal(2, *size, seed=4).requires_grad_(), complex_normal(2, *size, seed=5)
    (found,) = torch.autograd.grad(operator(images), images, cotangents)
    torch.testing.assert_close(found, operator(cotangents))


def test_types_stay(smooth_maps: MapMaker, complex_normal: Normal) -> None:
    images = complex_normal(2, 14, 9, seed=6)
    maps, mask = smooth_maps(COILS, 14, 9), mask_of("2D")
    wide = normal_between(maps, mask, *between("finer"))(images)
    single = [one.to(torch.complex64) for one in (maps, *between("finer"))]
    found = normal_between(single[0], mask.float(), single[1], single[2])(images.to(torch.complex64))
    assert found.dtype == torch.complex64
    torch.testing.assert_close(found.to(torch.complex128), wide, rtol=1e-5, atol=1e-5)
