"""Smooth coils and the dense matrix of an encoding."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


def _smooth_maps(coils: int, rows: int, columns: int) -> Tensor:
    """Unit-norm fields 1/(z - z_c) of line currents on a circle around the field of view, complex128."""
    y = (torch.arange(rows, dtype=torch.float64) - rows // 2) / rows
    x = (torch.arange(columns, dtype=torch.float64) - columns // 2) / columns
    place = torch.complex(*torch.broadcast_tensors(x, y.unsqueeze(1)))
    wires = 0.85 * torch.exp(2j * torch.pi * (torch.arange(coils, dtype=torch.float64) + 0.3) / coils)
    maps = 1 / (place - wires[:, None, None])
    return maps / maps.abs().square().sum(dim=0, keepdim=True).sqrt()


def _centred_dft(size: int) -> Tensor:
    index = torch.arange(size, dtype=torch.float64) - size // 2
    return torch.exp(-2j * torch.pi * torch.outer(index, index) / size) / size**0.5


def _dense_encoding(maps: Tensor) -> Tensor:
    coils, rows, columns = maps.shape
    fourier = torch.kron(_centred_dft(rows), _centred_dft(columns))
    return torch.cat([fourier * maps[coil].flatten() for coil in range(coils)])


def _complex_normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randn((2, *shape), generator=generator, dtype=torch.float64)
    return torch.complex(parts[0], parts[1])


@pytest.fixture(scope="session")
def smooth_maps() -> Callable[[int, int, int], Tensor]:
    """(coils, rows, columns) to unit-norm sensitivities, complex128."""
    return _smooth_maps


@pytest.fixture(scope="session")
def centred_dft() -> Callable[[int], Tensor]:
    """Matrix of the centred orthonormal transform, from its sum."""
    return _centred_dft


@pytest.fixture(scope="session")
def dense_encoding() -> Callable[[Tensor], Tensor]:
    """Sensitivities (coils, y, x) to the whole encoding without mask, (coils · k1 · k0, y · x)."""
    return _dense_encoding


@pytest.fixture(scope="session")
def complex_normal() -> Callable[..., Tensor]:
    """(*shape, seed=...) to circular noise of E|z|² = 2, complex128."""
    return _complex_normal
