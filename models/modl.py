"""MoDL: unrolled reconstruction whose data consistency is solved to the end."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from voxelsigma.models.encoding import SenseEncoding
from voxelsigma.models.normal_equations import least_squares_solver
from voxelsigma.models.scale import divided, root_mean_square
from voxelsigma.models.unrolled import ResidualNetwork

INITIAL_WEIGHT = 0.05


class Modl(nn.Module):
    r"""Model-based deep learning: denoise, then solve for the data.

    .. math::
        x_0 = A^H y / s, \qquad
        z_k = x_k + D_k(x_k), \qquad
        x_{k+1} = (A^H A + \lambda_k)^{-1} (A^H y / s + \lambda_k z_k), \qquad
        f(y) = s \, x_K

    with a residual convolutional network :math:`D_k` and a learned :math:`\lambda_k > 0` (Aggarwal, Mani & Jacob, IEEE
    Trans Med Imaging 2019). The scale :math:`s`, the root mean square of the zero-filled image, is computed from the
    data, so :math:`f(c\,y) = c\,f(y)` for every :math:`c > 0`, and is part of the Jacobian.

    The least-squares problem is solved by conjugate gradients to a relative residual; its derivative is that of the
    solution, one more solve for a batch of tangents. In training mode, and only there, primal and gradient stop
    after a fixed number of iterations.

    Parameters
    ----------
    steps
        Number of steps K.
    blocks, channels
        Residual blocks and feature channels of a step's network.
    shared
        Whether all steps have one network and one λ, as in the paper, or each its own.
    tolerance
        Relative residual.
    iterations
        Of the conjugate gradients in training.
    """

    def __init__(
        self,
        *,
        steps: int = 4,
        blocks: int = 2,
        channels: int = 32,
        shared: bool = False,
        tolerance: float = 1e-6,
        iterations: int = 10,
    ) -> None:
        super().__init__()
        if not 0 < tolerance < 1:
            raise ValueError(f"modl: tolerance must be above 0 and below 1, got {tolerance}")
        if steps < 1 or iterations < 1:
            raise ValueError(f"modl: steps and iterations must be at least 1, got {steps} and {iterations}")
        own = 1 if shared else steps
        self.networks = nn.ModuleList(ResidualNetwork(blocks=blocks, channels=channels) for _ in range(own))
        # softplus of it is λ
        self.raw_weights = nn.Parameter(torch.full((own,), math.log(math.expm1(INITIAL_WEIGHT))))
        self.steps = steps
        self.tolerance = tolerance
        self.iterations = iterations

    @property
    def weights(self) -> Tensor:
        """Weights λ of the denoised image, one for each network of its own, above 0."""
        return functional.softplus(self.raw_weights)

    def forward(self, kspace: Tensor, sensitivities: Tensor, mask: Tensor) -> Tensor:
        """Reconstruct.

        Parameters
        ----------
        kspace
            Whitened k-space, shape `(coils, k1, k0)` or `(batch, coils, k1, k0)`, complex.
        sensitivities
            Unit-norm coil sensitivities, shape `(coils, y, x)` or `(batch, coils, y, x)`, complex.
        mask
            Sampled positions, 1 or 0, shape `(k1, k0)` or `(batch, 1, k1, k0)`, real.

        Returns
        -------
            Images, shape `(y, x)` or `(batch, y, x)`, complex, in the units of the zero-filled image.

        Raises
        ------
        ValueError
            In evaluation, if a least-squares problem is too nearly singular to be solved.
        """
        zero_filled = SenseEncoding(sensitivities, mask).adjoint(kspace)
        batched = zero_filled if zero_filled.dim() == 3 else zero_filled.unsqueeze(0)
        scale = root_mean_square(batched)
        target = images = divided(batched, scale)
        solve = least_squares_solver(
            tolerance=self.tolerance, iterations=self.iterations if self.training else None, method="modl"
        )
        maps = sensitivities if sensitivities.dim() == 4 else sensitivities.unsqueeze(0)
        sampled = (mask if mask.dim() == 4 else mask.expand(1, 1, *mask.shape[-2:])) != 0
        for step in range(self.steps):
            # where it is shared there is one
            own = min(step, len(self.networks) - 1)
            weight = self.weights[own]
            denoised = images + self.networks[own](images)
            images = solve(target + weight * denoised, weight, maps, sampled)
        return (images * scale).reshape(zero_filled.shape)
