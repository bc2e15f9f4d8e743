"""Grids: windows of k-space and interpolation between them."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from voxelsigma.models.fourier import fft_centred, ifft_centred
from voxelsigma.models.grid import (
    Window,
    acquired_window,
    apply_axes,
    interpolation_matrix,
    kspace_matrix,
    linear_matrix,
    symmetric_window,
)


def sampled(encoded: int, lines: range | list[int]) -> Tensor:
    mask = torch.zeros(encoded, dtype=torch.bool)
    mask[list(lines)] = True
    return mask


def images(size: int, seed: int = 0) -> Tensor:
    """A few complex profiles, (3, size)."""
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randn((2, 3, size), generator=generator, dtype=torch.float64)
    return torch.complex(parts[0], parts[1])


def to_kspace(profiles: Tensor) -> Tensor:
    return fft_centred(profiles, [-1])


def to_image(kspace: Tensor) -> Tensor:
    return ifft_centred(kspace, [-1])


def zero_filled(window: Window, kspace: Tensor) -> Tensor:
    """K-space of a window in the encoded axis."""
    whole = torch.zeros((*kspace.shape[:-1], window.encoded), dtype=kspace.dtype)
    whole[..., window.start : window.start + window.size] = kspace
    return whole


def recentred(kspace: Tensor, size: int) -> Tensor:
    """K-space cut or zero-filled to another size around its own origin."""
    result = torch.zeros((*kspace.shape[:-1], size), dtype=kspace.dtype)
    for index in range(kspace.shape[-1]):
        place = index - kspace.shape[-1] // 2 + size // 2
        if 0 <= place < size:
            result[..., place] = kspace[..., index]
    return result


# --- windows


@pytest.mark.parametrize(
    ("encoded", "lines", "limits", "expected"),
    [
        pytest.param(144, range(18, 126, 3), (18, 125), (18, 108), id="36 lines of step 3 inside a padded axis"),
        pytest.param(128, range(0, 128, 2), (0, 127), (0, 128), id="regular, whole axis"),
        pytest.param(128, range(1, 128, 2), (0, 127), (0, 128), id="regular, from the second line"),
        pytest.param(12, range(2, 12, 3), (0, 11), (0, 12), id="regular, from the last offset"),
        pytest.param(16, range(0, 16, 3), (0, 15), (0, 16), id="regular, the step does not divide the axis"),
        pytest.param(16, range(16), (0, 15), (0, 16), id="full"),
        pytest.param(16, range(3, 13), (3, 12), (3, 10), id="full inside a padded axis"),
        pytest.param(16, range(6, 16), (6, 15), (6, 10), id="partial Fourier"),
        pytest.param(16, [2, 3, 7, 8, 11], (1, 14), (1, 14), id="irregular: the encoding limits"),
        pytest.param(16, [0, 3, 7, 8, 15], (4, 9), (0, 16), id="irregular: lines beyond the limits count"),
        pytest.param(16, [8], (0, 15), (0, 16), id="one line: the encoding limits"),
        pytest.param(16, [8], (8, 8), (8, 1), id="one line alone"),
    ],
)
def test_acquired_window(
    encoded: int, lines: range | list[int], limits: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert acquired_window(sampled(encoded, lines), limits) == Window(*expected, encoded)


def test_nothing_sampled_is_refused() -> None:
    with pytest.raises(ValueError, match="no line was sampled; at least one is needed"):
        acquired_window(torch.zeros(8, dtype=torch.bool), (0, 7))


@settings(deadline=None, max_examples=100)
@given(encoded=st.integers(4, 60), step=st.integers(2, 5), start=st.integers(0, 20), count=st.integers(2, 20))
def test_regular_lines_fill_their_window_periodically(encoded: int, step: int, start: int, count: int) -> None:
    last = start + step * (count - 1)
    assume(last < encoded)
    window = acquired_window(sampled(encoded, range(start, last + 1, step)), (0, encoded - 1))
    assert window.start >= 0
    assert window.start + window.size <= encoded
    assert window.start <= start
    assert last < window.start + window.size
    if step * count <= encoded:
        assert window.size == step * count
    else:
        assert window.whole


@settings(deadline=None, max_examples=100)
@given(encoded=st.integers(1, 40), start=st.integers(0, 39), size=st.integers(1, 40))
def test_symmetric_window_is_the_smallest_even_one_around_the_origin(encoded: int, start: int, size: int) -> None:
    assume(start + size <= encoded)
    window = Window(start, size, encoded)
    symmetric = symmetric_window(window)
    assert symmetric.centred
    assert symmetric.encoded == encoded
    assert 0 <= symmetric.start <= window.start
    assert window.start + window.size <= symmetric.start + symmetric.size <= encoded
    candidates = [
        Window(encoded // 2 - width // 2, width, encoded)
        for width in range(2, encoded + 1, 2)
        if encoded // 2 - width // 2 <= start and start + size <= encoded // 2 - width // 2 + width <= encoded
    ]
    if window.centred:
        assert symmetric == window
    elif candidates:
        assert symmetric == candidates[0]
    else:
        assert symmetric.whole
    assert symmetric_window(symmetric) == symmetric


def test_properties_of_a_window() -> None:
    assert Window(0, 9, 9).whole
    assert Window(0, 9, 9).centred
    assert Window(4, 8, 16).centred
    assert not Window(4, 8, 16).whole
    assert not Window(0, 8, 16).centred
    values = torch.arange(48).reshape(3, 16)
    assert torch.equal(Window(4, 8, 16).crop(values, -1), values[:, 4:12])
    assert torch.equal(Window(1, 2, 3).crop(values, 0), values[1:])


# --- zero-filled interpolation


def test_identity_is_none() -> None:
    assert interpolation_matrix(Window(0, 16, 16), 16, 1.0) is None
    assert interpolation_matrix(Window(4, 8, 16), 8, 1.0) is None
    # the same size, but off the origin or of another field of view
    assert interpolation_matrix(Window(0, 8, 16), 8, 1.0) is not None
    assert interpolation_matrix(Window(0, 16, 16), 16, 0.5) is not None


@pytest.mark.parametrize(("size", "wanted"), [(8, 12), (8, 13), (9, 12), (9, 15), (8, 16), (7, 8)])
def test_interpolation_is_zero_filling_with_intensity_kept(size: int, wanted: int) -> None:
    matrix = interpolation_matrix(Window(0, size, size), wanted, 1.0)
    assert matrix is not None
    profiles = images(size)
    expected = to_image(recentred(to_kspace(profiles), wanted)) * (wanted / size) ** 0.5
    torch.testing.assert_close(profiles @ matrix.mT, expected)
    # a constant stays the constant
    ones = torch.ones(size, dtype=torch.complex128)
    torch.testing.assert_close(matrix @ ones, torch.ones(wanted, dtype=torch.complex128))


def test_voxels_at_shared_places_keep_their_values() -> None:
    matrix = interpolation_matrix(Window(0, 9, 9), 27, 1.0)
    assert matrix is not None
    profiles = images(9)
    # output voxel 13 is the origin; every third voxel meets an input voxel
    torch.testing.assert_close((profiles @ matrix.mT)[:, 1::3], profiles)


@pytest.mark.parametrize(("size", "wanted"), [(16, 8), (16, 9), (15, 8), (12, 5)])
def test_downsampling_keeps_low_frequencies_only(size: int, wanted: int) -> None:
    matrix = interpolation_matrix(Window(0, size, size), wanted, 1.0)
    assert matrix is not None
    profiles = images(size)
    expected = to_image(recentred(to_kspace(profiles), wanted)) * (wanted / size) ** 0.5
    torch.testing.assert_close(profiles @ matrix.mT, expected)
    # the highest frequency is gone, not aliased
    alternating = torch.tensor([(-1.0) ** index for index in range(size)], dtype=torch.complex128)
    highest = (matrix @ alternating).abs().max()
    assert float(highest) < 1e-12 if size % 2 == 0 else float(highest) < 1


@pytest.mark.parametrize(("size", "wanted"), [(16, 8), (16, 12), (18, 9), (16, 7), (15, 5), (15, 9)])
def test_smaller_field_of_view_is_a_selection_of_voxels(size: int, wanted: int) -> None:
    matrix = interpolation_matrix(Window(0, size, size), wanted, wanted / size)
    assert matrix is not None
    first = size // 2 - wanted // 2
    expected = torch.eye(size, dtype=torch.complex128)[first : first + wanted]
    torch.testing.assert_close(matrix, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("start", "size", "encoded"), [(0, 12, 16), (4, 12, 16), (0, 9, 15), (5, 6, 16), (3, 7, 11)])
def test_any_window_is_zero_filled_into_the_encoded_grid(start: int, size: int, encoded: int) -> None:
    window = Window(start, size, encoded)
    matrix = interpolation_matrix(window, encoded, 1.0)
    assert matrix is not None
    kspace = images(size, seed=1)
    expected = to_image(zero_filled(window, kspace)) * (encoded / size) ** 0.5
    torch.testing.assert_close(to_image(kspace) @ matrix.mT, expected)


@pytest.mark.parametrize(("start", "size", "encoded"), [(0, 12, 16), (2, 12, 16), (5, 6, 15)])
@pytest.mark.parametrize(("wanted", "part"), [(16, 1.0), (8, 0.5), (24, 0.75), (5, 1.0)])
def test_kspace_matrix_is_the_sum_over_carried_frequencies(
    start: int, size: int, encoded: int, wanted: int, part: float
) -> None:
    matrix = kspace_matrix(Window(start, size, encoded), wanted, part)
    for index in range(wanted):
        place = (index - wanted // 2) * part / wanted
        for column in range(size):
            frequency = start + column - encoded // 2
            carried = -wanted / part / 2 <= frequency < wanted / part / 2
            expected = torch.exp(torch.tensor(2j * torch.pi * frequency * place)) * carried / size**0.5
            torch.testing.assert_close(matrix[index, column], expected.to(torch.complex128), atol=1e-6, rtol=0)


def test_noise_keeps_its_level_through_interpolation() -> None:
    # SNR units: white noise of variance 2 on the window has variance 2 n/N' · N'/n = 2 in any larger image
    matrix = interpolation_matrix(Window(0, 12, 12), 20, 1.0)
    assert matrix is not None
    variance = 2 * matrix.abs().square().sum(dim=1)
    torch.testing.assert_close(variance, torch.full((20,), 2.0, dtype=torch.float64))


# --- linear interpolation of maps


def test_linear_identity_is_none() -> None:
    assert linear_matrix(16, 16) is None
    assert linear_matrix(16, 16, 0.5) is not None


@settings(deadline=None, max_examples=60)
@given(points=st.integers(2, 20), wanted=st.integers(1, 40), part=st.sampled_from([1.0, 0.75, 0.5]))
def test_linear_interpolation_keeps_constants_and_slopes(points: int, wanted: int, part: float) -> None:
    matrix = linear_matrix(points, wanted, part)
    assume(matrix is not None)
    assert matrix is not None
    assert bool((matrix >= 0).all())
    torch.testing.assert_close(matrix.sum(dim=1), torch.ones(wanted, dtype=torch.float64))
    place = (torch.arange(wanted, dtype=torch.float64) - wanted // 2) * part / wanted
    ramp = (torch.arange(points, dtype=torch.float64) - points // 2) / points
    # beyond the last voxel the periodic field of view turns the ramp
    inside = (place >= ramp[0]) & (place <= ramp[-1])
    torch.testing.assert_close((matrix @ ramp)[inside], place[inside])


def test_linear_interpolation_is_periodic() -> None:
    matrix = linear_matrix(4, 8)
    assert matrix is not None
    expected = torch.tensor([0.5, 0.0, 0.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(matrix[7], expected)


def test_matrices_are_applied_to_their_axes() -> None:
    batch = images(30).reshape(3, 6, 5)
    rows, columns = images(6, seed=2), images(5, seed=3)
    expected = torch.einsum("ay,byx,cx->bac", rows, batch, columns)
    torch.testing.assert_close(apply_axes((rows, columns), batch), expected)
    torch.testing.assert_close(apply_axes((None, columns), batch), batch @ columns.mT)
    torch.testing.assert_close(apply_axes((rows, None), batch), rows @ batch)
    assert apply_axes((None, None), batch) is batch
    assert apply_axes((rows, columns), batch.to(torch.complex64)).dtype == torch.complex64
