"""Exact σ where it is cheap: column by column for linear reconstructions, row by row for small networks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from voxelsigma.noise.voxels import phase_factor

MOST_AMPLIFICATION: Final = 3e3
"""Of noise by least squares, beyond which nothing of an image is left; g = 1,000 at R = 9."""


@dataclass(frozen=True, slots=True)
class ColumnSystem:
    r"""The normal equations of SENSE with sampling along y only: one small system a readout column.

    After the inverse FFT along the readout every column x is a problem of its own,
    :math:`(H_x + \lambda)\,\rho_x = (A^H W y)_x`, with

    .. math:: H_{ij} = \sum_c S^*_{c,i} S_{c,j} \, [F^H \operatorname{diag}(w) F]_{ij}.

    Parameters
    ----------
    normal
        H, shape `(x, y, y)`, complex128.
    factor
        Cholesky factor of :math:`H + \lambda`, with ones on the diagonal for voxels that no coil sees.
    """

    normal: Tensor
    factor: Tensor

    def solve(self, right_side: Tensor) -> Tensor:
        """Least-squares images of right sides :math:`A^H W y`, `(..., y, x)` to `(..., y, x)`."""
        batch = right_side.shape[:-2]
        # (..., y, x) -> (x, y, batch)
        stacked = right_side.reshape(-1, *right_side.shape[-2:]).permute(2, 1, 0)
        solved = torch.cholesky_solve(stacked.to(self.factor.dtype), self.factor)
        return solved.permute(2, 1, 0).to(right_side.dtype).reshape(*batch, *right_side.shape[-2:])

    def variance(self, rows: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
        r"""Exact noise variance of the least-squares image, after linear interpolations :math:`P_y` and :math:`P_x`.

        .. math:: \operatorname{Cov}_x = 2\,(H_x + \lambda)^{-1} H_x (H_x + \lambda)^{-1}

        (Pruessmann et al., Magn Reson Med 1999, eq. 20). Interpolation along y gives
        :math:`P_y \operatorname{Cov}_x P_y^H`; columns are independent, so :math:`P_x` adds their variances.

        Parameters
        ----------
        rows
            :math:`P_y`, shape `(y_out, y)`; None for none.
        columns
            :math:`P_x`, shape `(x_out, x)`; None for none.

        Returns
        -------
            Complex variance :math:`E|u|^2`, shape `(y_out, x_out)`, float64: twice that of one component.
        """
        size = self.normal.shape[-1]
        kind, device = self.normal.dtype, self.normal.device
        wanted = torch.eye(size, dtype=kind, device=device) if rows is None else rows.to(device, kind)
        # Z = (H + λ)⁻¹ P^H: (x, y, y_out); variance = 2 diag(Z^H H Z): (x, y_out)
        repeated = wanted.mH.expand(len(self.factor), -1, -1).contiguous()
        solved = torch.cholesky_solve(repeated, self.factor)
        variance = 2 * (solved.conj() * (self.normal @ solved)).sum(dim=-2).real
        if columns is not None:
            variance = columns.to(device).abs().square().to(variance.dtype) @ variance
        return variance.mT.contiguous()


def column_system(sensitivities: Tensor, weights: Tensor, regularization: float) -> ColumnSystem:
    r"""Set up and factorise the normal equations of every readout column.

    Parameters
    ----------
    sensitivities
        Shape `(coils, y, x)`, complex.
    weights
        w of each phase encoding line, :math:`2/\operatorname{Var}_k`: the number of readouts averaged into it, shape
        `(k1,)`, real; 0 where not sampled.
    regularization
        Tikhonov λ, at least 0.

    Raises
    ------
    ValueError
        If a column's system is singular, λ = 0 with fewer samples than unknowns, or nearly so.
    """
    transfer = _transfer(weights.to(torch.float64))
    # S: (coils, y, x) -> (x, y, coils); H: (x, y, y)
    by_column = sensitivities.to(torch.complex128).permute(2, 1, 0)
    normal = (by_column.conj() @ by_column.mT) * transfer
    dead = by_column.abs().square().sum(dim=-1) == 0
    system = normal + torch.diag_embed(dead.to(normal.dtype) + regularization)
    factor, failed = torch.linalg.cholesky_ex(system)
    diagonal = torch.diagonal(factor, dim1=-2, dim2=-1).real
    singular = (failed > 0) | (diagonal.amin(dim=-1) < 1e-7 * diagonal.amax(dim=-1))
    if bool(singular.any()):
        column = int(singular.nonzero()[0])
        raise ValueError(
            f"sense: least squares is singular at readout position {column}: {int((weights > 0).sum())} lines of "
            f"{sensitivities.shape[0]} coils do not determine {int((~dead[column]).sum())} voxels at "
            f"regularization {regularization:g}; choose a regularization above 0"
        )
    amplification = _largest_of_inverse(factor).sqrt()
    if float(amplification.max()) > MOST_AMPLIFICATION:
        column = int(amplification.argmax())
        raise ValueError(
            f"sense: least squares is nearly singular at readout position {column}: it amplifies noise "
            f"{float(amplification[column]):.0f} times at regularization {regularization:g}, at most "
            f"{MOST_AMPLIFICATION:.0f} times can make an image; choose a larger regularization"
        )
    return ColumnSystem(normal, factor)


def jacobian_variance(
    reconstruction: Callable[[Tensor], Tensor],
    kspace: Tensor,
    variance: Tensor,
    *,
    chunk: int = 32,
) -> tuple[Tensor, Tensor]:
    r"""Exact noise variance of any differentiable reconstruction, from the rows of its Jacobian.

    One row a voxel and component by reverse mode: for small images and for tests.

    .. math:: \operatorname{Var}\big(\Re(e^{-i\phi_i} u_i)\big)
        = \sum_k \tfrac12 \operatorname{Var}_k \, |\partial_k \Re(e^{-i\phi_i} x_i)|^2

    with :math:`\partial_k` the gradient in real and imaginary part of sample k.

    Parameters
    ----------
    reconstruction
        From k-space `(coils, k1, k0)` to a complex image `(y, x)`.
    kspace
        The measured data, shape `(coils, k1, k0)`.
    variance
        Complex noise variance of each sample, shape `(k1, k0)`.
    chunk
        Rows at a time.

    Returns
    -------
        Variance of the in-phase component, and :math:`E|u|^2`, shape `(y, x)` each.
    """
    image, pull = torch.func.vjp(reconstruction, kspace)[:2]
    direction = phase_factor(image).to(image.dtype)
    total = [_row_energy(pull, turn, variance, chunk) for turn in (direction, 1j * direction)]
    return total[0], total[0] + total[1]


def _row_energy(
    pull: Callable[[Tensor], tuple[Tensor, ...]], direction: Tensor, variance: Tensor, chunk: int
) -> Tensor:
    """Noise variance of one component of every voxel."""
    voxels = torch.arange(direction.numel())
    energies = []
    for part in voxels.split(chunk):
        cotangents = torch.zeros((len(part), direction.numel()), dtype=direction.dtype)
        cotangents[torch.arange(len(part)), part] = direction.flatten()[part]
        rows = torch.func.vmap(lambda t: pull(t)[0])(cotangents.reshape(-1, *direction.shape))
        energies.append((rows.abs().square() * variance / 2).flatten(1).sum(dim=1))
    return torch.cat(energies).reshape(direction.shape)


def _largest_of_inverse(factor: Tensor) -> Tensor:
    """Largest eigenvalue of the inverse of each system, by the power method: never too large, soon close."""
    size = factor.shape[-1]
    # alternating and irregular: not orthogonal to any smooth or rough mode
    start = torch.cos(1.7 * torch.arange(size, device=factor.device, dtype=torch.float64) ** 2).to(factor.dtype)
    vector = start.expand(len(factor), -1).unsqueeze(-1) / start.norm()
    for _ in range(8):
        solved = torch.cholesky_solve(vector, factor)
        length = solved.norm(dim=(-2, -1), keepdim=True)
        vector = solved / length
    return length[:, 0, 0].real


def _transfer(weights: Tensor) -> Tensor:
    r"""The matrix :math:`F^H \operatorname{diag}(w) F` of a centred orthonormal FFT, shape `(y, y)`, complex128."""
    size = len(weights)
    origin = size // 2
    index = torch.arange(size, dtype=torch.float64, device=weights.device) - origin
    fourier = torch.exp(-2j * torch.pi * torch.outer(index, index) / size) / size**0.5
    return fourier.mH @ (weights.to(fourier.dtype).unsqueeze(1) * fourier)
