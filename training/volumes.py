"""Head volumes that training images are cut from: label maps and intensity volumes."""

import math
import zipfile
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

VOLUME_ENDINGS: Final = (".nii.gz", ".nii", ".npz")

_LARGEST_LABEL: Final = 65535
# Atlases number at most some hundreds of structures; intensities have thousands of values.
_MOST_LABELS: Final = 1000
# Deflate cannot shrink data further.
LARGEST_COMPRESSION: Final = 1032


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
        Names to read, all of which must be there; by default all.
    exclude
        Names to leave out.

    Returns
    -------
        At least one volume.

    Raises
    ------
    ValueError
        The folder does not exist, holds no volume or not all those in `only`, or one cannot be used (`read_volume`).
    OSError
        A file cannot be read.
    """
    if not folder.is_dir():
        raise ValueError(f"volumes: {folder} is not a folder")
    paths = [path for path in sorted(folder.rglob("*")) if path.name.endswith(VOLUME_ENDINGS)]
    names = [volume_name(path) for path in paths]
    wanted = set(names if only is None else only) - set(exclude)
    chosen = [path for path, name in zip(paths, names, strict=True) if name in wanted]
    missing = sorted(wanted - set(names))
    if missing or not chosen:
        named = f" named {', '.join(missing)}" if missing else ""
        there = f": {', '.join(sorted(names))}" if names else ""
        raise ValueError(
            f"volumes: {folder} holds no {', '.join(VOLUME_ENDINGS)} file{named}; found {len(paths)} others{there}"
        )
    return [read_volume(path) for path in chosen]


def volume_name(path: Path) -> str:
    """A file's name without its ending."""
    return path.name.split(".")[0]


def read_volume(path: Path) -> Volume:
    """Read one volume.

    Parameters
    ----------
    path
        A NIfTI file of labels, or an `.npz` file of intensities with an array `vol`.

    Raises
    ------
    ValueError
        It is damaged, states more than it holds, is not three-dimensional or empty, or its values are not finite real
        numbers (labels: whole, at most 65535, and at most 1000 different ones).
    OSError
        It cannot be read.
    """
    try:
        values = _intensities(path) if path.suffix == ".npz" else _nifti(path)
    except (ImageFileError, HeaderDataError, EOFError, zlib.error, zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(f"volumes: {path} is damaged ({error})") from error
    if values.ndim != 3 or 0 in values.shape:
        raise ValueError(f"volumes: {path} must have three axes, got shape {values.shape}")
    if values.dtype.kind not in "iuf":
        raise ValueError(f"volumes: {path} must hold real numbers, got {values.dtype}")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError(f"volumes: {path} holds NaN or Inf; expected finite values")
    if values.max() <= 0:
        raise ValueError(f"volumes: {path} is empty: no value is above 0")
    if path.suffix == ".npz":
        return Volume(volume_name(path), _without_borders(np.maximum(values, 0)), 0)
    numbered, labels = _numbered(_labels(path, values))
    return Volume(volume_name(path), _without_borders(numbered), labels)


def _intensities(path: Path) -> NDArray[Any]:
    """The array `vol` of an `.npz` file, its stated size checked before it is read."""
    with zipfile.ZipFile(path) as archive:
        members = [name.removesuffix(".npy") for name in archive.namelist()]
        if "vol" not in members:
            raise ValueError(f"volumes: {path} must hold an array 'vol', found {', '.join(members) or 'none'}")
        entry = archive.getinfo("vol.npy")
        with archive.open(entry) as member:
            version = np.lib.format.read_magic(member)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(member)
        _check_size(path, shape, dtype.itemsize, min(entry.file_size, entry.compress_size * LARGEST_COMPRESSION))
    with np.load(path) as arrays:
        return np.asarray(arrays["vol"])


def _nifti(path: Path) -> NDArray[Any]:
    """The values of a NIfTI file, their stated size checked before they are read."""
    image = nib.load(path)
    compressed = LARGEST_COMPRESSION if path.name.endswith(".gz") else 1
    _check_size(path, image.shape, image.get_data_dtype().itemsize, path.stat().st_size * compressed)  # type: ignore[attr-defined]
    return np.asanyarray(image.dataobj)  # type: ignore[attr-defined]


def _check_size(path: Path, shape: tuple[int, ...], itemsize: int, most: int) -> None:
    stated = math.prod(shape) * itemsize
    if stated > most:
        raise ValueError(f"volumes: {path} states {stated} bytes of shape {shape}; it holds at most {most}")


def _labels(path: Path, values: NDArray[Any]) -> NDArray[np.int32]:
    """Values of at least 0, refused if they look like intensities."""
    if values.dtype.kind == "f":
        broken = values[values != np.rint(values)]
        if broken.size:
            raise ValueError(
                f"volumes: {path} holds {broken[0]:g}; a NIfTI file must be a label map of whole numbers "
                "(intensities go into .npz files)"
            )
    if values.max() > _LARGEST_LABEL:
        raise ValueError(f"volumes: {path} has the label {values.max()}; expected at most {_LARGEST_LABEL}")
    labels = np.maximum(values, 0).astype(np.int32)
    found = np.count_nonzero(np.bincount(labels.ravel()))
    if found > _MOST_LABELS:
        raise ValueError(
            f"volumes: {path} holds {found} different values; a NIfTI file must be a label map of at most "
            f"{_MOST_LABELS} (intensities go into .npz files)"
        )
    return labels


def _numbered(labels: NDArray[np.int32]) -> tuple[NDArray[np.int16], int]:
    """Labels renumbered without gaps, 0 staying 0."""
    present = np.bincount(labels.ravel()) > 0
    present[0] = True
    numbers = np.cumsum(present) - 1
    return numbers.astype(np.int16)[labels], int(present.sum())


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
