"""Coil sensitivities by Walsh's adaptive method: eigenvectors of local coil covariances."""

import torch
from torch import Tensor

from voxelsigma.models.espirit import principal_coil
from voxelsigma.models.grid import Window, apply_axes, kspace_matrix


def walsh(
    reference: Tensor,
    size: tuple[int, int],
    *,
    smoothing: int = 7,
    iterations: int = 20,
    phase: Tensor | None = None,
) -> Tensor:
    r"""Estimate unit-norm coil sensitivities from low-resolution coil images.

    At every voxel the leading eigenvector of the coil covariance of its neighbourhood,
    :math:`\sum_{j \in N(i)} m_j m_j^H` (Walsh et al., Magn Reson Med 2000, eq. 6, white noise).

    Parameters
    ----------
    reference
        Reference lines around the origin, shape `(..., coils, r1, r0)`, complex.
    size
        Matrix of the maps, `(y, x)`, over the field of view of the reference lines.
    smoothing
        Width of the neighbourhood in voxels of the maps, odd.
    iterations
        Power iterations.
    phase
        Virtual coil whose phase the maps are relative to, shape `(coils,)`; None takes the first principal
        component of the reference lines.

    Returns
    -------
        Shape `(..., coils, y, x)`, complex, unit norm over coils.
    """
    images = _low_resolution(reference, size)
    # images: (..., coils, y, x) -> products: (..., coils, coils, y, x)
    products = images.unsqueeze(-3) * images.conj().unsqueeze(-4)
    covariance = _box(products, smoothing).movedim((-4, -3), (-2, -1))
    virtual = principal_coil(reference) if phase is None else phase
    vector = virtual.expand(covariance.shape[:-1]).unsqueeze(-1)
    for _ in range(iterations):
        vector = covariance @ vector
        vector = vector / vector.norm(dim=-2, keepdim=True).clamp_min(torch.finfo(vector.real.dtype).tiny)
    projection = (virtual.conj().unsqueeze(-1) * vector).sum(dim=-2, keepdim=True)
    turned = vector * torch.where(projection.abs() > 0, projection.conj() / projection.abs().clamp_min(1e-20), 1)
    # (..., y, x, coils) -> (..., coils, y, x)
    return turned.squeeze(-1).movedim(-1, -3)


def _low_resolution(reference: Tensor, size: tuple[int, int]) -> Tensor:
    """Coil images of the reference lines on the grid of the maps, apodised so that they do not ring."""
    matrices = []
    for points, width in zip(reference.shape[-2:], size, strict=True):
        window = Window(0, points, points)
        hann = torch.hann_window(points + 2, periodic=False, dtype=torch.float64)[1:-1]
        matrices.append(kspace_matrix(window, width, 1.0) * hann)
    return apply_axes(matrices, reference)


def _box(values: Tensor, width: int) -> Tensor:
    """Mean over a square neighbourhood in the last two axes, complex."""
    real = torch.view_as_real(values).movedim(-1, 0)
    flat = real.reshape(-1, 1, *values.shape[-2:])
    smooth = torch.nn.functional.avg_pool2d(flat, width, stride=1, padding=width // 2)
    return torch.view_as_complex(smooth.reshape(real.shape).movedim(0, -1).contiguous())
