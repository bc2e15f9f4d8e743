"""The unrolled network: reference value, gradients, zero input, scale."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import scipy.signal
import torch
from torch import Tensor

from voxelsigma.models.encoding import SenseEncoding
from voxelsigma.models.unrolled import ResidualBlock, Unrolled
from voxelsigma.noise.linearize import linearize

MapMaker = Callable[[int, int, int], Tensor]
Normal = Callable[..., Tensor]
Real = npt.NDArray[np.float64]
Complex = npt.NDArray[np.complexfloating[Any, Any]]

COILS, ROWS, COLUMNS = 3, 12, 10


def seeded(*, steps: int, blocks: int, channels: int, seed: int = 1) -> Unrolled:
    """A network in double precision whose weights are drawn here, not by torch's initialisation."""
    network = Unrolled(steps=steps, blocks=blocks, channels=channels).double().eval()
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.from_numpy(0.25 * rng.standard_normal(tuple(parameter.shape))))
        network.step_sizes.copy_(torch.from_numpy(rng.uniform(0.5, 1.2, steps)))
    return network.requires_grad_(False)


@pytest.fixture(scope="module")
def mask() -> Tensor:
    chance = torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(2))
    return (chance < 0.5).double()


@pytest.fixture(scope="module")
def maps(smooth_maps: MapMaker) -> Tensor:
    return smooth_maps(COILS, ROWS, COLUMNS)


@pytest.fixture(scope="module")
def kspace(complex_normal: Normal, mask: Tensor) -> Tensor:
    return 5 * complex_normal(COILS, ROWS, COLUMNS, seed=3) * mask


# --- the same network again, in numpy and scipy


def convolved(features: Real, weight: Real, bias: Real) -> Real:
    rows = []
    for kernels, offset in zip(weight, bias, strict=True):
        total = np.full(features.shape[1:], offset)
        for channel, kernel in zip(features, kernels, strict=True):
            total = total + scipy.signal.correlate2d(channel, kernel, mode="same")
        rows.append(total)
    return np.stack(rows)


def corrected(image: Complex, weights: dict[str, Real], prefix: str, blocks: int) -> Complex:
    def layer(name: str, features: Real) -> Real:
        return convolved(features, weights[f"{prefix}.{name}.weight"], weights[f"{prefix}.{name}.bias"])

    features = np.maximum(layer("enter", np.stack([image.real, image.imag])), 0)
    for block in range(blocks):
        inner = np.maximum(layer(f"blocks.{block}.first", features), 0)
        features = features + layer(f"blocks.{block}.second", inner)
    real, imaginary = layer("leave", features)
    return np.asarray(real + 1j * imaginary)


def naive(network: Unrolled, blocks: int, kspace: Complex, maps: Complex, mask: Real) -> Complex:
    def transformed(array: Complex, transform: Callable[..., Complex]) -> Complex:
        axes = (-2, -1)
        return np.fft.fftshift(transform(np.fft.ifftshift(array, axes), norm="ortho"), axes)

    def normal(image: Complex) -> Complex:
        seen = mask * transformed(maps * image, np.fft.fft2)
        return np.asarray((maps.conj() * transformed(seen, np.fft.ifft2)).sum(axis=0))

    weights = {key: value.numpy() for key, value in network.state_dict().items()}
    zero_filled = (maps.conj() * transformed(mask * kspace, np.fft.ifft2)).sum(axis=0)
    scale = np.sqrt(np.mean(np.abs(zero_filled) ** 2))
    start = zero_filled / scale
    image = start
    for step, size in enumerate(weights["step_sizes"]):
        image = image - size * (normal(image) - start) + corrected(image, weights, f"networks.{step}", blocks)
    return np.asarray(scale * image)


@pytest.mark.parametrize(("steps", "blocks", "channels"), [(1, 1, 2), (3, 2, 4), (2, 0, 3)])
def test_value_is_that_of_a_naive_twin(
    kspace: Tensor, maps: Tensor, mask: Tensor, steps: int, blocks: int, channels: int
) -> None:
    network = seeded(steps=steps, blocks=blocks, channels=channels)
    expected = naive(network, blocks, kspace.numpy(), maps.numpy(), mask.numpy())
    np.testing.assert_allclose(network(kspace, maps, mask).numpy(), expected, rtol=1e-10, atol=1e-10)


def test_value_of_a_residual_block_by_hand() -> None:
    block = ResidualBlock(1).double().requires_grad_(False)
    kernel = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    kernel[0, 0, 1, 0] = 2.0  # correlation: twice the left neighbour
    block.load_state_dict(
        {
            "first.weight": kernel,
            "first.bias": torch.tensor([-1.0]),
            "second.weight": kernel.flip(-1),  # twice the right neighbour
            "second.bias": torch.tensor([0.5]),
        }
    )
    row = torch.tensor([[[[1.0, -2.0, 3.0]]]], dtype=torch.float64)
    # inner: relu(2 · [0, 1, -2] - 1) = [0, 1, 0]; out: row + 2 · [1, 0, 0] + 0.5
    torch.testing.assert_close(block(row), torch.tensor([[[[3.5, -1.5, 3.5]]]], dtype=torch.float64))


# --- properties


@pytest.mark.parametrize("factor", [1e-6, 0.5, 3.0, 1e6])
def test_scale_of_the_data_is_the_scale_of_the_image(kspace: Tensor, maps: Tensor, mask: Tensor, factor: float) -> None:
    network = seeded(steps=2, blocks=1, channels=4)
    image = network(kspace, maps, mask)
    torch.testing.assert_close(network(factor * kspace, maps, mask) / factor, image, rtol=1e-9, atol=1e-9)


def test_it_is_not_linear(kspace: Tensor, maps: Tensor, mask: Tensor) -> None:
    network = seeded(steps=2, blocks=1, channels=4)
    image = network(kspace, maps, mask)
    assert float((network(-kspace, maps, mask) + image).norm()) > 0.01 * float(image.norm())


def test_zero_input_is_a_zero_image_and_finite_throughout(maps: Tensor, mask: Tensor) -> None:
    network = seeded(steps=2, blocks=1, channels=4)
    nothing = torch.zeros(COILS, ROWS, COLUMNS, dtype=torch.complex128, requires_grad=True)
    image = network(nothing, maps, mask)
    # the networks have biases, but the scale of an empty scan is 0
    assert not bool(image.any())
    (gradient,) = torch.autograd.grad((image * (1 + 2j)).real.sum(), nothing)
    assert bool(gradient.isfinite().all())
    pushed = linearize(lambda samples: network(samples, maps, mask), nothing.detach()).push(
        torch.ones(2, COILS, ROWS, COLUMNS, dtype=torch.complex128)
    )
    assert bool(pushed.isfinite().all())


def test_an_empty_member_of_a_batch_harms_nobody(kspace: Tensor, maps: Tensor, mask: Tensor) -> None:
    network = seeded(steps=2, blocks=1, channels=4)
    images = network(torch.stack([torch.zeros_like(kspace), kspace]), maps, mask)
    assert not bool(images[0].any())
    torch.testing.assert_close(images[1], network(kspace, maps, mask))


def test_networks_that_do_nothing_leave_gradient_descent(kspace: Tensor, maps: Tensor, mask: Tensor) -> None:
    network = seeded(steps=3, blocks=1, channels=4)
    for parameter in network.networks.parameters():
        parameter.zero_()
    operator = SenseEncoding(maps, mask)
    image = target = operator.adjoint(kspace)
    for size in network.step_sizes:
        image = image - size * (operator.adjoint(operator.forward(image)) - target)
    torch.testing.assert_close(network(kspace, maps, mask), image)
    # of a full scan that is the image itself, with steps of any size
    everywhere = torch.ones_like(mask)
    full = SenseEncoding(maps, everywhere)
    scan = full.forward(target)
    torch.testing.assert_close(network(scan, maps, everywhere), target)


def test_positions_that_were_not_sampled_do_not_matter(
    kspace: Tensor, maps: Tensor, mask: Tensor, complex_normal: Normal
) -> None:
    network = seeded(steps=2, blocks=1, channels=4)
    filled = kspace + 100 * complex_normal(COILS, ROWS, COLUMNS, seed=4) * (1 - mask)
    torch.testing.assert_close(network(filled, maps, mask), network(kspace, maps, mask))


def test_batch_equals_single(maps: Tensor, complex_normal: Normal) -> None:
    network = seeded(steps=2, blocks=2, channels=4)
    generator = torch.Generator().manual_seed(5)
    masks = (torch.rand(3, 1, ROWS, COLUMNS, generator=generator) < 0.6).double()
    # scans of very different size: each has a scale of its own
    sizes = torch.tensor([1.0, 100.0, 0.01], dtype=torch.float64).reshape(3, 1, 1, 1)
    scans = sizes * complex_normal(3, COILS, ROWS, COLUMNS, seed=6)
    turned = torch.stack([maps, 1j * maps, maps.flip(-1)])
    together = network(scans, turned, masks)
    assert together.shape == (3, ROWS, COLUMNS)
    for index in range(3):
        alone = network(scans[index], turned[index], masks[index, 0])
        torch.testing.assert_close(together[index], alone, rtol=1e-10, atol=1e-12)


def test_single_precision_is_close(kspace: Tensor, maps: Tensor, mask: Tensor) -> None:
    network = seeded(steps=3, blocks=2, channels=4)
    expected = network(kspace, maps, mask)
    single = network.float()(kspace.to(torch.complex64), maps.to(torch.complex64), mask.float())
    assert single.dtype == torch.complex64
    assert float((single - expected).norm() / expected.norm()) < 1e-5


# --- gradients


def test_gradient_in_kspace(smooth_maps: MapMaker, complex_normal: Normal) -> None:
    network, maps = seeded(steps=2, blocks=1, channels=2), smooth_maps(2, 5, 4)
    mask = (torch.arange(20).reshape(5, 4) % 3 > 0).double()
    kspace = complex_normal(2, 5, 4, seed=7).requires_grad_()
    assert torch.autograd.gradcheck(lambda samples: network(samples, maps, mask), (kspace,))


def test_gradient_in_every_parameter(smooth_maps: MapMaker, complex_normal: Normal) -> None:
    network, maps = seeded(steps=2, blocks=1, channels=2), smooth_maps(2, 5, 4)
    mask = (torch.arange(20).reshape(5, 4) % 3 > 0).double()
    kspace = complex_normal(2, 5, 4, seed=8)
    names, values = zip(*network.named_parameters(), strict=True)

    def image(*parameters: Tensor) -> Tensor:
        state = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(network, state, (kspace, maps, mask))

    assert torch.autograd.gradcheck(image, tuple(value.clone().requires_grad_() for value in values))


def test_scale_is_part_of_the_derivative(kspace: Tensor, maps: Tensor, mask: Tensor) -> None:
    # Euler: the derivative of a homogeneous map along its own argument is its value
    network = seeded(steps=2, blocks=1, channels=4)
    step = 1e-6
    ahead, behind = (network((1 + sign * step) * kspace, maps, mask) for sign in (1, -1))
    torch.testing.assert_close((ahead - behind) / (2 * step), network(kspace, maps, mask), rtol=1e-6, atol=1e-6)
    linearization = linearize(lambda samples: network(samples, maps, mask), kspace)
    torch.testing.assert_close(linearization.push(kspace.unsqueeze(0))[0], linearization.value)


def test_shape_of_the_weights_is_that_of_the_hyperparameters() -> None:
    network = Unrolled(steps=2, blocks=3, channels=5)
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    assert shapes["step_sizes"] == (2,)
    assert shapes["networks.1.enter.weight"] == (5, 2, 3, 3)
    assert shapes["networks.0.blocks.2.second.weight"] == (5, 5, 3, 3)
    assert shapes["networks.1.leave.bias"] == (2,)
    assert len(shapes) == 1 + 2 * (2 * 2 + 3 * 4)
    assert bool((network.step_sizes == 1).all())
