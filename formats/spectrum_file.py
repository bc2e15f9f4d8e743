"""Noise power spectra in files: numbers or a picture."""

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt

from voxelsigma.formats.atomic import write_whole
from voxelsigma.noise.spectrum import Spectrum


def write_spectrum(spectrum: Spectrum, path: Path, unit: str) -> None:
    """Write the two-dimensional spectrum `(y, x)` as `.npy`, or draw it with its radial mean as `.png`.

    Parameters
    ----------
    spectrum
        Of a region.
    path
        The file.
    unit
        Of length: `voxel` or `mm`.

    Raises
    ------
    ValueError
        If the file is to be something else.
    ModuleNotFoundError
        If matplotlib is not installed.
    OSError
        If it cannot be written.
    """
    if path.suffix == ".npy":
        write_array(spectrum.power.numpy(), path)
    elif path.suffix == ".png":
        write_whole(path, _drawn(spectrum, unit))
    else:
        raise ValueError(f"{path}: a spectrum is written as .npy or .png, got {path.suffix or 'no suffix'!r}")


def write_array(array: npt.NDArray[np.float64], path: Path) -> None:
    """Write an array as `.npy`.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    buffer = io.BytesIO()
    np.save(buffer, array)
    write_whole(path, buffer.getvalue())


def _drawn(spectrum: Spectrum, unit: str) -> bytes:
    try:
        import matplotlib.figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError("drawing needs matplotlib: pip install 'voxelsigma[view]'") from None
    figure = matplotlib.figure.Figure(figsize=(9, 4), layout="constrained")
    whole, radial = figure.subplots(1, 2)
    rows, columns = (axis.numpy() for axis in spectrum.frequencies)
    drawn = whole.imshow(
        spectrum.power.numpy(),
        extent=(*_edges(columns), *_edges(rows)[::-1]),
        aspect="auto",
        vmin=0.0,
        cmap="magma",
        interpolation="nearest",
    )
    whole.set(xlabel=f"frequency along x, cycles/{unit}", ylabel=f"frequency along y, cycles/{unit}")
    figure.colorbar(drawn, ax=whole, label=f"noise power, (SNR units)² {unit}²")
    radial.errorbar(
        spectrum.radial_frequency.numpy(),
        spectrum.radial_power.numpy(),
        1.96 * spectrum.radial_error.numpy(),
        marker=".",
        capsize=2,
    )
    radial.set(xlabel=f"radial frequency, cycles/{unit}", ylabel="noise power, mean over rings (bars: 95 %)")
    radial.set_ylim(bottom=0)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    return buffer.getvalue()


def _edges(axis: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Outer edges of the cells around equally spaced centres."""
    half = (axis[1] - axis[0]) / 2
    return float(axis[0] - half), float(axis[-1] + half)
