"""SENSE: regularised least squares by conjugate gradients, the linear reconstruction."""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from voxelsigma.models.conjugate_gradients import conjugate_gradients
from voxelsigma.models.fourier import ifft_centred
from voxelsigma.models.grid import Window, apply_axes
from voxelsigma.models.problem import PlaneProblem
from voxelsigma.models.sense_covariance import SenseCovariance
from voxelsigma.noise.exact import ColumnSystem, column_system
from voxelsigma.noise.linearize import Linearization, linear
from voxelsigma.noise.pico import Probing, sample_covariance
from voxelsigma.noise.probes import ProbeSource

MAX_FACTOR_BYTES: Final = 2**29
"""Cholesky factors of all columns beyond this size are not kept; conjugate gradients need none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sense:
    """The linear reconstruction, ready to be bound to a plane.

    Parameters
    ----------
    regularization
        Tikhonov λ, at least 0; in units where unit-norm sensitivities and full sampling make
        :math:`A^H A` the identity.
    tolerance
        Relative residual of the conjugate gradients.
    """

    regularization: float = 0.0
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        if not self.regularization >= 0:
            raise ValueError(f"sense: regularization must be at least 0, got {self.regularization}")

    def bind(self, problem: PlaneProblem) -> "SenseReconstruction":
        """Reconstruction of one plane."""
        windows = problem.windows(symmetric=False)
        size = (windows[0].size, windows[1].size)
        sensitivities = problem.sensitivities_on(size)
        weights = problem.cropped_weights(windows)
        columns = None
        if _constant_along(weights, -1) and 16 * size[1] * size[0] ** 2 <= MAX_FACTOR_BYTES:
            columns = column_system(sensitivities, weights[:, 0], self.regularization)
        return SenseReconstruction(
            model=self,
            problem=problem,
            windows=windows,
            sensitivities=sensitivities,
            weights=weights,
            output=problem.output_matrices(windows),
            columns=columns,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SenseReconstruction:
    r"""Regularised least squares on the acquired grid, then zero-filled interpolation.

    .. math:: f(y) = P\,(A^H W A + \lambda)^{-1} A^H W\, y

    with W the readouts averaged into each sample (Pruessmann et al., Magn Reson Med 2001). Complex-linear, on
    batches as on single k-spaces: `(..., coils, k1, k0)` to `(..., y, x)`. Solved by conjugate gradients; where
    sampling varies along y only, by the Cholesky factors of the readout columns, which give the same solution
    at once for any number of probes.
    """

    model: Sense
    problem: PlaneProblem
    windows: tuple[Window, Window]
    sensitivities: Tensor
    weights: Tensor
    output: tuple[Tensor | None, Tensor | None]
    columns: ColumnSystem | None

    def __call__(self, kspace: Tensor) -> Tensor:
        """Reconstruct k-space on the encoded matrix."""
        rows, columns = self.windows
        # the normal equations amplify rounding by g squared; one k-space in float64 costs nothing, probes need none
        precise = self.columns is not None and kspace.dim() == 3
        given = kspace.to(torch.complex128) if precise else kspace
        samples = columns.crop(rows.crop(given, -2), -1)
        coil_images = ifft_centred(self.weights * samples)
        right_side = (self.sensitivities.conj() * coil_images).sum(dim=-3)
        return apply_axes(self.output, self._solve(right_side).to(kspace.dtype))

    def _solve(self, right_side: Tensor) -> Tensor:
        if self.columns is not None:
            return self.columns.solve(right_side)
        # with the origin at index 0 the transforms need no shifts of their own
        normal = _Normal(
            torch.fft.ifftshift(self.sensitivities, dim=(-2, -1)),
            torch.fft.ifftshift(self.weights),
            self.model.regularization,
        )
        shifted = torch.fft.ifftshift(right_side, dim=(-2, -1))
        return torch.fft.fftshift(conjugate_gradients(normal, shifted, tolerance=self.model.tolerance), dim=(-2, -1))

    def linearize(self, kspace: Tensor) -> Linearization:
        """Its own Jacobian."""
        with torch.no_grad():
            return linear(self, kspace)

    def exact_variance(self) -> Tensor | None:
        r"""Exact :math:`E|u|^2` of the image where sampling varies along one axis only, else None, `(y, x)`."""
        # an asymmetric echo correlates the noise of neighbouring columns
        whole = self.windows[1].whole and self.problem.white_readout
        if not whole or self.columns is None:
            return None
        # the columns know noise of variance 2/w; that of a plane of a volume with an asymmetric echo is less
        noise = (self.problem.variance * self.problem.weights)[self.problem.weights > 0]
        if not torch.allclose(noise, noise[0], rtol=1e-4):
            return None
        return self.columns.variance(*self.output) * (noise[0].double() / 2)

    def covariance(self, probes: ProbeSource | None = None) -> SenseCovariance:
        """Covariance of the image's noise as an operator.

        Parameters
        ----------
        probes
            Source of k-space probes with the noise of this plane; needed where the noise is not independent from
            sample to sample (an asymmetric echo behind a crop of the readout). None for the problem's variances.
        """
        correlated = probes is not None and probes.through is not None
        return SenseCovariance(
            problem=self.problem,
            windows=self.windows,
            sensitivities=self.sensitivities,
            weights=self.weights,
            output=self.output,
            regularization=self.model.regularization,
            solve=self._solve,
            noise=sample_covariance(probes) if correlated and probes is not None else None,
        )

    def covariance_push(self, images: Tensor) -> Tensor:
        r"""Apply the covariance :math:`\Sigma = G C G^H` of the image's noise, `(..., y, x)` to `(..., y, x)`."""
        return self.covariance().push(images)

    def probing(self, probes: ProbeSource | None = None) -> Probing:
        """What image-space probing needs; `probes` as for `covariance`."""
        return self.covariance(probes).probing()


@dataclass(frozen=True, slots=True)
class _Normal:
    r""":math:`A^H W A + \lambda` with the origin of both spaces at index 0."""

    sensitivities: Tensor
    weights: Tensor
    regularization: float

    def __call__(self, images: Tensor) -> Tensor:
        """Axes along which W is constant need no Fourier transform."""
        axes = [axis for axis in (-2, -1) if not _constant_along(self.weights, axis)]
        coil_images = self.sensitivities * images.unsqueeze(-3)
        if axes:
            weighted = self.weights * torch.fft.fftn(coil_images, dim=axes, norm="ortho")
            coil_images = torch.fft.ifftn(weighted, dim=axes, norm="ortho")
        else:
            coil_images = self.weights * coil_images
        combined = (self.sensitivities.conj() * coil_images).sum(dim=-3)
        return combined + self.regularization * images


def _constant_along(weights: Tensor, axis: int) -> bool:
    """Whether the sampling weights do not change along an axis."""
    return bool(torch.allclose(weights, weights.narrow(axis, 0, 1), rtol=1e-5))
