"""VORTEX: consistency under the physics of the acquisition."""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from voxelsigma.training.checks import check_choice, check_number, check_range, check_whole
from voxelsigma.training.consistency import NoiseUnit, check_consistency, noise_scale, semi_supervised, with_noise
from voxelsigma.training.examples import Example
from voxelsigma.training.motion import shots_of_lines, translated, turned

MotionModel = Literal["phase", "translation"]
Curriculum = Literal["none", "linear", "exponential"]

# time constants of the exponential curriculum in the time of its rise
_TIME_CONSTANTS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Vortex:
    r"""Supervised where there is a reference, consistent under motion and noise.

    .. math::
        L = \|f(y) - \rho\| + \lambda\,\|f(P y + \sigma M n) - \bar f(y)\|

    the first term for scans with a reference only (Desai et al., VORTEX, MIDL 2022). :math:`\bar f(y)` is held
    constant, P is motion between shots, M the scan's own mask, n noise of standard deviation 1 per real component, and
    :math:`\|\cdot\|` the mean absolute error in units of the object. Of the paper's transforms these are the invariant
    ones, those that the image must not show. Its equivariant ones (flips, rotations of the image) are not included.

    Motion in the paper is one of two shots, which take the lines in turn, each with a random phase error,

    .. math:: P y_k = y_k \, e^{-i \pi \alpha m_{s(k)}}, \qquad m_s \sim U(-1, 1), \quad
        \alpha \sim U(\alpha_\mathrm{low}, \alpha_\mathrm{high})

    Its mean over the shots is a phase of the whole image, which no reconstruction can know. The model `translation`
    is rigid motion along y instead, from the mean position, with the same phase at the edge of k-space for the same
    :math:`\alpha`, which here is in voxels:

    .. math:: P y_k = y_k \, e^{-2 \pi i k d_{s(k)} / N}, \qquad d_s = \alpha\,(m_s - \overline{m})

    Defaults are the heavy setting of the paper and of the authors' configurations.

    Parameters
    ----------
    weight
        :math:`\lambda`.
    noise, noise_unit
        As in `Noise2Recon`.
    motion
        Range of :math:`\alpha`, drawn anew for every scan.
    motion_model
        `phase` or `translation`.
    shots
        Number of shots.
    noise_probability, motion_probability
        Chances that a scan gets noise, and motion.
    curriculum
        `none`, or how the upper ends of both ranges rise from the lower ends: with the share t of training done as
        t / T (`linear`) or :math:`(1 - e^{-5t/T}) / (1 - e^{-5})` (`exponential`).
    curriculum_share
        T, the share of training at which they are reached.
    supervised_consistency
        Whether batches with a reference get the consistency term too.
    """

    weight: float = 0.1
    noise: tuple[float, float] = (0.2, 0.5)
    noise_unit: NoiseUnit = "image"
    motion: tuple[float, float] = (0.2, 0.5)
    motion_model: MotionModel = "phase"
    shots: int = 2
    noise_probability: float = 1.0
    motion_probability: float = 1.0
    curriculum: Curriculum = "none"
    curriculum_share: float = 1.0
    supervised_consistency: bool = False

    def __post_init__(self) -> None:
        check_consistency(
            "vortex",
            weight=self.weight,
            noise=self.noise,
            noise_unit=self.noise_unit,
            supervised_consistency=self.supervised_consistency,
        )
        check_range("vortex", "motion", self.motion)
        check_choice("vortex", "motion_model", self.motion_model, get_args(MotionModel))
        check_whole("vortex", "shots", self.shots, 2)
        check_number("vortex", "noise_probability", self.noise_probability, 0, 1)
        check_number("vortex", "motion_probability", self.motion_probability, 0, 1)
        check_choice("vortex", "curriculum", self.curriculum, get_args(Curriculum))
        check_number("vortex", "curriculum_share", self.curriculum_share, 0.01, 1)

    def __call__(
        self, network: nn.Module, example: Example, rng: np.random.Generator, *, progress: float = 1.0
    ) -> Tensor:
        """Loss of a batch; see `Objective`."""
        return semi_supervised(
            network,
            example,
            lambda: self.augment(example, rng, progress=progress),
            weight=self.weight,
            supervised_consistency=self.supervised_consistency,
        )

    def augment(self, example: Example, rng: np.random.Generator, *, progress: float = 1.0) -> Tensor:
        """K-space after motion and noise, the same shape as the scan's.

        Draws, for the whole batch each: which scans move, their α, the shots' m; which scans get noise, their
        deviation, the noise.
        """
        batch = len(example.kspace)
        amounts = self._drawn(self.motion, self.motion_probability, batch, progress, rng)
        shots = amounts[:, None] * rng.uniform(-1, 1, (batch, self.shots))
        moved = self._moved(example, shots)
        deviations = self._drawn(self.noise, self.noise_probability, batch, progress, rng)
        return with_noise(example, moved, deviations * noise_scale(example, self.noise_unit), rng)

    def _drawn(
        self, limits: tuple[float, float], probability: float, batch: int, progress: float, rng: np.random.Generator
    ) -> NDArray[np.float64]:
        """Strengths, shape `(batch,)`, 0 where by chance there is none."""
        low, high = limits
        reached = low + (high - low) * difficulty(self.curriculum, progress / self.curriculum_share)
        chosen = rng.random(batch) < probability
        return chosen * rng.uniform(low, reached, batch)

    def _moved(self, example: Example, shots: NDArray[np.float64]) -> Tensor:
        """K-space whose shots moved by `(batch, shots)`."""
        if self.motion_model == "translation":
            return translated(example.kspace, self._lines(example, shots - shots.mean(axis=1, keepdims=True)))
        return turned(example.kspace, self._lines(example, np.pi * shots))

    def _lines(self, example: Example, shots: NDArray[np.float64]) -> Tensor:
        """Values of the shots, `(batch, shots)`, at their lines, `(batch, k1)`."""
        values = torch.from_numpy(shots).to(example.kspace.device, example.kspace.real.dtype)
        return values.gather(1, shots_of_lines(example.mask, self.shots))


def difficulty(curriculum: Curriculum, progress: float) -> float:
    """Share of a range that is in use, 0 to 1, at a share of the curriculum's time."""
    done = min(max(progress, 0.0), 1.0)
    if curriculum == "none":
        return 1.0
    if curriculum == "linear":
        return done
    return float(np.expm1(-_TIME_CONSTANTS * done) / np.expm1(-_TIME_CONSTANTS))
