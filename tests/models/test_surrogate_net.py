"""The network that says how a reconstruction passes noise on: weights, and the cascade of filters that they make."""

import re
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from voxelsigma.models.surrogate_net import (
    BEGUN,
    FURTHER,
    GRADIENT_STAGES,
    MOST_STAGES,
    SOLVED_STAGES,
    SurrogateNet,
    assembled,
    check_stages,
)
from voxelsigma.noise.inverse import Operator, regularised_inverse
from voxelsigma.noise.local_filter import square
from voxelsigma.noise.response import REACH

GIVEN = 3
STAGES = [(0.0,), (0.3,), (0.0, 0.0, 0.0), (0.02, 0.5, 2.5)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def images(*shape: int, seed: int) -> Tensor:
    return torch.complex(normal(*shape, seed=seed), normal(*shape, seed=seed + 1000))


def hermitian(rows: int, columns: int) -> Tensor:
    """With eigenvalues from 0 to 1, complex128."""
    size = rows * columns
    vectors = torch.linalg.qr(images(size, size, seed=5).to(torch.complex128)).Q
    return vectors @ torch.diag(torch.linspace(0, 1, size)).to(vectors) @ vectors.mH


def applying(matrix: Tensor) -> Operator:
    return lambda given: (given.flatten(1) @ matrix.to(given.dtype).mT).view(given.shape)


def seeded(*, channels: int = 3, levels: int = 2, stages: Sequence[float] = (0.0,)) -> SurrogateNet:
    """A network whose last layer says something too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = SurrogateNet(given=GIVEN, channels=channels, levels=levels, stages=stages)
        torch.nn.init.normal_(net.last.weight)
    return net


# --- sizes


@pytest.mark.parametrize(("channels", "levels"), [(0, 3), (32, 0), (32, -1)])
def test_sizes_that_make_no_network_are_refused(channels: int, levels: int) -> None:
    with pytest.raises(ValueError, match=f"levels and channels must be at least 1, got {levels} and {channels}$"):
        SurrogateNet(given=GIVEN, channels=channels, levels=levels)


@pytest.mark.parametrize("stages", [*STAGES, GRADIENT_STAGES, SOLVED_STAGES, (0,), (1e-3, 100), [0.0] * MOST_STAGES])
def test_stages_that_are_taken(stages: Sequence[float]) -> None:
    check_stages(stages)
    net = SurrogateNet(given=GIVEN, channels=1, levels=1, stages=stages)
    assert net.stages == tuple(stages)
    assert all(isinstance(one, float) for one in net.stages)


@pytest.mark.parametrize(
    ("stages", "told"),
    [
        ((), "must be 1 to 8 numbers, got 0"),
        ([0.1] * (MOST_STAGES + 1), "must be 1 to 8 numbers, got 9"),
        ((0.0, -0.1), "must each be 0, or 0.001 to 100, got -0.1"),
        ((1e-4,), "must each be 0, or 0.001 to 100, got 0.0001"),
        ((0.02, 100.5), "must each be 0, or 0.001 to 100, got 100.5"),
        ((float("nan"),), "must each be 0, or 0.001 to 100, got nan"),
        ((0.0, float("inf")), "must each be 0, or 0.001 to 100, got inf"),
    ],
)
def test_stages_that_make_no_surrogate_are_refused(stages: Sequence[float], told: str) -> None:
    for refusing in (check_stages, lambda one: SurrogateNet(given=GIVEN, stages=one)):
        with pytest.raises(ValueError, match=f"^predictor: surrogate_stages {re.escape(told)}$"):
            refusing(stages)


def test_reaches_are_those_that_are_known() -> None:
    """The known variance of a cheap filter is of the same reach, and files hold so many weights."""
    assert BEGUN == (REACH, REACH) == (3, 3)
    assert FURTHER == (2, 2, 1)
    for count in (1, 2, 3):
        net = SurrogateNet(given=GIVEN, channels=2, levels=1, stages=[0.0] * count)
        assert net.last.out_channels == 2 * 49 + (count - 1) * (25 + 25 + 9)


@pytest.mark.parametrize("stages", [GRADIENT_STAGES, SOLVED_STAGES])
def test_a_file_stays_small(stages: Sequence[float]) -> None:
    """Of the usual sizes; its weights are float16."""
    net = SurrogateNet(given=13, stages=stages)
    assert 2 * sum(one.numel() for one in net.parameters()) < 1_200_000


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (8, 12), (13, 30)])
def test_every_matrix_has_filters(shape: tuple[int, int], stages: tuple[float, ...]) -> None:
    net, features = seeded(stages=stages), normal(2, GIVEN, *shape)
    found = net(features)
    assert found.shape == (2, 98 + 59 * (len(stages) - 1), *shape)
    assert bool(found.isfinite().all())
    # scans of a batch have nothing to do with each other
    torch.testing.assert_close(found[1:], net(features[1:]))


# --- the network


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("shape", [(8, 8), (9, 12)])
def test_before_training_it_is_the_zero_filled_image(shape: tuple[int, int], stages: tuple[float, ...]) -> None:
    net, operator = SurrogateNet(given=GIVEN, channels=3, levels=2, stages=stages), applying(hermitian(*shape))
    for features in (torch.zeros(GIVEN, *shape), 10 * normal(GIVEN, *shape)):
        found = net(features[None])[0].detach()
        # of every stage the middle of one filter
        assert int((found != 0).sum()) == len(stages) * shape[0] * shape[1]
        assert float(found.sum()) == len(stages) * shape[0] * shape[1]
        w = images(4, *shape, seed=1)
        assert torch.equal(net.surrogate(features, operator)(w), w)


def test_filters_by_their_layers() -> None:
    """One level, even sizes, step by step."""
    net, features = seeded(levels=1), normal(1, GIVEN, 8, 6)
    state = net.state_dict()

    def block(given: Tensor, name: str) -> Tensor:
        first = functional.conv2d(given, state[f"{name}.first.weight"], state[f"{name}.first.bias"], padding=1)
        begun = first * first.sigmoid()
        second = functional.conv2d(begun, state[f"{name}.second.weight"], state[f"{name}.second.bias"], padding=1)
        return (begun + second) * (begun + second).sigmoid()

    fine = block(features, "down.0")
    coarse = block(fine.unflatten(2, (4, 2)).unflatten(4, (3, 2)).mean(dim=(3, 5)), "down.1")
    above = doubled(doubled(coarse).mT).mT
    joined = block(torch.cat([above, fine], dim=1), "up.0")
    expected = torch.einsum("oc,bcyx->boyx", state["last.weight"][:, :, 0, 0], joined)
    expected = expected + state["last.bias"].view(-1, 1, 1)
    torch.testing.assert_close(net(features), expected)


def doubled(values: Tensor) -> Tensor:
    """Twice as many rows, by linear interpolation between the middles of the old ones."""
    rows = values.unbind(dim=-2)
    between = [
        part for one, next_one in pairwise(rows) for part in (0.75 * one + 0.25 * next_one, (one + 3 * next_one) / 4)
    ]
    return torch.stack([rows[0], *between, rows[-1]], dim=-2)


def test_gradients() -> None:
    net = seeded(channels=1, levels=1).double()
    features = 0.3 * normal(1, GIVEN, 2, 2).double().requires_grad_(True)
    torch.autograd.gradcheck(net, (features,), nondet_tol=1e-12)


# --- what its weights make


def explicit(given: Tensor, weights: Tensor, reach: int) -> Tensor:
    """Filter images voxel by voxel."""
    rows, columns = given.shape[-2:]
    found = torch.zeros_like(given)
    for y in range(rows):
        for x in range(columns):
            for weight, (down, right) in zip(weights[:, y, x], square(reach), strict=True):
                # beyond the border there is nothing
                if 0 <= y + down < rows and 0 <= x + right < columns:
                    found[:, y, x] += weight * given[:, y + down, x + right]
    return found


@pytest.mark.parametrize("stages", STAGES)
def test_weights_are_the_filters_of_the_stages_in_their_order(stages: tuple[float, ...]) -> None:
    shape = (5, 7)
    operator = applying(hermitian(*shape))
    weights = 0.2 * normal(98 + 59 * (len(stages) - 1), *shape, seed=2).double()
    w = images(2, *shape, seed=1).to(torch.complex128)

    def applied(given: Tensor, place: int) -> Tensor:
        weight = stages[place]
        if weight == 0:
            return operator(given)
        return (weight if place else 1 + weight) * regularised_inverse(operator, weight)(given)

    z = explicit(w, weights[:49], 3) + explicit(applied(w, 0), weights[49:98], 3)
    for place in range(1, len(stages)):
        kept, passed, beside = weights[98 + 59 * (place - 1) : 98 + 59 * place].split([25, 25, 9])
        z = explicit(z, kept, 2) + explicit(applied(z, place), passed, 2) + explicit(w, beside, 1)
    surrogate = assembled(weights, stages, operator)
    assert len(surrogate.stages) == len(stages)
    torch.testing.assert_close(surrogate(w), z)
    torch.testing.assert_close(surrogate.second(w), applied(w, 0))


def test_operators_are_of_size_one() -> None:
    """The first keeps what the data say fully, further ones what they say nothing of."""
    shape = (3, 4)
    whole, nothing = (lambda given: given), (lambda given: 0 * given)
    weights, w = torch.zeros(98 + 59, *shape), images(1, *shape, seed=3)
    for weight in (0.02, 0.5, 2.5):
        for operator, scale in ((whole, 1.0), (nothing, (1 + weight) / weight)):
            found = assembled(weights, (weight, weight), operator)
            kept = [stage.operator(w) / w for stage in found.stages]
            torch.testing.assert_close(kept[0], torch.full_like(w, scale), rtol=0.12, atol=0)
            torch.testing.assert_close(kept[1], torch.full_like(w, scale * weight / (1 + weight)), rtol=0.12, atol=0)


@pytest.mark.parametrize("stages", STAGES)
def test_it_is_differentiable_in_the_weights(stages: tuple[float, ...]) -> None:
    """Along a few random directions."""
    shape = (3, 4)
    operator, count = applying(hermitian(*shape)), 98 + 59 * (len(stages) - 1)
    begun, directions = normal(count, *shape, seed=6).double(), normal(2, count, *shape, seed=7).double()
    w = images(1, *shape, seed=8).to(torch.complex128)

    def pushed(moved: Tensor, given: Tensor) -> Tensor:
        weights = 0.1 * (begun + torch.einsum("k,kwyx->wyx", moved, directions))
        return assembled(weights, stages, operator)(given)

    moved = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(pushed, (moved, w.requires_grad_()))


@pytest.mark.parametrize("stages", STAGES)
def test_a_surrogate_is_what_its_network_says(stages: tuple[float, ...]) -> None:
    """Of features of any type, without gradients."""
    net, shape = seeded(stages=stages), (9, 11)
    features, operator, w = normal(GIVEN, *shape).half(), applying(hermitian(*shape)), images(2, *shape, seed=4)
    expected = assembled(net(features.float()[None])[0].detach(), stages, operator)(w)
    for kind in (torch.float16, torch.float32, torch.float64):
        found = net.surrogate(features.to(kind), operator)(w)
        assert not found.requires_grad
        assert torch.equal(found, expected)
