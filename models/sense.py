"""SENSE: regularised least squares by conjugate gradients, the linear reconstruction."""

from dataclasses import dataclass

import torch
from torch import Tensor

from voxelsigma.models.conjugate_gradients import conjugate_gradients
from voxelsigma.models.fourier import fft_centred, ifft_centred
from voxelsigma.models.grid import Window, apply_axes
from voxelsigma.models.problem import PlaneProblem
from voxelsigma.noise.exact import column_variance
from voxelsigma.noise.linearize import Linearization, linear


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

    def bind(self, problem: PlaneProblem) -> "SenseReconstruction":
        """Reconstruction of one plane."""
        windows = problem.windows(symmetric=False)
        size = (windows[0].size, windows[1].size)
        return SenseReconstruction(
            model=self,
            problem=problem,
            windows=windows,
            sensitivities=problem.sensitivities_on(size),
            weights=problem.cropped_weights(windows),
            output=problem.output_matrices(windows),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SenseReconstruction:
    r"""Regularised least squares on the acquired grid, then zero-filled interpolation.

    .. math:: f(y) = P\,(A^H W A + \lambda)^{-1} A^H W\, y

    with W the readouts averaged into each sample (Pruessmann et al., Magn Reson Med 2001). Complex-linear, on
    batches as on single k-spaces: `(..., coils, k1, k0)` to `(..., y, x)`.
    """

    model: Sense
    problem: PlaneProblem
    windows: tuple[Window, Window]
    sensitivities: Tensor
    weights: Tensor
    output: tuple[Tensor | None, Tensor | None]

    def __call__(self, kspace: Tensor) -> Tensor:
        """Reconstruct k-space on the encoded matrix."""
        rows, columns = self.windows
        samples = columns.crop(rows.crop(kspace, -2), -1)
        coil_images = ifft_centred(self.weights * samples)
        right_side = (self.sensitivities.conj() * coil_images).sum(dim=-3)
        solution = conjugate_gradients(self._normal, right_side, tolerance=self.model.tolerance)
        return apply_axes(self.output, solution)

    def linearize(self, kspace: Tensor) -> Linearization:
        """Its own Jacobian."""
        with torch.no_grad():
            return linear(self, kspace)

    def exact_variance(self) -> Tensor | None:
        r"""Exact :math:`E|u|^2` of the image where sampling varies along one axis only, else None, `(y, x)`."""
        readout_whole = self.windows[1].whole and bool((self.problem.variance.amax(dim=0) > 0).all())
        if readout_whole and _constant_along(self.weights, -1):
            return column_variance(
                self.sensitivities,
                self.weights[:, 0],
                self.model.regularization,
                rows=self.output[0],
                columns=self.output[1],
            )
        return None

    def _normal(self, images: Tensor) -> Tensor:
        r""":math:`A^H W A + \lambda`; axes along which W is constant need no Fourier transform."""
        axes = [axis for axis in (-2, -1) if not _constant_along(self.weights, axis)]
        coil_images = self.sensitivities * images.unsqueeze(-3)
        if axes:
            coil_images = ifft_centred(self.weights * fft_centred(coil_images, axes), axes)
        else:
            coil_images = self.weights * coil_images
        combined = (self.sensitivities.conj() * coil_images).sum(dim=-3)
        return combined + self.model.regularization * images


def _constant_along(weights: Tensor, axis: int) -> bool:
    """Whether the sampling weights do not change along an axis."""
    return bool(torch.allclose(weights, weights.narrow(axis, 0, 1), rtol=1e-5))
