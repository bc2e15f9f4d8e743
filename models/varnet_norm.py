"""A U-Net between normalisation and its inverse, on complex images."""

import torch
from torch import Tensor, nn

from voxelsigma.models.scale import divided, safe_root
from voxelsigma.models.unet import UNet, padded_apply

_MULTIPLE = 16


class NormUNet(nn.Module):
    r"""U-Net on an image whose real and imaginary part each have mean 0 and standard deviation 1.

    .. math:: g(x) = \sigma\,U\!\left(\frac{x - \mu}{\sigma}\right) + \mu

    with mean :math:`\mu` and (unbiased) standard deviation :math:`\sigma` over the image, one of each for real and
    imaginary part (Sriram et al., MICCAI 2020). They are computed from the image, so :math:`g(c\,x) = c\,g(x)` for
    every :math:`c > 0`, and they are part of the Jacobian. An image that does not vary stays in its units.

    Parameters
    ----------
    channels, levels
        Of the U-Net.
    """

    def __init__(self, *, channels: int, levels: int) -> None:
        super().__init__()
        self.unet = UNet(channels=channels, levels=levels)

    def forward(self, images: Tensor) -> Tensor:
        """Complex images `(batch, y, x)`, same shape out."""
        # images: (batch, y, x) complex -> (batch, 2, y, x) real
        channels = torch.view_as_real(images).movedim(-1, 1)
        mean = channels.mean(dim=(-2, -1), keepdim=True)
        centred = channels - mean
        deviation = safe_root(centred.square().sum(dim=(-2, -1), keepdim=True) / max(images[0].numel() - 1, 1))
        features = padded_apply(self.unet, divided(centred, deviation), max(_MULTIPLE, 2**self.unet.levels))
        restored = features * deviation + mean
        return torch.complex(restored[:, 0], restored[:, 1])
