"""Any network with the documented signature, bound to a plane."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from voxelsigma.models.grid import Window, apply_axes
from voxelsigma.models.problem import PlaneProblem

NetworkFunction: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From whitened k-space `(coils, k1, k0)`, sensitivities `(coils, y, x)` and mask `(k1, k0)` to an image `(y, x)`.

K-space, sensitivities and image are complex; an image may be real. All axes are centred.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A trained network, ready to be bound to a plane.

    Parameters
    ----------
    function
        The network.
    estimates_sensitivities
        Whether it takes no notice of the sensitivities, but estimates its own from the data.
    """

    function: NetworkFunction
    estimates_sensitivities: bool = False

    def bind(self, problem: PlaneProblem) -> "NetworkReconstruction":
        """Reconstruction of one plane."""
        windows = problem.windows(symmetric=True)
        size = (windows[0].size, windows[1].size)
        weights = problem.cropped_weights(windows)
        sensitivities = problem.sensitivities_on(size)
        return NetworkReconstruction(
            function=self.function,
            windows=windows,
            sensitivities=sensitivities,
            mask=(weights > 0).to(weights.dtype),
            output=problem.output_matrices(windows),
            # a network's biases put something where no coil sees anything: that is neither image nor noise
            seen=None if self.estimates_sensitivities else sensitivities.abs().square().sum(dim=0) > 0,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkReconstruction:
    """A network on the smallest grid around the origin that holds all acquired lines, then interpolation.

    Parameters
    ----------
    function
        The network.
    windows
        Its grid, as parts of the encoded axes.
    sensitivities, mask
        On that grid.
    output
        Interpolation to the wanted image, a matrix for each axis or None.
    seen
        Where the image is kept, shape `(y, x)`; None for everywhere.
    """

    function: NetworkFunction
    windows: tuple[Window, Window]
    sensitivities: Tensor
    mask: Tensor
    output: tuple[Tensor | None, Tensor | None]
    seen: Tensor | None = None

    def __call__(self, kspace: Tensor) -> Tensor:
        """Reconstruct k-space on the encoded matrix, `(coils, k1, k0)` to `(y, x)`.

        Raises
        ------
        TypeError, ValueError
            If the network returns anything but one image of its grid.
        """
        rows, columns = self.windows
        samples = columns.crop(rows.crop(kspace, -2), -1)
        image = self.function(samples, self.sensitivities, self.mask)
        if not isinstance(image, Tensor):
            raise TypeError(f"network: must return one tensor, got {type(image).__name__}")
        if image.shape != (*samples.shape[:-3], *samples.shape[-2:]):
            raise ValueError(
                f"network: returned an image of shape {tuple(image.shape)}, k-space has {tuple(samples.shape)}; "
                "expected (y, x) of the same matrix"
            )
        if self.seen is not None:
            image = image * self.seen
        if image.is_complex() or self.output == (None, None):
            return apply_axes(self.output, image)
        # the interpolation is complex where the window has an even size; of a real image the real part counts
        return apply_axes(self.output, torch.complex(image, torch.zeros_like(image))).real
