"""Stated intervals hold what they promise: repeated sketches against the exact conditional σ."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from voxelsigma.models.problem import PlaneProblem
from voxelsigma.noise.linearize import Linearization
from voxelsigma.noise.moments import Moments, moments
from voxelsigma.noise.probes import ProbeSource
from voxelsigma.noise.sigma import MapKind, sigma_map
from voxelsigma.noise.voxels import object_mask, phase_factor

REPETITIONS = 400
COUNTS = (16, 32, 64, 256)


@dataclass(frozen=True, slots=True)
class Repeated:
    """Sums over the first S probes of every repetition, shape `(repetitions, y, x)`, and what the maps need."""

    sums: dict[int, Moments]
    direction: Tensor
    covariate_variance: Tensor
    inside: Tensor


@pytest.fixture(scope="module")
def repeated(linearization: Linearization, problem: PlaneProblem) -> Repeated:
    covariate = problem.covariate()
    sampled = problem.variance.flatten() > 0
    coils = len(problem.sensitivities)
    network = rows_of(linearization.push, coils, sampled, problem)
    zero_filled = rows_of(covariate.push, coils, sampled, problem)
    deviation = problem.variance.flatten()[sampled].sqrt().float().repeat(coils)
    generator = torch.Generator().manual_seed(57)
    parts: dict[int, list[Moments]] = {count: [] for count in COUNTS}
    for _ in range(REPETITIONS):
        angles = 2 * torch.pi * torch.rand(max(COUNTS), len(deviation), generator=generator)
        probes = torch.cat([deviation * angles.cos(), deviation * angles.sin()], dim=1)
        u, w = (as_images(probes @ rows, linearization.value.shape) for rows in (network, zero_filled))
        for count in COUNTS:
            parts[count].append(moments(u[:count], w[:count]))
    sums = {
        count: Moments(
            count=count,
            **{
                name: torch.stack([getattr(one, name) for one in found])
                for name in ("u_abs", "u_u", "w_abs", "w_w", "u_wc", "u_w")
            },
        )
        for count, found in parts.items()
    }
    return Repeated(sums, phase_factor(linearization.value), covariate.variance, object_mask(linearization.value))


@pytest.mark.slow
@pytest.mark.parametrize("plain", [True, False], ids=["plain", "control variate"])
@pytest.mark.parametrize("kind", ["magnitude", "complex"])
@pytest.mark.parametrize("count", COUNTS)
def test_intervals_hold_the_exact_value_in_95_percent(
    repeated: Repeated, exact_variances: tuple[Tensor, Tensor], count: int, kind: MapKind, plain: bool
) -> None:
    """Averaged over voxels and 400 repetitions; a false alarm (sampling error of 0.5 % at most): below 1e-4."""
    exact = exact_variances[0 if kind == "magnitude" else 1].sqrt()
    found = sigma_map(
        repeated.sums[count],
        kind,
        direction=repeated.direction,
        covariate_variance=None if plain else repeated.covariate_variance,
    )
    lower, upper = found.interval()
    held = ((lower <= exact) & (exact <= upper)).double()[:, repeated.inside]
    assert 0.93 < float(held.mean()) < 0.97
    # and neither side is left to the other
    assert float((exact < lower).double()[:, repeated.inside].mean()) == pytest.approx(0.025, abs=0.02)


def rows_of(push: Callable[[Tensor], Tensor], coils: int, sampled: Tensor, problem: PlaneProblem) -> Tensor:
    """A real-linear map as a matrix, from real and imaginary parts of the samples to those of the image."""
    size = int(sampled.sum()) * coils
    places = sampled.repeat(coils).nonzero().flatten()
    rows = []
    for factor in torch.tensor([1, 1j], dtype=torch.complex128):
        unit = torch.zeros(size, coils * sampled.numel(), dtype=torch.complex128)
        unit[torch.arange(size), places] = factor
        pushed = torch.cat([push(part) for part in unit.reshape(size, coils, *problem.variance.shape).split(64)])
        rows.append(torch.cat([pushed.real.flatten(1), pushed.imag.flatten(1)], dim=1))
    return torch.cat(rows).float()


def as_images(values: Tensor, shape: torch.Size) -> Tensor:
    real, imaginary = values.double().chunk(2, dim=1)
    return torch.complex(real, imaginary).reshape(len(values), *shape)


def test_the_matrix_is_the_push(linearization: Linearization, problem: PlaneProblem) -> None:
    sampled = problem.variance.flatten() > 0
    probes = ProbeSource(variance=problem.variance, coils=4, seed=3, dtype=torch.complex128).block(0)
    chosen = probes.flatten(2)[..., sampled].flatten(1)
    rows = rows_of(linearization.push, 4, sampled, problem)
    found = as_images(torch.cat([chosen.real, chosen.imag], dim=1).float() @ rows, linearization.value.shape)
    torch.testing.assert_close(found, linearization.push(probes), rtol=1e-4, atol=1e-4)
