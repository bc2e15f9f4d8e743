"""The network that says how a reconstruction passes noise on: filters, and the stand-in that they make."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from voxelsigma.models.surrogate_net import OFFSETS, SurrogateNet

GIVEN = 3
MIDDLE = OFFSETS.index((0, 0))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def images(*shape: int, seed: int) -> Tensor:
    return torch.complex(normal(*shape, seed=seed), normal(*shape, seed=seed + 1000))


def seeded(*, channels: int = 3, levels: int = 2) -> SurrogateNet:
    """A network whose last layer says something too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = SurrogateNet(given=GIVEN, channels=channels, levels=levels)
        torch.nn.init.normal_(net.last.weight)
    return net


@pytest.mark.parametrize("sizes", [{"channels": 0}, {"levels": 0}, {"levels": -1}])
def test_sizes_that_make_no_network_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"levels and channels must be at least 1, got (-1|0|3|32) and (0|32)"):
        SurrogateNet(given=GIVEN, **sizes)


def test_filters_see_seven_voxels_either_way() -> None:
    assert len(OFFSETS) == len(set(OFFSETS)) == 49
    assert {y for y, _ in OFFSETS} == {x for _, x in OFFSETS} == set(range(-3, 4))


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (8, 12), (13, 30), (33, 17)])
def test_every_matrix_has_filters(shape: tuple[int, int]) -> None:
    net, features = seeded(), normal(2, GIVEN, *shape)
    found = net(features)
    assert found.shape == (2, 2, 49, *shape)
    assert bool(found.isfinite().all())
    # scans of a batch have nothing to do with each other
    torch.testing.assert_close(found[1:], net(features[1:]))


@pytest.mark.parametrize("shape", [(8, 8), (9, 12)])
def test_before_training_it_is_the_zero_filled_image(shape: tuple[int, int]) -> None:
    net = SurrogateNet(given=GIVEN, channels=3, levels=2)
    for features in (torch.zeros(GIVEN, *shape), 10 * normal(GIVEN, *shape)):
        found = net(features[None])[0]
        assert torch.equal(found[0, MIDDLE], torch.ones(shape))
        assert int((found != 0).sum()) == shape[0] * shape[1]
        w, second = images(4, *shape, seed=1), images(4, *shape, seed=2)
        assert torch.equal(net.surrogate(features)(w, second), w)


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
    torch.testing.assert_close(net(features).flatten(1, 2), expected)


def doubled(values: Tensor) -> Tensor:
    """Twice as many rows, by linear interpolation between the middles of the old ones."""
    rows = values.unbind(dim=-2)
    between = [
        part for one, next_one in pairwise(rows) for part in (0.75 * one + 0.25 * next_one, (one + 3 * next_one) / 4)
    ]
    return torch.stack([rows[0], *between, rows[-1]], dim=-2)


def test_gradients() -> None:
    net = seeded(channels=1, levels=1).double()
    features = 0.3 * normal(1, GIVEN, 4, 2).double().requires_grad_(True)
    torch.autograd.gradcheck(net, (features,), nondet_tol=1e-12)


def test_a_surrogate_is_the_sum_over_its_offsets() -> None:
    net, shape = seeded(), (9, 11)
    features = normal(GIVEN, *shape)
    w, second = images(2, *shape, seed=1), images(2, *shape, seed=2)
    near, again = net(features[None])[0].detach().double()
    expected = torch.zeros(2, *shape, dtype=torch.complex128)
    for y in range(shape[0]):
        for x in range(shape[1]):
            for place, (down, right) in enumerate(OFFSETS):
                v, u = y + down, x + right
                # beyond the border there is nothing
                if 0 <= v < shape[0] and 0 <= u < shape[1]:
                    expected[:, y, x] += near[place, y, x] * w[:, v, u] + again[place, y, x] * second[:, v, u]
    found = net.surrogate(features)
    assert found.near.offsets == found.again.offsets == OFFSETS
    torch.testing.assert_close(found(w, second), expected.to(torch.complex64), rtol=1e-4, atol=1e-4)


def test_a_surrogate_needs_no_gradients_and_takes_features_of_any_type() -> None:
    net, features = seeded(), normal(GIVEN, 9, 11).half()
    found, expected = net.surrogate(features), net.surrogate(features.float())
    for one, other in ((found.near, expected.near), (found.again, expected.again)):
        assert not one.weights.requires_grad
        assert torch.equal(one.weights, other.weights)
