"""What examples are drawn from: the ranges, and the sizes and masks drawn from them."""

import math
from dataclasses import dataclass, replace

import numpy as np

from voxelsigma.formats.masks import Kind, Mask, make_mask

Sizes = tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleSettings:
    """What examples are drawn from; every range includes both ends.

    Of measured scans only masks (`kinds`, `acceleration`, `centre`), `snr` and `support_share` are drawn.

    Parameters
    ----------
    matrix
        Range of the number of voxels along y and, independently, along x; multiples of 4.
    coils
        Range of the number of coils.
    many_coils
        Number of coils of the share `many_coils_share` of the examples.
    many_coils_share
        See `many_coils`; 0 to 1.
    kinds
        Masks, each equally often.
    acceleration
        Range of the acceleration R, drawn log-uniformly, whole numbers for `uniform_1d`.
    centre
        Width of the fully sampled centre; by default random, up to 0.15 of the axis and within the budget.
        `uniform_1d` gets that many reference lines in addition to its own, by default at least 8; 0 for none.
    reference_share
        Share of the examples with `uniform_1d` that have reference lines; 0 to 1.
    snr
        Range of the mean object magnitude of the fully sampled image in units of the noise's standard
        deviation per real component, drawn log-uniformly.
    correlation
        Largest correlation of the noise of neighbouring coils before whitening, drawn from 0; 0 for white noise.
    support_share
        Share of the examples whose sensitivities are 0 outside the dilated object; 0 to 1.
    intensity_share
        Share of the examples cut from intensity volumes rather than label maps, where there are both; 0 to 1.
    """

    matrix: tuple[int, int] = (96, 144)
    coils: tuple[int, int] = (4, 16)
    many_coils: int = 32
    many_coils_share: float = 0.04
    kinds: tuple[Kind, ...] = ("uniform_1d", "random_1d", "random_2d", "poisson_disc")
    acceleration: tuple[float, float] = (2.0, 12.0)
    centre: int | None = None
    reference_share: float = 0.7
    snr: tuple[float, float] = (5.0, 50.0)
    correlation: float = 0.3
    support_share: float = 0.5
    intensity_share: float = 0.25

    def __post_init__(self) -> None:
        for name in ("matrix", "coils", "acceleration", "snr"):
            low, high = getattr(self, name)
            if not 0 < low <= high < math.inf:
                raise ValueError(f"examples: {name} must be a range of positive numbers, got {(low, high)}")
        if self.matrix[0] % 4 or self.matrix[1] % 4:
            raise ValueError(f"examples: matrix must be a range of multiples of 4, got {self.matrix}")
        if self.many_coils < 1:
            raise ValueError(f"examples: many_coils must be at least 1, got {self.many_coils}")
        for name in ("many_coils_share", "reference_share", "support_share", "intensity_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"examples: {name} must be from 0 to 1, got {getattr(self, name)}")
        if self.centre is not None and self.centre < 0:
            raise ValueError(f"examples: centre must be at least 0, got {self.centre}")
        if not 0 <= self.correlation < 1:
            raise ValueError(f"examples: correlation must be at least 0 and below 1, got {self.correlation}")
        if self.acceleration[0] < 1:
            raise ValueError(f"examples: acceleration must be at least 1, got {self.acceleration}")
        if not self.kinds:
            raise ValueError("examples: kinds must name at least one mask, got none")


def check_drawable(settings: ExampleSettings) -> None:
    """Find at once the masks that could not be drawn for simulated scans.

    Of every kind the hardest mask is tried: the smallest matrix at the largest acceleration.

    Raises
    ------
    ValueError
        The acceleration or the centre does not fit the smallest matrix.
    """
    least, acceleration = settings.matrix[0], settings.acceleration[1]
    for kind in settings.kinds:
        # both 2D kinds have the same limits, and this one takes no time
        alike: Kind = "random_2d" if kind == "poisson_disc" else kind
        worst = replace(settings, kinds=(alike,), acceleration=(acceleration, acceleration), reference_share=1.0)
        try:
            draw_mask((least, least), worst, np.random.default_rng(0))
        except ValueError as error:
            centre = "random" if settings.centre is None else settings.centre
            raise ValueError(
                f"examples: {kind} cannot be drawn with centre {centre}, matrix {least} (the smallest) and "
                f"acceleration {acceleration:g} (the largest): {error}"
            ) from None


def draw_sizes(settings: ExampleSettings, rng: np.random.Generator) -> Sizes:
    """Draw what the examples of a batch share: the number of coils and the two axes of the matrix."""
    low, high = settings.matrix
    y, x = (low + 4 * int(n) for n in rng.integers(0, (high - low) // 4 + 1, 2))
    many = rng.random() < settings.many_coils_share
    coils = settings.many_coils if many else int(rng.integers(settings.coils[0], settings.coils[1] + 1))
    return coils, y, x


def draw_mask(shape: tuple[int, int], settings: ExampleSettings, rng: np.random.Generator) -> Mask:
    """Draw a mask of k-space `(k1, k0)`.

    Raises
    ------
    ValueError
        The settings' centre does not fit the drawn acceleration or the shape.
    """
    kind = settings.kinds[rng.integers(len(settings.kinds))]
    acceleration = log_uniform(settings.acceleration, rng)
    if kind == "uniform_1d":
        acceleration = round(acceleration)
        mask = make_mask(kind, shape, acceleration, centre=0, rng=rng)
        if rng.random() < settings.reference_share:
            first, width = _reference_lines(shape[0], settings.centre, rng)
            mask[first : first + width] = True
        return mask
    if kind == "random_1d":
        most = min(0.8 * shape[0] / acceleration, 0.15 * shape[0])
    else:
        most = min(np.sqrt(0.6 * shape[0] * shape[1] / acceleration), 0.15 * min(shape))
    centre = int(rng.integers(min(4, int(most)), int(most) + 1)) if settings.centre is None else settings.centre
    return make_mask(kind, shape, acceleration, centre=centre, rng=rng)


def _reference_lines(lines: int, centre: int | None, rng: np.random.Generator) -> tuple[int, int]:
    """First reference line and their number, which is random where the settings leave it open."""
    if centre is not None and centre > lines:
        raise ValueError(f"centre must be from 0 to {lines}, got {centre}")
    width = min(lines, int(rng.integers(8, 1 + max(8, int(0.2 * lines))))) if centre is None else centre
    return lines // 2 - width // 2, width


def log_uniform(limits: tuple[float, float], rng: np.random.Generator) -> float:
    """A number between two limits whose logarithm is uniform."""
    return float(np.exp(rng.uniform(np.log(limits[0]), np.log(limits[1]))))
