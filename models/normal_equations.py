r"""Regularised least squares :math:`(A^H A + \lambda)^{-1} b` as one differentiable function."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from voxelsigma.models.conjugate_gradients import conjugate_gradients
from voxelsigma.models.encoding import SenseEncoding
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
        normal = normal_operator(sensitivities, mask)
        return conjugate_gradients(
            lambda images: normal(images).add_(weight * images),
            right_side,
            tolerance=tolerance,
            max_iterations=_MAX_ITERATIONS,
            iterations=iterations,
            method=method,
            advice=_ADVICE,
        )

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


def normal_operator(sensitivities: Tensor, sampled: Tensor) -> Callable[[Tensor], Tensor]:
    """`A^H A` of images `(..., y, x)`, with eigenvalues from 0 to 1.

    The image may be a part of the field of view that k-space has: it is padded with zeros. No shift of it is needed,
    since a convolution does not ask where the origin is; along axes on which all is sampled nothing is to be done.

    Parameters
    ----------
    sensitivities
        Unit-norm, shape `(..., coils, y, x)`, complex.
    sampled
        1 or 0 for each position of k-space, real or boolean, shape `(..., k1, k0)` that goes with the coils': at least
        as many positions as voxels.
    """
    axes = [axis for axis in (-2, -1) if not _constant_along(sampled, axis)]
    padded = [sampled.shape[axis] for axis in axes]
    mask = torch.fft.ifftshift(sampled, dim=(-2, -1))
    for axis in {-2, -1} - set(axes):
        mask = mask.narrow(axis, 0, 1)
    rows, columns = sensitivities.shape[-2:]
    conjugated = sensitivities.conj().resolve_conj()

    def operator(images: Tensor) -> Tensor:
        # images: (..., y, x) -> (..., coils, y, x)
        coil_images = sensitivities * images.unsqueeze(-3)
        if axes:
            spectrum = torch.fft.fftn(coil_images, s=padded, dim=axes).mul_(mask)
            coil_images = torch.fft.ifftn(spectrum, dim=axes)[..., :rows, :columns]
        else:
            coil_images = coil_images.mul_(mask)
        return coil_images.mul_(conjugated).sum(dim=-3)

    return operator


def _encoded_twice(images: Tensor, sensitivities: Tensor, mask: Tensor) -> Tensor:
    """`A^H A` of images, `(..., y, x)`, the plain way."""
    encoding = SenseEncoding(sensitivities, mask)
    return encoding.adjoint(encoding.forward(images))


def _change(images: Tensor, sensitivities: Tensor, tangents: Tensor, mask: Tensor) -> Tensor:
    r""":math:`(\dot A^H A + A^H \dot A) x` for tangents of the sensitivities, `(probes, batch, coils, y, x)`."""
    encoding, changed = SenseEncoding(sensitivities, mask), SenseEncoding(tangents, mask)
    return changed.adjoint(encoding.forward(images)) + encoding.adjoint(changed.forward(images))


def _constant_along(mask: Tensor, axis: int) -> bool:
    return torch.equal(mask, mask.narrow(axis, 0, 1).expand_as(mask))
