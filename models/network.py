"""Any network with the documented signature, bound to a plane."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from voxelsigma.models.grid import Window, apply_axes
from voxelsigma.models.problem import PlaneProblem

NetworkFunction: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From whitened k-space `(coils, k1, k0)`, sensitivities `(coils, y, x)` and mask `(k1, k0)` to an image `(y, x)`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A trained network, ready to be bound to a plane."""

    function: NetworkFunction

    def bind(self, problem: PlaneProblem) -> "NetworkReconstruction":
        """Reconstruction of one plane."""
        windows = problem.windows(symmetric=True)
        size = (windows[0].size, windows[1].size)
        weights = problem.cropped_weights(windows)
        return NetworkReconstruction(
            function=self.function,
            windows=windows,
            sensitivities=problem.sensitivities_on(size),
            mask=(weights > 0).to(weights.dtype),
            output=problem.output_matrices(windows),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkReconstruction:
    """A network on the smallest grid around the origin that holds all acquired lines, then interpolation."""

    function: NetworkFunction
    windows: tuple[Window, Window]
    sensitivities: Tensor
    mask: Tensor
    output: tuple[Tensor | None, Tensor | None]

    def __call__(self, kspace: Tensor) -> Tensor:
        """Reconstruct k-space on the encoded matrix, `(coils, k1, k0)` to `(y, x)`."""
        rows, columns = self.windows
        samples = columns.crop(rows.crop(kspace, -2), -1)
        image = self.function(samples, self.sensitivities, self.mask)
        # a network's biases put something where no coil sees anything: that is neither image nor noise
        seen = self.sensitivities.abs().square().sum(dim=0) > 0
        return apply_axes(self.output, image * seen)
