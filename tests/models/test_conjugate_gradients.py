"""Conjugate gradients for batches."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from voxelsigma.models.conjugate_gradients import conjugate_gradients

SHAPE = (4, 5)


def complex_normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randn((2, *shape), generator=generator, dtype=torch.float64)
    return torch.complex(parts[0], parts[1])


def systems(count: int, seed: int) -> Tensor:
    """Hermitian positive definite matrices on 4 × 5 images, (count, 20, 20)."""
    factor = complex_normal(count, 20, 20, seed=seed)
    return factor @ factor.mH / 20 + 0.1 * torch.eye(20, dtype=torch.complex128)


def apply(matrices: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda images: (matrices @ images.flatten(-2).unsqueeze(-1)).squeeze(-1).unflatten(-1, SHAPE)


def solved_directly(matrices: Tensor, right_side: Tensor) -> Tensor:
    return torch.linalg.solve(matrices, right_side.flatten(-2).unsqueeze(-1)).squeeze(-1).unflatten(-1, SHAPE)


@settings(deadline=None, max_examples=20)
@given(count=st.integers(1, 5), seed=st.integers(0, 2**31), scale=st.sampled_from([1e-8, 1.0, 1e8]))
def test_batch_equals_direct_solution(count: int, seed: int, scale: float) -> None:
    matrices, right_side = systems(count, seed), scale * complex_normal(count, *SHAPE, seed=seed + 1)
    # members of very different size do not share one tolerance
    right_side[0] *= 1e-5
    found = conjugate_gradients(apply(matrices), right_side, tolerance=1e-12)
    expected = solved_directly(matrices, right_side)
    error = (found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert float(error.max()) < 1e-8


def test_residual_is_below_the_tolerance_for_every_member() -> None:
    matrices, right_side = systems(6, 1), complex_normal(6, *SHAPE, seed=2)
    for tolerance in (1e-2, 1e-6):
        found = conjugate_gradients(apply(matrices), right_side, tolerance=tolerance)
        residual = (right_side - apply(matrices)(found)).flatten(1).norm(dim=1)
        assert bool((residual <= 1.01 * tolerance * right_side.flatten(1).norm(dim=1)).all())


def test_single_precision() -> None:
    matrices, right_side = systems(3, 3).to(torch.complex64), complex_normal(3, *SHAPE, seed=4).to(torch.complex64)
    found = conjugate_gradients(apply(matrices), right_side)
    assert found.dtype == torch.complex64
    torch.testing.assert_close(found, solved_directly(matrices, right_side), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_zero_members_stay_zero_and_harm_nobody(dtype: torch.dtype) -> None:
    matrices, right_side = systems(3, 5).to(dtype), complex_normal(3, *SHAPE, seed=6).to(dtype)
    right_side[1] = 0
    found = conjugate_gradients(apply(matrices), right_side)
    assert not bool(found[1].any())
    torch.testing.assert_close(found, solved_directly(matrices, right_side), rtol=1e-4, atol=1e-4)
    assert not bool(conjugate_gradients(apply(matrices), torch.zeros_like(right_side)).any())


def test_a_system_without_batch_is_a_system() -> None:
    matrices, right_side = systems(1, 7), complex_normal(1, *SHAPE, seed=8)
    alone = conjugate_gradients(apply(matrices[0]), right_side[0])
    torch.testing.assert_close(alone, conjugate_gradients(apply(matrices), right_side)[0])


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_limit_of_iterations_is_an_error(dtype: torch.dtype) -> None:
    matrices, right_side = systems(3, 9).to(dtype), complex_normal(3, *SHAPE, seed=10).to(dtype)
    right_side[2] = 0
    with pytest.raises(
        ValueError,
        match=r"stopped at a relative residual of \d\.\de-\d\d after 3 iterations, 1e-06 is needed; the "
        r"least-squares problem is \(nearly\) singular: choose a regularization above 0",
    ):
        conjugate_gradients(apply(matrices), right_side, max_iterations=3)


def test_inconsistent_singular_system_is_an_error() -> None:
    matrices = torch.zeros(1, 20, 20, dtype=torch.complex128)
    matrices[0, :10, :10] = torch.eye(10)
    with pytest.raises(ValueError, match=r"\(nearly\) singular"):
        conjugate_gradients(apply(matrices), torch.ones(1, *SHAPE, dtype=torch.complex128))


def test_consistent_singular_system_has_its_smallest_solution() -> None:
    diagonal = torch.arange(20, dtype=torch.float64).to(torch.complex128)
    expected = torch.ones(20, dtype=torch.complex128)
    expected[0] = 0
    found = conjugate_gradients(apply(torch.diag(diagonal)), diagonal.reshape(SHAPE), tolerance=1e-10)
    torch.testing.assert_close(found.flatten(), expected)


def test_a_member_that_is_done_stands_still() -> None:
    # one member is solved by one step, the other needs many
    matrices = torch.stack([torch.eye(20, dtype=torch.complex128), systems(1, 11)[0]])
    right_side = complex_normal(2, *SHAPE, seed=12)
    found = conjugate_gradients(apply(matrices), right_side, tolerance=1e-13)
    torch.testing.assert_close(found[0], right_side[0], rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(found, solved_directly(matrices, right_side), rtol=1e-9, atol=1e-9)


def test_fixed_number_of_iterations_is_no_error() -> None:
    matrices, right_side = systems(1, 13), complex_normal(1, *SHAPE, seed=14)
    expected = solved_directly(matrices, right_side)
    errors = [
        float((conjugate_gradients(apply(matrices), right_side, iterations=count) - expected).norm())
        for count in (0, 2, 4, 30)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == float(expected.norm())
    assert errors[-1] < 1e-5 * errors[0]


def test_who_asked_is_named() -> None:
    with pytest.raises(ValueError, match=r"^modl: conjugate gradients stopped at .*; do something else$"):
        conjugate_gradients(
            apply(systems(1, 15)),
            complex_normal(1, *SHAPE, seed=16),
            max_iterations=2,
            method="modl",
            advice="do something else",
        )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_an_error(bad: float) -> None:
    right_side = complex_normal(2, *SHAPE, seed=17)
    right_side[0, 0, 0] = bad
    with pytest.raises(ValueError, match=r"^sense: conjugate gradients met values that are not finite"):
        conjugate_gradients(apply(systems(2, 18)), right_side)
