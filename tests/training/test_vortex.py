"""Noise2Recon and VORTEX, against loops in numpy."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from voxelsigma.models.encoding import SenseEncoding
from voxelsigma.training.examples import Example
from voxelsigma.training.noise2recon import Noise2Recon
from voxelsigma.training.objectives import Objective
from voxelsigma.training.supervised import Supervised
from voxelsigma.training.vortex import Vortex, difficulty

Array = NDArray[np.complex128]


class Curved(nn.Module):
    """A function of the zero-filled image z, not linear: a z + b Re(z) z."""

    def __init__(self) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.tensor([0.8, 0.03]))
        self.calls: list[tuple[Tensor, bool]] = []

    def forward(self, kspace: Tensor, sensitivities: Tensor, mask: Tensor) -> Tensor:
        self.calls.append((kspace.detach().clone(), torch.is_grad_enabled()))
        image = SenseEncoding(sensitivities, mask).adjoint(kspace)
        return self.factors[0] * image + self.factors[1] * image.real * image


def make_example(*, shape: tuple[int, int] = (9, 10), target: bool = False) -> Example:
    rng = np.random.default_rng(0)

    def draw(*sizes: int) -> Tensor:
        return torch.from_numpy(rng.standard_normal(sizes) + 1j * rng.standard_normal(sizes)).to(torch.complex64)

    mask = torch.from_numpy(rng.random((2, 1, *shape)) < 0.5).float()
    mask[:, :, 1] = 0
    sensitivities = draw(2, 3, *shape)
    sensitivities /= sensitivities.abs().square().sum(dim=1, keepdim=True).sqrt()
    image = 10 * draw(2, *shape)
    kspace = SenseEncoding(sensitivities, mask).forward(image) + mask * draw(2, 3, *shape)
    return Example(kspace, sensitivities, mask, image if target else None)


def zero_filled(example: Example, kspace: Array) -> Array:
    images = []
    for y, s, m in zip(kspace, example.sensitivities.numpy(), example.mask.numpy(), strict=True):
        image = np.zeros(y.shape[-2:], complex)
        for coil in range(len(y)):
            image += s[coil].conj() * np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(m[0] * y[coil]), norm="ortho"))
        images.append(image)
    return np.array(images)


def curved(example: Example, kspace: Array) -> Array:
    image = zero_filled(example, kspace)
    return 0.8 * image + 0.03 * image.real * image


def error(images: Array, reference: Array) -> float:
    losses = []
    for image, wanted in zip(images, reference, strict=True):
        magnitude = np.abs(wanted)
        inside = magnitude > 0.1 * np.percentile(magnitude, 99)
        losses.append(np.abs(image - wanted).mean() / magnitude[inside].mean())
    return float(np.mean(losses))


def noisy(example: Example, kspace: Array, deviations: NDArray[np.float64], rng: np.random.Generator) -> Array:
    noise = rng.standard_normal((*kspace.shape, 2), dtype=np.float32)
    found = kspace.copy()
    for scan in range(len(kspace)):
        parts = noise[scan, ..., 0] + 1j * noise[scan, ..., 1]
        found[scan] += deviations[scan] * example.mask[scan].numpy() * parts
    return found


@pytest.mark.parametrize("unit", ["image", "noise"])
@pytest.mark.parametrize("shape", [(9, 10), (10, 9)])
def test_noise2recon_is_its_formula(unit: str, shape: tuple[int, int]) -> None:
    example, network = make_example(shape=shape), Curved()
    objective = Noise2Recon(weight=0.3, noise=(0.2, 0.5), noise_unit=unit)  # type: ignore[arg-type]
    found = objective(network, example, np.random.default_rng(4))
    rng, kspace = np.random.default_rng(4), example.kspace.numpy().astype(complex)
    deviations = rng.uniform(0.2, 0.5, 2)
    if unit == "image":
        deviations = deviations * [np.percentile(np.abs(image), 95) for image in zero_filled(example, kspace)]
    augmented = noisy(example, kspace, deviations, rng)
    expected = 0.3 * error(curved(example, augmented), curved(example, kspace))
    assert float(found.detach()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("model", ["phase", "translation"])
@pytest.mark.parametrize("shots", [2, 3])
def test_vortex_is_its_formula(model: str, shots: int) -> None:
    example, network = make_example(), Curved()
    objective = Vortex(motion_model=model, shots=shots, weight=0.2, noise_probability=0.5, motion_probability=0.7)  # type: ignore[arg-type]
    for seed in range(4):
        found = objective(network, example, np.random.default_rng(seed))
        rng, kspace = np.random.default_rng(seed), example.kspace.numpy().astype(complex)
        moves = rng.random(2) < 0.7
        amounts = np.where(moves, rng.uniform(0.2, 0.5, 2), 0)
        relative = rng.uniform(-1, 1, (2, shots))
        moved = kspace.copy()
        for scan in range(2):
            shot = 0
            for line in range(9):
                if example.mask[scan, 0, line].sum() == 0:
                    continue
                mean = relative[scan].mean()
                if model == "phase":
                    phase = np.pi * amounts[scan] * relative[scan, shot]
                else:
                    phase = 2 * np.pi * (line - 4) / 9 * amounts[scan] * (relative[scan, shot] - mean)
                moved[scan, :, line] *= np.exp(-1j * phase)
                shot = (shot + 1) % shots
        gets = rng.random(2) < 0.5
        deviations = np.where(gets, rng.uniform(0.2, 0.5, 2), 0)
        deviations *= [np.percentile(np.abs(image), 95) for image in zero_filled(example, kspace)]
        augmented = noisy(example, moved, deviations, rng)
        expected = 0.2 * error(curved(example, augmented), curved(example, kspace))
        assert float(found.detach()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("objective", [Noise2Recon(noise=(0, 0)), Vortex(noise=(0, 0), motion=(0, 0))])
def test_without_change_there_is_no_loss(objective: Objective) -> None:
    assert float(objective(Curved(), make_example(), np.random.default_rng(0)).detach()) == 0


@pytest.mark.parametrize("objective", [Noise2Recon(), Vortex()])
def test_no_gradient_goes_through_the_reconstruction_of_the_scan_itself(objective: Objective) -> None:
    example, network = make_example(), Curved()
    loss = objective(network, example, np.random.default_rng(3))
    loss.backward()
    (kspace, with_gradient), (augmented, augmented_with_gradient) = network.calls
    assert torch.equal(kspace, example.kspace)
    assert not with_gradient
    assert augmented_with_gradient
    # the same loss with the reference as a constant
    constant = Curved()
    with torch.no_grad():
        reference = constant(kspace, example.sensitivities, example.mask)
    images = constant(augmented, example.sensitivities, example.mask)
    supervised = Supervised()(_Given(images), replace(example, target=reference), np.random.default_rng(0))
    (0.1 * supervised).backward()
    assert constant.factors.grad is not None
    assert network.factors.grad is not None
    torch.testing.assert_close(network.factors.grad, constant.factors.grad)
    assert float(network.factors.grad.abs().min()) > 0


class _Given(nn.Module):
    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.images = images

    def forward(self, kspace: Tensor, sensitivities: Tensor, mask: Tensor) -> Tensor:
        return self.images


@pytest.mark.parametrize("objective", [Noise2Recon(), Vortex()])
def test_noise_falls_on_sampled_positions_only(objective: Objective) -> None:
    example, network = make_example(), Curved()
    objective(network, example, np.random.default_rng(3))
    difference = network.calls[1][0] - example.kspace
    sampled = (example.mask != 0).expand_as(difference)
    assert float(difference[~sampled].abs().max()) == 0
    assert float(difference[sampled].abs().min()) > 0


def test_added_noise_has_the_stated_deviation() -> None:
    example = make_example(shape=(64, 64))
    network = Curved()
    Noise2Recon(noise=(3, 3), noise_unit="noise")(network, example, np.random.default_rng(0))
    difference = (network.calls[1][0] - example.kspace)[(example.mask != 0).expand_as(example.kspace)]
    # about 12,000 samples: 6 standard errors, false-alarm probability below 1e-8
    count = len(difference)
    for part in (difference.real, difference.imag):
        assert abs(float(part.std()) / 3 - 1) < 6 / np.sqrt(2 * count)


@pytest.mark.parametrize("make", [Noise2Recon, Vortex])
def test_batches_with_a_reference_are_supervised(make: type[Noise2Recon] | type[Vortex]) -> None:
    example, network = make_example(target=True), Curved()
    supervised = float(Supervised()(network, example, np.random.default_rng(0)).detach())
    network.calls.clear()
    rng = np.random.default_rng(0)
    assert float(make()(network, example, rng).detach()) == supervised
    assert len(network.calls) == 1
    assert rng.random() == np.random.default_rng(0).random()
    both = make(supervised_consistency=True)(network, example, np.random.default_rng(1))
    consistency = make()(network, replace(example, target=None), np.random.default_rng(1))
    assert float(both.detach()) == pytest.approx(supervised + float(consistency.detach()), rel=1e-6)


def test_a_network_that_gives_nothing_has_a_finite_loss() -> None:
    nothing = _Given(torch.zeros(2, 9, 10, dtype=torch.complex64, requires_grad=True))
    loss = Noise2Recon()(nothing, make_example(), np.random.default_rng(0))
    loss.backward()
    assert float(loss.detach()) == 0


def test_curricula_rise_to_the_whole_range() -> None:
    assert [difficulty("none", progress) for progress in (0, 0.5, 1)] == [1, 1, 1]
    assert [difficulty("linear", progress) for progress in (-1, 0, 0.25, 1, 2)] == [0, 0, 0.25, 1, 1]
    for progress in (0.0, 0.1, 0.5, 1.0):
        expected = (1 - np.exp(-5 * progress)) / (1 - np.exp(-5))
        assert difficulty("exponential", progress) == pytest.approx(expected)


def test_a_curriculum_begins_at_the_lower_ends() -> None:
    example = make_example()
    rising = Vortex(noise=(0, 0.5), motion=(0, 0.5), curriculum="linear", curriculum_share=0.5)
    losses = [
        float(rising(Curved(), example, np.random.default_rng(0), progress=progress).detach())
        for progress in (0.0, 0.2, 0.5, 1.0)
    ]
    assert losses[0] == 0
    assert losses[0] < losses[1] < losses[2] == losses[3]
    whole = Vortex(noise=(0, 0.5), motion=(0, 0.5))(Curved(), example, np.random.default_rng(0))
    assert losses[3] == float(whole.detach())
