"""The covariance of a SENSE image as an operator, against dense matrices."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from voxelsigma.models.fourier import fft_centred, ifft_centred
from voxelsigma.models.problem import PlaneProblem
from voxelsigma.models.sense import Sense, SenseReconstruction
from voxelsigma.noise.pico import Probing, image_probes, probe_sums, variance_map
from voxelsigma.noise.probes import ProbeSource

MapMaker = Callable[[int, int, int], Tensor]
COILS, ROWS, COLUMNS = 4, 16, 16


def planar(fraction: float, seed: int = 1) -> Tensor:
    """Random 2D weights, some samples from two readouts."""
    generator = torch.Generator().manual_seed(seed)
    chance = torch.rand(ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    return (chance < fraction).double() + (chance < fraction / 5).double()


def problem_of(maps: Tensor, weights: Tensor, **others: object) -> PlaneProblem:
    rows, columns = weights.shape
    fields: dict[str, object] = {
        "sensitivities": maps,
        "variance": torch.where(weights > 0, 2 / weights.clamp_min(1e-6), 0.0),
        "weights": weights,
        "limits": ((0, rows - 1), (0, columns - 1)),
        "size": (rows, columns),
    }
    return PlaneProblem(**{**fields, **others})  # type: ignore[arg-type]


def uneven(problem: PlaneProblem) -> PlaneProblem:
    """Noise that is no multiple of one over the weights."""
    slope = torch.linspace(0.4, 1, problem.variance.shape[0], dtype=torch.float64).unsqueeze(1)
    return dataclasses.replace(problem, variance=problem.variance * slope)


def windowed(maps: Tensor, fraction: float) -> PlaneProblem:
    """An asymmetrically cropped window: partial Fourier along k1."""
    weights = planar(fraction)
    weights[:5] = 0
    return problem_of(maps, weights, limits=((5, ROWS - 1), (0, COLUMNS - 1)))


def dead(maps: Tensor) -> Tensor:
    maps = maps.clone()
    maps[:, 3:6, :4] = 0
    return maps


CASES: dict[str, Callable[[Tensor], PlaneProblem]] = {
    "plain": lambda maps: problem_of(maps, planar(0.7)),
    "interpolated": lambda maps: problem_of(maps, planar(0.7), size=(24, 20)),
    "part of the field of view": lambda maps: problem_of(maps, planar(0.7), size=(8, 16), field_of_view=(0.5, 1.0)),
    "odd part, coarser": lambda maps: problem_of(maps, planar(0.8), size=(7, 12), field_of_view=(0.5, 1.0)),
    "window": lambda maps: windowed(maps, 0.8),
    "dead voxels": lambda maps: problem_of(dead(maps), planar(0.7)),
    "dead voxels, interpolated": lambda maps: problem_of(dead(maps), planar(0.7), size=(20, 16)),
    "uneven noise": lambda maps: uneven(problem_of(maps, planar(0.7))),
    "uneven noise, interpolated": lambda maps: uneven(problem_of(maps, planar(0.7), size=(20, 16))),
    "not of unit norm": lambda maps: problem_of(
        maps * torch.linspace(0.6, 1.2, COLUMNS, dtype=torch.float64), planar(0.7)
    ),
}


def bound(maps: MapMaker, name: str, regularization: float, tolerance: float = 1e-10) -> SenseReconstruction:
    problem = CASES[name](maps(COILS, ROWS, COLUMNS))
    return Sense(regularization=regularization, tolerance=tolerance).bind(problem)


def dense_covariance(reconstruction: SenseReconstruction, dense_encoding: Callable[[Tensor], Tensor]) -> Tensor:
    """P M⁺ A^H W C W A M⁺ P^H, all of it matrices."""
    rows, columns = reconstruction.windows
    encoding = dense_encoding(reconstruction.sensitivities)
    weights = reconstruction.weights.flatten().repeat(COILS).unsqueeze(1)
    variance = columns.crop(rows.crop(reconstruction.problem.variance, -2), -1).flatten().repeat(COILS).unsqueeze(1)
    normal = encoding.mH @ (weights * encoding)
    energy = normal.diagonal().real
    damping = torch.where(energy > 0, reconstruction.model.regularization, 1.0)
    inverse = torch.linalg.inv(normal + torch.diag(damping.to(normal.dtype)))
    spread = encoding.mH @ (weights.square() * variance * encoding)
    identity = [torch.eye(window.size, dtype=torch.complex128) for window in reconstruction.windows]
    axes = [unit if matrix is None else matrix for matrix, unit in zip(reconstruction.output, identity, strict=True)]
    left = torch.kron(axes[0].contiguous(), axes[1].contiguous()) @ inverse
    return left @ spread @ left.mH


def some_images(reconstruction: SenseReconstruction, dtype: torch.dtype = torch.complex128) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    parts = torch.randn(2, 6, *reconstruction.problem.size, generator=generator, dtype=torch.float64)
    return torch.complex(parts[0], parts[1]).to(dtype)


def by_matrix(covariance: Tensor, images: Tensor) -> Tensor:
    return (images.to(covariance.dtype).flatten(1) @ covariance.mT).reshape(images.shape)


def mean_of(probing: Probing, dtype: torch.dtype = torch.complex128, blocks: int = 1) -> tuple[Tensor, Tensor]:
    """Average of many samples, and its standard error, `(1 + controls, y, x)` each."""
    like = ProbeSource(variance=torch.ones(1, 1), coils=1, seed=5, dtype=dtype)
    source = image_probes(probing, like)
    drawn = torch.cat([source.block(number) for number in range(blocks)])
    sums = probe_sums(probing.samples(drawn))
    mean = sums.first / sums.count
    spread = (sums.second.diagonal().permute(2, 0, 1) / sums.count - mean.square()).clamp_min(0)
    return mean, (spread / (sums.count - 1)).sqrt()


@pytest.mark.parametrize("regularization", [0.0, 0.05])
@pytest.mark.parametrize("name", CASES)
def test_the_push_is_the_dense_covariance(
    smooth_maps: MapMaker, dense_encoding: Callable[[Tensor], Tensor], name: str, regularization: float
) -> None:
    reconstruction = bound(smooth_maps, name, regularization)
    expected = dense_covariance(reconstruction, dense_encoding)
    images = some_images(reconstruction)
    found = reconstruction.covariance_push(images)
    torch.testing.assert_close(found, by_matrix(expected, images), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("regularization", [0.0, 0.05])
@pytest.mark.parametrize("name", ["plain", "interpolated", "uneven noise"])
def test_single_precision_suffices(
    smooth_maps: MapMaker, dense_encoding: Callable[[Tensor], Tensor], name: str, regularization: float
) -> None:
    exact = bound(smooth_maps, name, regularization)
    problem = exact.problem
    single = dataclasses.replace(
        problem,
        sensitivities=problem.sensitivities.to(torch.complex64),
        variance=problem.variance.float(),
        weights=problem.weights.float(),
    )
    coarse = Sense(regularization=regularization).bind(single)
    expected = by_matrix(dense_covariance(exact, dense_encoding), some_images(exact))
    found = coarse.covariance_push(some_images(exact, torch.complex64))
    assert float((found - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("regularization", [0.0, 0.05])
@pytest.mark.parametrize("name", CASES)
def test_samples_and_controls_have_the_means_that_are_stated(
    smooth_maps: MapMaker, dense_encoding: Callable[[Tensor], Tensor], name: str, regularization: float
) -> None:
    # each voxel and control within 5.5 standard errors of 400 probes: false alarm below 1e-4 for all of it
    reconstruction = bound(smooth_maps, name, regularization, tolerance=1e-6)
    probing = reconstruction.probing()
    exact = dense_covariance(reconstruction, dense_encoding).diagonal().real.reshape(probing.uncoupled.shape)
    mean, error = mean_of(probing, blocks=50)
    expected = torch.cat([exact.unsqueeze(0), probing.means])
    assert float(((mean - expected).abs() / (error + 1e-5 * expected.abs().amax())).max()) < 5.5
    assert probing.solves == (2 if name.startswith("uneven") else 1)


def test_the_estimator_varies_as_its_formula(smooth_maps: MapMaker, dense_encoding: Callable[[Tensor], Tensor]) -> None:
    reconstruction = bound(smooth_maps, "plain", 0.0, tolerance=1e-6)
    covariance = dense_covariance(reconstruction, dense_encoding)
    others = covariance - torch.diag(covariance.diagonal())
    expected = 0.5 * others.abs().square().sum(dim=1).reshape(ROWS, COLUMNS)
    _, error = mean_of(reconstruction.probing(), blocks=100)
    # a variance of 800 samples is known to 5 %, the mean of 256 voxels' to less
    assert float((error[0].square() * 800 / expected).mean()) == pytest.approx(1, abs=0.03)


def test_noise_behind_a_crop_of_the_readout_is_pushed_with_its_correlations(smooth_maps: MapMaker) -> None:
    # an asymmetric echo: 24 of 32 samples of the readout, then half of its field of view
    def crop(probes: Tensor) -> Tensor:
        return fft_centred(ifft_centred(probes, (-1,))[..., 8:24], (-1,))

    acquired = torch.zeros(ROWS, 32, dtype=torch.float64)
    acquired[:, 8:] = 2
    weights = torch.ones(ROWS, COLUMNS, dtype=torch.float64)
    weights[:, :4] = 0
    problem = problem_of(smooth_maps(COILS, ROWS, COLUMNS), weights, limits=((0, ROWS - 1), (4, COLUMNS - 1)))
    reconstruction = Sense(regularization=0.02).bind(problem)
    source = ProbeSource(variance=acquired, coils=COILS, seed=1, through=crop, dtype=torch.complex128)
    units = torch.eye(COILS * ROWS * 32, dtype=torch.complex128).reshape(-1, COILS, ROWS, 32)
    columns = torch.cat([reconstruction(crop(part * acquired.sqrt())) for part in units.split(256)]).flatten(1).mT
    rows = torch.eye(ROWS * COLUMNS, dtype=torch.complex128).reshape(-1, ROWS, COLUMNS)
    found = reconstruction.covariance(source).push(rows).flatten(1).mT
    torch.testing.assert_close(found, columns @ columns.mH, rtol=1e-8, atol=1e-9)


def test_regular_sampling_is_known_almost_exactly(
    smooth_maps: MapMaker, dense_encoding: Callable[[Tensor], Tensor]
) -> None:
    # every voxel folds onto one other: two terms of the series are nearly the whole of it
    weights = torch.zeros(ROWS, COLUMNS, dtype=torch.float64)
    for row in range(ROWS):
        weights[row, row % 2 :: 2] = 1
    reconstruction = Sense(tolerance=1e-10).bind(problem_of(smooth_maps(COILS, ROWS, COLUMNS), weights))
    assert reconstruction.exact_variance() is None
    exact = dense_covariance(reconstruction, dense_encoding).diagonal().real.reshape(ROWS, COLUMNS) / 2
    probing = reconstruction.probing()
    source = image_probes(probing, ProbeSource(variance=weights, coils=COILS, seed=2, dtype=torch.complex128))
    found = variance_map(probe_sums(probing.samples(source.block(0))), probing)
    # without controls 8 probes would leave 1 / (2 sqrt(8)) of the couplings of each voxel
    assert float((found.sigma / exact.sqrt() - 1).square().mean().sqrt()) < 0.01
    assert float(found.explained.median()) > 0.9
