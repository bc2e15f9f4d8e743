"""What a model card says of its reconstruction in numbers."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

MASK_TITLES: Mapping[str, str] = {
    "uniform_1d": "1D uniform",
    "random_1d": "1D random",
    "random_2d": "2D random",
    "poisson_disc": "2D Poisson",
}
"""Kinds of sampling masks, and what they are called in tables."""

MASKS = tuple(MASK_TITLES)
MAPS = ("full", "masked")

_REQUIRED = ("mask", "acceleration", "psnr", "ssim", "linear_psnr", "zero_filled_psnr", "sigma")
_CHOICES: Mapping[str, tuple[str, ...]] = {"mask": MASKS, "maps": MAPS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    r"""Figures of one kind of scan, means over its slices.

    Parameters
    ----------
    mask, acceleration
        Kind of the sampling mask, and its R.
    psnr, ssim
        Of the reconstruction: peak signal-to-noise ratio in dB, structural similarity.
    linear_psnr, zero_filled_psnr
        In dB, of regularised least squares at its best λ, and of the zero-filled image.
    sigma
        Median over the object of the magnitude σ map, SNR units: a fully sampled image has 1.
    noise_ratio
        The same of σ over that of full sampling and :math:`\sqrt{R}`.
    linear_ssim, zero_filled_ssim
        Structural similarity of the two others.
    maps
        Whether the sensitivities cover the field of view (`full`) or end at the object (`masked`).
    """

    mask: str
    acceleration: float
    psnr: float
    ssim: float
    linear_psnr: float
    zero_filled_psnr: float
    sigma: float
    noise_ratio: float | None = None
    linear_ssim: float | None = None
    zero_filled_ssim: float | None = None
    maps: str = "full"

    @property
    def gain(self) -> float:
        """PSNR above the linear reconstruction's, in dB."""
        return self.psnr - self.linear_psnr

    @property
    def key(self) -> tuple[str, float, str]:
        """The kind of scan: mask, R and maps."""
        return self.mask, self.acceleration, self.maps

    def entry(self) -> dict[str, Any]:
        """As a card has it."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def merged_figures(before: Iterable[Figures], after: Iterable[Figures]) -> tuple[Figures, ...]:
    """Rows of two evaluations: `after` replaces what `before` has of the same kind of scan, the others stay."""
    return tuple({row.key: row for row in (*before, *after)}.values())


def checked_figures(path: Path, rows: list[Any]) -> tuple[Figures, ...]:
    """Check the field `figures` of a card.

    Raises
    ------
    ValueError
        If a row is not what it must be; the text names file, row (from 0) and field.
    """
    return tuple(_row(f"{path}: field 'figures[{number}]", row) for number, row in enumerate(rows))


def _row(where: str, row: Any) -> Figures:
    if not isinstance(row, dict):
        raise ValueError(f"{where}' must be a mapping, got {row!r}")
    known = [field.name for field in fields(Figures)]
    for key, value in row.items():
        if key not in known:
            raise ValueError(f"{where}' has the unknown field {key!r}; known are {', '.join(known)}")
        if key in _CHOICES:
            if value not in _CHOICES[key]:
                raise ValueError(f"{where}.{key}' must be one of {', '.join(_CHOICES[key])}, got {value!r}")
        elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{where}.{key}' must be a finite number, got {value!r}")
    missing = [key for key in _REQUIRED if key not in row]
    if missing:
        raise ValueError(f"{where}' lacks the fields {', '.join(missing)}")
    if row["acceleration"] < 1:
        raise ValueError(f"{where}.acceleration' must be at least 1, got {row['acceleration']!r}")
    if row["sigma"] < 0:
        raise ValueError(f"{where}.sigma' must be at least 0, got {row['sigma']!r}")
    return Figures(**row)
