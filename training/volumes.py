"""Head volumes that training images are cut from: label maps and intensity volumes."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

_ENDINGS = (".nii.gz", ".nii", ".npz")


@dataclass(frozen=True, slots=True)
class Volume:
    """One head.

    Parameters
    ----------
    name
        The file's name without its ending, such as `head_07`.
    values
        Labels numbered 0 (air) to `labels - 1`, or intensities of at least 0; shape `(z, y, x)`
        in any orientation.
    labels
        Number of labels, 0 for intensities.
    """

    name: str
    values: NDArray[Any]
    labels: int


def load_volumes(folder: Path, *, only: Collection[str] | None = None, exclude: Collection[str] = ()) -> list[Volume]:
    """Read every volume in a folder and the folders in it, in the order of their paths.

    NIfTI files are label maps, `.npz` files are intensity volumes with an array `vol`. Empty
    borders are cut off.

    Parameters
    ----------
    folder
        Where the volumes are.
    only
        Names to read; by default all.
    exclude
        Names to leave out.

    Returns
    -------
        At least one volume.

    Raises
    ------
    ValueError
        The folder does not exist or holds none of the volumes, or a volume is not three-dimensional.
    """
    if not folder.is_dir():
        raise ValueError(f"volumes: {folder} is not a folder")
    paths = [path for path in sorted(folder.rglob("*")) if path.name.endswith(_ENDINGS)]
    chosen = [p for p in paths if (only is None or _name(p) in only) and _name(p) not in exclude]
    if not chosen:
        wanted = "" if only is None else f" named {', '.join(sorted(only))}"
        raise ValueError(f"volumes: {folder} holds no {', '.join(_ENDINGS)} file{wanted}; found {len(paths)} others")
    return [_read(path) for path in chosen]


def _name(path: Path) -> str:
    return path.name.split(".")[0]


def _read(path: Path) -> Volume:
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            if "vol" not in arrays:
                raise ValueError(f"volumes: {path} must hold an array 'vol', found {', '.join(arrays)}")
            values, labels = np.maximum(arrays["vol"], 0), 0
    else:
        values, labels = _numbered(np.asanyarray(nib.load(path).dataobj).astype(np.int32))  # type: ignore[attr-defined]
    if values.ndim != 3:
        raise ValueError(f"volumes: {path} must have three axes, got shape {values.shape}")
    return Volume(_name(path), _without_borders(values), labels)


def _numbered(values: NDArray[np.int32]) -> tuple[NDArray[np.int16], int]:
    """Labels renumbered without gaps, 0 staying 0."""
    present = np.bincount(np.maximum(values, 0).ravel()) > 0
    present[0] = True
    numbers = np.cumsum(present) - 1
    return numbers.astype(np.int16)[np.maximum(values, 0)], int(present.sum())


def _without_borders(values: NDArray[Any]) -> NDArray[Any]:
    """The smallest box that holds everything above 0 (for intensities: above 5 % of the brightest percentile)."""
    threshold = 0.05 * np.percentile(values[::2, ::2, ::2], 99)
    occupied = values > threshold
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        places = np.flatnonzero(occupied.any(axis=others))
        if places.size:
            values = values.take(range(places[0], places[-1] + 1), axis=axis)
            occupied = occupied.take(range(places[0], places[-1] + 1), axis=axis)
    return np.ascontiguousarray(values)
