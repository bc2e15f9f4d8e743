"""Noise2Recon: consistency under added noise."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from voxelsigma.training.consistency import NoiseUnit, check_consistency, noise_scale, semi_supervised, with_noise
from voxelsigma.training.examples import Example


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise2Recon:
    r"""Supervised where there is a reference, consistent under added noise where there is none.

    .. math::
        L = \begin{cases} \|f(y) - \rho\| & \text{with reference} \\
        \lambda\,\|f(y + \sigma M n) - \bar f(y)\| & \text{without} \end{cases},
        \qquad \sigma \sim U(\sigma_\mathrm{low}, \sigma_\mathrm{high})

    (Desai et al., Noise2Recon, Magn Reson Med 2023). :math:`\bar f(y)` is held constant, M is the scan's own mask and
    n has standard deviation 1 per real component. :math:`\|\cdot\|` is the mean absolute error in units of the object.
    The paper takes batches with and without reference in turn. Defaults are those of the authors' configurations.

    Parameters
    ----------
    weight
        :math:`\lambda`.
    noise
        Range of :math:`\sigma`, drawn anew for every scan.
    noise_unit
        `image`, as in the paper: the 95th percentile of the zero-filled magnitude. `noise`: the standard deviation
        of the scan's own noise, per real component. In SNR units the first is :math:`P_{95}(|A^H y|)` of the second.
    supervised_consistency
        Whether batches with a reference get the consistency term too.
    """

    weight: float = 0.1
    noise: tuple[float, float] = (0.2, 0.5)
    noise_unit: NoiseUnit = "image"
    supervised_consistency: bool = False

    def __post_init__(self) -> None:
        check_consistency(
            "noise2recon",
            weight=self.weight,
            noise=self.noise,
            noise_unit=self.noise_unit,
            supervised_consistency=self.supervised_consistency,
        )

    def __call__(
        self, network: nn.Module, example: Example, rng: np.random.Generator, *, progress: float = 1.0
    ) -> Tensor:
        """Loss of a batch; see `Objective`. Draws one deviation for each scan, then the noise."""

        def noisy() -> Tensor:
            drawn = rng.uniform(*self.noise, len(example.kspace))
            return with_noise(example, example.kspace, drawn * noise_scale(example, self.noise_unit), rng)

        return semi_supervised(
            network, example, noisy, weight=self.weight, supervised_consistency=self.supervised_consistency
        )
