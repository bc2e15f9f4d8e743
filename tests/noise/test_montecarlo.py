"""Monte Carlo against closed forms and the exact variance of a network."""

import math

import pytest
import torch
from torch import Tensor

from voxelsigma.models.fourier import ifft_centred
from voxelsigma.models.network import NetworkReconstruction
from voxelsigma.models.problem import PlaneProblem
from voxelsigma.noise.covariate import zero_filled_variance
from voxelsigma.noise.montecarlo import monte_carlo
from voxelsigma.noise.sigma import MapKind, root_bias


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("scale", [1.0, 1e-2])
@pytest.mark.parametrize("kind", ["magnitude", "complex"])
def test_linear_reconstruction_has_its_closed_form(
    problem: PlaneProblem, kspace: Tensor, kind: MapKind, scale: float
) -> None:
    maps = problem.sensitivities
    result = monte_carlo(
        lambda samples: (maps.conj() * ifft_centred(samples)).sum(dim=-3),
        kspace,
        problem.variance,
        400,
        generator=seeded(61),
        kind=kind,
        scale=scale,
    )
    variance = zero_filled_variance(maps, problem.variance) / (2 if kind == "magnitude" else 1)
    # 576 voxels at level 1 - 1e-6: false alarm 6e-4
    lower, upper = result.interval(1 - 1e-6)
    assert bool(((lower <= variance.sqrt()) & (variance.sqrt() <= upper)).all())
    # fewer than 576 independent voxels (97 samples of 4 coils) know the mean to 3.5 % / √388: 0.2 %; 5 of them
    assert float((result.sigma / variance.sqrt()).mean()) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("kind", ["magnitude", "complex"])
def test_network_at_small_scale_has_the_variance_of_its_jacobian(
    network: NetworkReconstruction,
    kspace: Tensor,
    problem: PlaneProblem,
    exact_variances: tuple[Tensor, Tensor],
    kind: MapKind,
) -> None:
    result = monte_carlo(network, kspace, problem.variance, 300, generator=seeded(62), kind=kind, scale=1e-4)
    exact = exact_variances[0 if kind == "magnitude" else 1].sqrt()
    # 576 voxels at level 1 - 1e-6: false alarm 6e-4
    lower, upper = result.interval(1 - 1e-6)
    assert bool(((lower <= exact) & (exact <= upper)).all())


def test_trials_are_the_trials_of_a_naive_twin(problem: PlaneProblem, kspace: Tensor) -> None:
    def reconstruct(samples: Tensor) -> Tensor:
        image = ifft_centred(samples).sum(dim=-3)
        return image * image.abs()

    trials, scale = 7, 0.3
    generator = seeded(63)
    images = []
    for _ in range(trials):
        parts = torch.randn((2, *kspace.shape), generator=generator, dtype=torch.float64)
        noise = torch.complex(parts[0], parts[1]) * (problem.variance / 2).sqrt()
        images.append(reconstruct(kspace + scale * noise))
    phase = torch.angle(reconstruct(kspace))
    stack = torch.stack(images)
    for kind, values in (("magnitude", (torch.exp(-1j * phase) * stack).real), ("complex", stack)):
        checked: MapKind = "magnitude" if kind == "magnitude" else "complex"
        result = monte_carlo(
            reconstruct, kspace, problem.variance, trials, generator=seeded(63), kind=checked, scale=scale
        )
        expected = values.std(dim=0) / scale
        torch.testing.assert_close(result.sigma * root_bias(result.degrees_of_freedom), expected, rtol=1e-9, atol=0)
        assert result.probes == trials
        assert result.kind == kind


def test_real_images_have_a_magnitude_map(problem: PlaneProblem, kspace: Tensor) -> None:
    result = monte_carlo(
        lambda samples: ifft_centred(samples)[0].abs(), kspace, problem.variance, 200, generator=seeded(64)
    )
    expected = math.sqrt(float(problem.variance.mean()) / 2)
    # inside the object, above SNR 3, the magnitude moves as the in-phase component
    bright = ifft_centred(kspace)[0].abs() > 10 * expected
    assert int(bright.sum()) > 20
    assert float(result.sigma[bright].mean()) == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize("trials", [1, 0, -1])
def test_fewer_than_two_trials_are_refused(problem: PlaneProblem, kspace: Tensor, trials: int) -> None:
    with pytest.raises(ValueError, match=f"monte_carlo: {trials} trials; a variance needs at least 2"):
        monte_carlo(lambda samples: samples[0], kspace, problem.variance, trials, generator=seeded(0))


def test_without_noise_nothing_moves(problem: PlaneProblem, kspace: Tensor) -> None:
    result = monte_carlo(lambda samples: samples[0], kspace, torch.zeros_like(problem.variance), 3, generator=seeded(0))
    assert not bool(result.sigma.any())


@pytest.mark.parametrize("mirror", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["magnitude", "complex"])
def test_stated_error_is_the_error_also_of_noise_that_is_not_circular(kind: MapKind, mirror: float) -> None:
    size = 64
    variance = torch.full((size, size), 2.0, dtype=torch.float64)
    kspace = torch.full((1, size, size), 10.0, dtype=torch.complex128)
    result = monte_carlo(
        lambda samples: samples[0] + mirror * samples[0].conj(),
        kspace,
        variance,
        50,
        generator=seeded(65),
        kind=kind,
    )
    exact = 1 + mirror if kind == "magnitude" else math.sqrt(2 * (1 + mirror**2))
    error = float((result.sigma / exact - 1).square().mean().sqrt())
    # 4096 voxels know it to 1.1 %; 5 of them and 1/(8 N) of the square root
    assert error == pytest.approx(float(result.relative_error().square().mean().sqrt()), rel=0.06)
    assert float(result.sigma.mean()) == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("trials", [2, 3, 8])
def test_few_trials_are_unbiased(trials: int) -> None:
    variance = torch.full((100, 100), 2.0, dtype=torch.float64)
    kspace = torch.ones(1, 100, 100, dtype=torch.complex128)
    result = monte_carlo(lambda samples: samples[0], kspace, variance, trials, generator=seeded(66))
    # relative error of one voxel at most 0.76, of the mean of 10000 0.8 %; 5 of them
    assert float(result.sigma.mean()) == pytest.approx(1, abs=0.04)
