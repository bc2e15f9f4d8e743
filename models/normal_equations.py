r"""Regularised least squares :math:`(A^H A + \lambda)^{-1} b` as one differentiable function."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from voxelsigma.models.conjugate_gradients import conjugate_gradients
from voxelsigma.models.encoding import SenseEncoding
from voxelsigma.models.grid import apply_axes
from voxelsigma.noise.tape_implicit import ImplicitPush, Pull, implicit

# a λ of 0.05 needs 30 of them for 1e-6, one of 0.001 needs 200
_MAX_ITERATIONS = 2000
_ADVICE = "the step's lambda is too small for this sampling: train with a larger one, or sample more"

Solver = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""From b `(batch, y, x)`, λ `()`, sensitivities `(batch, coils, y, x)`, mask `(batch, 1, k1, k0)` to the solution.

The mask is boolean: it has no tangents.
"""


def least_squares_solver(*, tolerance: float, iterations: int | None, method: str) -> Solver:
    r"""Solver of :math:`H x = b` with :math:`H = A^H A + \lambda`, differentiable in everything but the mask.

    The derivative is that of the solution, whatever the iterations were that found it,

    .. math::
        \dot x = H^{-1} (\dot b - \dot H x), \qquad
        \bar b = H^{-1} \bar x, \quad \bar\theta = - \langle \partial_\theta (H x), \bar b \rangle ,

    so one more solve for a whole batch of tangents, and one for a gradient.

    Parameters
    ----------
    tolerance
        Relative residual of primal, tangents and cotangents alike.
    iterations
        Stop each of them after so many iterations; None, the rule, to solve to the tolerance.
    method
        Who asks, for error texts.
    """

    def solved(right_side: Tensor, weight: Tensor, sensitivities: Tensor, mask: Tensor) -> Tensor:
        found = conjugate_gradients(
            _uncentred_operator(weight, sensitivities, mask),
            torch.fft.ifftshift(right_side, dim=(-2, -1)),
            tolerance=tolerance,
            max_iterations=_MAX_ITERATIONS,
            iterations=iterations,
            method=method,
            advice=_ADVICE,
        )
        return torch.fft.fftshift(found, dim=(-2, -1))

    def rule(inputs: Sequence[Tensor], output: Tensor) -> ImplicitPush:
        _, weight, sensitivities, mask = (tensor.detach() for tensor in inputs)
        solution = output.detach()

        def push(tangents: tuple[Tensor | None, ...]) -> Tensor:
            of_right_side, of_weight, of_sensitivities, _ = tangents
            change = of_right_side
            if of_weight is not None:
                # the tangents of λ: (probes,) -> (probes, batch, y, x)
                moved = -of_weight.reshape(-1, 1, 1, 1) * solution
                change = moved if change is None else change + moved
            if of_sensitivities is not None:
                moved = -_change(solution, sensitivities, of_sensitivities, mask)
                change = moved if change is None else change + moved
            assert change is not None
            # one probe at a time stays in a CPU's cache, and stops when it is done
            parts = change.split(len(change) if change.is_cuda else 1)
            return torch.cat([solved(part, weight, sensitivities, mask) for part in parts])

        return push

    def pull(inputs: Sequence[Tensor], output: Tensor) -> Pull:
        _, weight, sensitivities, mask = (tensor.detach() for tensor in inputs)

        def transposed(cotangent: Tensor) -> tuple[Tensor | None, ...]:
            of_right_side = solved(cotangent.detach(), weight, sensitivities, mask)
            with torch.enable_grad():
                given = weight.clone().requires_grad_(), sensitivities.clone().requires_grad_()
                mapped = _encoded_twice(output.detach(), given[1], mask) + given[0] * output.detach()
                of_weight, of_sensitivities = torch.autograd.grad(mapped, given, -of_right_side)
            return of_right_side, of_weight, of_sensitivities, None

        return transposed

    return implicit(solved, rule, pull, name=method)


def normal_operator(sensitivities: Tensor, mask: Tensor) -> Callable[[Tensor], Tensor]:
    """`A^H A` of images `(..., y, x)`, centred, without a shift of any coil.

    Parameters
    ----------
    sensitivities
        Shape `(coils, y, x)`, complex.
    mask
        Sampled positions, shape `(k1, k0)`.
    """
    operator = _uncentred_operator(sensitivities.real.new_zeros(()), sensitivities, mask)
    axes = (-2, -1)
    return lambda images: torch.fft.fftshift(operator(torch.fft.ifftshift(images, dim=axes)), dim=axes)


def normal_between(sensitivities: Tensor, mask: Tensor, rows: Tensor, columns: Tensor) -> Callable[[Tensor], Tensor]:
    r"""`A^H A` of images on another grid than that of the samples: finer, or a part of the field of view.

    .. math:: N = \frac1g \sum_c S_c^* P M P^H S_c

    with the transforms P from k-space to the image, and g, which :math:`P P^H` multiplies images by at most, so that
    :math:`\|N\| \le 1`. On the grid of the samples it is `normal_operator`.

    Parameters
    ----------
    sensitivities
        Shape `(coils, y, x)`, complex, unit-norm.
    mask
        Sampled positions, shape `(k1, k0)`.
    rows, columns
        From k-space to the image along y and x, shapes `(y, k1)` and `(x, k0)`, complex.
    """
    gain = float(torch.linalg.matrix_norm(rows, 2) * torch.linalg.matrix_norm(columns, 2)) ** 2
    conjugated = (sensitivities.conj() / gain).resolve_conj()
    back = rows.mH, columns.mH

    def operator(images: Tensor) -> Tensor:
        # images: (..., y, x) -> (..., coils, k1, k0) -> (..., y, x)
        samples = apply_axes(back, sensitivities * images.unsqueeze(-3)).mul_(mask)
        return (conjugated * apply_axes((rows, columns), samples)).sum(dim=-3)

    return operator


def _encoded_twice(images: Tensor, sensitivities: Tensor, mask: Tensor) -> Tensor:
    """`A^H A` of images, `(..., y, x)`, the plain way."""
    encoding = SenseEncoding(sensitivities, mask)
    return encoding.adjoint(encoding.forward(images))


def _change(images: Tensor, sensitivities: Tensor, tangents: Tensor, mask: Tensor) -> Tensor:
    r""":math:`(\dot A^H A + A^H \dot A) x` for tangents of the sensitivities, `(probes, batch, coils, y, x)`."""
    encoding, changed = SenseEncoding(sensitivities, mask), SenseEncoding(tangents, mask)
    return changed.adjoint(encoding.forward(images)) + encoding.adjoint(changed.forward(images))


def _uncentred_operator(weight: Tensor, sensitivities: Tensor, mask: Tensor) -> Callable[[Tensor], Tensor]:
    r""":math:`A^H A + \lambda` between images that are shifted, so that no transform need be.

    Axes along which the mask is constant need no Fourier transform.
    """
    axes = [axis for axis in (-2, -1) if not _constant_along(mask, axis)]
    maps = torch.fft.ifftshift(sensitivities, dim=(-2, -1))
    conjugated = maps.conj().resolve_conj()
    sampled = torch.fft.ifftshift(mask, dim=(-2, -1))

    def operator(images: Tensor) -> Tensor:
        # images: (..., y, x) -> (..., coils, y, x)
        coil_images = maps * images.unsqueeze(-3)
        if axes:
            coil_images = torch.fft.ifftn(torch.fft.fftn(coil_images, dim=axes).mul_(sampled), dim=axes)
        else:
            coil_images = coil_images.mul_(sampled)
        return coil_images.mul_(conjugated).sum(dim=-3).add_(weight * images)

    return operator


def _constant_along(mask: Tensor, axis: int) -> bool:
    return torch.equal(mask, mask.narrow(axis, 0, 1).expand_as(mask))
