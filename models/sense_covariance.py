"""The noise covariance of a SENSE image as an operator, and how image-space probing samples its diagonal."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from voxelsigma.models.fourier import fft_centred, ifft_centred
from voxelsigma.models.grid import Window, apply_axes
from voxelsigma.models.problem import PlaneProblem
from voxelsigma.noise.pico import Probing

Matrices = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class SenseCovariance:
    r"""Covariance of :math:`x = P M^{-1} A^H W y`, with :math:`M = A^H W A + \lambda`, H the same without λ.

    .. math:: \Sigma = P M^{-1} K M^{-1} P^H, \qquad K = A^H W C W A

    with C the covariance of k-space noise. Where :math:`C = c\,W^{-1}` on the samples (c = 2: whitened readouts,
    averaged), :math:`K = c H`, and :math:`\Sigma = c\,P (M^{-1} - \lambda M^{-2}) P^H`.

    Parameters
    ----------
    problem, windows, sensitivities, weights, output
        As in `SenseReconstruction`.
    regularization
        λ.
    solve
        :math:`M^{-1}` on images of the acquired grid, `(..., y, x)`.
    noise
        C on k-space of the encoded matrix, where it is not the diagonal of the problem's variances.
    """

    problem: PlaneProblem
    windows: tuple[Window, Window]
    sensitivities: Tensor
    weights: Tensor
    output: Matrices
    regularization: float
    solve: Callable[[Tensor], Tensor]
    noise: Callable[[Tensor], Tensor] | None = None

    @property
    def common(self) -> float | None:
        """The factor c of noise of variance c/w; None where there is none."""
        if self.noise is not None:
            return None
        product = (self.problem.variance * self.problem.weights)[self.problem.weights > 0]
        return float(product[0]) if bool(torch.allclose(product, product[0], rtol=1e-4)) else None

    @property
    def seen(self) -> Tensor:
        """Voxels of the acquired grid that some coil sees, `(y, x)`."""
        return self.sensitivities.abs().square().sum(dim=0) > 0

    def push(self, images: Tensor) -> Tensor:
        """Σ on images of the output grid, `(..., y, x)` to `(..., y, x)`."""
        return apply_axes(self.output, self._inner(self.seen * apply_axes(_adjoint(self.output), images)))

    def probing(self) -> Probing:
        r"""Samples of the diagonal from probes q on the acquired grid, with controls of known mean.

        With :math:`a = Pq`, :math:`z = M^{-1}q`, one solve gives two diagonals, as
        :math:`E|Pz|^2 = \operatorname{diag}(P M^{-2} P^H)`:

        .. math:: e = c\,\Re(a^* \odot P z) - c \lambda |P z|^2

        (Noise that is no multiple of 1/w takes :math:`e = \Re(a^* \odot P M^{-1} K z)`, two solves.) The controls are
        the first terms of :math:`M^{-1} = D^{-1} - D^{-1} E D^{-1} + D^{-1} E D^{-1} E D^{-1} - \dots` with D the
        diagonal of M and E the rest: the second has mean 0, and the third
        :math:`D_{ii}^{-2} \sum_j |E_{ij}|^2 / D_{jj}`, a convolution. Where interpolation mixes voxels, the only
        control is the first, :math:`a^* \odot P D^{-1} q`, with mean :math:`\sum_j |P_{ij}|^2 / D_{jj}`.
        """
        energy = self.sensitivities.abs().square().sum(dim=0)
        diagonal = (energy * self.weights.mean() + self.regularization).double()
        inverse = torch.where(self.seen, 1 / diagonal.clamp_min(1e-30), 0)
        power: Matrices = tuple(None if m is None else m.abs().square() for m in self.output)  # type: ignore[assignment]
        uncoupled = apply_axes(power, inverse - self.regularization * inverse.square()).clamp_min(0)
        alone = all(matrix is None or _selects(matrix) for matrix in power)
        if alone:
            third = inverse.square() * _coupling(self.sensitivities, self.weights, inverse)
            means = torch.stack([torch.zeros_like(uncoupled), apply_axes(power, third)])
        else:
            means = apply_axes(power, inverse).unsqueeze(0)
        factor = self.common
        floor = 2.0 if factor is None else factor
        return Probing(
            size=(self.windows[0].size, self.windows[1].size),
            samples=lambda probes: self._samples(probes, inverse, alone=alone),
            means=means,
            uncoupled=floor * uncoupled,
            solves=2 if factor is None else 1,
        )

    def _samples(self, probes: Tensor, inverse: Tensor, *, alone: bool) -> Tensor:
        probes = probes * self.seen
        inverse = inverse.to(probes.real.dtype)
        factor, damping = self.common, self.regularization
        reference = apply_axes(self.output, probes).conj()
        solved = self.solve(probes)
        if factor is None:
            sample = (reference * apply_axes(self.output, self.solve(self._spread(solved)))).real
        else:
            seen_through = apply_axes(self.output, solved)
            sample = factor * ((reference * seen_through).real - damping * seen_through.abs().square())
        if not alone:
            return torch.stack([sample, (reference * apply_axes(self.output, inverse * probes)).real])
        first = inverse * probes
        # E x = M x - D x
        second = first - inverse * self._normal(first)
        third = second - inverse * self._normal(second)
        return torch.stack([sample, *((reference * apply_axes(self.output, x)).real for x in (-second, third))])

    def _inner(self, images: Tensor) -> Tensor:
        """Σ on the acquired grid."""
        solved, factor = self.solve(images), self.common
        if factor is None:
            return self.solve(self._spread(solved))
        if self.regularization == 0:
            return factor * solved
        return factor * (solved - self.regularization * self.solve(solved))

    def _normal(self, images: Tensor) -> Tensor:
        """M on the acquired grid."""
        kspace = self.weights * fft_centred(self.sensitivities * images.unsqueeze(-3))
        combined = (self.sensitivities.conj() * ifft_centred(kspace)).sum(dim=-3)
        return combined + self.regularization * images

    def _spread(self, images: Tensor) -> Tensor:
        """K on the acquired grid."""
        samples = self.weights * fft_centred(self.sensitivities * images.unsqueeze(-3))
        rows, columns = self.windows
        if self.noise is None:
            variance = columns.crop(rows.crop(self.problem.variance, -2), -1)
            noisy = variance * samples
        else:
            encoded = samples.new_zeros((*samples.shape[:-2], rows.encoded, columns.encoded))
            columns.crop(rows.crop(encoded, -2), -1).copy_(samples)
            noisy = columns.crop(rows.crop(self.noise(encoded), -2), -1)
        return (self.sensitivities.conj() * ifft_centred(self.weights * noisy)).sum(dim=-3)


def _adjoint(matrices: Matrices) -> Matrices:
    rows, columns = matrices
    return None if rows is None else rows.mH, None if columns is None else columns.mH


def _selects(power: Tensor) -> bool:
    """Whether every row of an interpolation, squared, takes one voxel and mixes none."""
    return bool((power.amax(dim=1) >= (1 - 1e-9) * power.sum(dim=1)).all())


def _coupling(sensitivities: Tensor, weights: Tensor, inverse: Tensor) -> Tensor:
    r"""Squared couplings of each voxel with all others, :math:`\sum_{j \ne i} |H_{ij}|^2 d_j`, shape `(y, x)`.

    With the point spread function t of the samples, :math:`H_{ij} = t_{i-j} \sum_c S^*_{c,i} S_{c,j}`, so that the sum
    is one convolution with :math:`|t|^2` for every pair of coils.
    """
    spread = torch.fft.ifft2(torch.fft.ifftshift(weights.double())).abs().square()
    spread[0, 0] = 0
    transfer = torch.fft.fft2(spread)
    maps = sensitivities.to(torch.complex128)
    total = torch.zeros_like(inverse)
    for one, two in combinations_with_replacement(range(len(maps)), 2):
        product = maps[one] * maps[two].conj()
        convolved = torch.fft.ifft2(transfer * torch.fft.fft2(product * inverse))
        total += (1 if one == two else 2) * (product.conj() * convolved).real
    return total
