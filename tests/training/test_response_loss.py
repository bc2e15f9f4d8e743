"""What a surrogate's training minimises: what it leaves of pushed probes, and that a few steps learn a cascade."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from voxelsigma.models.encoding import SenseEncoding
from voxelsigma.models.normal_equations import normal_operator
from voxelsigma.models.predictor import OF_SCAN
from voxelsigma.models.surrogate_net import SurrogateNet, assembled
from voxelsigma.noise.inverse import regularised_inverse
from voxelsigma.noise.local_filter import square
from voxelsigma.noise.probes import BLOCK_SIZE
from voxelsigma.training.config import FitSettings
from voxelsigma.training.fit import fit, make_fabric
from voxelsigma.training.responses import ResponseLoss, ResponseScan, ResponseTarget, response_drawer

ROWS, COLUMNS, PROBES, COILS = 6, 7, 3, 2
STAGES = [(0.0,), (0.0, 0.0), (0.3, 0.5, 0.0)]


class Says(nn.Module):
    """A network that says always the same."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, features: Tensor) -> Tensor:
        assert features.shape[:2] == (1, OF_SCAN)
        return self.weights.unsqueeze(0)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def explicit(given: Tensor, weights: Tensor, reach: int) -> Tensor:
    """Filter images voxel by voxel."""
    found = torch.zeros_like(given)
    for y in range(ROWS):
        for x in range(COLUMNS):
            for weight, (down, right) in zip(weights[:, y, x], square(reach), strict=True):
                if 0 <= y + down < ROWS and 0 <= x + right < COLUMNS:
                    found[:, y, x] += weight * given[:, y + down, x + right]
    return found


def in_phase(weights: Tensor, stages: tuple[float, ...], scan: ResponseScan) -> Tensor:
    """What the cascade makes of the images, along the direction."""
    w, direction, sensitivities = (
        torch.complex(*one.unbind(dim=-3)) for one in (scan.images, scan.direction, scan.sensitivities)
    )
    encoding = SenseEncoding(sensitivities, scan.sampled)

    def applied(images: Tensor, place: int) -> Tensor:
        def twice(given: Tensor) -> Tensor:
            return encoding.adjoint(encoding.forward(given))

        weight = stages[place]
        scale = weight if place else 1 + weight
        return twice(images) if weight == 0 else scale * regularised_inverse(twice, weight)(images)

    begun, again, *others = weights.split([49, 49, *[25, 25, 9] * (len(stages) - 1)])
    z = explicit(w, begun, 3) + explicit(applied(w, 0), again, 3)
    for place in range(1, len(stages)):
        kept, passed, beside = others[3 * place - 3 : 3 * place]
        z = explicit(z, kept, 2) + explicit(applied(z, place), passed, 2) + explicit(w, beside, 1)
    return (direction.conj() * z).real


def example(stages: tuple[float, ...]) -> tuple[ResponseScan, Tensor]:
    """A scan, and the weights that made what was pushed."""
    plane = (ROWS, COLUMNS)
    weights = 0.3 * normal(98 + 59 * (len(stages) - 1), *plane, seed=1)
    maps = normal(COILS, 2, *plane, seed=2)
    angle = 3 * normal(*plane, seed=3)
    scan = ResponseScan(
        features=torch.zeros(OF_SCAN, *plane).double(),
        pushed=torch.zeros(PROBES, *plane).double(),
        images=normal(PROBES, 2, *plane, seed=4),
        direction=torch.stack([angle.cos(), angle.sin()]),
        sensitivities=maps / maps.square().sum(dim=(0, 1)).sqrt(),
        sampled=(normal(*plane, seed=5) > 0).double(),
        inside=(normal(*plane, seed=6) > -0.5).double(),
    )
    return replace(scan, pushed=in_phase(weights, stages, scan)), weights


def loss_of(weights: Tensor, stages: tuple[float, ...], scan: ResponseScan) -> float:
    with torch.no_grad():
        return float(ResponseLoss(stages)(Says(weights), scan, np.random.default_rng()))


@pytest.mark.parametrize("stages", STAGES)
def test_the_filters_that_made_it_leave_nothing(stages: tuple[float, ...]) -> None:
    scan, weights = example(stages)
    assert float(scan.pushed.abs().max()) > 1
    assert loss_of(weights, stages, scan) < 1e-20
    assert loss_of(1.01 * weights, stages, scan) > 1e-6


@pytest.mark.parametrize("stages", STAGES)
def test_what_is_left_counts_by_its_local_energy(stages: tuple[float, ...]) -> None:
    scan, weights = example(stages)
    # some of it next to nothing: there the energy has a least value
    weak = replace(scan, pushed=scan.pushed * torch.where(torch.arange(COLUMNS) < 4, 1e-3, 1.0))
    for given, said in ((scan, 0 * weights), (weak, 0 * weights), (scan, 0.5 * weights)):
        left, squares = given.pushed - in_phase(said, stages, scan), given.pushed.square().mean(dim=0)
        total, count = 0.0, 0
        for y, x in given.inside.nonzero().tolist():
            around = squares[max(0, y - 2) : y + 3, max(0, x - 2) : x + 3].mean()
            total += float(left[:, y, x].square().mean() / around.clamp_min(0.03))
            count += 1
        assert loss_of(said, stages, given) == pytest.approx(total / count, rel=1e-9)


def test_voxels_beside_the_object_do_not_count() -> None:
    stages = (0.0,)
    scan, weights = example(stages)
    spoilt = torch.where(scan.inside > 0, weights, weights + 1)
    assert loss_of(spoilt, stages, scan) < 1e-20
    assert loss_of(spoilt, stages, replace(scan, inside=1 - scan.inside)) > 0.1
    assert loss_of(spoilt, stages, replace(scan, inside=torch.zeros_like(scan.inside))) == 0


@pytest.mark.parametrize("stages", STAGES)
def test_its_gradient_is_that_of_the_weights(stages: tuple[float, ...]) -> None:
    """Along a few random directions; and it knows neither chance nor progress."""
    scan, weights = example(stages)
    directions = normal(3, *weights.shape, seed=7)

    def loss(moved: Tensor) -> Tensor:
        network = Says(0.5 * weights + torch.tensordot(moved, directions, dims=1))
        return ResponseLoss(stages)(network, scan, np.random.default_rng())

    assert torch.autograd.gradcheck(loss, torch.zeros(3, dtype=torch.float64, requires_grad=True))
    values = {
        float(ResponseLoss(stages)(Says(weights), scan, np.random.default_rng(seed), progress=progress).detach())
        for seed, progress in ((0, 1.0), (1, 0.0))
    }
    assert len(values) == 1


# --- and what is learned


def whole(values: NDArray[np.float16]) -> Tensor:
    """`(..., 2, y, x)` to `(..., y, x)`, complex64."""
    return torch.complex(*torch.from_numpy(values.astype(np.float32)).unbind(dim=-3))


def constant_weights(stages: tuple[float, ...], shape: tuple[int, int]) -> Tensor:
    """Of one cascade everywhere."""
    weights = torch.zeros(98 + 59 * (len(stages) - 1), *shape)
    begun, again, *others = weights.split([49, 49, *[25, 25, 9] * (len(stages) - 1)])
    begun[[square(3).index((0, 0)), square(3).index((0, 1))]] = 0.4
    again[square(3).index((0, 0))] = -0.6
    for filters, value in zip(others, (0.7, 0.5, 0.3), strict=False):
        filters[len(filters) // 2] = value
    return weights


def filtered_scan(seed: int, stages: tuple[float, ...]) -> ResponseTarget:
    """A scan whose reconstruction is such a cascade."""
    shape, rng = (20, 18), np.random.default_rng(seed)
    maps = rng.normal(size=(3, 2, 1, 1)) + 0.3 * rng.normal(size=(3, 2, *shape))
    maps = (maps / np.sqrt(np.square(maps).sum(axis=(0, 1)))).astype(np.float16)
    angle = rng.uniform(0, 2 * np.pi, shape)
    direction = np.stack([np.cos(angle), np.sin(angle)]).astype(np.float16)
    images = (rng.normal(size=(BLOCK_SIZE, 2, *shape)) * 0.5**0.5).astype(np.float16)
    sampled = rng.random(shape) < 0.5
    operator = normal_operator(whole(maps), torch.from_numpy(sampled))
    surrogate = assembled(constant_weights(stages, shape), stages, operator)
    return ResponseTarget(
        features=rng.normal(size=(OF_SCAN, *shape)).astype(np.float16),
        pushed=(whole(direction).conj() * surrogate(whole(images))).real.numpy().astype(np.float16),
        images=images,
        direction=direction,
        sensitivities=maps,
        sampled=sampled,
        inside=np.ones(shape, dtype=bool),
    )


@pytest.mark.parametrize("stages", [(0.0,), (0.0, 0.3)])
def test_a_few_steps_learn_it(tmp_path: Path, stages: tuple[float, ...]) -> None:
    paths = [tmp_path / f"{number}.npz" for number in range(4)]
    for number, path in enumerate(paths):
        filtered_scan(number, stages).save(path)
    # one that is never learned from
    held_out = response_drawer(paths[3:], seed=1)(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = SurrogateNet(given=OF_SCAN, channels=4, levels=1, stages=stages)
    objective = ResponseLoss(net.stages)

    @torch.no_grad()
    def left() -> float:
        return float(objective(net, held_out, np.random.default_rng()))

    begun = left()
    settings = FitSettings(steps=60, warm_up=5, learning_rate=3e-2, log_every=60)
    fabric = make_fabric(settings, tmp_path, accelerator="cpu")
    fabric.launch()
    fit(net, objective, response_drawer(paths[:3], seed=1), settings, folder=tmp_path, fabric=fabric)
    assert begun > 0.5
    assert left() < 0.1 * begun
