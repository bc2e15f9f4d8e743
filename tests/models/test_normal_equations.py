"""`A^H A`, on the grid of the samples and on others; the solver is tested with the network that has it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from voxelsigma.models.encoding import SenseEncoding
from voxelsigma.models.grid import Window, embedded, kspace_matrix
from voxelsigma.models.normal_equations import normal_operator
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


def on_grid(name: str, mask: Tensor) -> Tensor:
    """The mask among all positions that belong to the voxels of a grid."""
    size, part = GRIDS[name]
    for dim, count in enumerate((ROWS, COLUMNS)):
        mask = embedded(mask, Window(0, count, count), size[dim], part[dim], dim)
    return mask


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


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("kind", MASKS)
def test_on_other_grids_it_is_its_formula(smooth_maps: MapMaker, name: str, kind: str) -> None:
    """With P from k-space to the image: S* P M P^H S, over what P P^H multiplies an image of the whole field by."""
    size, part = GRIDS[name]
    maps, mask = smooth_maps(COILS, *size), mask_of(kind)
    windows = Window(0, ROWS, ROWS), Window(0, COLUMNS, COLUMNS)
    transform = torch.kron(*(kspace_matrix(*one) for one in zip(windows, size, part, strict=True)))
    gain = size[0] / part[0] / ROWS * size[1] / part[1] / COLUMNS
    expected = torch.zeros(len(transform), len(transform), dtype=torch.complex128)
    for coil in maps.flatten(1):
        seen = coil.conj().unsqueeze(1) * transform
        expected += seen @ torch.diag(mask.flatten()).to(seen) @ seen.mH / gain
    found = dense(normal_operator(maps, on_grid(name, mask)), size)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found, found.mH)
    values = torch.linalg.eigvalsh(found)
    assert float(values.min()) > -1e-12
    assert float(values.max()) < 1 + 1e-12
    if kind == "full":
        # nothing larger would do
        assert float(values.max()) > 0.9


def test_a_field_of_view_that_is_no_whole_number_of_voxels(smooth_maps: MapMaker) -> None:
    maps, mask = smooth_maps(COILS, 7, 4), mask_of("2D")
    sampled = embedded(mask, Window(0, COLUMNS, COLUMNS), 4, 0.7, 1)
    assert sampled.shape == (7, 6)
    found = dense(normal_operator(maps, sampled), (7, 4))
    torch.testing.assert_close(found, found.mH)
    values = torch.linalg.eigvalsh(found)
    assert -1e-12 < float(values.min()) <= float(values.max()) < 1 + 1e-12


def test_positions_are_those_of_their_frequencies() -> None:
    """Of 8 encoded positions the 3 from the third on have the frequencies -2, -1, 0."""
    values, window = torch.tensor([1.0, 2.0, 3.0]), Window(2, 3, 8)
    assert embedded(values, window, 8, 1.0, 0).tolist() == [0, 0, 1, 2, 3, 0, 0, 0]
    assert embedded(values, window, 5, 0.5, 0).tolist() == [0, 0, 0, 1, 2, 3, 0, 0, 0, 0]
    # three voxels carry -1, 0 and 1 alone
    assert embedded(values, window, 3, 1.0, 0).tolist() == [2, 3, 0]


@pytest.mark.parametrize("name", ["own", "finer"])
def test_it_is_differentiable(smooth_maps: MapMaker, complex_normal: Normal, name: str) -> None:
    """It is Hermitian, so that a gradient goes through them as an image does."""
    size, _ = GRIDS[name]
    maps, mask = smooth_maps(COILS, *size), mask_of("2D")
    operator = normal_operator(maps, on_grid(name, mask))
    images, cotangents = complex_normal(2, *size, seed=4).requires_grad_(), complex_normal(2, *size, seed=5)
    (found,) = torch.autograd.grad(operator(images), images, cotangents)
    torch.testing.assert_close(found, operator(cotangents))


def test_types_stay(smooth_maps: MapMaker, complex_normal: Normal) -> None:
    images = complex_normal(2, 14, 9, seed=6)
    maps, mask = smooth_maps(COILS, 14, 9), mask_of("2D")
    mask = on_grid("finer", mask)
    wide = normal_operator(maps, mask)(images)
    found = normal_operator(maps.to(torch.complex64), mask.float())(images.to(torch.complex64))
    assert found.dtype == torch.complex64
    torch.testing.assert_close(found.to(torch.complex128), wide, rtol=1e-5, atol=1e-5)
