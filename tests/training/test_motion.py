"""Motion between shots, against the Fourier shift theorem and loops in numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from voxelsigma.models.fourier import fft_centred, ifft_centred
from voxelsigma.training.motion import shots_of_lines, translated, turned

SHAPES = [(8, 6), (9, 6), (8, 7), (9, 7)]


def images(shape: tuple[int, int], seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.standard_normal((2, 3, *shape)) + 1j * rng.standard_normal((2, 3, *shape)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("voxels", [0, 1, -2, 11])
def test_a_whole_displacement_of_all_lines_is_a_circular_shift(shape: tuple[int, int], voxels: int) -> None:
    image = images(shape)
    moved = ifft_centred(translated(fft_centred(image), torch.full((2, shape[0]), float(voxels), dtype=torch.float64)))
    torch.testing.assert_close(moved, image.roll(voxels, dims=-2), rtol=0, atol=1e-12)


def test_no_motion_is_the_identity() -> None:
    kspace, none = images((9, 6)), torch.zeros(2, 9)
    assert torch.equal(translated(kspace, none), kspace)
    assert torch.equal(turned(kspace, none), kspace)


@given(st.floats(-3, 3), st.floats(-3, 3))
def test_displacements_add_up(first: float, second: float) -> None:
    kspace = images((7, 4))
    one, two = (torch.full((2, 7), value, dtype=torch.float64) for value in (first, second))
    torch.testing.assert_close(translated(translated(kspace, one), two), translated(kspace, one + two))


def test_every_line_gets_its_own_phase() -> None:
    kspace = images((9, 6))
    displacements = np.random.default_rng(1).uniform(-2, 2, (2, 9))
    found = translated(kspace, torch.from_numpy(displacements)).numpy()
    turned_by = turned(kspace, torch.from_numpy(displacements)).numpy()
    for scan in range(2):
        for line in range(9):
            y, d = kspace[scan, :, line].numpy(), displacements[scan, line]
            np.testing.assert_allclose(found[scan, :, line], y * np.exp(-2j * np.pi * (line - 4) * d / 9))
            np.testing.assert_allclose(turned_by[scan, :, line], y * np.exp(-1j * d))


def test_magnitudes_in_kspace_stay() -> None:
    kspace = images((8, 6)).to(torch.complex64)
    moved = translated(kspace, torch.rand(2, 8))
    assert moved.dtype == torch.complex64
    torch.testing.assert_close(moved.abs(), kspace.abs())


def test_acquired_lines_go_to_the_shots_in_turn() -> None:
    acquired = [0, 1, 0, 1, 0, 1, 1, 0]
    mask = torch.zeros(2, 1, 8, 5)
    mask[0, 0, :, 2] = torch.tensor(acquired).float()
    mask[1] = 1
    shots = shots_of_lines(mask, 2)
    assert shots[0][mask[0, 0, :, 2] != 0].tolist() == [0, 1, 0, 1]
    assert shots[1].tolist() == [0, 1] * 4
    assert shots_of_lines(mask, 3)[1].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert shots_of_lines(torch.zeros(1, 1, 4, 4), 2).tolist() == [[0] * 4]
