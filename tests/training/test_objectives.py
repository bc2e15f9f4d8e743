"""The supervised objective, and objectives by name."""

from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from voxelsigma.models.varnet import VarNet
from voxelsigma.training.examples import Example, object_voxels
from voxelsigma.training.losses import object_magnitude, quantile, relative_error
from voxelsigma.training.noise2recon import Noise2Recon
from voxelsigma.training.objectives import OBJECTIVES, make_objective
from voxelsigma.training.ssdu import Ssdu
from voxelsigma.training.supervised import Supervised
from voxelsigma.training.vortex import Vortex


class Fixed(nn.Module):
    """Gives images of its own."""

    def __init__(self, images: Tensor, *, own_sensitivities: bool = False) -> None:
        super().__init__()
        self.images = nn.Parameter(images)
        self.estimates_sensitivities = own_sensitivities

    def forward(self, kspace: Tensor, sensitivities: Tensor, mask: Tensor) -> Tensor:
        return 1 * self.images


def draw(*sizes: int, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.standard_normal(sizes) + 1j * rng.standard_normal(sizes)).to(torch.complex64)


def make_example(target: Tensor | None) -> Example:
    return Example(draw(2, 3, 20, 21), draw(2, 3, 20, 21, seed=1), torch.ones(2, 1, 20, 21), target)


@pytest.mark.parametrize("shape", [(20, 21), (1, 1), (7, 3), (64, 64)])
def test_object_magnitude_is_the_mean_inside_the_object(shape: tuple[int, int]) -> None:
    images = draw(3, *shape) * torch.linspace(0, 1, shape[0])[:, None] ** 3 + 1e-3
    expected = [m[object_voxels(m)].mean() for m in images.abs().numpy()]
    np.testing.assert_allclose(object_magnitude(images).numpy(), expected, rtol=1e-5)
    assert not object_magnitude(images.requires_grad_()).requires_grad
    assert object_magnitude(torch.zeros(2, *shape)).tolist() == [0, 0]


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.95, 0.99, 1.0])
def test_quantile_is_that_of_numpy(fraction: float) -> None:
    values = torch.rand(3, 37, generator=torch.Generator().manual_seed(0))
    expected = np.percentile(values.numpy(), 100 * fraction, axis=1)
    np.testing.assert_allclose(quantile(values, fraction).numpy(), expected, rtol=1e-5)


def test_supervised_is_the_error_in_units_of_the_object() -> None:
    target = 5 * draw(2, 20, 21)
    network = Fixed(target + 3j)
    loss = Supervised()(network, make_example(target), np.random.default_rng(0))
    expected = np.mean([3 / m[object_voxels(m)].mean() for m in target.abs().numpy()])
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert not loss.is_complex()
    loss.backward()
    assert network.images.grad is not None
    assert float(network.images.grad.abs().min()) > 0


def test_real_images_are_compared_with_magnitudes() -> None:
    target = 5 * draw(2, 20, 21)
    loss = Supervised()(Fixed(target.abs()), make_example(target), np.random.default_rng(0))
    assert float(loss.detach()) == 0
    # a complex network whose phase is not defined
    turned = target * torch.exp(torch.tensor(1j))
    for own, low, high in ((False, 0.1, 2.0), (True, 0.0, 1e-6)):
        network = Fixed(turned, own_sensitivities=own)
        assert low <= float(Supervised()(network, make_example(target), np.random.default_rng(0)).detach()) < high


@pytest.mark.parametrize("name", ["supervised", "noise2recon", "vortex"])
def test_a_network_with_real_images_learns(name: str) -> None:
    network = VarNet(cascades=1, channels=2, levels=1, sensitivity_channels=2, sensitivity_levels=1)
    extra = {} if name == "supervised" else {"supervised_consistency": True}
    loss = make_objective(name, extra)(network, make_example(5 * draw(2, 20, 21)), np.random.default_rng(0))
    loss.backward()
    assert bool(loss.isfinite())
    assert all(value.grad is not None and bool(value.grad.isfinite().all()) for value in network.parameters())


def test_references_that_are_missing_or_empty_are_refused() -> None:
    network = Fixed(draw(2, 20, 21))
    with pytest.raises(ValueError, match="supervised: the batch has no target; expected scans with a fully sampled"):
        Supervised()(network, make_example(None), np.random.default_rng(0))
    target = draw(2, 20, 21)
    target[1] = 0
    with pytest.raises(ValueError, match=r"supervised: targets \[1\] of the batch are empty"):
        Supervised()(network, make_example(target), np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"loss: images of the network have shape \(2, 20, 21\), expected \(2, 5, 5\)"):
        relative_error(network, draw(2, 20, 21), draw(2, 5, 5))


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_objectives_are_functions_of_their_arguments(name: str) -> None:
    objective, example = make_objective(name, {}), make_example(5 * draw(2, 20, 21))
    if name in {"noise2recon", "vortex"}:
        example = replace(example, target=None)
    network = Fixed(draw(2, 20, 21))
    before = [value.clone() for value in (example.kspace, example.sensitivities, example.mask)]
    losses = {float(objective(network, example, np.random.default_rng(7), progress=0.5).detach()) for _ in range(3)}
    assert len(losses) == 1
    for value, old in zip((example.kspace, example.sensitivities, example.mask), before, strict=True):
        assert torch.equal(value, old)


def test_objectives_are_made_from_their_names() -> None:
    assert make_objective("supervised", {}) == Supervised()
    assert make_objective("ssdu", {"label_share": 0.4}) == Ssdu(label_share=0.4)
    made = make_objective("noise2recon", {"noise": [0, 2], "noise_unit": "noise", "weight": 1})
    assert made == Noise2Recon(noise=(0, 2), noise_unit="noise", weight=1)
    assert make_objective("vortex", {"motion_model": "translation", "shots": 4}) == Vortex(
        motion_model="translation", shots=4
    )
    with pytest.raises(FrozenInstanceError):
        Ssdu().centre = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "hyperparameters", "message"),
    [
        ("n2r", {}, "objective must be one of supervised, noise2recon, vortex, ssdu, got 'n2r'"),
        ("supervised", {"weight": 1}, "supervised: hyperparameter 'weight' is unknown; expected none"),
        ("ssdu", {"rho": 0.2}, "ssdu: hyperparameter 'rho' is unknown; expected some of label_share, centre"),
        ("noise2recon", {"weight": "1"}, "noise2recon: weight must be a number of at least 0, got '1'"),
        ("noise2recon", {"weight": -1}, "noise2recon: weight must be a number of at least 0, got -1"),
        ("noise2recon", {"weight": float("inf")}, "noise2recon: weight must be .*got inf"),
        ("noise2recon", {"noise": 0.2}, r"noise2recon: noise must be two numbers \(low, high\) .*got 0\.2"),
        ("noise2recon", {"noise": [0.5, 0.2]}, r"noise2recon: noise must be two .*got \(0\.5, 0\.2\)"),
        ("noise2recon", {"noise": [0, float("nan")]}, "noise2recon: noise must be two"),
        ("noise2recon", {"noise_unit": "snr"}, "noise2recon: noise_unit must be one of 'image', 'noise', got 'snr'"),
        ("noise2recon", {"supervised_consistency": 1}, "supervised_consistency must be one of False, True, got 1"),
        ("vortex", {"motion": ["a", 1]}, r"vortex: motion must be two .*got \('a', 1\)"),
        ("vortex", {"motion_model": "affine"}, "vortex: motion_model must be one of 'phase', 'translation'"),
        ("vortex", {"shots": 1}, "vortex: shots must be a whole number of at least 2, got 1"),
        ("vortex", {"noise_probability": 1.5}, "vortex: noise_probability must be a number from 0 to 1, got 1.5"),
        ("vortex", {"motion_probability": -1}, "vortex: motion_probability must be a number from 0 to 1"),
        ("vortex", {"curriculum": None}, "vortex: curriculum must be one of 'none', 'linear', 'exponential', got None"),
        ("vortex", {"curriculum_share": 0}, "vortex: curriculum_share must be a number from 0.01 to 1, got 0"),
    ],
)
def test_wrong_configurations_are_refused(name: str, hyperparameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_objective(name, hyperparameters)
