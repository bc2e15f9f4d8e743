"""Grids: from the encoded matrix to the one that the acquired lines span, and on to the image's own."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Window:
    """A contiguous part of an encoded k-space axis that serves as a grid of its own.

    Parameters
    ----------
    start
        Index of its first position in the encoded axis.
    size
        Number of positions.
    encoded
        Size of the encoded axis, whose origin is at index `encoded // 2`.
    """

    start: int
    size: int
    encoded: int

    @property
    def whole(self) -> bool:
        """Whether it is the whole encoded axis."""
        return self.start == 0 and self.size == self.encoded

    @property
    def centred(self) -> bool:
        """Whether its own origin, at index `size // 2`, is the origin of the encoded axis."""
        return self.start + self.size // 2 == self.encoded // 2

    def crop(self, kspace: Tensor, dim: int) -> Tensor:
        """The part of a tensor's axis that lies in the window."""
        return kspace.narrow(dim, self.start, self.size)


def acquired_window(sampled: Tensor, limits: tuple[int, int]) -> Window:
    """The grid that the acquired lines of one axis span.

    Lines at a regular distance R span a periodic grid of R times their number: on it SENSE unfolds exactly, while
    least squares on a zero-padded axis would be singular. Other patterns span what the encoding limits say.

    Parameters
    ----------
    sampled
        Whether anything was sampled at each position of the encoded axis, shape `(n,)`, boolean.
    limits
        First and last position that the protocol encodes, as indices of the encoded axis.

    Raises
    ------
    ValueError
        If nothing was sampled.
    """
    encoded = len(sampled)
    lines = sampled.nonzero().flatten().tolist()
    if not lines:
        raise ValueError("k-space: no line was sampled; at least one is needed")
    steps = {after - before for before, after in itertools.pairwise(lines)}
    if len(steps) == 1 and (step := steps.pop()) > 1:
        size = step * len(lines)
        if size > encoded:
            return Window(0, encoded, encoded)
        return Window(min(lines[0], encoded - size), size, encoded)
    first, last = min(limits[0], lines[0]), max(limits[1], lines[-1])
    return Window(first, last - first + 1, encoded)


def symmetric_window(window: Window) -> Window:
    """The smallest window around the origin that holds another one; the same one where that is centred."""
    origin = window.encoded // 2
    half = max(origin - window.start, window.start + window.size - origin)
    if window.centred or 2 * half > window.encoded:
        return window if window.centred else Window(0, window.encoded, window.encoded)
    return Window(origin - half, 2 * half, window.encoded)


def interpolation_matrix(window: Window, size: int, field_of_view: float) -> Tensor | None:
    r"""Zero-filled interpolation of an image on a window's grid to `size` voxels of the output field of view.

    .. math:: P_{ij} = \frac1n \sum_m e^{2\pi i \,[k_m y_i - (m - \lfloor n/2 \rfloor)(j - \lfloor n/2 \rfloor)/n]}

    with the encoded frequency :math:`k_m` of the window's position m, limited to what `size` voxels can carry, and the
    output position :math:`y_i` in encoded fields of view. Intensities are kept: images stay in SNR units.

    Parameters
    ----------
    window
        Grid of the image, n positions.
    size
        Number of output voxels.
    field_of_view
        Output field of view over the encoded one, at most 1.

    Returns
    -------
        Shape `(size, n)`, complex128; None where the image already is on the output grid.
    """
    if window.centred and window.size == size and abs(field_of_view - 1) < 1e-3:
        return None
    local = torch.arange(window.size, dtype=torch.float64) - window.size // 2
    forward = torch.exp(-2j * torch.pi * torch.outer(local, local) / window.size) / window.size**0.5
    return kspace_matrix(window, size, field_of_view) @ forward


def kspace_matrix(window: Window, size: int, field_of_view: float) -> Tensor:
    r"""From k-space on a window to the image of the output grid, :math:`e^{2\pi i k_m y_i} / \sqrt n`.

    Parameters are those of `interpolation_matrix`; shape `(size, n)`, complex128. Columns of frequencies that `size`
    voxels cannot carry are 0.
    """
    frequency = torch.arange(window.size, dtype=torch.float64) + (window.start - window.encoded // 2)
    carried = size / field_of_view / 2
    kept = (frequency >= -carried - 1e-6) & (frequency < carried - 1e-6)
    place = (torch.arange(size, dtype=torch.float64) - size // 2) * field_of_view / size
    return torch.exp(2j * torch.pi * torch.outer(place, frequency)) * kept / window.size**0.5


def embedded(values: Tensor, window: Window, size: int, field_of_view: float, dim: int) -> Tensor:
    """A window's positions of k-space among all that belong to the output's voxels, 0 where it has none.

    Parameters
    ----------
    values
        Of the window's positions along `dim`.
    window, size, field_of_view
        As of `kspace_matrix`; of the encoded field of view there are `size / field_of_view` voxels, here the nearest
        whole number.
    dim
        The axis.
    """
    count = round(size / field_of_view)
    places = torch.arange(window.size) + (window.start - window.encoded // 2) + count // 2
    kept = ((places >= 0) & (places < count)).nonzero().flatten()
    shape = list(values.shape)
    shape[dim] = count
    found = values.new_zeros(shape)
    index = kept.to(values.device)
    return found.index_copy_(dim, places.to(values.device)[index], values.index_select(dim, index))


def linear_matrix(points: int, size: int, field_of_view: float = 1.0) -> Tensor | None:
    """Linear interpolation between voxels of the same field of view, for maps that are smooth but not band-limited.

    Parameters
    ----------
    points
        Number of voxels of the map, over the encoded field of view.
    size, field_of_view
        The wanted grid: `size` voxels of this part of the encoded field of view.

    Returns
    -------
        Shape `(size, points)`, float64; None where the grids agree.
    """
    if points == size and abs(field_of_view - 1) < 1e-3:
        return None
    place = (torch.arange(size, dtype=torch.float64) - size // 2) * field_of_view / size * points + points // 2
    distance = (place.unsqueeze(1) - torch.arange(points, dtype=torch.float64)).abs()
    # the field of view is periodic
    distance = torch.minimum(distance, points - distance)
    return (1 - distance).clamp_min(0)


def apply_axes(matrices: Sequence[Tensor | None], images: Tensor) -> Tensor:
    """Apply one matrix to each of the last two axes, `(..., y, x)` to `(..., y_out, x_out)`; None leaves an axis."""
    rows, columns = matrices
    if rows is not None:
        images = rows.to(images.device, images.dtype) @ images
    if columns is not None:
        images = images @ columns.to(images.device, images.dtype).mT
    return images
