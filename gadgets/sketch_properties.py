"""Properties of the sketch gadget."""

from dataclasses import dataclass
from typing import Final

from voxelsigma.gadgets.properties import boolean, choice, integer, number, several, text

MAPS: Final = ("magnitude", "complex", "error", "lower", "upper", "freedom", "snr", "gfactor")
"""Series that can be asked for: σ, its standard error, 95 % interval and degrees of freedom, and what is made of σ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SketchProperties:
    """Properties of `sketch`.

    It stops at `probes`, at `target_error` (relative, median over the object) or after `time_budget` seconds a plane,
    whichever comes first; with a `seed` on counts alone, so that it can be repeated: at `probes`, or at the fewer that
    reach `target_error` for certain, whatever a prediction says. `maps` lists the series to emit. `estimator` `auto`
    computes exactly where that is cheap (a linear reconstruction with sampling along one axis), and for other linear
    reconstructions probes image space (`pico`) or k-space (`sketch`), by what their first probes tell. `dtype` is the
    data type of the series.
    `precision` `auto` lets a GPU push probes in bfloat16 or TF32 where the first ones show that σ stays within 1 %.
    `prior` `auto` begins with the map that the model's predictor makes, if its card has one: after `prior_probes`
    probes it is tested, and while it passes, those (or as many as `target_error` takes) are enough; of data beyond
    what the model is fit for at least 16. With a `seed` it is tested and made use of all the same, but saves no probes.
    `model` names the card of images that another process made, where that card is not a shipped one.
    """

    probes: int = integer(64, 2, 65536)
    target_error: float | None = number(None, 1e-4, 1.0)
    time_budget: float | None = number(None, 1e-3, 86400.0)
    seed: int | None = integer(None, 0, 2**62)
    maps: tuple[str, ...] = several(("magnitude",), *MAPS)
    estimator: str = choice("auto", "auto", "sketch", "pico", "exact")
    control_variate: bool = boolean(True)
    prior: str = choice("auto", "auto", "off")
    prior_probes: int = integer(8, 8, 65536)
    model: str = text("sense")
    chunk: int | None = integer(None, 1, 4096)
    precision: str = choice("auto", "auto", "float32")
    dtype: str = choice("float32", "float32", "uint16")
    device: str = choice("auto", "auto", "cpu", "cuda")
    forward: tuple[str, ...] = several((), "covariance", "kspace", "sensitivities")
