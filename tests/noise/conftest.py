"""A small scan and a small network whose exact noise is known from a dense Jacobian."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from voxelsigma.models.encoding import SenseEncoding
from voxelsigma.models.network import Network, NetworkReconstruction
from voxelsigma.models.problem import PlaneProblem
from voxelsigma.models.unrolled import Unrolled
from voxelsigma.noise.exact import jacobian_variance
from voxelsigma.noise.linearize import Linearization, linearize

SIZE = 24
COILS = 4

MapMaker = Callable[[int, int, int], Tensor]


def smooth_maps(coils: int, rows: int, columns: int) -> Tensor:
    """Unit-norm fields 1/(z - z_c) of line currents on a circle around the field of view, complex128."""
    y = (torch.arange(rows, dtype=torch.float64) - rows // 2) / rows
    x = (torch.arange(columns, dtype=torch.float64) - columns // 2) / columns
    place = torch.complex(*torch.broadcast_tensors(x, y.unsqueeze(1)))
    wires = 0.85 * torch.exp(2j * torch.pi * (torch.arange(coils, dtype=torch.float64) + 0.3) / coils)
    maps = 1 / (place - wires[:, None, None])
    return maps / maps.abs().square().sum(dim=0, keepdim=True).sqrt()


@pytest.fixture(scope="session", name="smooth_maps")
def smooth_maps_fixture() -> MapMaker:
    return smooth_maps


@pytest.fixture(scope="session")
def problem() -> PlaneProblem:
    """2D random sampling at R = 6 with a full centre; a tenth of the samples is averaged from two readouts."""
    generator = torch.Generator().manual_seed(11)
    mask = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    middle = slice(SIZE // 2 - 2, SIZE // 2 + 2)
    mask[middle, middle] = True
    others = (~mask.flatten()).nonzero().flatten()
    chosen = others[torch.randperm(len(others), generator=generator)[: SIZE * SIZE // 6 - 16]]
    mask.view(-1)[chosen] = True
    twice = torch.rand(SIZE, SIZE, generator=generator) < 0.1
    weights = torch.where(twice, 2.0, 1.0).double() * mask
    whole = (0, SIZE - 1)
    return PlaneProblem(
        sensitivities=smooth_maps(COILS, SIZE, SIZE),
        variance=torch.where(mask, 2 / weights.clamp_min(1), 0.0),
        weights=weights,
        limits=(whole, whole),
        size=(SIZE, SIZE),
    )


@pytest.fixture(scope="session")
def kspace(problem: PlaneProblem) -> Tensor:
    """Noisy data of an object with edges and phase, complex128, (coils, k1, k0)."""
    generator = torch.Generator().manual_seed(12)
    axis = (torch.arange(SIZE, dtype=torch.float64) - SIZE // 2) / (SIZE / 2)
    y, x = axis.unsqueeze(1), axis
    amplitude = 20.0 * ((y / 0.8) ** 2 + (x / 0.65) ** 2 < 1) + 15.0 * ((y - 0.2).abs() + (x + 0.1).abs() < 0.3)
    image = torch.polar(amplitude.double(), (1.5 * y - x + 2 * x * y).expand_as(amplitude).contiguous())
    mask = (problem.variance > 0).double()
    parts = torch.randn(2, COILS, SIZE, SIZE, generator=generator, dtype=torch.float64)
    noise = torch.complex(parts[0], parts[1]) * (problem.variance / 2).sqrt()
    return SenseEncoding(problem.sensitivities, mask).forward(image) + noise


@pytest.fixture(scope="session")
def network(problem: PlaneProblem) -> NetworkReconstruction:
    """A random unrolled network in double precision, bound to the problem."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(13)
        function = Unrolled(steps=3, blocks=1, channels=8)
        with torch.no_grad():
            # like a trained network: far from circular noise, 70 % of which the zero-filled image explains
            for parameter in function.networks.parameters():
                parameter.mul_(1.2)
            function.step_sizes.copy_(torch.tensor([0.5, 0.4, 0.3]))
    return Network(function=function.double().eval().requires_grad_(False)).bind(problem)


@pytest.fixture(scope="session")
def linearization(network: NetworkReconstruction, kspace: Tensor) -> Linearization:
    return linearize(network, kspace)


@pytest.fixture(scope="session")
def exact_variances(network: NetworkReconstruction, kspace: Tensor, problem: PlaneProblem) -> tuple[Tensor, Tensor]:
    """In-phase variance and E|u|² of every voxel of the network, from the rows of its Jacobian."""
    return jacobian_variance(network, kspace, problem.variance, chunk=96)
