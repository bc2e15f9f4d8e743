"""One plane to reconstruct: accelerations, weights, coil maps on other grids, the covariate."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from voxelsigma.models import problem as problem_module
from voxelsigma.models.encoding import SenseEncoding
from voxelsigma.models.grid import Window, apply_axes, interpolation_matrix
from voxelsigma.models.normal_equations import normal_operator
from voxelsigma.models.problem import PlaneProblem
from voxelsigma.noise.inverse import Operator
from voxelsigma.noise.linearize import linearize
from voxelsigma.noise.probes import ProbeSource
from voxelsigma.noise.sketch import Stopping, sketch
from voxelsigma.noise.voxels import phase_factor

MapMaker = Callable[[int, int, int], Tensor]
Normal = Callable[..., Tensor]

COILS = 3


def problem_of(
    maps: Tensor,
    weights: Tensor,
    *,
    limits: tuple[tuple[int, int], tuple[int, int]] | None = None,
    size: tuple[int, int] | None = None,
    field_of_view: tuple[float, float] = (1.0, 1.0),
) -> PlaneProblem:
    rows, columns = weights.shape
    return PlaneProblem(
        sensitivities=maps,
        variance=torch.where(weights > 0, 2 / weights.clamp_min(1e-6), 0.0),
        weights=weights,
        limits=limits or ((0, rows - 1), (0, columns - 1)),
        size=size or (rows, columns),
        field_of_view=field_of_view,
    )


def line_weights(rows: int, columns: int, lines: dict[int, float]) -> Tensor:
    weights = torch.zeros(rows, columns, dtype=torch.float64)
    for line, count in lines.items():
        weights[line] = count
    return weights


# --- grids and accelerations


@pytest.mark.parametrize(
    ("rows", "lines", "limits", "expected"),
    [
        pytest.param(24, dict.fromkeys(range(24), 1.0), (0, 23), 1.0, id="full"),
        pytest.param(24, dict.fromkeys(range(0, 24, 3), 1.0), (0, 23), 3.0, id="regular"),
        pytest.param(144, dict.fromkeys(range(18, 126, 3), 1.0), (18, 125), 3.0, id="regular in a padded axis"),
        pytest.param(24, dict.fromkeys([1, 5, 9, 11, 12, 13], 1.0), (0, 23), 4.0, id="irregular"),
        pytest.param(24, dict.fromkeys([7, 9, 12, 13], 1.0), (6, 17), 3.0, id="irregular in a padded axis"),
        pytest.param(24, dict.fromkeys(range(24), 2.0), (0, 23), 0.5, id="two averages"),
        pytest.param(24, {4: 3.0, 10: 2.0, 11: 1.0, 12: 2.0}, (0, 23), 3.0, id="repeats"),
        pytest.param(24, dict.fromkeys(range(9, 24), 1.0), (9, 23), 1.0, id="partial Fourier"),
    ],
)
def test_acceleration_counts_repeats_on_the_acquired_grid(
    smooth_maps: MapMaker, rows: int, lines: dict[int, float], limits: tuple[int, int], expected: float
) -> None:
    problem = problem_of(smooth_maps(COILS, rows, 5), line_weights(rows, 5, lines), limits=(limits, (0, 4)))
    assert problem.acceleration() == pytest.approx(expected)


def test_windows_of_a_regular_scan_in_a_padded_axis(smooth_maps: MapMaker) -> None:
    weights = line_weights(144, 6, dict.fromkeys(range(18, 126, 3), 1.0))
    problem = problem_of(smooth_maps(COILS, 144, 6), weights, limits=((18, 125), (0, 5)))
    for symmetric in (False, True):
        assert problem.windows(symmetric=symmetric) == (Window(18, 108, 144), Window(0, 6, 6))


def test_windows_of_partial_fourier_and_an_asymmetric_echo(smooth_maps: MapMaker) -> None:
    weights = line_weights(16, 12, dict.fromkeys(range(5, 16), 1.0))
    weights[:, :3] = 0
    problem = problem_of(smooth_maps(COILS, 16, 12), weights, limits=((5, 15), (3, 11)))
    assert problem.windows(symmetric=False) == (Window(5, 11, 16), Window(3, 9, 12))
    assert problem.windows(symmetric=True) == (Window(0, 16, 16), Window(0, 12, 12))
    assert problem.cropped_weights(problem.windows(symmetric=False)).min() == 1


def test_cropped_weights_are_those_of_the_window(smooth_maps: MapMaker) -> None:
    weights = torch.rand(10, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    problem = problem_of(smooth_maps(COILS, 10, 8), weights)
    assert torch.equal(problem.cropped_weights((Window(2, 5, 10), Window(1, 4, 8))), weights[2:7, 1:5])


def test_white_readouts_vary_along_no_line(smooth_maps: MapMaker) -> None:
    weights = line_weights(8, 6, {0: 1.0, 3: 2.0, 4: 1.0})
    assert problem_of(smooth_maps(COILS, 8, 6), weights).white_readout
    weights[3, 2] = 1.5
    assert not problem_of(smooth_maps(COILS, 8, 6), weights).white_readout


# --- coil maps on other grids


@pytest.mark.parametrize("size", [(24, 20), (12, 10), (48, 31), (7, 20)])
@pytest.mark.parametrize("part", [1.0, 0.5])
def test_sensitivities_keep_unit_norm_on_any_grid(smooth_maps: MapMaker, size: tuple[int, int], part: float) -> None:
    problem = problem_of(smooth_maps(COILS, 24, 20), torch.ones(24, 20))
    maps = problem.sensitivities_on(size, (part, 1.0))
    assert maps.shape == (COILS, *size)
    norm = maps.abs().square().sum(dim=0)
    torch.testing.assert_close(norm, torch.ones(size, dtype=torch.float64))


def test_sensitivities_on_their_own_grid_are_themselves(smooth_maps: MapMaker) -> None:
    problem = problem_of(smooth_maps(COILS, 24, 20), torch.ones(24, 20))
    assert problem.sensitivities_on((24, 20)) is problem.sensitivities


def test_sensitivities_of_a_part_of_the_field_of_view_are_a_selection(smooth_maps: MapMaker) -> None:
    maps = smooth_maps(COILS, 24, 20)
    problem = problem_of(maps, torch.ones(24, 20))
    torch.testing.assert_close(problem.sensitivities_on((12, 20), (0.5, 1.0)), maps[:, 6:18])
    torch.testing.assert_close(problem.sensitivities_on((24, 10), (1.0, 0.5)), maps[:, :, 5:15])


def test_sensitivities_between_voxels_are_close_to_the_fields(smooth_maps: MapMaker) -> None:
    coarse, fine = smooth_maps(COILS, 32, 32), smooth_maps(COILS, 64, 64)
    found = problem_of(coarse, torch.ones(32, 32)).sensitivities_on((64, 64))
    inside = (slice(None), slice(0, 63), slice(0, 63))
    assert float((found - fine)[inside].abs().max()) < 0.01


def test_voxels_that_no_coil_sees_stay_unseen(smooth_maps: MapMaker) -> None:
    maps = smooth_maps(COILS, 24, 20)
    maps[:, :, :8] = 0
    found = problem_of(maps, torch.ones(24, 20)).sensitivities_on((24, 80))
    # four voxels a voxel: one is seen where it is nearer to a voxel that is seen than to one that is not
    seen = torch.zeros(80, dtype=torch.float64)
    seen[4 * 8 - 1 : 4 * 19 + 2] = 1
    # midway, at 30 and 78, the rounding decides
    decided = [index for index in range(80) if index not in (30, 78)]
    norm = found.abs().square().sum(dim=0)
    torch.testing.assert_close(norm[:, decided], seen[decided].expand(24, -1))


# --- the covariate


def irregular_weights(rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 3, (rows, columns), generator=generator).double()


SCANS: dict[str, dict[str, Any]] = {
    "own grid": {},
    "finer grid": {"size": (20, 18)},
    "coarser grid": {"size": (8, 12)},
    "half the field of view": {"size": (7, 12), "field_of_view": (0.5, 1.0)},
    "part of a finer field of view": {"size": (14, 9), "field_of_view": (0.5, 0.5)},
    "part of no whole number of voxels": {"size": (14, 7), "field_of_view": (1.0, 0.55)},
    "padded axis": {"limits": ((2, 11), (0, 11))},
    "partial Fourier": {"limits": ((4, 13), (0, 11)), "size": (16, 12)},
}


def scan(smooth_maps: MapMaker, name: str) -> PlaneProblem:
    weights = irregular_weights(14, 12)
    options = SCANS[name]
    (first, last), _ = options.get("limits", ((0, 13), (0, 11)))
    weights[:first] = 0
    weights[last + 1 :] = 0
    return problem_of(smooth_maps(COILS, 14, 12), weights, **options)


@pytest.mark.parametrize("name", SCANS)
def test_variance_of_the_covariate_is_exact(smooth_maps: MapMaker, name: str) -> None:
    problem = scan(smooth_maps, name)
    covariate = problem.covariate()
    # every sample alone, at its own deviation: the sum of squares is E|w|² without any chance
    places = (problem.variance > 0).expand(COILS, -1, -1).nonzero()
    tangents = torch.zeros(len(places), COILS, *problem.variance.shape, dtype=torch.complex128)
    for tangent, (coil, row, column) in zip(tangents, places.tolist(), strict=True):
        tangent[coil, row, column] = problem.variance[row, column].sqrt()
    expected = covariate.push(tangents).abs().square().sum(dim=0)
    assert covariate.variance.shape == problem.size
    assert covariate.variance.dtype == torch.float64
    torch.testing.assert_close(covariate.variance, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["own grid", "finer grid", "partial Fourier"])
def test_variance_of_the_covariate_is_that_of_pushed_probes(smooth_maps: MapMaker, name: str) -> None:
    problem = scan(smooth_maps, name)
    covariate = problem.covariate()
    probes = ProbeSource(variance=problem.variance, coils=COILS, seed=4)
    pushed = torch.cat([covariate.push(block) for block in probes.blocks(0, 250)])
    measured = pushed.abs().square().mean(dim=0)
    # |w|² of 2000 probes is known to 1/√2000 = 2.2 %; 6 of them in at most 360 voxels: false alarm 1e-6
    torch.testing.assert_close(measured.double(), covariate.variance, rtol=0.135, atol=0)
    assert float((measured / covariate.variance).mean()) == pytest.approx(1, abs=0.02)


def test_covariate_on_its_own_grid_is_the_zero_filled_image(smooth_maps: MapMaker, complex_normal: Normal) -> None:
    problem = scan(smooth_maps, "own grid")
    kspace = complex_normal(2, COILS, 14, 12, seed=5) * (problem.weights > 0)
    operator = SenseEncoding(problem.sensitivities, torch.ones(14, 12))
    torch.testing.assert_close(problem.covariate().push(kspace), operator.adjoint(kspace))


@pytest.mark.parametrize("name", ["finer grid", "partial Fourier"])
def test_covariate_on_a_finer_grid_is_the_combination_of_interpolated_coil_images(
    smooth_maps: MapMaker, complex_normal: Normal, name: str
) -> None:
    problem = scan(smooth_maps, name)
    rows, columns = problem.size
    kspace = complex_normal(2, COILS, 14, 12, seed=6) * (problem.weights > 0)
    padded = torch.zeros(2, COILS, rows, columns, dtype=torch.complex128)
    top, left = rows // 2 - 7, columns // 2 - 6
    padded[..., top : top + 14, left : left + 12] = kspace
    operator = SenseEncoding(problem.sensitivities_on(problem.size), torch.ones(rows, columns))
    # the window is the whole axis, also of partial Fourier: intensities are those of an image model on it
    expected = operator.adjoint(padded) * (rows / 14 * columns / 12) ** 0.5
    torch.testing.assert_close(problem.covariate().push(kspace), expected)


@pytest.mark.parametrize("name", ["own grid", "finer grid"])
def test_covariate_of_a_real_reconstruction_is_in_phase_with_its_zero_filled_image(
    smooth_maps: MapMaker, complex_normal: Normal, name: str
) -> None:
    problem = scan(smooth_maps, name)
    kspace = complex_normal(COILS, 14, 12, seed=7) * (problem.weights > 0)
    plain = problem.covariate()
    linearization = linearize(lambda measured: plain.push(measured.unsqueeze(0))[0].abs(), kspace)
    probes = ProbeSource(variance=problem.variance, coils=COILS, seed=8, dtype=torch.complex128)
    turned = problem.covariate(kspace)
    torch.testing.assert_close(turned.variance, plain.variance)
    torch.testing.assert_close(turned.push(probes.block(0)).real, linearization.push(probes.block(0)))
    # the covariate explains everything, so that few probes give the closed form
    explained = sketch(
        linearization, probes, Stopping(probes=8), covariate=replace(turned, filtered_variance=None)
    ).map()
    torch.testing.assert_close(explained.sigma, (turned.variance / 2).sqrt(), rtol=1e-3, atol=0)


# --- A^H A on the wanted grid


def normal_of(problem: PlaneProblem, kspace: Tensor | None = None) -> Operator:
    normal = problem.covariate(kspace).normal
    assert normal is not None
    return normal


def dense(operator: Operator, size: tuple[int, int]) -> Tensor:
    """Columns are what becomes of unit images."""
    count = size[0] * size[1]
    return operator(torch.eye(count, dtype=torch.complex128).view(-1, *size)).flatten(1).mT


@pytest.mark.parametrize("turned", [False, True])
def test_normal_is_the_encoding_and_its_adjoint(smooth_maps: MapMaker, complex_normal: Normal, turned: bool) -> None:
    """Of the zero-filled image, that of its own encoding."""
    problem = scan(smooth_maps, "own grid")
    data = complex_normal(COILS, 14, 12, seed=9) * (problem.weights > 0) if turned else None
    encoding = SenseEncoding(problem.sensitivities, (problem.weights > 0).double())
    images = complex_normal(3, 14, 12, seed=10)
    # without a phase of its own all images are turned by that of the zero-filled one
    phase = torch.ones(14, 12) if data is None else phase_factor(encoding.adjoint(data))
    expected = phase.conj() * encoding.adjoint(encoding.forward(phase * images))
    torch.testing.assert_close(normal_of(problem, data)(images), expected)
    covariate = problem.covariate(data)
    assert covariate.normal is not None
    kspace = complex_normal(2, COILS, 14, 12, seed=11)
    projected = encoding.forward(encoding.adjoint(kspace))
    torch.testing.assert_close(covariate.normal(covariate.push(encoding.mask * kspace)), covariate.push(projected))


@pytest.mark.parametrize("name", SCANS)
@pytest.mark.parametrize("turned", [False, True])
def test_normal_is_hermitian_and_at_most_one(
    smooth_maps: MapMaker, complex_normal: Normal, name: str, turned: bool
) -> None:
    problem = scan(smooth_maps, name)
    data = complex_normal(COILS, 14, 12, seed=12) * (problem.weights > 0) if turned else None
    found = dense(normal_of(problem, data), problem.size)
    torch.testing.assert_close(found, found.mH, rtol=0, atol=1e-12)
    values = torch.linalg.eigvalsh(found)
    assert float(values.min()) > -1e-12
    # two in three samples are there
    assert 0.5 < float(values.max()) < 1 + 1e-12


@pytest.mark.parametrize("name", [name for name in SCANS if name != "part of no whole number of voxels"])
def test_normal_is_what_the_covariate_of_its_samples_is(
    smooth_maps: MapMaker, complex_normal: Normal, name: str
) -> None:
    """The push is all of a covariate that knows about grids: N is push and its adjoint, by one factor everywhere."""
    problem = scan(smooth_maps, name)
    count = problem.size[0] * problem.size[1]
    places = (problem.weights > 0).expand(COILS, -1, -1).nonzero()
    unit = torch.zeros(len(places), COILS, 14, 12, dtype=torch.complex128)
    unit[torch.arange(len(places)), places[:, 0], places[:, 1], places[:, 2]] = 1
    pushed = problem.covariate().push(unit).flatten(1).mT
    assert pushed.shape == (count, len(places))
    found, expected = dense(normal_of(problem), problem.size), pushed @ pushed.mH
    factor = found.diagonal().real.sum() / expected.diagonal().real.sum()
    torch.testing.assert_close(found, factor * expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(28, 24), (28, 12), (20, 18)])
def test_normal_on_a_finer_grid_is_the_interpolated_one(
    smooth_maps: MapMaker, complex_normal: Normal, size: tuple[int, int]
) -> None:
    """Exactly where one coil sees all alike; nearly where coils are smooth."""
    weights = irregular_weights(14, 12)
    low = torch.zeros(14, 12, dtype=torch.complex128)
    # products with the fields stay within the band
    low[4:10, 3:9] = complex_normal(6, 6, seed=13)
    coarse = SenseEncoding(torch.ones(1, 14, 12).to(low), torch.ones(14, 12)).adjoint(low)
    windows = Window(0, 14, 14), Window(0, 12, 12)
    matrices = [interpolation_matrix(window, one, 1.0) for window, one in zip(windows, size, strict=True)]
    for maps, most in ((torch.ones(1, 14, 12).to(low), 1e-12), (smooth_maps(COILS, 14, 12), 0.1)):
        encoding = SenseEncoding(maps, (weights > 0).double())
        expected = apply_axes(matrices, encoding.adjoint(encoding.forward(coarse)))
        found = normal_of(problem_of(maps, weights, size=size))(apply_axes(matrices, coarse).unsqueeze(0))[0]
        assert float((found - expected).norm()) < most * float(expected.norm())


def test_normal_of_images_is_that_of_each(smooth_maps: MapMaker, complex_normal: Normal) -> None:
    for name in ("own grid", "finer grid"):
        problem = scan(smooth_maps, name)
        normal, images = normal_of(problem), complex_normal(3, *problem.size, seed=14)
        before = images.clone()
        for image, found in zip(images, normal(images), strict=True):
            torch.testing.assert_close(normal(image.unsqueeze(0))[0], found)
        assert torch.equal(images, before)


@pytest.mark.parametrize("name", ["own grid", "finer grid"])
def test_normal_is_made_when_it_is_asked_for(
    smooth_maps: MapMaker, complex_normal: Normal, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And once: pipelines without a surrogate never do."""
    made: list[Operator] = []

    def counting(*arguments: Tensor) -> Operator:
        made.append(normal_operator(*arguments))
        return made[-1]

    monkeypatch.setattr(problem_module, "normal_operator", counting)
    problem = scan(smooth_maps, name)
    covariate = problem.covariate()
    assert covariate.normal is not None
    covariate.push(complex_normal(2, COILS, 14, 12, seed=15))
    assert not made
    for _ in range(2):
        covariate.normal(complex_normal(2, *problem.size, seed=16))
    assert len(made) == 1
