"""Centred, orthonormal Fourier transforms on torch tensors."""

from collections.abc import Sequence

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
