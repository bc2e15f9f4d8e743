"""Networks of a user's own, to be named by cards."""

import torch
from torch import Tensor, nn

from voxelsigma.models.encoding import SenseEncoding


class Weighted(nn.Module):
    """The zero-filled image, weighted."""

    def __init__(self, *, start: float = 1.0) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor([start]))

    def forward(self, kspace: Tensor, sensitivities: Tensor, mask: Tensor) -> Tensor:
        return self.factor * SenseEncoding(sensitivities, mask).adjoint(kspace)


def doubled(kspace: Tensor, sensitivities: Tensor, mask: Tensor, *, factor: float = 2.0) -> Tensor:
    return factor * SenseEncoding(sensitivities, mask).adjoint(kspace)


def of_one_coil(kspace: Tensor, sensitivities: Tensor, mask: Tensor) -> Tensor:
    return kspace


def nothing(kspace: Tensor, sensitivities: Tensor, mask: Tensor) -> None:
    return None


class Namespace:
    inner = staticmethod(doubled)


built = Weighted(start=3.0)
number = 3
