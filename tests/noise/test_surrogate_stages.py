"""The stand-in for a Jacobian, a cascade of filters around operators, against dense matrices."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from voxelsigma.noise.inverse import Operator, regularised_inverse
from voxelsigma.noise.local_filter import square
from voxelsigma.noise.response import Response
from voxelsigma.noise.surrogate import Stage, Surrogate

ROWS, COLUMNS = 5, 6
SMALL = ROWS * COLUMNS


def complex_normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.complex128)


def real_normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_response(reach: int, seed: int) -> Response:
    offsets = square(reach)
    return Response(offsets=offsets, weights=0.3 * real_normal(len(offsets), ROWS, COLUMNS, seed=seed))


def hermitian() -> Tensor:
    """With eigenvalues from 0 to 1."""
    vectors = torch.linalg.qr(complex_normal(SMALL, SMALL, seed=20)).Q
    return vectors @ torch.diag(torch.linspace(0, 1, SMALL)).to(vectors) @ vectors.mH


def applying(matrix: Tensor) -> Operator:
    return lambda images: (images.flatten(1) @ matrix.mT).view(images.shape)


def filter_matrix(response: Response | None) -> Tensor:
    """Rows are voxels, columns what they see."""
    matrix = torch.zeros(ROWS, COLUMNS, ROWS, COLUMNS, dtype=torch.complex128)
    if response is not None:
        for y in range(ROWS):
            for x in range(COLUMNS):
                for (down, right), weight in zip(response.offsets, response.weights[:, y, x], strict=True):
                    if 0 <= y + down < ROWS and 0 <= x + right < COLUMNS:
                        matrix[y, x, y + down, x + right] = weight
    return matrix.view(SMALL, SMALL)


def inverse_matrix(matrix: Tensor, weight: float) -> Tensor:
    """The polynomial of `regularised_inverse` by its eigenvalues."""
    values, vectors = torch.linalg.eigh(matrix)
    steps = math.ceil(1.5 * math.sqrt(1 + 1 / weight))
    left = torch.cos(steps * torch.acos((1 - 2 * values).clamp(-1, 1)))
    found = (1 - left / math.cosh(steps * math.acosh(1 + 2 * weight))) / (values + weight)
    return vectors @ torch.diag(found).to(vectors) @ vectors.mH


def cascade() -> tuple[Surrogate, list[Tensor]]:
    """Three stages, none like another, and the matrices of their operators."""
    matrix, weight = hermitian(), 0.3
    solve = regularised_inverse(applying(matrix), weight)
    last = Stage(
        operator=lambda images: weight * solve(images), kept=random_response(2, 1), passed=random_response(1, 2)
    )
    stages = (
        Stage(operator=applying(matrix), kept=random_response(3, 3), passed=random_response(3, 4)),
        replace(last, first=random_response(1, 5)),
        replace(last, operator=applying(matrix), second=random_response(1, 7), first=random_response(2, 8)),
    )
    return Surrogate(stages=stages), [matrix, weight * inverse_matrix(matrix, weight), matrix]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_it_is_the_cascade_of_its_stages(count: int) -> None:
    """Against dense matrices, in double precision."""
    whole, matrices = cascade()
    surrogate = replace(whole, stages=whole.stages[:count])
    images = complex_normal(3, ROWS, COLUMNS, seed=10)
    for image, found in zip(images, surrogate(images), strict=True):
        w = image.flatten()
        second = matrices[0] @ w
        z = w
        for stage, matrix in zip(surrogate.stages, matrices[:count], strict=True):
            z = filter_matrix(stage.kept) @ z + filter_matrix(stage.passed) @ (matrix @ z)
            z = z + filter_matrix(stage.first) @ w + filter_matrix(stage.second) @ second
        torch.testing.assert_close(found.flatten(), z)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_what_is_known_behind_the_first_operator_need_not_be_given(count: int) -> None:
    whole, matrices = cascade()
    surrogate = replace(whole, stages=whole.stages[:count])
    images = complex_normal(3, ROWS, COLUMNS, seed=11)
    second = surrogate.second(images)
    torch.testing.assert_close(second, applying(matrices[0])(images))
    assert torch.equal(surrogate(images, second), surrogate(images))


def test_it_is_complex_linear() -> None:
    """Or else half of E|c|² would not be the variance of the component in phase."""
    surrogate, _ = cascade()
    one, other = complex_normal(2, 3, ROWS, COLUMNS, seed=12)
    a, b = 2 - 1j, 0.5j
    torch.testing.assert_close(surrogate(a * one + b * other), a * surrogate(one) + b * surrogate(other))
    assert not bool(surrogate(0 * one).any())


def test_types_are_those_of_the_images() -> None:
    surrogate, _ = cascade()
    images = complex_normal(2, ROWS, COLUMNS, seed=13)
    wide, matrix = surrogate(images), hermitian().to(torch.complex64)
    stages = tuple(
        replace(stage, operator=applying(matrix)) if place != 1 else stage
        for place, stage in enumerate(surrogate.stages)
    )
    solve = regularised_inverse(applying(matrix), 0.3)
    stages = (stages[0], replace(stages[1], operator=lambda one: 0.3 * solve(one)), stages[2])
    found = replace(surrogate, stages=stages)(images.to(torch.complex64))
    assert found.dtype == torch.complex64
    torch.testing.assert_close(found.to(torch.complex128), wide, rtol=1e-4, atol=1e-4)
