"""Noise power spectra from pushed probes that were kept."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from voxelsigma.noise.functionals import Batches, check_enough

Window: TypeAlias = Literal["none", "hann"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spectrum:
    r"""Noise power spectrum of a rectangular region.

    Parameters
    ----------
    power
        NPS, shape `(y, x)`, zero frequency at n//2; squared image units times voxel area.
    frequencies
        Of the rows and of the columns, in cycles per unit of the spacing.
    degrees_of_freedom
        ν per frequency: :math:`\nu \hat P / P` follows :math:`\chi^2_\nu`; shape `(y, x)`.
    radial_frequency, radial_power, radial_error
        Mean over rings up to the smaller Nyquist frequency, and its standard error over the probes, shape `(rings,)`.
    probes
        Number of probes.
    """

    power: Tensor
    frequencies: tuple[Tensor, Tensor]
    degrees_of_freedom: Tensor
    radial_frequency: Tensor
    radial_power: Tensor
    radial_error: Tensor
    probes: int

    @property
    def variance(self) -> float:
        r"""Integral :math:`\sum P \, \Delta f_y \Delta f_x`: the mean noise variance of the region."""
        steps = (len(axis) * _spacing_of(axis) for axis in self.frequencies)
        area = 1.0
        for step in steps:
            area *= step
        return float(self.power.mean()) * area


def noise_power_spectrum(
    batches: Batches,
    direction: Tensor,
    *,
    spacing: tuple[float, float] = (1.0, 1.0),
    window: Window = "none",
    complex_linear: bool = False,
) -> Spectrum:
    r"""Noise power spectrum of the in-phase noise of a region.

    .. math:: P(f) = \frac{\Delta_y \Delta_x}{\sum_i h_i^2} \; E \Big| \sum_i h_i a_i e^{-2 \pi i f \cdot r_i} \Big|^2

    (IEC 62220-1; Siewerdsen, Cunningham & Jaffray, Med Phys 2002), with h = 1, or a Hann window against the
    leakage of a region's edges. The noise's mean is known to be 0: no trend is taken off. Its integral over all
    frequencies is the mean variance, :math:`\sum_i h_i^2 \sigma_i^2 / \sum_i h_i^2`, exactly. Noise of parallel imaging
    is not stationary: the spectrum is the region's average.

    Of a complex-linear reconstruction both quadratures are used,
    :math:`P(f) = \tfrac14 (P_c(f) + P_c(-f))` with :math:`P_c` the spectrum of :math:`c = e^{-i\phi} u`.

    Parameters
    ----------
    batches
        The probes of the region, `(probes, y, x)`, at least 2 probes.
    direction
        Phase factor of its reconstructed voxels, shape `(y, x)`.
    spacing
        Size of a voxel `(y, x)`: 1 gives cycles per voxel, millimetres cycles per millimetre.
    window
        `none` or `hann`.
    complex_linear
        Whether the reconstruction is complex-linear.

    Raises
    ------
    ValueError
        If there are fewer than 2 probes, or the region is smaller than 4 × 4.
    """
    rows, columns = direction.shape
    if min(rows, columns) < 4:
        raise ValueError(f"a noise power spectrum needs a region of at least 4 x 4 voxels, got {rows} x {columns}")
    taper = _taper(rows, window)[:, None] * _taper(columns, window)[None, :]
    factor = spacing[0] * spacing[1] / float(taper.square().sum())
    frequencies = (_frequencies(rows, spacing[0]), _frequencies(columns, spacing[1]))
    rings, radii = _rings(frequencies)
    total = torch.zeros((rows, columns), dtype=torch.float64)
    ring_sum, ring_square = (torch.zeros(len(radii), dtype=torch.float64) for _ in range(2))
    count = 0
    for batch in batches:
        turned = (batch.to(torch.complex128) * direction.conj()).cpu()
        shown = turned if complex_linear else turned.real.to(torch.complex128)
        power = factor * torch.fft.fftshift(torch.fft.fft2(shown * taper).abs().square(), dim=(-2, -1))
        total += power.sum(dim=0)
        ringed = _ring_means((power + _mirrored(power)) / 4 if complex_linear else power, rings, len(radii))
        ring_sum += ringed.sum(dim=0)
        ring_square += ringed.square().sum(dim=0)
        count += len(batch)
    check_enough(count)
    power, mirrored = total / count, _mirrored(total / count)
    ring_power = ring_sum / count
    ring_variance = (ring_square / count - ring_power.square()).clamp_min(0) * count / (count - 1)
    return Spectrum(
        power=(power + mirrored) / 4 if complex_linear else power,
        frequencies=frequencies,
        degrees_of_freedom=_spectral_freedom(power, mirrored, count, complex_linear=complex_linear),
        radial_frequency=radii,
        radial_power=ring_power,
        radial_error=(ring_variance / count).sqrt(),
        probes=count,
    )


def _spectral_freedom(power: Tensor, mirrored: Tensor, count: int, *, complex_linear: bool) -> Tensor:
    """Degrees of freedom: a complex ordinate has 2, a real one (its own mirror) 1; two ordinates pool theirs."""
    own = torch.arange(power.numel(), dtype=torch.float64).reshape(power.shape)
    alone = own == _mirrored(own)
    if not complex_linear:
        return torch.where(alone, count, 2 * count).double()
    squares = power.square() + mirrored.square()
    pooled = 2 * count * (power + mirrored).square() / torch.where(squares > 0, squares, 1)
    return torch.where(alone | (squares == 0), 2.0 * count, pooled)


def _taper(length: int, window: Window) -> Tensor:
    place = (torch.arange(length, dtype=torch.float64) + 0.5) / length
    return torch.ones_like(place) if window == "none" else torch.sin(torch.pi * place).square()


def _frequencies(length: int, spacing: float) -> Tensor:
    return torch.from_numpy(np.fft.fftshift(np.fft.fftfreq(length, spacing)))


def _spacing_of(axis: Tensor) -> float:
    """Step between frequencies."""
    return float(axis[1] - axis[0])


def _mirrored(power: Tensor) -> Tensor:
    """Values at the negative frequencies, the zero frequency being at n//2 of both axes."""
    rows, columns = power.shape[-2:]
    shifts = (1 - rows % 2, 1 - columns % 2)
    return power.flip((-2, -1)).roll(shifts, dims=(-2, -1))


def _rings(frequencies: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Ring of every frequency, shape `(y, x)`, -1 beyond the smaller Nyquist frequency; radii `(rings,)`."""
    width = max(_spacing_of(axis) for axis in frequencies)
    radius = (frequencies[0][:, None].square() + frequencies[1][None, :].square()).sqrt()
    nyquist = min(float(-axis[0]) if len(axis) % 2 == 0 else float(axis[-1]) for axis in frequencies)
    count = int(nyquist / width + 1e-9) + 1
    rings = (radius / width).round().long()
    return torch.where(rings < count, rings, -1), width * torch.arange(count, dtype=torch.float64)


def _ring_means(power: Tensor, rings: Tensor, count: int) -> Tensor:
    """Mean over each ring, `(probes, y, x)` to `(probes, rings)`."""
    inside = rings >= 0
    members = rings[inside]
    sums = torch.zeros((len(power), count), dtype=torch.float64).index_add_(1, members, power[:, inside])
    return sums / torch.bincount(members, minlength=count)
