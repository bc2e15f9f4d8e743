"""Pictures of image series: every map with a colour bar and its unit."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from voxelsigma.formats.atomic import write_whole
from voxelsigma.formats.image_file import Series


@dataclass(frozen=True, slots=True)
class _Look:
    """How a series is shown."""

    title: str
    unit: str
    colours: str
    percentile: float = 99.5


_LOOKS = {
    1: _Look("Image", "intensity in SNR units", "gray"),
    2000: _Look("Noise σ, magnitude", "σ in SNR units (1 = fully sampled)", "magma"),
    2010: _Look("Noise σ, complex", "σ in SNR units (√2 = fully sampled)", "magma"),
    2020: _Look("Standard error of σ", "σ units", "magma"),
    2100: _Look("SNR = image / σ", "SNR, no unit", "viridis"),
    2200: _Look("g-factor", "g, no unit", "inferno"),
}


def draw_series(series: tuple[Series, ...], path: Path, *, image: int = 0) -> list[str]:
    """Draw one image of every known series side by side into a PNG.

    Parameters
    ----------
    series
        As read from a file; series of other kinds are left out.
    path
        The PNG to write.
    image
        Which image of each series; of a volume the middle partition is shown.

    Returns
    -------
        One line a panel that says what it shows.

    Raises
    ------
    ValueError
        If no series can be drawn, or there is no such image.
    ModuleNotFoundError
        If matplotlib is not installed.
    """
    try:
        import matplotlib.figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError("drawing needs matplotlib: pip install 'voxelsigma[view]'") from None

    shown = [entry for entry in series if entry.index in _LOOKS]
    if not shown:
        raise ValueError(f"no series that can be drawn among {[entry.index for entry in series]}")
    lines = []
    figure = matplotlib.figure.Figure(figsize=(4.2 * len(shown), 4.4), layout="constrained")
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    for axis, entry in zip(axes, shown, strict=True):
        if not 0 <= image < len(entry.data):
            raise ValueError(f"series {entry.index} has {len(entry.data)} images; there is none with number {image}")
        look = _LOOKS[entry.index]
        comment = str(entry.attributes[image].get("ImageComments", ""))
        title = _title(look, comment)
        plane = _plane(entry.data[image]) / _factor(entry, image)
        high = float(np.percentile(plane, look.percentile)) or 1.0
        drawn = axis.imshow(plane, cmap=look.colours, vmin=0.0, vmax=high, interpolation="nearest")
        axis.set_title(title, fontsize=12)
        axis.set_axis_off()
        figure.colorbar(drawn, ax=axis, shrink=0.85, label=_unit(look, title))
        lines.append(f"{title} (series {entry.index}): {comment}, median {_median(plane):.3g}")
    drawing = io.BytesIO()
    figure.savefig(drawing, dpi=110, format="png")
    write_whole(path, drawing.getvalue())
    return lines


def _title(look: _Look, comment: str) -> str:
    title = "Noise ratio to full sampling" if comment.startswith("noise ratio") else look.title
    labels = [word for word in ("uncalibrated", "incomplete") if word in comment.split()]
    return f"{title} ({', '.join(labels)})" if labels else title


def _unit(look: _Look, title: str) -> str:
    return "σ / (σ fully sampled · √R), no unit" if title.startswith("Noise ratio") else look.unit


def _plane(data: npt.NDArray[np.generic]) -> npt.NDArray[np.float64]:
    """The middle partition of the first channel, magnitude, shape `(y, x)`."""
    volume = np.abs(np.asarray(data)[0]).astype(np.float64)
    return volume[len(volume) // 2]


def _median(plane: npt.NDArray[np.float64]) -> float:
    """Over what is not empty; 0 if all of it is."""
    filled = plane[plane > 0]
    return float(np.median(filled)) if filled.size else 0.0


def _factor(entry: Series, image: int) -> float:
    """Scale that was applied for storage as integers."""
    return float(entry.attributes[image].get("GADGETRON_ScaleRatio", 1.0))
