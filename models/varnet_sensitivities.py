"""Coil sensitivities that a network estimates from the fully sampled centre of k-space."""

import torch
from torch import Tensor, nn

from voxelsigma.models.fourier import ifft_centred
from voxelsigma.models.scale import divided, safe_root
from voxelsigma.models.varnet_norm import NormUNet


class SensitivityNetwork(nn.Module):
    r"""From the auto-calibration lines to unit-norm sensitivities, :math:`S_c = g(z_c) / \sqrt{\sum_j |g(z_j)|^2}`.

    :math:`z_c` is coil c's image of the centre of k-space, :math:`g` one normalised U-Net for all coils (Sriram et al.,
    MICCAI 2020). The scale of the data cancels.

    Parameters
    ----------
    channels, levels
        Of the U-Net.
    """

    def __init__(self, *, channels: int, levels: int) -> None:
        super().__init__()
        self.norm_unet = NormUNet(channels=channels, levels=levels)

    def forward(self, kspace: Tensor, mask: Tensor) -> Tensor:
        """K-space `(batch, coils, k1, k0)` and mask `(batch or 1, 1, k1, k0)` to sensitivities like the former."""
        images = ifft_centred(kspace * centre_box(mask))
        # images: (batch, coils, y, x) -> (batch · coils, y, x) and back
        maps = self.norm_unet(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        return divided(maps, root_sum_of_squares(maps).unsqueeze(1))


def root_sum_of_squares(images: Tensor) -> Tensor:
    """Root sum of squares over coils, `(batch, coils, y, x)` complex to `(batch, y, x)` real."""
    return safe_root(torch.view_as_real(images).square().sum(dim=-1).sum(dim=1))


def centre_box(mask: Tensor) -> Tensor:
    r"""The largest fully sampled box around the origin of k-space.

    It holds :math:`2a` by :math:`2b` samples around the origin, or all of an axis that is sampled throughout. For a
    mask of lines that is the contiguous run of lines around the origin, cut to be as long on both sides; in
    fastMRI's words, the low frequencies.

    Parameters
    ----------
    mask
        Sampled positions, shape `(..., k1, k0)`, real; not 0 where sampled.

    Returns
    -------
        1 in the box and 0 elsewhere, of the mask's shape and type.

    Raises
    ------
    ValueError
        If the origin was not sampled.
    """
    sampled = mask != 0
    if not _holds(sampled[..., mask.shape[-2] // 2, mask.shape[-1] // 2].all()):
        raise ValueError(
            "varnet: the centre of k-space is not sampled, so it cannot estimate sensitivities; sample "
            "auto-calibration lines around it, or use a model that is given sensitivities"
        )
    rows, columns = (_rings(size, mask.device) for size in mask.shape[-2:])
    outermost = mask.shape[-1] - mask.shape[-1] // 2
    # sampled: (..., k1, k0) -> (..., k1): the widest box of columns that is sampled in this row, -1 for none
    widest = torch.where(sampled, outermost + 1, columns).amin(dim=-1) - 1
    # ... and in all rows of each box of rows, (..., boxes)
    boxes = torch.arange(mask.shape[-2] - mask.shape[-2] // 2 + 1, device=mask.device).unsqueeze(1)
    common = torch.where(rows <= boxes, widest.unsqueeze(-2), outermost).amin(dim=-1)
    area = _width(boxes.squeeze(1), mask.shape[-2]) * _width(common, mask.shape[-1])
    best = area.argmax(dim=-1, keepdim=True)
    chosen = common.gather(-1, best)
    # (..., k1, 1) and (..., 1, k0)
    return ((rows <= best).unsqueeze(-1) & (columns <= chosen).unsqueeze(-2)).to(mask.dtype)


def _holds(condition: Tensor) -> bool:
    """Whether a condition holds, or cannot be known because a transform of torch is looking on."""
    try:
        return bool(condition)
    except RuntimeError:
        return True


def _rings(size: int, device: torch.device) -> Tensor:
    """Number of the smallest box around the origin that holds a position: the origin alone, 2 samples, 4, ... all."""
    distance = torch.arange(size, device=device) - size // 2
    return torch.where(distance > 0, distance + 1, -distance)


def _width(box: Tensor, size: int) -> Tensor:
    """Samples of an axis in a box; none in box -1."""
    return torch.where(box == 0, 1, (2 * box).clamp(0, size))
