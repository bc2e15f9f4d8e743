"""Voxels of an image: their phases, and which of them show an object."""

import torch
from torch import Tensor


def phase_factor(image: Tensor) -> Tensor:
    r"""Unit phase factor :math:`e^{i\phi}` of each voxel; 1 where the image is 0 or real."""
    if not image.is_complex():
        return torch.ones_like(image, dtype=torch.complex128)
    wide = image.to(torch.complex128)
    magnitude = wide.abs()
    return torch.where(magnitude > 0, wide / magnitude.clamp_min(torch.finfo(torch.float64).tiny), 1)


def object_mask(image: Tensor, threshold: float = 0.1) -> Tensor:
    """Voxels of the object: brighter than a tenth of the image's 99th percentile, shape `(...)`, boolean.

    Where that is 0, all that is not; of an image of zeros everything.
    """
    magnitude = image.abs().double().flatten()
    rank = max(1, round(0.99 * magnitude.numel()))
    bright = magnitude.kthvalue(rank).values
    if not bool(bright) and bool(magnitude.any()):
        return image.abs() > 0
    return image.abs() >= threshold * bright


def neighbourhood_mean(values: Tensor, size: int) -> Tensor:
    """Mean over size × size neighbours in the last two axes, zeros beyond the border counted, `(..., y, x)`."""
    flat = values.reshape(-1, 1, *values.shape[-2:])
    return torch.nn.functional.avg_pool2d(flat, size, stride=1, padding=size // 2).reshape(values.shape)
