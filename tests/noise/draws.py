"""Random complex values, and how far an estimate is off."""

import torch
from torch import Tensor


def complex_normal(shape: tuple[int, ...], seed: int) -> Tensor:
    """Circular, E|z|² = 2."""
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randn((2, *shape), generator=generator, dtype=torch.float64)
    return torch.complex(parts[0], parts[1])


def phases(shape: tuple[int, ...], seed: int) -> Tensor:
    values = complex_normal(shape, seed)
    return values / values.abs()


def rms_error(estimate: Tensor, truth: Tensor | float) -> float:
    return float((estimate / truth - 1).square().mean().sqrt())
