"""A user's network without weights: a real image."""

import torch
from torch import Tensor

from voxelsigma.models.encoding import SenseEncoding


def magnitude(kspace: Tensor, sensitivities: Tensor, mask: Tensor) -> Tensor:
    """Smoothed magnitude of the zero-filled image."""
    image = SenseEncoding(sensitivities, mask).adjoint(kspace)
    return (torch.view_as_real(image).square().sum(dim=-1) + 1e-2).sqrt()
