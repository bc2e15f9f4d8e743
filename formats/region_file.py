"""Masks and weights of regions: NumPy arrays or NIfTI volumes, in the order of an image's axes."""

from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

MOST_REGIONS: Final = 1024


def read_labels(path: Path, shape: tuple[int, int, int]) -> npt.NDArray[np.int64]:
    """Read a mask: 0 outside, a whole number for each region; booleans are one region.

    Parameters
    ----------
    path
        `.npy`, `(z, y, x)` or, where there is one slice, `(y, x)`; or NIfTI, whose `(x, y, z)` is turned round (voxels
        are taken as they are stored, no geometry is applied).
    shape
        Expected `(z, y, x)`.

    Raises
    ------
    FileNotFoundError, OSError
        If it cannot be read.
    ValueError
        If it is no such array, has another shape, holds no voxel, negative or broken numbers or too many.
    """
    array = _fitted(path, _read(path), shape)
    if array.dtype.kind == "f" and not (np.isfinite(array).all() and (array == np.rint(array)).all()):
        raise ValueError(
            f"{path}: a mask of {array.dtype} with numbers that are not whole; expected booleans or labels (weights go "
            "with --weights)"
        )
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{path}: a mask of {array.dtype}; expected booleans or whole numbers")
    if (array < 0).any() or (array > 2**31).any():
        raise ValueError(f"{path}: labels from {array.min()} to {array.max()}; expected 0 (outside) and above")
    labels = array.astype(np.int64)
    if not labels.any():
        raise ValueError(f"{path}: the mask is empty: all of its {labels.size} voxels are 0")
    if (count := len(np.unique(labels[labels > 0]))) > MOST_REGIONS:
        raise ValueError(f"{path}: {count} regions; expected at most {MOST_REGIONS}")
    return labels


def read_weights(path: Path, shape: tuple[int, int, int]) -> npt.NDArray[np.float64]:
    """Read real weights, one a voxel; files and shapes as for `read_labels`.

    Raises
    ------
    FileNotFoundError, OSError
        If it cannot be read.
    ValueError
        If it is no such array, has another shape, holds NaN or Inf, or nothing but 0.
    """
    array = _fitted(path, _read(path), shape)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{path}: weights of {array.dtype}; expected real numbers")
    weights = array.astype(np.float64)
    if broken := int((~np.isfinite(weights)).sum()):
        raise ValueError(f"{path}: {broken} of {weights.size} weights are NaN or Inf; expected finite numbers")
    if not weights.any():
        raise ValueError(f"{path}: all of its {weights.size} weights are 0")
    return weights


def _read(path: Path) -> npt.NDArray[Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a mask (.npy, .nii, .nii.gz)")
    if path.name.endswith((".nii", ".nii.gz")):
        return _read_nifti(path)
    try:
        found = np.load(path, allow_pickle=False)
    except OSError as error:
        raise OSError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: not a NumPy array of numbers ({error})") from error
    if not isinstance(found, np.ndarray):
        found.close()
        raise ValueError(f"{path}: holds several arrays; expected one (.npy)")
    return found


def _read_nifti(path: Path) -> npt.NDArray[Any]:
    try:
        import nibabel
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"{path}: NIfTI needs nibabel: pip install 'voxelsigma[view]'") from None
    try:
        return np.asarray(nibabel.nifti1.Nifti1Image.from_filename(path).dataobj).T
    except (nibabel.filebasedimages.ImageFileError, OSError, EOFError, ValueError) as error:
        raise ValueError(f"{path}: not a NIfTI volume ({error})") from error


def _fitted(path: Path, array: npt.NDArray[Any], shape: tuple[int, int, int]) -> npt.NDArray[Any]:
    wanted = f"(z, y, x) = {shape}" + (f" or (y, x) = {shape[1:]}" if shape[0] == 1 else "")
    if array.shape == shape[1:] and shape[0] > 1:
        raise ValueError(
            f"{path}: has the shape {array.shape}, of one slice among {shape[0]}; expected {wanted}, or name the slice "
            "with --slice"
        )
    if array.shape not in (shape, shape[1:]):
        raise ValueError(f"{path}: has the shape {array.shape}; expected {wanted}, as the image has")
    return array.reshape(shape)
