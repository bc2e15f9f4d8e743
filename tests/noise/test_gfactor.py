"""The g-factor: closed form, exact columns and sketch give one answer."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from voxelsigma.models.problem import PlaneProblem
from voxelsigma.models.sense import Sense
from voxelsigma.noise.exact import column_system
from voxelsigma.noise.gfactor import aliasing_gfactor, noise_ratio
from voxelsigma.noise.linearize import linearize
from voxelsigma.noise.probes import ProbeSource
from voxelsigma.noise.sketch import Stopping, sketch

ROWS, COLUMNS, COILS = 48, 40, 8

MapMaker = Callable[[int, int, int], Tensor]


@pytest.fixture(scope="module")
def maps(smooth_maps: MapMaker) -> Tensor:
    return smooth_maps(COILS, ROWS, COLUMNS)


def regular_lines(acceleration: int, offset: int = 0) -> Tensor:
    return (torch.arange(ROWS) % acceleration == offset).double()


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("acceleration", [2, 3, 4])
def test_exact_columns_give_the_closed_form(maps: Tensor, acceleration: int, offset: int) -> None:
    system = column_system(maps, regular_lines(acceleration, offset), 0.0)
    sigma = (system.variance() / 2).sqrt()
    g = noise_ratio(sigma, maps, acceleration)
    torch.testing.assert_close(g, aliasing_gfactor(maps, acceleration), rtol=1e-6, atol=0)
    assert float(g.min()) >= 1 - 1e-9
    assert float(g.max()) > 1.01


@pytest.mark.parametrize("acceleration", [2, 3, 4])
def test_sketched_sense_gives_the_closed_form_within_its_stated_error(maps: Tensor, acceleration: int) -> None:
    weights = regular_lines(acceleration).unsqueeze(1).expand(-1, COLUMNS).float()
    problem = PlaneProblem(
        sensitivities=maps.to(torch.complex64),
        variance=2 * weights,
        weights=weights,
        limits=((0, ROWS - 1), (0, COLUMNS - 1)),
        size=(ROWS, COLUMNS),
    )
    reconstruction = Sense().bind(problem)
    assert reconstruction.windows[0].whole
    probes = ProbeSource(variance=problem.variance, coils=COILS, seed=51)
    linearization = linearize(reconstruction, probes.block(100)[0])
    result = sketch(linearization, probes, Stopping(probes=256)).map()
    g = noise_ratio(result.sigma, maps, problem.acceleration())
    difference = (g / aliasing_gfactor(maps, acceleration) - 1).abs()
    stated = float(result.relative_error().median())
    assert stated == pytest.approx(1 / math.sqrt(4 * 256), rel=1e-6)
    # the median of |error| is 0.67 of the standard error; about 1920/R folds know it to 5 %
    assert 0.5 * stated < float(difference.median()) < 0.85 * stated


def test_one_is_the_g_factor_of_full_sampling(maps: Tensor) -> None:
    torch.testing.assert_close(aliasing_gfactor(maps, 1), torch.ones(ROWS, COLUMNS, dtype=torch.float64))


def test_g_factor_does_not_depend_on_the_scale_and_phase_of_the_maps(maps: Tensor) -> None:
    shading = torch.polar(
        torch.linspace(0.2, 3, ROWS * COLUMNS, dtype=torch.float64),
        0.1 * torch.arange(ROWS * COLUMNS, dtype=torch.float64),
    ).reshape(ROWS, COLUMNS)
    torch.testing.assert_close(aliasing_gfactor(shading * maps, 3), aliasing_gfactor(maps, 3), rtol=1e-7, atol=0)


def test_g_factor_of_two_coils_by_hand() -> None:
    # two voxels fold; coil 1 sees both alike, coil 2 only the second with weight b
    b = 0.75
    maps = torch.tensor([[[1.0], [1.0]], [[0.0], [b]]], dtype=torch.complex128)
    # S^H S = [[1, 1], [1, 1 + b²]], determinant b²: inverse diagonal (1 + b²)/b² and 1/b²
    expected = math.sqrt(1 + b**2) / b
    torch.testing.assert_close(
        aliasing_gfactor(maps, 2), torch.full((2, 1), expected, dtype=torch.float64), rtol=1e-12, atol=0
    )


def test_voxels_that_no_coil_sees_take_no_part_in_the_fold(maps: Tensor) -> None:
    hidden = maps.clone()
    hidden[:, : ROWS // 2] = 0
    g = aliasing_gfactor(hidden, 2)
    assert not bool(g[: ROWS // 2].any())
    torch.testing.assert_close(g[ROWS // 2 :], torch.ones(ROWS // 2, COLUMNS, dtype=torch.float64))


@pytest.mark.parametrize("acceleration", [5, 7])
def test_acceleration_that_does_not_divide_the_rows_is_refused(maps: Tensor, acceleration: int) -> None:
    with pytest.raises(ValueError, match=f"48 rows at acceleration {acceleration}; expected a divisor of the rows"):
        aliasing_gfactor(maps, acceleration)


def test_noise_ratio_is_its_formula() -> None:
    maps = torch.tensor([[[3.0, 0.0, 1.0]], [[4.0j, 0.0, 0.0]]], dtype=torch.complex128)
    sigma = torch.tensor([[0.4, 7.0, 2.0]], dtype=torch.float64)
    # σ_full = 1/5, -, 1: g = 0.4 · 5 / √4 = 1, 0 where no coil sees anything, 2 / √4 = 1
    expected = torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(noise_ratio(sigma, maps, 4.0), expected)
