"""How a predictor is made of a model card."""

from dataclasses import dataclass
from typing import Final, Literal

from voxelsigma.models.predictor_file import MOST_CHANNELS, MOST_LEVELS
from voxelsigma.models.surrogate_net import check_stages
from voxelsigma.training.checks import check_choice, check_number, check_whole
from voxelsigma.training.config import FitSettings

CALIBRATION_FIRST: Final = 2**20
"""Number of the first scan that is calibrated with: those before are learned from."""

_CLIPS: Final = (1.0, 0.3)
"""Largest gradient, of the predictor and of its surrogate."""
_PRECISIONS: Final = ("32-true", "bf16-mixed", "64-true")


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillSettings:
    """How a predictor is made.

    Parameters
    ----------
    scans, probes
        Scans to learn from, and probes pushed through each to be predicted, beside those to predict from.
    calibration_scans, calibration_probes
        Further scans that tell what predictions are worth, and probes of each to be predicted: so many that their own
        error is small beside that of a prediction.
    matrix
        Range of the simulated scans' matrix, multiples of 4.
    steps, batch, learning_rate
        Of Adam, batches of crops.
    crop
        Side of a crop, or that of the smallest scan.
    channels, levels
        Of the `SigmaPredictor`.
    surrogate_scans, surrogate_steps, surrogate_learning_rate, surrogate_channels, surrogate_levels
        The same of its `SurrogateNet`, which is made first, from a block of probes a scan; a step sees a whole scan.
    surrogate_stages
        Of the `SurrogateNet`; None for those that fit the card's architecture.
    precision
        `32-true`, `bf16-mixed` or `64-true`.
    checkpoint_every, log_every
        Steps between two.
    seed
        Of scans, probes, weights and crops.
    """

    scans: int = 400
    probes: int = 8
    calibration_scans: int = 20
    calibration_probes: int = 64
    matrix: tuple[int, int] = (80, 128)
    steps: int = 1500
    batch: int = 4
    learning_rate: float = 2e-3
    crop: int = 80
    channels: int = 24
    levels: int = 3
    surrogate_scans: int = 800
    surrogate_steps: int = 12000
    surrogate_learning_rate: float = 1.5e-3
    surrogate_channels: int = 32
    surrogate_levels: int = 3
    surrogate_stages: tuple[float, ...] | None = None
    precision: Literal["32-true", "bf16-mixed", "64-true"] = "bf16-mixed"
    checkpoint_every: int = 200
    log_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("calibration_scans", "batch", "checkpoint_every", "log_every"):
            check_whole("distill", name, getattr(self, name), 1)
        for part in ("", "surrogate_"):
            for name in ("scans", "steps", "channels", "levels"):
                check_whole("distill", part + name, getattr(self, part + name), 1)
            for name, most in (("scans", CALIBRATION_FIRST), ("channels", MOST_CHANNELS), ("levels", MOST_LEVELS)):
                check_number("distill", part + name, getattr(self, part + name), 1, most)
            check_number("distill", f"{part}learning_rate", getattr(self, f"{part}learning_rate"), 1e-8, 1)
        if self.surrogate_stages is not None:
            check_stages(self.surrogate_stages)
        for name, least in (("probes", 2), ("calibration_probes", 2), ("seed", 0), ("crop", 16)):
            check_whole("distill", name, getattr(self, name), least)
        check_choice("distill", "precision", self.precision, _PRECISIONS)

    def fit_settings(self, *, surrogate: bool = False) -> FitSettings:
        """What the training loop of either network is told."""
        steps = self.surrogate_steps if surrogate else self.steps
        return FitSettings(
            steps=steps,
            batch=self.batch,
            learning_rate=self.surrogate_learning_rate if surrogate else self.learning_rate,
            warm_up=min(100, steps // 10),
            clip=_CLIPS[surrogate],
            precision=self.precision,
            checkpoint_every=self.checkpoint_every,
            log_every=self.log_every,
            seed=self.seed,
        )
