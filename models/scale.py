"""The scale of an image, by which networks are made to follow the scale of the data."""

import torch
from torch import Tensor


def root_mean_square(images: Tensor) -> Tensor:
    """Root mean square of each image of a batch, `(batch, y, x)` complex to `(batch, 1, 1)` real; 0 of an empty one."""
    return safe_root(torch.view_as_real(images).square().sum(dim=-1).mean(dim=(-2, -1), keepdim=True))


def safe_root(power: Tensor) -> Tensor:
    """Square root of what is at least 0, with a derivative of 0 where it is 0."""
    # the root of 0 has no finite derivative: keep it out of the graph
    positive = power > 0
    root = torch.where(positive, power, torch.ones_like(power)).sqrt()
    return torch.where(positive, root, torch.zeros_like(root))


def divided(values: Tensor, scale: Tensor) -> Tensor:
    """Quotient of values and a scale; where the scale is 0 the values themselves, which then are 0 too."""
    return values / torch.where(scale > 0, scale, torch.ones_like(scale))
