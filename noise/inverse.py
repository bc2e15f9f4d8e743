"""A fixed polynomial of the normal operator that is nearly its regularised inverse: linear, as solvers are not."""

import math
from collections.abc import Callable
from typing import Final

from torch import Tensor

Operator = Callable[[Tensor], Tensor]
"""Linear, of images `(probes, y, x)`."""

_TERMS: Final = 1.5
"""By the root of the condition number: what is left of an error is then below 10 %."""


def regularised_inverse(normal: Operator, weight: float) -> Operator:
    r"""Nearly :math:`(N + \lambda)^{-1}`, for N between 0 and 1.

    Chebyshev's semi-iteration (Golub & Varga, Numer Math 1961) from 0, a number of steps that depends on λ alone. So it
    is a polynomial of N: linear, and self-adjoint if N is, which conjugate gradients stopped early are not.

    Parameters
    ----------
    normal
        N, :math:`A^H A` with unit-norm sensitivities.
    weight
        λ, above 0.
    """
    middle, half = 0.5 + weight, 0.5
    steps = math.ceil(_TERMS * math.sqrt(1 + 1 / weight))

    def apply(images: Tensor) -> Tensor:
        left, change = images, images / middle
        found, ratio = change, half / middle
        for _ in range(steps - 1):
            left = left - normal(change) - weight * change
            following = 1 / (2 * middle / half - ratio)
            change = following * ratio * change + (2 * following / half) * left
            found, ratio = found + change, following
        return found

    return apply
