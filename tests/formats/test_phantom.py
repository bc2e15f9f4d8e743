"""The head phantom."""

import numpy as np
from numpy.typing import NDArray

from voxelsigma.formats.phantom import head_phantom


def drawn(size: int, z: float = 0.0) -> NDArray[np.float64]:
    axis = (np.arange(size) - size // 2) * 2 / size
    return head_phantom(z, axis[:, None], axis)


def test_nothing_is_outside_the_head_and_nothing_is_negative() -> None:
    image = drawn(64)
    assert image.shape == (64, 64)
    assert image.min() == 0
    assert (image[[0, -1]] == 0).all()
    assert (image[:, [0, -1]] == 0).all()
    assert head_phantom(0.95, 0, 0) == 0


def test_the_brain_is_about_one_half_and_the_skull_is_brighter() -> None:
    image = drawn(128)
    brain = image[(image > 0.25) & (image < 0.9)]
    assert 0.4 < np.median(brain) < 0.7
    assert image.max() > 0.9
    # skull: the first bright voxel from the left edge, on the central row
    row = image[64]
    assert row[np.flatnonzero(row)[0]] == 0.95


def test_there_is_detail_to_lose() -> None:
    image = drawn(128)
    assert len(np.unique(image.round(3))) > 100


def test_positions_broadcast() -> None:
    z, y, x = np.linspace(-1, 1, 4), np.linspace(-1, 1, 5), np.linspace(-1, 1, 6)
    volume = head_phantom(z[:, None, None], y[:, None], x)
    assert volume.shape == (4, 5, 6)
    np.testing.assert_array_equal(volume[1], head_phantom(z[1], y[:, None], x))
    assert head_phantom(0, 0, 0).shape == ()


def test_the_intensity_belongs_to_the_position_not_to_the_grid() -> None:
    np.testing.assert_allclose(drawn(128)[::2, ::2], drawn(64), atol=1e-12)


def test_slices_differ() -> None:
    assert np.abs(drawn(64, z=0.3) - drawn(64)).max() > 0.1
