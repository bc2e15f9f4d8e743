"""Centred, orthonormal Fourier transforms on torch tensors."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def fft_centred(images: Tensor, dim: Sequence[int] = (-2, -1)) -> Tensor:
    """Image space to k-space: centred and orthonormal, index n//2 is the origin on both sides.

    Parameters
    ----------
    images
        Complex tensor of any shape.
    dim
        Axes to transform.

    Returns
    -------
        Tensor of the same shape.
    """
    axes = tuple(dim)
    return torch.fft.fftshift(torch.fft.fftn(torch.fft.ifftshift(images, dim=axes), dim=axes, norm="ortho"), dim=axes)


def ifft_centred(kspace: Tensor, dim: Sequence[int] = (-2, -1)) -> Tensor:
    """K-space to image space: the inverse, and the adjoint, of `fft_centred`."""
    axes = tuple(dim)
    return torch.fft.fftshift(torch.fft.ifftn(torch.fft.ifftshift(kspace, dim=axes), dim=axes, norm="ortho"), dim=axes)


def centred_combination(factors: Tensor) -> Callable[[Tensor], Tensor]:
    r"""From k-space of coils to :math:`\sum_c f_c \, F^{-1} y_c`, without a shift of any coil.

    A shift in k-space is a phase in the image, which goes into the factors, as does the shift of the coil images; the
    sum alone is shifted.

    Parameters
    ----------
    factors
        f, shape `(coils, y, x)`, complex.

    Returns
    -------
        A function from `(..., coils, y, x)` to `(..., y, x)`.
    """
    axes = (-2, -1)
    turned = torch.fft.ifftshift(factors, dim=axes)
    for axis in axes:
        size = factors.shape[axis]
        places = torch.arange(size, device=factors.device)
        # whole numbers, so that no phase is rounded before it is small
        angle = -2 * torch.pi * ((places * (size // 2)) % size).double() / size
        phase = torch.polar(torch.ones_like(angle), angle).to(factors.dtype)
        turned = turned * (phase.unsqueeze(-1) if axis == axes[0] else phase)

    def combine(kspace: Tensor) -> Tensor:
        combined = torch.fft.ifftn(kspace, dim=axes, norm="ortho").mul_(turned).sum(dim=-3)
        return torch.fft.fftshift(combined, dim=axes)

    return combine
