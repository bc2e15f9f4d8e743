"""One plane to reconstruct: what is known beside the data themselves."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from voxelsigma.models.fourier import centred_combination
from voxelsigma.models.grid import (
    Window,
    acquired_window,
    apply_axes,
    embedded,
    interpolation_matrix,
    kspace_matrix,
    linear_matrix,
    symmetric_window,
)
from voxelsigma.models.normal_equations import normal_operator
from voxelsigma.noise.covariate import coil_correlation, zero_filled_variance
from voxelsigma.noise.inverse import Operator
from voxelsigma.noise.response import filtered_variance
from voxelsigma.noise.sketch import Covariate
from voxelsigma.noise.voxels import phase_factor


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaneProblem:
    """A plane of Cartesian k-space and the image that is wanted of it.

    Parameters
    ----------
    sensitivities
        Unit-norm coil sensitivities over the encoded field of view, shape `(coils, y, x)`, complex, on any
        matrix; they are interpolated to the grid of the reconstruction.
    variance
        Complex noise variance of each sample, shape `(k1, k0)`, the encoded matrix; 0 where not sampled.
    weights
        Readouts averaged into each sample, shape `(k1, k0)`; 0 where nothing was sampled.
    limits
        First and last encoded position of each axis, as indices of the encoded matrix.
    size
        Matrix of the wanted image, `(y, x)`.
    field_of_view
        Its field of view over the encoded one, `(y, x)`.
    """

    sensitivities: Tensor
    variance: Tensor
    weights: Tensor
    limits: tuple[tuple[int, int], tuple[int, int]]
    size: tuple[int, int]
    field_of_view: tuple[float, float] = (1.0, 1.0)

    def windows(self, *, symmetric: bool) -> tuple[Window, Window]:
        """The acquired grid of both axes; around the origin where an image model needs that."""
        sampled = self.weights > 0
        windows = (
            acquired_window(sampled.any(dim=1), self.limits[0]),
            acquired_window(sampled.any(dim=0), self.limits[1]),
        )
        return (symmetric_window(windows[0]), symmetric_window(windows[1])) if symmetric else windows

    @property
    def white_readout(self) -> bool:
        """Whether every readout position is sampled alike along its line, so that hybrid space is white."""
        return bool(torch.allclose(self.variance, self.variance.mean(dim=-1, keepdim=True), rtol=1e-4))

    def acceleration(self, windows: tuple[Window, Window] | None = None) -> float:
        """R: encoded over acquired samples, repeats counted, on a grid; None is the acquired one."""
        weights = self.cropped_weights(windows or self.windows(symmetric=False))
        return weights.numel() / float(weights.sum())

    def interpolation_gain(self, windows: tuple[Window, Window]) -> Tensor:
        """Standard deviation of white unit noise of a grid behind the interpolation to the wanted image, `(y, x)`."""
        gains = [
            torch.ones(size) if matrix is None else matrix.abs().square().sum(dim=1).sqrt().float()
            for matrix, size in zip(self.output_matrices(windows), self.size, strict=True)
        ]
        return torch.outer(gains[0], gains[1])

    def cropped_weights(self, windows: tuple[Window, Window]) -> Tensor:
        """Readouts averaged into each sample, on a window."""
        return windows[1].crop(windows[0].crop(self.weights, -2), -1)

    def sensitivities_on(self, size: tuple[int, int], field_of_view: tuple[float, float] = (1.0, 1.0)) -> Tensor:
        """Sensitivities on another grid, unit-norm wherever the coils see the voxel."""
        matrices = [
            linear_matrix(points, wanted, part)
            for points, wanted, part in zip(self.sensitivities.shape[-2:], size, field_of_view, strict=True)
        ]
        if matrices == [None, None]:
            return self.sensitivities
        maps = apply_axes(matrices, self.sensitivities)
        norm = maps.abs().square().sum(dim=-3, keepdim=True).sqrt()
        return torch.where(norm > 0.5, maps / norm.clamp_min(1e-6), torch.zeros_like(maps))

    def output_matrices(self, windows: tuple[Window, Window]) -> tuple[Tensor | None, Tensor | None]:
        """Zero-filled interpolation from a window's grid to the wanted image, one matrix an axis."""
        rows, columns = (
            interpolation_matrix(window, size, part)
            for window, size, part in zip(windows, self.size, self.field_of_view, strict=True)
        )
        return rows, columns

    def covariate(self, kspace: Tensor | None = None) -> Covariate:
        r"""The zero-filled image on the wanted grid, and its closed-form variance.

        Parameters
        ----------
        kspace
            For a reconstruction without a phase of its own: measured data, shape `(coils, k1, k0)`. The covariate is
            then turned by the phase of their zero-filled image, :math:`e^{-i\phi} w`: its real part is in phase.
        """
        maps = self.sensitivities_on(self.size, self.field_of_view)
        if kspace is None:
            return self._zero_filled(maps)
        phase = phase_factor(self._zero_filled(maps).push(kspace.unsqueeze(0))[0])
        return self._zero_filled(maps * phase.to(maps.dtype))

    def _zero_filled(self, sensitivities: Tensor) -> Covariate:
        windows = self.windows(symmetric=True)
        device = self.variance.device
        rows, columns = (
            kspace_matrix(window, size, part).to(device, sensitivities.dtype)
            for window, size, part in zip(windows, self.size, self.field_of_view, strict=True)
        )
        conjugated = sensitivities.conj().resolve_conj()
        combine = self._combination(conjugated, windows)

        def push(probes: Tensor) -> Tensor:
            samples = windows[1].crop(windows[0].crop(probes, -2), -1)
            if combine is not None:
                return combine(samples)
            # coil images: (probes, coils, y, x) -> (probes, y, x)
            return (conjugated * apply_axes((rows, columns), samples)).sum(dim=-3)

        # nobody may ask for it
        @cache
        def operator() -> Operator:
            sampled = (self.cropped_weights(windows) > 0).to(device, sensitivities.real.dtype)
            return normal_operator(sensitivities, self._embedded(sampled, windows))

        def normal(images: Tensor) -> Tensor:
            # one probe at a time stays in a CPU's cache
            return torch.cat([operator()(part) for part in images.split(len(images) if images.is_cuda else 1)])

        cropped = windows[1].crop(windows[0].crop(self.variance, -2), -1)
        carried = (rows[0] != 0).unsqueeze(1) & (columns[0] != 0)
        white = cropped * carried
        correlation = coil_correlation(white, rows, columns)
        return Covariate(
            push=push,
            variance=zero_filled_variance(sensitivities, white).double(),
            filtered_variance=lambda response: filtered_variance(response, sensitivities, correlation),
            correlation=correlation,
            normal=normal,
        )

    def _embedded(self, samples: Tensor, windows: tuple[Window, Window]) -> Tensor:
        """Samples of a window's grid, `(..., k1, k0)`, among all positions that belong to the wanted voxels."""
        for dim, window, size, part in zip((-2, -1), windows, self.size, self.field_of_view, strict=True):
            if (window.size, window.centred, round(size / part)) != (size, True, size):
                samples = embedded(samples, window, size, part, dim)
        return samples

    def _combination(self, factors: Tensor, windows: tuple[Window, Window]) -> Callable[[Tensor], Tensor] | None:
        """From samples of a window's grid to images times factors `(coils, y, x)`, summed, by Fourier transforms.

        None where the field of view is no whole number of the wanted voxels.
        """
        voxels = [size / part for size, part in zip(self.size, self.field_of_view, strict=True)]
        whole = [round(one) for one in voxels]
        if any(abs(one - count) > 1e-6 for one, count in zip(voxels, whole, strict=True)):
            return None
        first = [count // 2 - size // 2 for count, size in zip(whole, self.size, strict=True)]
        gain = math.sqrt(math.prod(whole) / (windows[0].size * windows[1].size))
        beside = [(at, count - size - at) for at, count, size in zip(first, whole, self.size, strict=True)]
        combine = centred_combination(functional.pad(gain * factors, (*beside[1], *beside[0])))
        rows, columns = (slice(at, at + size) for at, size in zip(first, self.size, strict=True))
        return lambda samples: combine(self._embedded(samples, windows))[..., rows, columns]
