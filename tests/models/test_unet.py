"""The U-Net: a second rendering, names of its weights, padding, scale, derivative."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from voxelsigma.models.encoding import SenseEncoding
from voxelsigma.models.unet import ImageUNet, UNet, padded_apply
from voxelsigma.noise.linearize import linearize

MapMaker = Callable[[int, int, int], Tensor]
Normal = Callable[..., Tensor]

# torch.func.jvp uses what torch itself has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

COILS, ROWS, COLUMNS = 3, 21, 18


def seeded(*, levels: int = 2, residual: bool = False) -> ImageUNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        network = ImageUNet(channels=3, levels=levels, residual=residual)
    return network.double().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def maps(smooth_maps: MapMaker) -> Tensor:
    return smooth_maps(COILS, ROWS, COLUMNS)


@pytest.fixture(scope="module")
def mask() -> Tensor:
    return (torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(2)) < 0.5).double()


@pytest.fixture(scope="module")
def kspace(complex_normal: Normal, mask: Tensor) -> Tensor:
    return 5 * complex_normal(COILS, ROWS, COLUMNS, seed=3) * mask


# --- the same network again, from its weights


def normalised(features: Tensor) -> Tensor:
    mean = features.mean(dim=(-2, -1), keepdim=True)
    variance = (features - mean).square().mean(dim=(-2, -1), keepdim=True)
    active = (features - mean) / (variance + 1e-5).sqrt()
    return torch.where(active > 0, active, 0.2 * active)


def block(weights: dict[str, Tensor], name: str, features: Tensor) -> Tensor:
    for place in (0, 4):
        features = normalised(functional.conv2d(features, weights[f"{name}.layers.{place}.weight"], padding=1))
    return features


def again(weights: dict[str, Tensor], images: Tensor, levels: int) -> Tensor:
    skips = []
    for level in range(levels):
        images = block(weights, f"down_sample_layers.{level}", images)
        skips.append(images)
        quarters = [images[..., row::2, column::2] for row in (0, 1) for column in (0, 1)]
        images = torch.stack(quarters).mean(dim=0)
    images = block(weights, "conv", images)
    for level in range(levels):
        kernel = weights[f"up_transpose_conv.{level}.layers.0.weight"]
        # (in, out, 2, 2): each voxel becomes a square
        squares = torch.einsum("bcyx,cdij->bdyixj", images, kernel)
        images = normalised(squares.flatten(4, 5).flatten(2, 3))
        name = f"up_conv.{level}" + (".0" if level == levels - 1 else "")
        images = block(weights, name, torch.cat([images, skips.pop()], dim=1))
    weight, bias = weights[f"up_conv.{levels - 1}.1.weight"], weights[f"up_conv.{levels - 1}.1.bias"]
    return torch.einsum("bcyx,dc->bdyx", images, weight[..., 0, 0]) + bias[:, None, None]


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_network_is_its_description(levels: int, complex_normal: Normal) -> None:
    network = seeded(levels=levels).unet
    images = complex_normal(2, 2, 16, 24, seed=1).real
    expected = again(dict(network.state_dict()), images, levels)
    torch.testing.assert_close(network(images), expected)


def test_names_and_shapes_are_fastmri_s() -> None:
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in UNet(inputs=1, outputs=1, channels=32).state_dict().items()}
    assert shapes["down_sample_layers.0.layers.0.weight"] == (32, 1, 3, 3)
    assert shapes["down_sample_layers.3.layers.4.weight"] == (256, 256, 3, 3)
    assert shapes["conv.layers.0.weight"] == (512, 256, 3, 3)
    assert shapes["up_transpose_conv.0.layers.0.weight"] == (512, 256, 2, 2)
    assert shapes["up_conv.0.layers.0.weight"] == (256, 512, 3, 3)
    assert shapes["up_conv.3.0.layers.4.weight"] == (32, 32, 3, 3)
    assert shapes["up_conv.3.1.weight"] == (1, 32, 1, 1)
    assert shapes["up_conv.3.1.bias"] == (1,)
    # two convolutions a block, one a way up, and the last one's weight and bias
    assert len(shapes) == 2 * 9 + 4 + 2


def test_image_is_the_network_s_of_the_scaled_zero_filled_image(kspace: Tensor, maps: Tensor, mask: Tensor) -> None:
    network = seeded()
    zero_filled = SenseEncoding(maps, mask).adjoint(kspace)
    scale = zero_filled.abs().square().mean().sqrt()
    padded = torch.zeros(1, 2, 24, 20, dtype=torch.float64)
    padded[0, :, 1:22, 1:19] = torch.stack([zero_filled.real, zero_filled.imag]) / scale
    features = again(dict(network.unet.state_dict()), padded, 2)[0, :, 1:22, 1:19]
    expected = scale * torch.complex(features[0], features[1])
    torch.testing.assert_close(network(kspace, maps, mask), expected)
    torch.testing.assert_close(seeded(residual=True)(kspace, maps, mask), expected + zero_filled)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 16), (16, 16), (17, 5), (40, 33)])
def test_any_matrix(rows: int, columns: int, smooth_maps: MapMaker, complex_normal: Normal) -> None:
    network = seeded(levels=4)
    mask = torch.ones(rows, columns, dtype=torch.float64)
    image = network(complex_normal(1, rows, columns, seed=5), smooth_maps(1, rows, columns), mask)
    assert image.shape == (rows, columns)
    assert bool(image.isfinite().all())


def test_padding_is_around_the_image() -> None:
    seen: list[Tensor] = []

    class Recording(torch.nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images)
            return images

    images = torch.ones(1, 2, 5, 9)
    assert torch.equal(padded_apply(Recording(), images, 8), images)
    assert seen[0].shape == (1, 2, 8, 16)
    assert seen[0][0, 0].any(dim=1).tolist() == [False] + [True] * 5 + [False] * 2
    assert seen[0][0, 0].any(dim=0).tolist() == [False] * 3 + [True] * 9 + [False] * 4


# --- properties


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_scale_of_the_data_is_the_scale_of_the_image(
    kspace: Tensor, maps: Tensor, mask: Tensor, factor: float, residual: bool
) -> None:
    network = seeded(residual=residual)
    image = network(kspace, maps, mask)
    torch.testing.assert_close(network(factor * kspace, maps, mask) / factor, image, rtol=1e-8, atol=1e-8)
    linearization = linearize(lambda samples: network(samples, maps, mask), kspace)
    torch.testing.assert_close(linearization.push(kspace.unsqueeze(0))[0], linearization.value)


def test_derivative(kspace: Tensor, maps: Tensor, mask: Tensor, complex_normal: Normal) -> None:
    network = seeded()
    tangents = complex_normal(2, COILS, ROWS, COLUMNS, seed=6)

    def image(samples: Tensor) -> Tensor:
        return network(samples, maps, mask)

    linearization = linearize(image, kspace)
    assert linearization.fallbacks == ()
    step = 1e-6
    for tangent, pushed in zip(tangents, linearization.push(tangents), strict=True):
        torch.testing.assert_close(pushed, torch.func.jvp(image, (kspace,), (tangent,))[1])
        quotient = (image(kspace + step * tangent) - image(kspace - step * tangent)) / (2 * step)
        torch.testing.assert_close(pushed, quotient, rtol=1e-5, atol=1e-5)


def test_gradient_reaches_every_parameter(kspace: Tensor, maps: Tensor, mask: Tensor) -> None:
    network = seeded().train().requires_grad_(True)
    network(kspace, maps, mask).abs().sum().backward()
    assert all(bool(parameter.grad.any()) for parameter in network.parameters() if parameter.grad is not None)
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_zero_input_is_a_zero_image_and_finite_throughout(maps: Tensor, mask: Tensor) -> None:
    network, nothing = seeded(), torch.zeros(COILS, ROWS, COLUMNS, dtype=torch.complex128)
    linearization = linearize(lambda samples: network(samples, maps, mask), nothing)
    assert not bool(linearization.value.any())
    assert bool(linearization.push(torch.ones_like(nothing).unsqueeze(0)).isfinite().all())


def test_batch_equals_single(maps: Tensor, mask: Tensor, complex_normal: Normal) -> None:
    network = seeded()
    sizes = torch.tensor([1.0, 100.0, 0.01], dtype=torch.float64).reshape(3, 1, 1, 1)
    scans = sizes * complex_normal(3, COILS, ROWS, COLUMNS, seed=6)
    masks = torch.stack([mask, 1 - mask, torch.ones_like(mask)]).unsqueeze(1)
    before = scans.clone()
    together = network(scans, torch.stack([maps, maps, maps.flip(-1)]), masks)
    assert torch.equal(scans, before)
    torch.testing.assert_close(together[1], network(scans[1], maps, masks[1, 0]), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(together[2], network(scans[2], maps.flip(-1), masks[2, 0]), rtol=1e-9, atol=1e-9)


def test_single_precision_is_close(kspace: Tensor, maps: Tensor, mask: Tensor) -> None:
    network = seeded()
    expected = network(kspace, maps, mask)
    single = network.float()(kspace.to(torch.complex64), maps.to(torch.complex64), mask.float())
    assert single.dtype == torch.complex64
    assert float((single - expected).norm() / expected.norm()) < 1e-4


def test_bad_hyperparameters() -> None:
    with pytest.raises(ValueError, match="unet: levels and channels must be at least 1, got 0 and 32"):
        ImageUNet(levels=0)
