"""VarNet: a second rendering in fastMRI's layout, names of its weights, derivative, calibration region."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from voxelsigma.models.network import Network
from voxelsigma.models.problem import PlaneProblem
from voxelsigma.models.varnet import VarNet
from voxelsigma.models.varnet_sensitivities import centre_box
from voxelsigma.noise.linearize import linearize

Normal = Callable[..., Tensor]

# torch.func.jvp uses what torch itself has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

COILS, ROWS, COLUMNS = 3, 38, 33


def seeded(*, cascades: int = 2) -> VarNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        network = VarNet(cascades=cascades, channels=2, levels=3, sensitivity_channels=2, sensitivity_levels=3)
        for name, parameter in network.named_parameters():
            if name.endswith("dc_weight"):
                parameter.data.fill_(0.7 + 0.2 * int(name.split(".")[1]))
    return network.double().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def mask() -> Tensor:
    """Lines: every third, and 8 in the centre."""
    lines = (torch.arange(ROWS) % 3 == 0) | ((torch.arange(ROWS) >= 15) & (torch.arange(ROWS) < 23))
    return lines.double().unsqueeze(1).expand(ROWS, COLUMNS)


@pytest.fixture(scope="module")
def kspace(complex_normal: Normal, mask: Tensor) -> Tensor:
    distance = (torch.arange(ROWS) - ROWS // 2).square().unsqueeze(1) + (torch.arange(COLUMNS) - COLUMNS // 2).square()
    return complex_normal(COILS, ROWS, COLUMNS, seed=3) * (1 + 40 / (1 + distance)) * mask


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# --- the same network again: real arrays (coils, h, w, 2), h the readout, from the weights by fastMRI's names


class Again:
    def __init__(self, weights: dict[str, Tensor], cascades: int, lines: int) -> None:
        self.weights, self.cascades, self.lines = weights, cascades, lines

    def __call__(self, kspace: Tensor, mask: Tensor) -> Tensor:
        measured = torch.view_as_real((kspace * mask).transpose(1, 2).contiguous())
        columns = mask[:, 0] > 0
        first = (len(columns) - self.lines + 1) // 2
        centre = torch.zeros_like(measured)
        centre[:, :, first : first + self.lines] = measured[:, :, first : first + self.lines]
        maps = torch.stack([self.normalised_unet("sens_net.norm_unet", coil) for coil in inverse(centre)])
        maps = maps / maps.square().sum(dim=-1).sum(dim=0).sqrt().unsqueeze(-1)
        current = measured
        for number in range(self.cascades):
            images = inverse(current)
            combined = times(images, maps * torch.tensor([1, -1])).sum(dim=0)
            model = self.normalised_unet(f"cascades.{number}.model", combined)
            soft = torch.where(columns.reshape(1, 1, -1, 1), current - measured, 0.0)
            weight = self.weights[f"cascades.{number}.dc_weight"]
            current = current - soft * weight - forward(times(model.expand_as(maps), maps))
        return inverse(current).square().sum(dim=-1).sum(dim=0).sqrt().T

    def normalised_unet(self, name: str, image: Tensor) -> Tensor:
        flat = image.reshape(-1, 2)
        mean, deviation = flat.mean(dim=0), flat.std(dim=0)
        height, width = image.shape[:2]
        below, right = -height % 16, -width % 16
        padding = (right // 2, right - right // 2, below // 2, below - below // 2)
        padded = functional.pad(((image - mean) / deviation).permute(2, 0, 1), padding)
        features = self.unet(f"{name}.unet", padded.unsqueeze(0))[0]
        cropped = features[:, below // 2 : below // 2 + height, right // 2 : right // 2 + width]
        return cropped.permute(1, 2, 0) * deviation + mean

    def unet(self, name: str, images: Tensor) -> Tensor:
        skips = []
        for level in range(3):
            images = self.block(f"{name}.down_sample_layers.{level}", images)
            skips.append(images)
            images = functional.avg_pool2d(images, 2)
        images = self.block(f"{name}.conv", images)
        for level in range(3):
            kernel = self.weights[f"{name}.up_transpose_conv.{level}.layers.0.weight"]
            images = active(functional.conv_transpose2d(images, kernel, stride=2))
            place = f"{name}.up_conv.{level}" + (".0" if level == 2 else "")
            images = self.block(place, torch.cat([images, skips.pop()], dim=1))
        last = f"{name}.up_conv.2.1"
        return functional.conv2d(images, self.weights[f"{last}.weight"], self.weights[f"{last}.bias"])

    def block(self, name: str, images: Tensor) -> Tensor:
        for place in (0, 4):
            images = active(functional.conv2d(images, self.weights[f"{name}.layers.{place}.weight"], padding=1))
        return images


def active(features: Tensor) -> Tensor:
    return functional.leaky_relu(functional.instance_norm(features), 0.2)


def times(left: Tensor, right: Tensor) -> Tensor:
    real = left[..., 0] * right[..., 0] - left[..., 1] * right[..., 1]
    return torch.stack([real, left[..., 0] * right[..., 1] + left[..., 1] * right[..., 0]], dim=-1)


def forward(images: Tensor) -> Tensor:
    centred = torch.fft.ifftshift(torch.view_as_complex(images.contiguous()), dim=(1, 2))
    return torch.view_as_real(torch.fft.fftshift(torch.fft.fft2(centred, norm="ortho"), dim=(1, 2)))


def inverse(kspace: Tensor) -> Tensor:
    centred = torch.fft.ifftshift(torch.view_as_complex(kspace.contiguous()), dim=(1, 2))
    return torch.view_as_real(torch.fft.fftshift(torch.fft.ifft2(centred, norm="ortho"), dim=(1, 2)))


def test_image_and_derivative_are_those_of_fastmri_s_layout(
    kspace: Tensor, mask: Tensor, complex_normal: Normal
) -> None:
    network = seeded()
    second = Again(dict(network.state_dict()), 2, 8)

    def image(samples: Tensor) -> Tensor:
        return network(samples, None, mask)

    linearization = linearize(image, kspace)
    assert linearization.fallbacks == ()
    assert not linearization.value.is_complex()
    assert error(linearization.value, second(kspace, mask)) < 1e-9
    tangents = complex_normal(2, COILS, ROWS, COLUMNS, seed=6)
    for tangent, pushed in zip(tangents, linearization.push(tangents), strict=True):
        expected = torch.func.jvp(lambda samples: second(samples, mask), (kspace,), (tangent,))[1]
        assert error(pushed, expected) < 1e-7


# --- weights


def test_names_and_shapes_are_those_published() -> None:
    with torch.device("meta"):
        state = VarNet().state_dict()
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    unets = [("sens_net.norm_unet.unet", 8), *((f"cascades.{number}.model.unet", 18) for number in range(12))]
    expected: dict[str, tuple[int, ...]] = {f"cascades.{number}.dc_weight": (1,) for number in range(12)}
    for name, channels in unets:
        widths = [channels * 2**level for level in range(5)]
        for level, (given, width) in enumerate(zip([2, *widths[:3]], widths[:4], strict=True)):
            expected[f"{name}.down_sample_layers.{level}.layers.0.weight"] = (width, given, 3, 3)
            expected[f"{name}.down_sample_layers.{level}.layers.4.weight"] = (width, width, 3, 3)
        expected[f"{name}.conv.layers.0.weight"] = (widths[4], widths[3], 3, 3)
        expected[f"{name}.conv.layers.4.weight"] = (widths[4], widths[4], 3, 3)
        for level, (below, width) in enumerate(zip(widths[:0:-1], widths[3::-1], strict=True)):
            place = f"{name}.up_conv.{level}" + (".0" if level == 3 else "")
            expected[f"{name}.up_transpose_conv.{level}.layers.0.weight"] = (below, width, 2, 2)
            expected[f"{place}.layers.0.weight"] = (width, below, 3, 3)
            expected[f"{place}.layers.4.weight"] = (width, width, 3, 3)
        expected |= {f"{name}.up_conv.3.1.weight": (2, channels, 1, 1), f"{name}.up_conv.3.1.bias": (2,)}
    assert shapes == expected
    # the paper says 30 million
    assert 29.5e6 < sum(value.numel() for value in state.values()) < 30.5e6


# --- calibration region


@pytest.mark.parametrize("size", [10, 11])
@pytest.mark.parametrize(
    ("before", "after", "expected"), [(2, 3, 4), (3, 2, 4), (3, 3, 6), (0, 1, 1), (0, 4, 1), (1, 1, 2)]
)
def test_lines_around_the_centre(size: int, before: int, after: int, expected: int) -> None:
    origin = size // 2
    mask = torch.zeros(size, 6)
    mask[origin - before : origin + after] = 1
    mask[0] = 1
    found = centre_box(mask)
    assert bool((found == found[:, :1]).all())
    half = expected // 2
    lines = [float(origin - half <= line < origin + max(half, 1)) for line in range(size)]
    assert found[:, 0].tolist() == lines
    # lines along the other axis as well
    assert torch.equal(centre_box(mask.mT), found.mT)


def test_everything_sampled_is_everything() -> None:
    for shape in ((7, 5), (8, 6), (1, 1)):
        assert bool(centre_box(torch.ones(shape)).all())


def test_box_of_a_two_dimensional_mask() -> None:
    mask = torch.zeros(2, 1, 20, 16)
    mask[0, 0, 6:14, 5:11] = 1
    mask[0, 0, 10, :] = 1
    mask[0, 0, ::7, ::5] = 1
    mask[1, 0, 8:12, 2:14] = 1
    mask[1, 0, 6:14, 7:9] = 1
    found = centre_box(mask)
    assert found.shape == mask.shape
    expected = torch.zeros_like(mask)
    expected[0, 0, 6:14, 5:11] = 1
    expected[1, 0, 8:12, 2:14] = 1
    assert torch.equal(found, expected)


def test_centre_that_was_not_sampled_is_refused(kspace: Tensor, mask: Tensor) -> None:
    with pytest.raises(ValueError, match="varnet: the centre of k-space is not sampled"):
        seeded()(kspace, None, torch.roll(1 - mask, 1, 0) * (torch.arange(ROWS) < 10).double().unsqueeze(1))


# --- properties


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_scale_of_the_data_is_the_scale_of_the_image(kspace: Tensor, mask: Tensor, factor: float) -> None:
    network = seeded()
    image = network(kspace, None, mask)
    assert error(network(factor * kspace, None, mask) / factor, image) < 1e-8
    linearization = linearize(lambda samples: network(samples, None, mask), kspace)
    assert error(linearization.push(kspace.unsqueeze(0))[0], linearization.value) < 1e-8


def test_single_precision_on_any_scale(kspace: Tensor, mask: Tensor) -> None:
    network = seeded()
    expected = network(kspace, None, mask)
    network.float()
    for factor in (1e-4, 1.0, 1e4):
        found = network((factor * kspace).to(torch.complex64), None, mask.float())
        assert found.dtype == torch.float32
        assert error(found / factor, expected) < 1e-3


def test_zero_input_is_finite_throughout(mask: Tensor) -> None:
    network, nothing = seeded(), torch.zeros(COILS, ROWS, COLUMNS, dtype=torch.complex128)
    linearization = linearize(lambda samples: network(samples, None, mask), nothing)
    assert not bool(linearization.value.any())
    assert bool(linearization.push(torch.ones_like(nothing).unsqueeze(0)).isfinite().all())


def test_coil_without_signal_is_no_harm(kspace: Tensor, mask: Tensor) -> None:
    scan = kspace * torch.tensor([1.0, 0.0, 1.0]).reshape(-1, 1, 1)
    assert bool(seeded()(scan, None, mask).isfinite().all())


@pytest.mark.parametrize(("coils", "rows", "columns"), [(1, 5, 7), (2, 16, 16), (5, 33, 20)])
def test_any_matrix_and_any_coils(coils: int, rows: int, columns: int, complex_normal: Normal) -> None:
    scan, mask = complex_normal(coils, rows, columns, seed=7), torch.ones(rows, columns, dtype=torch.float64)
    image = seeded(cascades=1)(scan, None, mask)
    assert image.shape == (rows, columns)
    assert bool(image.isfinite().all())


def test_batch_equals_single(kspace: Tensor, mask: Tensor) -> None:
    network = seeded()
    scans = torch.stack([kspace, 100 * kspace.flip(0), 0 * kspace])
    masks = torch.stack([mask, torch.ones_like(mask), mask]).unsqueeze(1)
    before = scans.clone()
    together = network(scans, None, masks)
    assert torch.equal(scans, before)
    assert together.shape == (3, ROWS, COLUMNS)
    for index in range(2):
        assert error(together[index], network(scans[index], None, masks[index, 0])) < 1e-9
    assert not bool(together[2].any())


def test_gradient_reaches_every_parameter(kspace: Tensor, mask: Tensor) -> None:
    network = seeded().train().requires_grad_(True)
    network(kspace, None, mask).sum().backward()
    without = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert without == []
    # the first cascade starts at the data
    still = [n for n, p in network.named_parameters() if p.grad is not None and not bool(p.grad.any())]
    assert still == ["cascades.0.dc_weight"]


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")
def test_general_linearization_knows_it_too(kspace: Tensor, mask: Tensor) -> None:
    network = seeded(cascades=1)

    def image(samples: Tensor) -> Tensor:
        return network(samples, None, mask)

    _, push = torch.func.linearize(image, kspace)
    expected = torch.func.jvp(image, (kspace,), (kspace.roll(1, -1),))[1]
    assert error(push(kspace.roll(1, -1)), expected) < 1e-9


# --- bound to a plane


def test_bound_to_a_plane_it_keeps_its_own_view_and_stays_real(kspace: Tensor, mask: Tensor) -> None:
    network = seeded(cascades=1)
    problem = PlaneProblem(
        # sensitivities that see nothing at all: they are not asked
        sensitivities=torch.zeros(COILS, ROWS, COLUMNS, dtype=torch.complex128),
        variance=2 * mask,
        weights=mask,
        limits=((0, ROWS - 1), (0, COLUMNS - 1)),
        size=(ROWS, 2 * COLUMNS),
    )
    wide = Network(function=network, estimates_sensitivities=True).bind(problem)(kspace)
    assert not wide.is_complex()
    assert wide.shape == (ROWS, 2 * COLUMNS)
    # zero-filled interpolation keeps the voxel in the centre
    narrow = network(kspace, None, mask)
    torch.testing.assert_close(wide[:, COLUMNS], narrow[:, COLUMNS // 2])
    assert not bool(Network(function=network).bind(problem)(kspace).any())
