"""SENSE: two solvers, one answer, and its exact noise."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from voxelsigma.models.fourier import fft_centred
from voxelsigma.models.problem import PlaneProblem
from voxelsigma.models.sense import Sense, SenseReconstruction
from voxelsigma.noise.exact import jacobian_variance
from voxelsigma.noise.linearize import Linearizable, linearize

MapMaker = Callable[[int, int, int], Tensor]
Normal = Callable[..., Tensor]
Dense = Callable[[Tensor], Tensor]

COILS, ROWS, COLUMNS = 4, 18, 12


def problem_of(
    maps: Tensor,
    weights: Tensor,
    *,
    limits: tuple[int, int] | None = None,
    size: tuple[int, int] | None = None,
    field_of_view: tuple[float, float] = (1.0, 1.0),
) -> PlaneProblem:
    rows, columns = weights.shape
    return PlaneProblem(
        sensitivities=maps,
        variance=torch.where(weights > 0, 2 / weights.clamp_min(1e-6), 0.0),
        weights=weights,
        limits=(limits or (0, rows - 1), (0, columns - 1)),
        size=size or (rows, columns),
        field_of_view=field_of_view,
    )


LINES = {
    "full": [1] * 18,
    "every other": [1, 0] * 9,
    "every third, shifted": [0, 0, 1] * 6,
    "irregular with repeats": [1, 0, 0, 2, 0, 1, 1, 0, 3, 1, 2, 1, 0, 1, 0, 0, 1, 0],
}


def by_lines(name: str) -> Tensor:
    return torch.tensor(LINES[name], dtype=torch.float64).unsqueeze(1).expand(-1, COLUMNS).contiguous()


def planar(fraction: float) -> Tensor:
    """Random 2D weights, some samples from two readouts."""
    generator = torch.Generator().manual_seed(1)
    chance = torch.rand(ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    return (chance < fraction).double() + (chance < fraction / 5).double()


def by_conjugate_gradients(reconstruction: SenseReconstruction) -> SenseReconstruction:
    return dataclasses.replace(reconstruction, columns=None)


def dense_solution(
    dense_encoding: Dense, maps: Tensor, weights: Tensor, kspace: Tensor, regularization: float
) -> Tensor:
    """Weighted, damped least squares of one k-space by QR of the stacked system."""
    coils = len(maps)
    root = weights.flatten().repeat(coils).sqrt()
    system = root.unsqueeze(1) * dense_encoding(maps)
    unknowns = system.shape[1]
    damping = regularization**0.5 * torch.eye(unknowns, dtype=system.dtype)
    target = torch.cat([root * kspace.flatten(), torch.zeros(unknowns, dtype=system.dtype)])
    solution = torch.linalg.lstsq(torch.cat([system, damping]), target.unsqueeze(1)).solution
    return solution.reshape(maps.shape[-2:])


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("regularization", [0.0, 0.02])
@pytest.mark.parametrize("name", LINES)
def test_conjugate_gradients_and_columns_give_one_image(
    smooth_maps: MapMaker, complex_normal: Normal, name: str, regularization: float, dtype: torch.dtype
) -> None:
    weights = by_lines(name).to(dtype.to_real())
    problem = problem_of(smooth_maps(COILS, ROWS, COLUMNS).to(dtype), weights)
    reconstruction = Sense(regularization=regularization).bind(problem)
    assert reconstruction.columns is not None
    kspace = complex_normal(2, COILS, ROWS, COLUMNS, seed=2).to(dtype)
    image, iterated = reconstruction(kspace), by_conjugate_gradients(reconstruction)(kspace)
    assert image.dtype == iterated.dtype == dtype
    # a relative residual of 1e-6 is an error of at most the condition number times it, in norm
    assert float((image - iterated).norm() / image.norm()) < 1e-5


@pytest.mark.parametrize("regularization", [0.0, 0.1])
@pytest.mark.parametrize("name", LINES)
def test_columns_equal_dense_least_squares(
    smooth_maps: MapMaker, complex_normal: Normal, dense_encoding: Dense, name: str, regularization: float
) -> None:
    maps, weights = smooth_maps(COILS, ROWS, COLUMNS), by_lines(name)
    kspace = complex_normal(COILS, ROWS, COLUMNS, seed=3)
    image = Sense(regularization=regularization).bind(problem_of(maps, weights))(kspace)
    torch.testing.assert_close(
        image, dense_solution(dense_encoding, maps, weights, kspace, regularization), rtol=1e-8, atol=1e-8
    )


@pytest.mark.parametrize(("fraction", "regularization"), [(0.7, 0.0), (0.4, 0.05)])
def test_planar_sampling_equals_dense_least_squares(
    smooth_maps: MapMaker, complex_normal: Normal, dense_encoding: Dense, fraction: float, regularization: float
) -> None:
    maps, weights = smooth_maps(COILS, ROWS, COLUMNS), planar(fraction)
    reconstruction = Sense(regularization=regularization, tolerance=1e-10).bind(problem_of(maps, weights))
    assert reconstruction.columns is None
    assert reconstruction.exact_variance() is None
    kspace = complex_normal(COILS, ROWS, COLUMNS, seed=4)
    expected = dense_solution(dense_encoding, maps, weights, kspace, regularization)
    torch.testing.assert_close(reconstruction(kspace), expected, rtol=1e-6, atol=1e-6)


def test_sampling_along_the_other_axis_equals_dense_least_squares(
    smooth_maps: MapMaker, complex_normal: Normal, dense_encoding: Dense
) -> None:
    # W is constant along k1 now: its Fourier transform is skipped there
    maps, weights = smooth_maps(COILS, ROWS, COLUMNS), torch.zeros(ROWS, COLUMNS, dtype=torch.float64)
    weights[:, [0, 2, 5, 6, 7, 10]] = 1
    weights[:, 6] = 2
    reconstruction = Sense(regularization=0.01, tolerance=1e-10).bind(problem_of(maps, weights))
    kspace = complex_normal(COILS, ROWS, COLUMNS, seed=5)
    expected = dense_solution(dense_encoding, maps, weights, kspace, 0.01)
    torch.testing.assert_close(reconstruction(kspace), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weights", [by_lines("irregular with repeats"), planar(0.6)], ids=["lines", "plane"])
def test_it_is_complex_linear_and_batches_are_singles(
    smooth_maps: MapMaker, complex_normal: Normal, weights: Tensor
) -> None:
    problem = problem_of(smooth_maps(COILS, ROWS, COLUMNS), weights, size=(24, 12))
    reconstruction = Sense(regularization=0.01, tolerance=1e-12).bind(problem)
    first, second = complex_normal(2, COILS, ROWS, COLUMNS, seed=6)
    images = reconstruction(torch.stack([first, second]))
    assert images.shape == (2, 24, 12)
    torch.testing.assert_close(images[0], reconstruction(first), rtol=1e-8, atol=1e-8)
    mixed = reconstruction((2 - 1j) * first + 0.5j * second)
    torch.testing.assert_close(mixed, (2 - 1j) * images[0] + 0.5j * images[1], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("weights", [by_lines("irregular with repeats"), planar(0.7)], ids=["lines", "plane"])
def test_averaged_samples_weigh_as_their_readouts(
    smooth_maps: MapMaker, complex_normal: Normal, dense_encoding: Dense, weights: Tensor
) -> None:
    maps = smooth_maps(COILS, ROWS, COLUMNS)
    repeats = int(weights.max())
    readouts = complex_normal(repeats, COILS, ROWS, COLUMNS, seed=7)
    # readout r of a sample exists where r < n_k
    exists = torch.arange(repeats).reshape(-1, 1, 1) < weights
    averaged = (readouts * exists.unsqueeze(1)).sum(dim=0) / weights.clamp_min(1)
    image = Sense(tolerance=1e-12).bind(problem_of(maps, weights))(averaged)
    # the oracle has never heard of averages: every readout is an equation of its own
    dense = dense_encoding(maps)
    taken = exists.unsqueeze(1).expand(-1, COILS, -1, -1).reshape(repeats, -1)
    system = torch.cat([dense[rows] for rows in taken])
    target = torch.cat([values.flatten()[rows] for values, rows in zip(readouts, taken, strict=True)])
    expected = torch.linalg.lstsq(system, target.unsqueeze(1)).solution.reshape(ROWS, COLUMNS)
    torch.testing.assert_close(image, expected, rtol=1e-6, atol=1e-6)


def test_regular_lines_in_a_padded_axis_unfold_exactly(smooth_maps: MapMaker, complex_normal: Normal) -> None:
    # 12 lines of step 3 from line 6 of 48: the object lives on a grid of 36
    weights = torch.zeros(48, COLUMNS, dtype=torch.float64)
    weights[range(6, 42, 3)] = 1
    problem = problem_of(smooth_maps(COILS, 48, COLUMNS), weights, limits=(6, 41))
    reconstruction = Sense().bind(problem)
    assert (reconstruction.windows[0].start, reconstruction.windows[0].size) == (6, 36)
    true_image = complex_normal(36, COLUMNS, seed=8)
    kspace = torch.zeros(COILS, 48, COLUMNS, dtype=torch.complex128)
    kspace[:, 6:42] = fft_centred(problem.sensitivities_on((36, COLUMNS)) * true_image)
    image = reconstruction(kspace * (weights > 0))
    interpolation = reconstruction.output[0]
    assert interpolation is not None
    torch.testing.assert_close(image, interpolation @ true_image, rtol=1e-8, atol=1e-8)


def test_regularization_shrinks_a_full_scan_by_its_formula(smooth_maps: MapMaker, complex_normal: Normal) -> None:
    maps = smooth_maps(COILS, ROWS, COLUMNS)
    true_image = complex_normal(ROWS, COLUMNS, seed=9)
    reconstruction = Sense(regularization=0.25).bind(problem_of(maps, by_lines("full")))
    torch.testing.assert_close(reconstruction(fft_centred(maps * true_image)), true_image / 1.25)
    iterated = by_conjugate_gradients(reconstruction)
    torch.testing.assert_close(iterated(fft_centred(maps * true_image)), true_image / 1.25)


# --- its noise


@pytest.mark.parametrize("regularization", [0.0, 0.05])
@pytest.mark.parametrize("name", ["every third, shifted", "irregular with repeats"])
@pytest.mark.parametrize(
    ("size", "field_of_view"), [((18, 12), (1.0, 1.0)), ((27, 14), (1.0, 1.0)), ((9, 16), (0.5, 1.0))]
)
def test_exact_variance_is_that_of_its_jacobian(
    smooth_maps: MapMaker,
    complex_normal: Normal,
    name: str,
    regularization: float,
    size: tuple[int, int],
    field_of_view: tuple[float, float],
) -> None:
    maps = smooth_maps(COILS, ROWS, COLUMNS)
    problem = problem_of(maps, by_lines(name), size=size, field_of_view=field_of_view)
    reconstruction = Sense(regularization=regularization).bind(problem)
    kspace = complex_normal(COILS, ROWS, COLUMNS, seed=10)
    in_phase, whole = jacobian_variance(reconstruction, kspace, problem.variance, chunk=512)
    exact = reconstruction.exact_variance()
    assert exact is not None
    torch.testing.assert_close(exact, whole, rtol=1e-7, atol=0)
    torch.testing.assert_close(exact / 2, in_phase, rtol=1e-7, atol=0)


def test_exact_variance_in_a_padded_axis(smooth_maps: MapMaker, complex_normal: Normal) -> None:
    weights = torch.zeros(24, COLUMNS, dtype=torch.float64)
    weights[range(5, 20, 3)] = 1
    problem = problem_of(smooth_maps(COILS, 24, COLUMNS), weights, limits=(5, 19), size=(24, 16))
    reconstruction = Sense().bind(problem)
    kspace = complex_normal(COILS, 24, COLUMNS, seed=11)
    expected = jacobian_variance(reconstruction, kspace, problem.variance, chunk=512)[1]
    exact = reconstruction.exact_variance()
    assert exact is not None
    torch.testing.assert_close(exact, expected, rtol=1e-7, atol=0)


def test_exact_variance_knows_noise_other_than_two_over_the_weights(
    smooth_maps: MapMaker, complex_normal: Normal
) -> None:
    # a plane of a volume whose readouts lack a quarter of their samples: 3/4 of the noise in every plane
    problem = problem_of(smooth_maps(COILS, ROWS, COLUMNS), by_lines("irregular with repeats"))
    quieter = dataclasses.replace(problem, variance=0.75 * problem.variance)
    reconstruction = Sense().bind(quieter)
    kspace = complex_normal(COILS, ROWS, COLUMNS, seed=12)
    expected = jacobian_variance(reconstruction, kspace, quieter.variance, chunk=512)[1]
    exact = reconstruction.exact_variance()
    assert exact is not None
    torch.testing.assert_close(exact, expected, rtol=1e-7, atol=0)
    # no common factor: no closed form
    uneven = problem.variance * torch.linspace(0.5, 1, ROWS, dtype=torch.float64).unsqueeze(1)
    assert Sense().bind(dataclasses.replace(problem, variance=uneven)).exact_variance() is None


def test_asymmetric_echoes_have_no_exact_variance(smooth_maps: MapMaker) -> None:
    weights = by_lines("every other")
    weights[:, :3] = 0
    problem = problem_of(smooth_maps(COILS, ROWS, COLUMNS), weights)
    narrow = dataclasses.replace(problem, limits=(problem.limits[0], (3, COLUMNS - 1)))
    reconstruction = Sense().bind(narrow)
    assert reconstruction.columns is not None
    assert reconstruction.exact_variance() is None
    # not even where noise has leaked, through a crop of the readout, to where no sample counts
    leaked = problem_of(problem.sensitivities, by_lines("every other")).variance
    assert Sense().bind(dataclasses.replace(narrow, variance=leaked)).exact_variance() is None


def test_noise_that_varies_along_the_readout_has_no_exact_variance(smooth_maps: MapMaker) -> None:
    problem = problem_of(smooth_maps(COILS, ROWS, COLUMNS), by_lines("every other"))
    uneven = problem.variance * torch.linspace(0.9, 1, COLUMNS, dtype=torch.float64)
    assert Sense().bind(dataclasses.replace(problem, variance=uneven)).exact_variance() is None


def test_it_linearizes_itself(smooth_maps: MapMaker, complex_normal: Normal) -> None:
    problem = problem_of(smooth_maps(COILS, ROWS, COLUMNS), by_lines("every other"), size=(24, 12))
    reconstruction = Sense().bind(problem)
    assert isinstance(reconstruction, Linearizable)
    kspace, tangent = complex_normal(2, COILS, ROWS, COLUMNS, seed=13)
    linearization = linearize(reconstruction, kspace)
    assert linearization.complex_linear
    torch.testing.assert_close(linearization.value, reconstruction(kspace))
    (pushed,) = linearization.push(tangent.unsqueeze(0))
    torch.testing.assert_close(pushed, reconstruction(kspace + tangent) - reconstruction(kspace))


def test_columns_too_many_to_keep_leave_conjugate_gradients(
    smooth_maps: MapMaker, complex_normal: Normal, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = problem_of(smooth_maps(COILS, ROWS, COLUMNS), by_lines("every other"))
    kspace = complex_normal(COILS, ROWS, COLUMNS, seed=14)
    expected = Sense().bind(problem)(kspace)
    monkeypatch.setattr("voxelsigma.models.sense.MAX_FACTOR_BYTES", 16 * COLUMNS * ROWS**2 - 1)
    without = Sense(tolerance=1e-10).bind(problem)
    assert without.columns is None
    torch.testing.assert_close(without(kspace), expected, rtol=1e-6, atol=1e-6)


def test_voxels_that_no_coil_sees_are_zero(smooth_maps: MapMaker, complex_normal: Normal) -> None:
    maps = smooth_maps(COILS, ROWS, COLUMNS)
    maps[:, 3:6, :4] = 0
    reconstruction = Sense(tolerance=1e-10).bind(problem_of(maps, by_lines("every other")))
    kspace = complex_normal(COILS, ROWS, COLUMNS, seed=15)
    image, iterated = reconstruction(kspace), by_conjugate_gradients(reconstruction)(kspace)
    assert not bool(image[3:6, :4].any())
    torch.testing.assert_close(iterated, image, rtol=1e-6, atol=1e-6)


def test_zero_input_is_a_zero_image(smooth_maps: MapMaker) -> None:
    for weights in (by_lines("every other"), planar(0.6)):
        reconstruction = Sense().bind(problem_of(smooth_maps(COILS, ROWS, COLUMNS), weights))
        assert not bool(reconstruction(torch.zeros(COILS, ROWS, COLUMNS, dtype=torch.complex128)).any())


def test_too_few_lines_are_refused(smooth_maps: MapMaker) -> None:
    weights = torch.zeros(ROWS, COLUMNS, dtype=torch.float64)
    weights[[0, 8, 9, 12]] = 1
    with pytest.raises(ValueError, match="least squares is singular at readout position 0: 4 lines of 4 coils"):
        Sense().bind(problem_of(smooth_maps(COILS, ROWS, COLUMNS), weights))
