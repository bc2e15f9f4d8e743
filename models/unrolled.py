"""The unrolled network: steps of data consistency and a residual convolutional network."""

import torch
from torch import Tensor, nn

from voxelsigma.models.encoding import SenseEncoding
from voxelsigma.models.scale import divided, root_mean_square


class ResidualBlock(nn.Module):
    r"""Two 3×3 convolutions around a ReLU, added to their input: :math:`h + C_2\,\mathrm{ReLU}(C_1 h)`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """Features `(batch, channels, y, x)`, same shape out."""
        return features + self.second(torch.relu(self.first(features)))


class ResidualNetwork(nn.Module):
    """The image-to-image correction of one step, on real and imaginary part as two channels."""

    def __init__(self, *, blocks: int, channels: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(2, channels, 3, padding=1)
        self.blocks = nn.Sequential(*(ResidualBlock(channels) for _ in range(blocks)))
        self.leave = nn.Conv2d(channels, 2, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Complex images `(batch, y, x)`, same shape out."""
        # images: (batch, y, x) complex -> (batch, 2, y, x) real
        channels = torch.view_as_real(images).movedim(-1, -3)
        # autocast may have left less than the image's precision, of which there are no complex numbers
        features = self.leave(self.blocks(torch.relu(self.enter(channels)))).to(channels.dtype)
        # features: (batch, 2, y, x) real -> (batch, y, x) complex
        return torch.complex(features[..., 0, :, :], features[..., 1, :, :])


class Unrolled(nn.Module):
    r"""Unrolled reconstruction with gradient data consistency.

    .. math::
        x_0 = A^H y / s, \qquad
        x_{k+1} = x_k - \eta_k A^H (A x_k - y / s) + D_k(x_k), \qquad
        f(y) = s \, x_K

    with a residual convolutional network :math:`D_k` and a learned step :math:`\eta_k` per step. The scale
    :math:`s` is the root mean square of the zero-filled image: it is computed from the data, so
    :math:`f(c\,y) = c\,f(y)` for every :math:`c > 0`, and it is part of the Jacobian. This is the unrolled
    network of Dalmaz et al., ICML 2025 (there: 4 steps of 2 residual blocks, 256 channels).

    Parameters
    ----------
    steps
        Number of unrolled steps K.
    blocks
        Residual blocks in each step's network.
    channels
        Feature channels in each step's network.
    """

    def __init__(self, *, steps: int = 4, blocks: int = 2, channels: int = 32) -> None:
        super().__init__()
        self.networks = nn.ModuleList(ResidualNetwork(blocks=blocks, channels=channels) for _ in range(steps))
        self.step_sizes = nn.Parameter(torch.ones(steps))

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
        encoding = SenseEncoding(sensitivities, mask)
        zero_filled = encoding.adjoint(kspace)
        batched = zero_filled if zero_filled.dim() == 3 else zero_filled.unsqueeze(0)
        scale = root_mean_square(batched)
        # an empty image stays empty: f(0) = 0, as homogeneity has it
        images = divided(batched, scale)
        # the data term of the gradient does not change between steps
        target = images
        for step_size, network in zip(self.step_sizes, self.networks, strict=True):
            gradient = encoding.adjoint(encoding.forward(images)) - target
            images = images - step_size * gradient + network(images)
        return (images * scale).reshape(zero_filled.shape)
