"""A U-Net without normalisation: levels of what it sees mean something."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from voxelsigma.models.unet import padded_apply


class FeatureUNet(nn.Module):
    """From feature maps to as many maps as are wanted, of any size.

    Parameters
    ----------
    given, wanted
        Maps that go in and come out.
    channels
        Of the first level; half as many more on each further one.
    levels
        How often the resolution is halved.

    Raises
    ------
    ValueError
        If there are no levels or no channels.
    """

    def __init__(self, *, given: int, wanted: int, channels: int, levels: int) -> None:
        super().__init__()
        if levels < 1 or channels < 1:
            raise ValueError(f"predictor: levels and channels must be at least 1, got {levels} and {channels}")
        widths = [round(channels * 1.5**level) for level in range(levels + 1)]
        self.levels = levels
        self.down = nn.ModuleList(
            _Block(before, width) for before, width in zip([given, *widths[:-1]], widths, strict=True)
        )
        self.up = nn.ModuleList(
            _Block(below + width, width) for below, width in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.last = nn.Conv2d(widths[0], wanted, kernel_size=1)
        nn.init.zeros_(self.last.weight)
        assert self.last.bias is not None
        nn.init.zeros_(self.last.bias)

    def maps(self, features: Tensor) -> Tensor:
        """`(batch, given, y, x)` to `(batch, wanted, y, x)`."""
        return padded_apply(self._unet, features, 2**self.levels)

    def _unet(self, features: Tensor) -> Tensor:
        skips = []
        for place, block in enumerate(self.down):
            features = block(features if place == 0 else functional.avg_pool2d(features, 2))
            skips.append(features)
        skips.pop()
        for block in self.up:
            above = functional.interpolate(features, scale_factor=2, mode="bilinear", align_corners=False)
            features = block(torch.cat([above, skips.pop()], dim=1))
        return self.last(features)


class _Block(nn.Module):
    """Two 3×3 convolutions, the second beside a shortcut."""

    def __init__(self, given: int, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(given, channels, kernel_size=3, padding=1)
        self.second = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        begun = functional.silu(self.first(features))
        return functional.silu(begun + self.second(begun))
