r"""Motion of the object between the shots of a scan, in k-space.

A scan in S shots acquires its lines in turn: the first, (S+1)-th, (2S+1)-th … acquired line belong to the first shot.
An object that has moved by :math:`d` voxels along y gives

.. math:: y'_k = y_k \, e^{-2 \pi i k d / N}

at line :math:`k` of :math:`N`, counted from the centre (Fourier shift theorem). Noise stays white: a phase does not
change its distribution.
"""

import torch
from torch import Tensor


def shots_of_lines(mask: Tensor, shots: int) -> Tensor:
    """Shot of every line, counting acquired lines only.

    Parameters
    ----------
    mask
        Sampled positions, shape `(batch, 1, k1, k0)`; a line is acquired where any of its positions is.
    shots
        Number of shots; consecutive acquired lines belong to consecutive shots.

    Returns
    -------
        Shape `(batch, k1)`, whole numbers from 0; lines that were not acquired count as the acquired one before.
    """
    acquired = (mask[:, 0] != 0).any(dim=-1)
    # (batch, k1): how many acquired lines up to this one
    order = acquired.cumsum(dim=-1) - 1
    return order.clamp(min=0) % shots


def translated(kspace: Tensor, displacements: Tensor) -> Tensor:
    r"""K-space of an object that stands elsewhere in every line.

    .. math:: y'_{k} = y_{k} \, e^{-2 \pi i k d_k / N}

    One displacement for all lines is a circular shift of the image by it, towards larger y.

    Parameters
    ----------
    kspace
        Shape `(batch, coils, k1, k0)`, complex, the centre at index `n // 2`.
    displacements
        Of the object along y, in voxels, shape `(batch, k1)`.

    Returns
    -------
        Same shape as the k-space.
    """
    lines = kspace.shape[-2]
    places = torch.arange(lines, device=displacements.device, dtype=displacements.dtype) - lines // 2
    return turned(kspace, 2 * torch.pi / lines * places * displacements)


def turned(kspace: Tensor, phases: Tensor) -> Tensor:
    r"""K-space with a phase error in every line, :math:`y'_k = y_k \, e^{-i \varphi_k}`.

    Parameters
    ----------
    kspace
        Shape `(batch, coils, k1, k0)`, complex.
    phases
        In radian, shape `(batch, k1)`.

    Returns
    -------
        Same shape as the k-space.
    """
    factors = torch.polar(torch.ones_like(phases), -phases)
    # (batch, k1) -> (batch, 1, k1, 1)
    return kspace * factors[:, None, :, None].to(kspace.dtype)
