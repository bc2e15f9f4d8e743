"""Conjugate gradients for batches of Hermitian positive semidefinite systems."""

from collections.abc import Callable

import torch
from torch import Tensor

SINGULAR = "the least-squares problem is (nearly) singular: choose a regularization above 0"


def conjugate_gradients(
    operator: Callable[[Tensor], Tensor],
    right_side: Tensor,
    *,
    tolerance: float = 1e-6,
    max_iterations: int = 500,
    iterations: int | None = None,
    method: str = "sense",
    advice: str = SINGULAR,
) -> Tensor:
    r"""Solve :math:`H x = b` for each member of a batch, from zero, to a relative residual.

    Hestenes & Stiefel, J Res Natl Bur Stand 1952. Every member runs with steps of its own until all have
    :math:`\|b - H x\| \le \text{tolerance} \cdot \|b\|`; one that is there stands still. Solved to the end, the
    solution is linear in b, so noise passes through it exactly; a fixed small number of iterations would not be.

    Parameters
    ----------
    operator
        H, on tensors `(..., y, x)`, complex.
    right_side
        b, shape `(..., y, x)`; the last two axes are one system.
    tolerance
        Relative residual.
    max_iterations
        Limit.
    iterations
        Stop after so many at the latest, whatever the residual, and without an error: for training only.
    method, advice
        Who solves, and what to do about a system that cannot be solved: for the error's text.

    Raises
    ------
    ValueError
        If the limit is reached first: the system is singular or nearly so; or if values are not finite.
    """
    residual = right_side.clone(memory_format=torch.contiguous_format)
    solution, direction = torch.zeros_like(residual), residual.clone()
    # updated in place, as rows of real numbers: (..., 2yx)
    solved, left, along = (_numbers(tensor) for tensor in (solution, residual, direction))
    energy = torch.linalg.vecdot(left, left).unsqueeze(-1)
    target = tolerance**2 * energy
    for _ in range(max_iterations if iterations is None else iterations):
        if bool((energy <= target).all()):
            return solution
        mapped = _numbers(operator(direction))
        curvature = torch.linalg.vecdot(along, mapped).unsqueeze(-1)
        active = (energy > target) & (curvature > 0)
        step = torch.where(active, energy / torch.where(active, curvature, 1), 0)
        solved.addcmul_(step, along)
        left.addcmul_(step, mapped, value=-1)
        renewed = torch.linalg.vecdot(left, left).unsqueeze(-1)
        turn = torch.where(active, renewed / torch.where(active, energy, 1), 0)
        along.mul_(turn).add_(left)
        energy = renewed
    if iterations is not None or bool((energy <= target).all()):
        return solution
    if not bool(energy.isfinite().all()):
        raise ValueError(f"{method}: conjugate gradients met values that are not finite")
    tiny = torch.finfo(energy.dtype).tiny
    worst = float((energy / (target / tolerance**2).clamp_min(tiny)).max() ** 0.5)
    raise ValueError(
        f"{method}: conjugate gradients stopped at a relative residual of {worst:.1e} after {max_iterations} "
        f"iterations, {tolerance:.0e} is needed; {advice}"
    )


def _numbers(images: Tensor) -> Tensor:
    """Complex images as rows of real numbers, `(..., y, x)` to `(..., 2yx)`; in the same memory if that is in order."""
    return torch.view_as_real(images).flatten(-3)
