"""Networks of every kind on the tape, against forward mode."""

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from tests.noise.tape_checks import check, draw
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from voxelsigma.models.network import NetworkReconstruction
from voxelsigma.noise.linearize import linearize

Layer = Callable[[], nn.Module]

POINT = draw(4, 8, 8)
VOLUME = draw(4, 8, 8, 8)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(5)


def ready(module: nn.Module) -> nn.Module:
    """In double precision and evaluation mode, running statistics not trivial."""
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.uniform_(-0.5, 0.5)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2.0)
    return module.double().eval().requires_grad_(False)


def as_channels(samples: Tensor, dim: int = 2) -> Tensor:
    """Complex (coils, ...) as one image of twice as many real channels."""
    parts = torch.view_as_real(samples).movedim(-1, 0)
    return parts.reshape(1, 2 * samples.shape[0], *samples.shape[samples.dim() - dim :])


def around(module: nn.Module, dim: int = 2) -> Callable[[Tensor], Tensor]:
    """The module between curved functions, so that its own derivative must stand at the right point."""
    module = ready(module)

    def function(samples: Tensor) -> Tensor:
        return module(torch.sin(as_channels(samples, dim))).square()

    return function


PLANE_LAYERS: dict[str, Layer] = {
    "conv": lambda: nn.Conv2d(8, 5, 3, padding=1),
    "conv without bias, strided": lambda: nn.Conv2d(8, 6, 3, stride=2, padding=1, bias=False),
    "conv dilated": lambda: nn.Conv2d(8, 5, 3, dilation=2, padding=2),
    "conv grouped": lambda: nn.Conv2d(8, 4, 3, groups=4),
    "conv depthwise, reflected": lambda: nn.Conv2d(8, 8, 3, groups=8, padding=1, padding_mode="reflect"),
    "conv same": lambda: nn.Conv2d(8, 4, 5, padding="same"),
    "conv 1x1": lambda: nn.Conv2d(8, 4, 1),
    "conv narrow": lambda: nn.Sequential(nn.Conv2d(8, 20, 1), nn.Conv2d(20, 2, 3, padding=1)),
    "conv narrow, oblong, dilated": lambda: nn.Sequential(
        nn.Conv2d(8, 20, 1), nn.Conv2d(20, 3, (3, 2), padding=(3, 2), dilation=(2, 3))
    ),
    "conv narrow, unpadded": lambda: nn.Sequential(nn.Conv2d(8, 20, 1), nn.Conv2d(20, 1, 5)),
    "conv narrow, wide margin": lambda: nn.Sequential(nn.Conv2d(8, 20, 1), nn.Conv2d(20, 1, 2, padding=11)),
    "transposed": lambda: nn.ConvTranspose2d(8, 4, 2, stride=2),
    "transposed, padded, grouped": lambda: nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1, output_padding=1, groups=2),
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "leaky relu": lambda: nn.LeakyReLU(0.2),
    "leaky relu in place": lambda: nn.LeakyReLU(0.2, inplace=True),
    "prelu": lambda: nn.PReLU(8),
    "elu": lambda: nn.ELU(0.7),
    "gelu": nn.GELU,
    "gelu tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
    "softplus": lambda: nn.Softplus(beta=2),
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "hardtanh": lambda: nn.Hardtanh(-0.3, 0.4),
    "relu6": nn.ReLU6,
    "softsign": nn.Softsign,
    "glu": lambda: nn.GLU(dim=1),
    "softmax": lambda: nn.Softmax(dim=1),
    "log softmax": lambda: nn.LogSoftmax(dim=-1),
    "instance norm": lambda: nn.InstanceNorm2d(8),
    "instance norm, affine": lambda: nn.InstanceNorm2d(8, affine=True),
    "instance norm, tracked": lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
    "batch norm": lambda: nn.BatchNorm2d(8),
    "batch norm without statistics": lambda: nn.BatchNorm2d(8, track_running_stats=False),
    "group norm": lambda: nn.GroupNorm(4, 8),
    "layer norm": lambda: nn.LayerNorm([8, 8]),
    "layer norm, plain": lambda: nn.LayerNorm([8, 8, 8], elementwise_affine=False),
    "local response norm": lambda: nn.LocalResponseNorm(3),
    "max pool": lambda: nn.MaxPool2d(2),
    "max pool, overlapping": lambda: nn.MaxPool2d(3, stride=2, padding=1),
    "avg pool": lambda: nn.AvgPool2d(2),
    "adaptive avg pool": lambda: nn.AdaptiveAvgPool2d(3),
    "adaptive avg pool to one": lambda: nn.AdaptiveAvgPool2d(1),
    "adaptive max pool": lambda: nn.AdaptiveMaxPool2d(3),
    "nearest": lambda: nn.Upsample(scale_factor=2),
    "bilinear": lambda: nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
    "bicubic": lambda: nn.Upsample(scale_factor=1.5, mode="bicubic"),
    "pixel shuffle": lambda: nn.PixelShuffle(2),
    "pixel unshuffle": lambda: nn.PixelUnshuffle(2),
    "zero pad": lambda: nn.ZeroPad2d((1, 2, 0, 3)),
    "reflection pad": lambda: nn.ReflectionPad2d(2),
    "replication pad": lambda: nn.ReplicationPad2d(2),
    "linear": lambda: nn.Linear(8, 3),
    "unfold": lambda: nn.Unfold(3, padding=1),
    "dropout, evaluated": lambda: nn.Dropout(0.5),
}


@pytest.mark.parametrize("make", PLANE_LAYERS.values(), ids=PLANE_LAYERS.keys())
def test_layers_of_planes(make: Layer) -> None:
    check(around(make()), POINT)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv3d(8, 4, 3, padding=1),
        lambda: nn.ConvTranspose3d(8, 4, 2, stride=2),
        lambda: nn.InstanceNorm3d(8, affine=True),
        lambda: nn.BatchNorm3d(8),
        lambda: nn.MaxPool3d(2),
        lambda: nn.AvgPool3d(2),
        lambda: nn.Upsample(scale_factor=2, mode="trilinear"),
        lambda: nn.AdaptiveAvgPool3d(2),
    ],
    ids=["conv", "transposed", "instance norm", "batch norm", "max pool", "avg pool", "trilinear", "adaptive"],
)
def test_layers_of_volumes(make: Layer) -> None:
    check(around(make(), 3), VOLUME[:, :4, :4, :4])


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv1d(8, 4, 3, stride=2, padding=1),
        lambda: nn.ConvTranspose1d(8, 4, 3),
        lambda: nn.InstanceNorm1d(8),
        lambda: nn.MaxPool1d(2),
        lambda: nn.AvgPool1d(2),
        lambda: nn.Upsample(scale_factor=2, mode="linear"),
    ],
    ids=["conv", "transposed", "instance norm", "max pool", "avg pool", "linear"],
)
def test_layers_of_lines(make: Layer) -> None:
    check(around(make(), 1), POINT[:, 0])


def test_circular_convolution_which_writes_into_views() -> None:
    check(around(nn.Conv2d(8, 4, 3, padding=1, padding_mode="circular")), POINT)


def test_unbatched_convolutions_and_pooling() -> None:
    layers = ready(nn.Sequential(nn.Conv2d(8, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.ConvTranspose2d(4, 2, 2)))
    check(lambda y: layers(as_channels(y)[0]), POINT)


def test_complex_convolution() -> None:
    weight, bias = draw(3, 4, 3, 3, seed=4), draw(3, seed=5)
    check(lambda y: torch.conv2d(y.unsqueeze(0), weight, bias, padding=1).abs(), POINT)


def test_shipped_network(network: NetworkReconstruction, kspace: Tensor) -> None:
    check(network, kspace)
    check(lambda y: network(y).abs(), kspace)


class UNet(nn.Module):
    """Concatenated paths, as in the U-Net of fastMRI."""

    def __init__(self, channels: int, *, normalisation: Callable[[int], nn.Module] = nn.InstanceNorm2d) -> None:
        super().__init__()

        def block(source: int, target: int) -> nn.Module:
            return nn.Sequential(
                nn.Conv2d(source, target, 3, padding=1, bias=False),
                normalisation(target),
                nn.LeakyReLU(0.2, inplace=True),
                nn.Dropout2d(0.1),
                nn.Conv2d(target, target, 3, padding=1, bias=False),
                normalisation(target),
                nn.LeakyReLU(0.2, inplace=True),
            )

        self.down, self.middle, self.up = (
            block(2, channels),
            block(channels, 2 * channels),
            block(2 * channels, channels),
        )
        self.rise = nn.ConvTranspose2d(2 * channels, channels, 2, stride=2, bias=False)
        self.out = nn.Conv2d(channels, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        first = self.down(images)
        second = self.middle(nn.functional.avg_pool2d(first, 2))
        return self.out(self.up(torch.cat([first, self.rise(second)], dim=1)))


def normalised(network: nn.Module, images: Tensor) -> Tensor:
    """A network on real and imaginary part, each to mean 0 and variance 1 before it and back behind it."""
    batch, _, rows, columns = images.shape
    parts = torch.view_as_real(images).permute(0, 4, 1, 2, 3).reshape(batch, 2, rows, columns)
    groups = parts.reshape(batch, 2, rows * columns)
    mean, deviation = groups.mean(dim=2).view(batch, 2, 1, 1), groups.std(dim=2).view(batch, 2, 1, 1)
    parts = network((parts - mean) / deviation) * deviation + mean
    return torch.view_as_complex(parts.reshape(batch, 2, 1, rows, columns).permute(0, 2, 3, 4, 1).contiguous())


class VarNet(nn.Module):
    """Variational cascades with a sensitivity network and a root-sum-of-squares output, as in E2E-VarNet."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask
        self.sensitivity = UNet(4)
        self.cascades = nn.ModuleList(UNet(4) for _ in range(2))
        self.weights = nn.Parameter(torch.tensor([0.7, 0.4]))

    def forward(self, kspace: Tensor) -> Tensor:
        current = kspace.unsqueeze(0)
        maps = normalised(self.sensitivity, torch.fft.ifft2(current, norm="ortho").transpose(0, 1)).transpose(0, 1)
        maps = maps / maps.abs().square().sum(dim=1, keepdim=True).sqrt()
        for weight, cascade in zip(self.weights, self.cascades, strict=True):
            combined = (torch.fft.ifft2(current, norm="ortho") * maps.conj()).sum(dim=1, keepdim=True)
            refined = torch.fft.fft2(normalised(cascade, combined) * maps, norm="ortho")
            data_term = torch.where(self.mask, current - kspace, torch.zeros(1, 1, 1, 1, dtype=kspace.dtype)) * weight
            current = current - data_term - refined
        return torch.fft.ifft2(current, norm="ortho").abs().square().sum(dim=1).sqrt()[0]


@pytest.mark.parametrize(
    "normalisation",
    [nn.InstanceNorm2d, nn.BatchNorm2d, lambda count: nn.GroupNorm(2, count)],
    ids=["instance", "batch", "group"],
)
def test_unet(normalisation: Callable[[int], nn.Module]) -> None:
    unet = ready(UNet(4, normalisation=normalisation))
    check(lambda y: torch.view_as_complex(unet(as_channels(y[:1]))[0].movedim(0, -1).contiguous()), POINT)


def test_end_to_end_variational_network() -> None:
    mask = draw(8, 8, seed=8, dtype=torch.float64) > 0
    network = ready(VarNet(mask))
    value = check(lambda y: network(mask * y), POINT).value
    assert not value.is_complex()


class Attention(nn.Module):
    """Self-attention over patches, with a feed-forward part."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.rest = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, tokens: Tensor) -> Tensor:
        normal = self.norm(tokens)
        tokens = tokens + self.attention(normal, normal, normal, need_weights=False)[0]
        return tokens + self.rest(tokens)


@pytest.fixture
def _no_fast_path() -> Iterator[None]:
    # torch's own encoder is one opaque operation, which knows no forward mode
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


def scaled_dot_product(samples: Tensor) -> Tensor:
    query, key, value = torch.view_as_real(samples).movedim(-1, 0).reshape(1, 2, 32, 8).repeat(3, 1, 1, 1).unbind(0)
    mask = torch.arange(32 * 32).reshape(32, 32) % 5 != 1
    attend = nn.functional.scaled_dot_product_attention
    return attend(query.sin(), key, value.cos(), attn_mask=mask) + attend(query, key, value, is_causal=True, scale=0.3)


@pytest.mark.usefixtures("_no_fast_path")
def test_attention() -> None:
    module = ready(Attention())
    for function in (scaled_dot_product, lambda y: module(as_channels(y).flatten(2).transpose(1, 2))):
        with sdpa_kernel(SDPBackend.MATH):
            exact = check(function, POINT)
        # torch's fused kernel has no forward mode to compare with
        fused = linearize(function, POINT)
        assert not fused.fallbacks
        torch.testing.assert_close(fused.value, exact.value, rtol=1e-7, atol=1e-7)
        batch = draw(2, *POINT.shape, seed=6)
        torch.testing.assert_close(fused.push(batch), exact.push(batch), rtol=1e-7, atol=1e-7)


@pytest.mark.filterwarnings("ignore:.*use_reentrant:UserWarning")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_module(reentrant: bool) -> None:
    layers = ready(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)))

    def function(samples: Tensor) -> Tensor:
        return checkpoint(layers, as_channels(samples), use_reentrant=reentrant)

    # torch has no forward mode through a checkpoint
    plain, again = linearize(lambda y: layers(as_channels(y)), POINT), linearize(function, POINT)
    assert not again.fallbacks
    assert torch.equal(plain.value, again.value)
    assert torch.equal(plain.push(POINT.unsqueeze(0)), again.push(POINT.unsqueeze(0)))


def test_scripted_module() -> None:
    layers = ready(nn.Sequential(nn.Conv2d(8, 4, 3, padding=1), nn.ReLU(), nn.InstanceNorm2d(4)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        scripted = torch.jit.script(layers)
    check(lambda y: scripted(as_channels(y)), POINT)


def test_modules_of_the_same_weights_and_shared_layers() -> None:
    layer = ready(nn.Conv2d(8, 8, 3, padding=1))
    check(lambda y: layer(torch.relu(layer(as_channels(y)))) + layer(as_channels(y)), POINT)


def test_memory_order_does_not_matter() -> None:
    first = nn.Conv2d(8, 8, 3, padding=1)
    first.weight.data = first.weight.contiguous(memory_format=torch.channels_last)
    layers = ready(nn.Sequential(first, nn.InstanceNorm2d(8), nn.ReLU()))
    check(lambda y: layers(as_channels(y).contiguous(memory_format=torch.channels_last)), POINT)
