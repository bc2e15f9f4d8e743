"""A polynomial that is nearly the regularised inverse: how nearly, and that it is linear."""

import math

import pytest
import torch
from torch import Tensor

from voxelsigma.noise.inverse import Operator, regularised_inverse

SHAPE = (5, 6)
SIZE = math.prod(SHAPE)
WEIGHTS = (1e-3, 0.02, 0.3, 1.0, 100.0)


def complex_normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.complex128)


def spectrum() -> Tensor:
    """From 0 to 1, both of them and many near 0."""
    return torch.linspace(0, 1, SIZE, dtype=torch.float64).square()


def hermitian() -> tuple[Tensor, Tensor]:
    """A matrix of that spectrum, and its eigenvectors."""
    vectors = torch.linalg.qr(complex_normal(SIZE, SIZE, seed=1)).Q
    return vectors @ torch.diag(spectrum()).to(vectors) @ vectors.mH, vectors


def of_matrix(matrix: Tensor, calls: list[int] | None = None) -> Operator:
    def operator(images: Tensor) -> Tensor:
        if calls is not None:
            calls.append(len(images))
        return (images.flatten(1) @ matrix.mT).view(images.shape)

    return operator


def dense(operator: Operator) -> Tensor:
    """Columns are what becomes of unit images."""
    return operator(torch.eye(SIZE, dtype=torch.complex128).view(-1, *SHAPE)).flatten(1).mT


@pytest.mark.parametrize("weight", WEIGHTS)
def test_it_is_nearly_the_inverse(weight: float) -> None:
    """What is left of an error, in the worst direction, is below 12 %."""
    matrix, _ = hermitian()
    wanted = matrix + weight * torch.eye(SIZE)
    found = dense(regularised_inverse(of_matrix(matrix), weight))
    left = torch.eye(SIZE) - found @ wanted
    assert float(torch.linalg.matrix_norm(left, 2)) < 0.12
    assert float(torch.linalg.matrix_norm(found @ wanted, 2)) < 1.12
    # and so of any solution, by its own size
    images = complex_normal(4, *SHAPE, seed=2)
    exact = torch.linalg.solve(wanted, images.flatten(1).mT).mT
    error = regularised_inverse(of_matrix(matrix), weight)(images).flatten(1) - exact
    assert bool((error.norm(dim=1) < 0.12 * exact.norm(dim=1)).all())


@pytest.mark.parametrize("weight", WEIGHTS)
def test_what_it_leaves_is_a_chebyshev_polynomial(weight: float) -> None:
    r"""Of k steps :math:`T_k((\theta - x) / \delta) / T_k(\theta / \delta)` for eigenvalues x of N + λ."""
    matrix, vectors = hermitian()
    calls: list[int] = []
    found = vectors.mH @ dense(regularised_inverse(of_matrix(matrix, calls), weight)) @ vectors
    steps = len(calls) + 1
    middle = 0.5 + weight
    least = math.cosh(steps * math.acosh(2 * middle))
    left = torch.cos(steps * torch.acos((1 - 2 * spectrum()).clamp(-1, 1))) / least
    expected = torch.diag((1 - left) / (spectrum() + weight)).to(found)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 / weight)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_it_is_linear_and_self_adjoint(weight: float) -> None:
    matrix, _ = hermitian()
    solve = regularised_inverse(of_matrix(matrix), weight)
    one, other = complex_normal(2, 3, *SHAPE, seed=3)
    a, b = 0.3 - 2j, 5j
    torch.testing.assert_close(solve(a * one + b * other), a * solve(one) + b * solve(other), rtol=1e-9, atol=1e-9)
    found = dense(solve)
    torch.testing.assert_close(found, found.mH, rtol=0, atol=1e-9 / weight)
    assert float(torch.linalg.eigvalsh(found).min()) > 0
    assert not bool(solve(torch.zeros_like(one)).any())


@pytest.mark.parametrize("weight", WEIGHTS)
def test_its_length_depends_on_the_weight_alone(weight: float) -> None:
    counts = set()
    for matrix in (hermitian()[0], torch.zeros(SIZE, SIZE).to(torch.complex128)):
        for images in (complex_normal(1, *SHAPE, seed=4), 1e6 * complex_normal(3, *SHAPE, seed=5)):
            calls: list[int] = []
            before = images.clone()
            regularised_inverse(of_matrix(matrix, calls), weight)(images)
            assert torch.equal(images, before)
            assert set(calls) == {len(images)}
            counts.add(len(calls))
    # one step needs no operator
    assert counts == {math.ceil(1.5 * math.sqrt(1 + 1 / weight)) - 1}


def test_types_stay() -> None:
    images = complex_normal(2, *SHAPE, seed=6)
    matrix = hermitian()[0]
    wide = regularised_inverse(of_matrix(matrix), 0.02)(images)
    found = regularised_inverse(of_matrix(matrix.to(torch.complex64)), 0.02)(images.to(torch.complex64))
    assert found.dtype == torch.complex64
    torch.testing.assert_close(found.to(torch.complex128), wide, rtol=1e-4, atol=1e-4)


def test_its_gradient_is_that_of_the_polynomial() -> None:
    solve = regularised_inverse(of_matrix(hermitian()[0]), 0.3)
    images, cotangents = complex_normal(2, *SHAPE, seed=7).requires_grad_(), complex_normal(2, *SHAPE, seed=8)
    (found,) = torch.autograd.grad(solve(images), images, cotangents)
    torch.testing.assert_close(found, solve(cotangents))
