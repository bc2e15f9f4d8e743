"""The U-Net, and the image-to-image reconstruction that is nothing else."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from voxelsigma.models.encoding import SenseEncoding
from voxelsigma.models.scale import divided, root_mean_square

SLOPE = 0.2


class ConvolutionBlock(nn.Module):
    """Twice: 3×3 convolution, instance normalisation, leaky ReLU, dropout."""

    def __init__(self, given: int, channels: int, dropout: float) -> None:
        super().__init__()
        # the places in this list are part of the names of published weights
        self.layers = nn.Sequential(*_layers(given, channels, dropout), *_layers(channels, channels, dropout))

    def forward(self, features: Tensor) -> Tensor:
        """Features `(batch, given, y, x)` to `(batch, channels, y, x)`."""
        return self.layers(features)


class UpBlock(nn.Module):
    """Transposed 2×2 convolution with stride 2, instance normalisation, leaky ReLU."""

    def __init__(self, given: int, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ConvTranspose2d(given, channels, kernel_size=2, stride=2, bias=False),
            nn.InstanceNorm2d(channels),
            nn.LeakyReLU(SLOPE),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Features `(batch, given, y, x)` to `(batch, channels, 2y, 2x)`."""
        return self.layers(features)


class UNet(nn.Module):
    """Contracting and expanding path with concatenated skips, on real channels.

    Ronneberger et al., MICCAI 2015, in the form of Zbontar et al., fastMRI, 2018: average pooling, transposed
    convolutions, instance normalisation without parameters. Names and shapes of the weights are those of fastMRI's.

    Parameters
    ----------
    inputs, outputs
        Channels of the image.
    channels
        Feature channels of the first level; twice as many on each further one.
    levels
        How often the resolution is halved.
    dropout
        Chance of dropping a channel in training.
    """

    def __init__(
        self, *, inputs: int = 2, outputs: int = 2, channels: int = 32, levels: int = 4, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if levels < 1 or channels < 1:
            raise ValueError(f"unet: levels and channels must be at least 1, got {levels} and {channels}")
        widths = [channels * 2**level for level in range(levels + 1)]
        self.levels = levels
        self.down_sample_layers = nn.ModuleList(
            ConvolutionBlock(given, width, dropout) for given, width in itertools.pairwise([inputs, *widths[:-1]])
        )
        self.conv = ConvolutionBlock(widths[-2], widths[-1], dropout)
        upwards = list(itertools.pairwise(reversed(widths)))
        self.up_transpose_conv = nn.ModuleList(UpBlock(below, width) for below, width in upwards)
        blocks = [ConvolutionBlock(below, width, dropout) for below, width in upwards]
        last = nn.Sequential(blocks[-1], nn.Conv2d(channels, outputs, kernel_size=1))
        self.up_conv = nn.ModuleList([*blocks[:-1], last])

    def forward(self, images: Tensor) -> Tensor:
        """Images `(batch, inputs, y, x)` to `(batch, outputs, y, x)`; y and x are multiples of 2 to the levels."""
        features, skips = images, []
        for block in self.down_sample_layers:
            features = block(features)
            skips.append(features)
            features = functional.avg_pool2d(features, kernel_size=2)
        features = self.conv(features)
        for up, block in zip(self.up_transpose_conv, self.up_conv, strict=True):
            features = block(torch.cat([up(features), skips.pop()], dim=1))
        return features


class ImageUNet(nn.Module):
    r"""U-Net on the zero-filled image.

    .. math:: x_0 = A^H y, \qquad f(y) = s\,U(x_0 / s) \;(+\; x_0)

    on real and imaginary part as two channels. The scale :math:`s`, the root mean square of the zero-filled image, is
    computed from the data, so :math:`f(c\,y) = c\,f(y)` for every :math:`c > 0`, and is part of the Jacobian. Images of
    any matrix are padded with zeros.

    Parameters
    ----------
    channels, levels, dropout
        Of the U-Net.
    residual
        Whether the network's output is added to the zero-filled image.
    """

    def __init__(self, *, channels: int = 32, levels: int = 4, dropout: float = 0.0, residual: bool = False) -> None:
        super().__init__()
        self.unet = UNet(channels=channels, levels=levels, dropout=dropout)
        self.residual = residual

    def forward(self, kspace: Tensor, sensitivities: Tensor, mask: Tensor) -> Tensor:
        """Reconstruct.

        Parameters
        ----------
        kspace
            Whitened k-space, shape `(coils, k1, k0)` or `(batch, coils, k1, k0)`, complex.
        sensitivities
            Unit-norm coil sensitivities, shape `(coils, y, x)` or `(batch, coils, y, x)`, complex.
        mask
            Sampled positions, 1 or 0, shape `(k1, k0)` or `(batch, 1, k1, k0)`, real.

        Returns
        -------
            Images, shape `(y, x)` or `(batch, y, x)`, complex, in the units of the zero-filled image.
        """
        zero_filled = SenseEncoding(sensitivities, mask).adjoint(kspace)
        batched = zero_filled if zero_filled.dim() == 3 else zero_filled.unsqueeze(0)
        scale = root_mean_square(batched)
        # images: (batch, y, x) complex -> (batch, 2, y, x) real
        channels = torch.view_as_real(divided(batched, scale)).movedim(-1, 1)
        # autocast may have left less than the image's precision, of which there are no complex numbers
        features = padded_apply(self.unet, channels, 2**self.unet.levels).to(channels.dtype)
        images = torch.complex(features[:, 0], features[:, 1]) * scale
        if self.residual:
            images = images + batched
        return images.reshape(zero_filled.shape)


def padded_apply(network: Callable[[Tensor], Tensor], images: Tensor, multiple: int) -> Tensor:
    """Apply a network to images padded with zeros to a multiple of both axes, and crop what comes out."""
    rows, columns = images.shape[-2:]
    wanted = [-(-size // multiple) * multiple for size in (rows, columns)]
    if wanted == [multiple, multiple]:
        # one voxel on the lowest level has no variance to be normalised by
        wanted[0] *= 2
    top, left = (wanted[0] - rows) // 2, (wanted[1] - columns) // 2
    padded = functional.pad(images, (left, wanted[1] - columns - left, top, wanted[0] - rows - top))
    return network(padded)[..., top : top + rows, left : left + columns]


def _layers(given: int, channels: int, dropout: float) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(given, channels, kernel_size=3, padding=1, bias=False),
        nn.InstanceNorm2d(channels),
        nn.LeakyReLU(SLOPE),
        nn.Dropout2d(dropout),
    )
