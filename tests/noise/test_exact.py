"""Exact σ against dense complex128 least squares."""

import pytest
import torch
from torch import Tensor

from voxelsigma.models.fourier import ifft_centred
from voxelsigma.models.network import NetworkReconstruction
from voxelsigma.models.problem import PlaneProblem
from voxelsigma.noise.covariate import zero_filled_variance
from voxelsigma.noise.exact import ColumnSystem, column_system, jacobian_variance

ROWS, COLUMNS, COILS = 10, 5, 3

LINE_WEIGHTS = {
    "full": [1] * 10,
    "every other": [1, 0] * 5,
    "every other, shifted": [0, 1] * 5,
    "random": [1, 0, 1, 1, 0, 1, 0, 0, 1, 0],
    "repeated": [1, 0, 3, 1, 2, 1, 0, 1, 2, 4],
    "half": [0, 0, 0, 1, 1, 1, 1, 1, 1, 1],
}


def complex_normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randn((2, *shape), generator=generator, dtype=torch.float64)
    return torch.complex(parts[0], parts[1])


def centred_dft(size: int) -> Tensor:
    index = torch.arange(size, dtype=torch.float64) - size // 2
    return torch.exp(-2j * torch.pi * torch.outer(index, index) / size) / size**0.5


def dense_encoding(maps: Tensor) -> Tensor:
    """The whole encoding without mask, (coils · k1 · k0, y · x): no column is treated apart."""
    coils, rows, columns = maps.shape
    fourier = torch.kron(centred_dft(rows), centred_dft(columns))
    return torch.cat([fourier * maps[coil].flatten() for coil in range(coils)])


def dense_least_squares(maps: Tensor, weights: Tensor, regularization: float) -> tuple[Tensor, Tensor]:
    """(A^H W A + λ)⁻¹ A^H W as one matrix, and E|n|² of its inputs, 2/w; from stacked readouts by `pinv`."""
    coils, rows, columns = maps.shape
    per_sample = weights.repeat_interleave(columns).repeat(coils).double()
    taken = per_sample > 0
    root = per_sample[taken].sqrt()
    system = root.unsqueeze(1) * dense_encoding(maps)[taken]
    if regularization:
        damping = regularization**0.5 * torch.eye(rows * columns, dtype=system.dtype)
        system = torch.cat([system, damping])
    inverse = torch.linalg.pinv(system, rtol=1e-12)[:, : int(taken.sum())]
    whole = torch.zeros(rows * columns, len(per_sample), dtype=system.dtype)
    whole[:, taken] = inverse * root
    variance = torch.where(taken, 2 / per_sample.clamp_min(1), 0.0)
    return whole, variance


@pytest.fixture
def maps() -> Tensor:
    return complex_normal(COILS, ROWS, COLUMNS, seed=1)


@pytest.mark.parametrize("regularization", [0.0, 0.03, 1.5])
@pytest.mark.parametrize("pattern", LINE_WEIGHTS)
def test_variance_equals_dense_least_squares(maps: Tensor, pattern: str, regularization: float) -> None:
    weights = torch.tensor(LINE_WEIGHTS[pattern])
    matrix, variance = dense_least_squares(maps, weights, regularization)
    expected = (matrix.abs().square() @ variance).reshape(ROWS, COLUMNS)
    system = column_system(maps, weights, regularization)
    torch.testing.assert_close(system.variance(), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("regularization", [0.0, 0.3])
@pytest.mark.parametrize("pattern", ["full", "random", "repeated"])
@pytest.mark.parametrize(("rows_out", "columns_out"), [(7, 8), (13, None), (None, 9)])
def test_variance_after_interpolation_equals_dense_least_squares(
    maps: Tensor, pattern: str, regularization: float, rows_out: int | None, columns_out: int | None
) -> None:
    weights = torch.tensor(LINE_WEIGHTS[pattern])
    matrix, variance = dense_least_squares(maps, weights, regularization)
    rows = None if rows_out is None else complex_normal(rows_out, ROWS, seed=2)
    columns = None if columns_out is None else complex_normal(columns_out, COLUMNS, seed=3)
    along_y = torch.eye(ROWS, dtype=torch.complex128) if rows is None else rows
    along_x = torch.eye(COLUMNS, dtype=torch.complex128) if columns is None else columns
    expected = (torch.kron(along_y, along_x) @ matrix).abs().square() @ variance
    found = column_system(maps, weights, regularization).variance(rows, columns)
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected.reshape(len(along_y), len(along_x)), rtol=1e-9, atol=0)


@pytest.mark.parametrize("regularization", [0.0, 0.03])
@pytest.mark.parametrize("pattern", LINE_WEIGHTS)
def test_solution_equals_dense_least_squares(maps: Tensor, pattern: str, regularization: float) -> None:
    weights = torch.tensor(LINE_WEIGHTS[pattern])
    matrix, _ = dense_least_squares(maps, weights, regularization)
    kspace = complex_normal(2, 3, COILS, ROWS, COLUMNS, seed=4)
    right_side = (maps.conj() * ifft_centred(weights.unsqueeze(1) * kspace)).sum(dim=-3)
    solved = column_system(maps, weights, regularization).solve(right_side)
    expected = (kspace.flatten(2) @ matrix.mT).reshape(2, 3, ROWS, COLUMNS)
    torch.testing.assert_close(solved, expected, rtol=1e-9, atol=1e-9)


def test_solution_keeps_shape_and_precision(maps: Tensor) -> None:
    system = column_system(maps.to(torch.complex64), torch.ones(ROWS), 0.1)
    assert system.factor.dtype == torch.complex128
    right_side = complex_normal(ROWS, COLUMNS, seed=5).to(torch.complex64)
    solved = system.solve(right_side)
    assert solved.shape == (ROWS, COLUMNS)
    assert solved.dtype == torch.complex64
    torch.testing.assert_close(system.solve(right_side.expand(2, -1, -1))[1], solved)


def test_voxels_that_no_coil_sees_are_zero_and_disturb_nobody(maps: Tensor) -> None:
    weights = torch.tensor(LINE_WEIGHTS["repeated"])
    maps[:, 2:4, 1:3] = 0
    maps[:, :, 4] = 0
    dead = maps.abs().sum(dim=0) == 0
    system = column_system(maps, weights, 0.0)
    matrix, variance = dense_least_squares(maps, weights, 0.0)
    expected = (matrix.abs().square() @ variance).reshape(ROWS, COLUMNS)
    torch.testing.assert_close(system.variance()[~dead], expected[~dead], rtol=1e-9, atol=0)
    assert not bool(system.variance()[dead].any())
    right_side = complex_normal(ROWS, COLUMNS, seed=6) * ~dead
    assert not bool(system.solve(right_side)[dead].any())


def test_fully_sampled_unit_norm_images_have_variance_two(maps: Tensor) -> None:
    unit = maps / maps.abs().square().sum(dim=0).sqrt()
    expected = torch.full((ROWS, COLUMNS), 2.0, dtype=torch.float64)
    torch.testing.assert_close(column_system(unit, torch.ones(ROWS), 0.0).variance(), expected)
    # n averages divide it by n
    torch.testing.assert_close(column_system(unit, torch.full((ROWS,), 4.0), 0.0).variance(), expected / 4)


@pytest.mark.parametrize("lines", [3, 1, 0])
def test_singular_systems_are_refused(maps: Tensor, lines: int) -> None:
    weights = (torch.arange(ROWS) < lines).float()
    with pytest.raises(
        ValueError,
        match=rf"sense: least squares is singular at readout position 0: {lines} lines of 3 coils do not "
        r"determine 10 voxels at regularization 0; choose a regularization above 0",
    ):
        column_system(maps, weights, 0.0)
    assert isinstance(column_system(maps, weights, 1e-3), ColumnSystem)


def test_nearly_singular_systems_are_refused() -> None:
    """Determined on paper: 4 coils that hardly differ, every other line."""
    generator = torch.Generator().manual_seed(4)
    maps = 1 + 1e-4 * torch.randn(4, ROWS, COLUMNS, generator=generator, dtype=torch.complex128)
    weights = (torch.arange(ROWS) % 2 == 0).float()
    with pytest.raises(ValueError, match=r"nearly singular at readout position \d+: it amplifies noise \d+ times"):
        column_system(maps, weights, 0.0)
    assert isinstance(column_system(maps, weights, 1e-3), ColumnSystem)


@pytest.mark.parametrize("amplification", [10.0, 1000.0])
def test_amplification_is_the_root_of_the_smallest_eigenvalue(amplification: float) -> None:
    """Of one voxel in each column, so that it is known."""
    maps = torch.full((1, 1, COLUMNS), 1 / amplification, dtype=torch.complex128)
    column_system(maps, torch.ones(1), 0.0)
    with pytest.raises(ValueError, match="it amplifies noise 4000 times at regularization 0, at most 3000"):
        column_system(maps * amplification / 4000, torch.ones(1), 0.0)


def test_singular_column_is_named(maps: Tensor) -> None:
    maps[1:, :, 3] = 0
    with pytest.raises(ValueError, match="at readout position 3: 5 lines of 3 coils"):
        column_system(maps, torch.tensor(LINE_WEIGHTS["every other"]), 0.0)


# --- rows of a Jacobian


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_rows_of_a_complex_linear_map_are_its_closed_form(chunk: int, maps: Tensor) -> None:
    variance = torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    variance[::3] = 0

    def combine(kspace: Tensor) -> Tensor:
        return (maps.conj() * ifft_centred(kspace)).sum(dim=-3)

    in_phase, whole = jacobian_variance(combine, complex_normal(COILS, ROWS, COLUMNS, seed=8), variance, chunk=chunk)
    expected = zero_filled_variance(maps, variance)
    torch.testing.assert_close(whole, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(in_phase, expected / 2, rtol=1e-10, atol=0)


def test_rows_of_a_map_with_conjugates_are_its_closed_form() -> None:
    plain, mirrored = complex_normal(2, ROWS, COLUMNS, seed=9)
    kspace = complex_normal(1, ROWS, COLUMNS, seed=10)
    variance = torch.linspace(0.5, 2, ROWS * COLUMNS, dtype=torch.float64).reshape(ROWS, COLUMNS)

    def reconstruct(samples: Tensor) -> Tensor:
        return plain * samples[0] + mirrored * samples[0].conj()

    in_phase, whole = jacobian_variance(reconstruct, kspace, variance)
    # Re(e^{-iφ}(p v + m v*)) = Re((p e^{-iφ} + m* e^{iφ}) v)
    image = reconstruct(kspace)
    turn = image / image.abs()
    expected = (plain / turn + mirrored.conj() * turn).abs().square() * variance / 2
    torch.testing.assert_close(in_phase, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(whole, (plain.abs().square() + mirrored.abs().square()) * variance, rtol=1e-10, atol=0)


def test_rows_of_a_network_lie_between_nothing_and_the_whole(
    network: NetworkReconstruction, kspace: Tensor, problem: PlaneProblem, exact_variances: tuple[Tensor, Tensor]
) -> None:
    in_phase, whole = exact_variances
    assert bool((in_phase > 0).all())
    assert bool((in_phase < whole).all())
    # half the noise power is half the variance
    halved = jacobian_variance(network, kspace, problem.variance / 2, chunk=96)
    torch.testing.assert_close(halved[1], whole / 2, rtol=1e-10, atol=0)


# --- the zero-filled image


def test_zero_filled_variance_is_its_formula(maps: Tensor) -> None:
    weights = torch.tensor(LINE_WEIGHTS["repeated"]).double()
    variance = torch.where(weights > 0, 2 / weights.clamp_min(1), 0.0).unsqueeze(1).expand(-1, COLUMNS)
    adjoint = dense_encoding(maps).mH
    expected = (adjoint.abs().square() @ variance.flatten().repeat(COILS)).reshape(ROWS, COLUMNS)
    torch.testing.assert_close(zero_filled_variance(maps, variance), expected, rtol=1e-12, atol=0)
