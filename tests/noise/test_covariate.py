"""The closed forms of the zero-filled image, against sums over k-space, in images of one row or one column too."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from voxelsigma.models.grid import Window, kspace_matrix
from voxelsigma.models.problem import PlaneProblem
from voxelsigma.noise.covariate import coil_correlation
from voxelsigma.noise.response import REACH, Response

COILS = 3
MapMaker = Callable[[int, int, int], Tensor]
OFFSETS = tuple((y, x) for y in range(-REACH, REACH + 1) for x in range(-REACH, REACH + 1))
LAGS = range(-2 * REACH, 2 * REACH + 1)

# encoded matrix, matrix of the image
NARROW = [
    ((12, 24), (1, 24)),
    ((12, 24), (1, 30)),
    ((24, 10), (24, 1)),
    ((1, 24), (1, 24)),
    ((24, 1), (24, 1)),
    ((1, 24), (4, 24)),
    ((9, 7), (1, 1)),
    ((1, 1), (1, 1)),
]


def problem_of(smooth_maps: MapMaker, encoded: tuple[int, int], size: tuple[int, int]) -> PlaneProblem:
    """Some samples with multiplicities; a voxel that no coil sees."""
    weights = torch.randint(0, 3, encoded, generator=torch.Generator().manual_seed(3)).double()
    weights[encoded[0] // 2, encoded[1] // 2] = 2
    maps = smooth_maps(COILS, *encoded)
    if maps[0].numel() > 1:
        maps[:, 0, 0] = 0
    return PlaneProblem(
        sensitivities=maps,
        variance=torch.where(weights > 0, 2 / weights.clamp_min(1), 0.0),
        weights=weights,
        limits=((0, encoded[0] - 1), (0, encoded[1] - 1)),
        size=size,
    )


def waves(encoded: int, size: int, part: float) -> Tensor:
    """From k-space to the voxels 0 and those at all distances from it, shape `(1 + distances, k)`."""
    frequency = torch.arange(encoded, dtype=torch.float64) - encoded // 2
    carried = (frequency >= -size / part / 2 - 1e-6) & (frequency < size / part / 2 - 1e-6)
    place = (torch.tensor([0, *LAGS], dtype=torch.float64) - size // 2) * part / size
    return torch.exp(2j * torch.pi * torch.outer(place, frequency)) * carried / encoded**0.5


def dense_correlation(variance: Tensor, size: tuple[int, int], part: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """The sum over k-space, of voxels beside the image as well."""
    rows, columns = (waves(*axis) for axis in zip(variance.shape, size, part, strict=True))
    both = torch.einsum("ek,kl,fl->ef", rows[1:] * rows[0].conj(), variance.to(rows), columns[1:] * columns[0].conj())
    return torch.as_tensor(both)


@pytest.mark.parametrize(("encoded", "size"), [((12, 14), (12, 14)), ((12, 14), (2, 20)), *NARROW])
def test_correlation_is_the_sum_over_k_space(
    smooth_maps: MapMaker, encoded: tuple[int, int], size: tuple[int, int]
) -> None:
    problem = problem_of(smooth_maps, encoded, size)
    found = problem.covariate().correlation
    assert found is not None
    torch.testing.assert_close(found, dense_correlation(problem.variance, size), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("part", [0.5, 0.25, 0.3])
def test_a_lone_voxel_of_a_part_needs_the_step_to_the_next(part: float) -> None:
    """It carries more than one frequency, and its own row does not tell which."""
    encoded, size = (12, 10), (1, 10)
    variance = torch.rand(encoded, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    rows, columns = (
        kspace_matrix(Window(0, count, count), wanted, share)
        for count, wanted, share in zip(encoded, size, (part, 1.0), strict=True)
    )
    steps = torch.exp(2j * torch.pi * part * (torch.arange(12, dtype=torch.float64) - 6))
    expected = dense_correlation(variance, size, (part, 1.0))
    found = coil_correlation(variance, rows, columns, steps=(steps, None))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    # what two rows tell is the same
    step = torch.exp(2j * torch.pi * (torch.arange(10, dtype=torch.float64) - 5) / 10)
    torch.testing.assert_close(coil_correlation(variance, rows, columns, steps=(steps, step)), expected)


@pytest.mark.parametrize(("encoded", "size"), NARROW)
def test_variances_of_a_narrow_image_are_those_of_all_unit_samples(
    smooth_maps: MapMaker, encoded: tuple[int, int], size: tuple[int, int]
) -> None:
    """Every sample pushed alone, at its own deviation, and through a filter that sees beyond the border."""
    problem = problem_of(smooth_maps, encoded, size)
    covariate = problem.covariate()
    assert covariate.filtered_variance is not None
    assert covariate.normal is not None
    samples = torch.zeros(COILS * encoded[0] * encoded[1], COILS, *encoded, dtype=torch.complex128)
    samples.view(len(samples), -1).diagonal().copy_(problem.variance.sqrt().expand(COILS, -1, -1).flatten())
    pushed = covariate.push(samples)
    torch.testing.assert_close(covariate.variance, pushed.abs().square().sum(dim=0), rtol=1e-9, atol=1e-12)
    weights = torch.randn(len(OFFSETS), *size, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    response = Response(offsets=OFFSETS, weights=weights)
    expected = response(pushed).abs().square().sum(dim=0)
    torch.testing.assert_close(covariate.filtered_variance(response), expected, rtol=1e-6, atol=1e-6)
    # the push is all of a covariate that knows about grids: N is push and its adjoint, by one factor everywhere
    unit = (samples != 0).to(samples)
    all_of = covariate.push(unit).flatten(1).mT
    count = size[0] * size[1]
    found = covariate.normal(torch.eye(count, dtype=torch.complex128).view(-1, *size)).flatten(1).mT
    torch.testing.assert_close(found, all_of @ all_of.mH * (found.norm() / (all_of @ all_of.mH).norm()))
