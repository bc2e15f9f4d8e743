"""Scans of heads that no shipped network was trained on, to compare reconstructions by."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Literal

import numpy as np
from torch import Tensor

from voxelsigma.formats.masks import Kind
from voxelsigma.models.figures import MAPS, MASK_TITLES, MASKS
from voxelsigma.training.examples import Example, ExampleSettings, collate, draw_example
from voxelsigma.training.volumes import Volume

HELD_OUT = ("head_07", "head_09")
MATRIX = 320
COILS = 8
SNR = 20.0
CENTRE = 24
CORRELATION = 0.3

Maps = Literal["full", "masked"]
"""Sensitivities that cover the field of view, or, as ESPIRiT makes them, that end at the object."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A kind of scan.

    Parameters
    ----------
    mask, acceleration
        Sampling mask and its R.
    maps
        Which sensitivities.
    matrix
        Voxels along y and x.
    snr
        Mean object magnitude of the fully sampled image, in standard deviations of the noise per real component.
    """

    mask: Kind
    acceleration: float
    maps: Maps = "full"
    matrix: int = MATRIX
    snr: float = SNR

    def __post_init__(self) -> None:
        if self.mask not in MASKS:
            raise ValueError(f"evaluate: mask must be one of {', '.join(MASKS)}, got {self.mask!r}")
        if self.maps not in MAPS:
            raise ValueError(f"evaluate: maps must be {' or '.join(MAPS)}, got {self.maps!r}")
        if self.matrix < 32 or self.matrix % 4:
            raise ValueError(f"evaluate: matrix must be a multiple of 4 from 32, got {self.matrix}")
        if not 1 <= self.acceleration <= self.matrix / 4:
            raise ValueError(f"evaluate: acceleration must be from 1 to {self.matrix // 4}, got {self.acceleration:g}")
        if self.mask == "uniform_1d" and self.acceleration % 1:
            raise ValueError(f"evaluate: acceleration must be a whole number for uniform_1d, got {self.acceleration:g}")
        if not (isfinite(self.snr) and self.snr > 0):
            raise ValueError(f"evaluate: snr must be a finite number above 0, got {self.snr:g}")

    @property
    def sampling(self) -> str:
        """Mask and R in words."""
        return f"{MASK_TITLES[self.mask]} R={self.acceleration:g}"

    @property
    def name(self) -> str:
        """The setting in words."""
        return f"{self.sampling}, {self.maps} maps"

    @property
    def centre(self) -> int:
        """Reference lines, or the side of the reference square: `CENTRE`, or at most three quarters of the samples."""
        if self.mask in ("random_1d", "uniform_1d"):
            return min(CENTRE, 3 * round(self.matrix / self.acceleration) // 4)
        return min(CENTRE, int((0.75 * self.matrix**2 / self.acceleration) ** 0.5))

    def examples(self) -> ExampleSettings:
        """What examples of it are drawn from."""
        return ExampleSettings(
            matrix=(self.matrix, self.matrix),
            coils=(COILS, COILS),
            many_coils_share=0.0,
            kinds=(self.mask,),
            acceleration=(self.acceleration, self.acceleration),
            centre=self.centre,
            reference_share=1.0,
            snr=(self.snr, self.snr),
            correlation=CORRELATION,
            support_share=float(self.maps == "masked"),
        )


def settings(
    masks: Iterable[str],
    accelerations: Iterable[float],
    maps: Iterable[str],
    *,
    matrix: int = MATRIX,
    snr: float = SNR,
) -> tuple[Setting, ...]:
    """All combinations.

    Raises
    ------
    ValueError
        If one of them is not possible, or there are none.
    """
    accelerated = tuple(accelerations)
    chosen = tuple(
        Setting(mask=mask, acceleration=acceleration, maps=support, matrix=matrix, snr=snr)  # type: ignore[arg-type]
        for support in maps
        for mask in masks
        for acceleration in accelerated
    )
    if not chosen:
        raise ValueError("evaluate: no setting is left; expected at least one mask, one acceleration and one of maps")
    return chosen


def held_out_slices(volumes: Sequence[Volume], drawn: ExampleSettings, *, slices: int, seed: int) -> list[Example]:
    """`slices` scans, taken from the volumes in turn; the settings must name one size."""
    sizes = drawn.coils[0], drawn.matrix[0], drawn.matrix[0]
    return [
        draw_example([volumes[number % len(volumes)]], drawn, sizes, np.random.default_rng([seed, number]))
        for number in range(slices)
    ]


def held_out_scans(volumes: Sequence[Volume], settings: ExampleSettings, *, slices: int, seed: int) -> Example:
    """The same as a batch."""
    return collate(held_out_slices(volumes, settings, slices=slices, seed=seed))


def reference(scan: Example) -> Tensor:
    """The image without noise.

    Raises
    ------
    ValueError
        If the scan has none.
    """
    if scan.target is None:
        raise ValueError("evaluate: a scan has no reference to compare with")
    return scan.target
