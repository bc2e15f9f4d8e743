"""Measured scans in files: arrays of known types and shapes, whole or not at all."""

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Final, TypeAlias, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from voxelsigma.formats.atomic import unwritable, whole_file

Layout: TypeAlias = Mapping[str, tuple[str, tuple[int, ...] | None]]
"""Of every field its type, and its axes before (y, x), -1 for any length above 0; None for a number. `inside` has
none."""

_Scan = TypeVar("_Scan", bound="StoredScan")

_DAMAGES: Final = (
    ValueError,
    KeyError,
    EOFError,
    OSError,
    MemoryError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredScan:
    """Base of what is measured of a scan; its fields are stored.

    Parameters
    ----------
    inside
        Voxels of the object, shape `(y, x)`.

    Attributes
    ----------
    layout
        Of all fields, `inside` too.
    """

    layout: ClassVar[Layout]
    inside: NDArray[np.bool_]

    @property
    def shape(self) -> tuple[int, int]:
        """Matrix `(y, x)`."""
        return self.inside.shape[0], self.inside.shape[1]

    def save(self, path: Path) -> None:
        """Write it as `.npz`, whole or not at all."""
        with whole_file(path) as partial:
            try:
                with partial.open("wb") as file:
                    np.savez(file, **{one.name: getattr(self, one.name) for one in fields(self)})
            except OSError as error:
                raise unwritable(path, error) from error

    @classmethod
    def load(cls: type[_Scan], path: Path) -> _Scan:
        """Read it back.

        Raises
        ------
        ValueError
            If the file is missing or damaged, with its name.
        """
        return cls(**_checked(path, cls.layout))


def stored(values: Tensor, kind: DTypeLike = np.float32) -> NDArray[Any]:
    """Values as they are stored.

    Raises
    ------
    ValueError
        If they are not finite, or too large for the type.
    """
    with np.errstate(over="ignore"):
        found = values.cpu().numpy().astype(kind)
    if not np.isfinite(found).all():
        raise ValueError("the scan's features or σ are not finite, or too large to be stored")
    return found


def _checked(path: Path, layout: Layout) -> dict[str, Any]:
    """Fields of a file by their names."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            found = {name: file[name] for name in layout}
        plane = found["inside"].shape
        if len(plane) != 2:
            raise ValueError(f"the matrix is {plane}")
        for name, values in found.items():
            kind, leading = layout[name]
            wanted = () if leading is None else (*leading, *plane)
            fits = len(values.shape) == len(wanted) and all(
                size == one or (one == -1 and size > 0) for size, one in zip(values.shape, wanted, strict=True)
            )
            if values.dtype != kind or not fits or not np.isfinite(values).all():
                raise ValueError(f"{name!r} is {values.dtype} of shape {values.shape}, or not finite")
    except _DAMAGES as error:
        raise ValueError(f"{path}: damaged ({' '.join(str(error).split()) or type(error).__name__})") from None
    return {name: values if values.ndim else values.item() for name, values in found.items()}
