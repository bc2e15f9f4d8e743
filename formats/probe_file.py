"""Pushed probes kept in a file beside the images: the noise itself, of which σ is only the diagonal.

Layout (HDF5): attributes `voxelsigma_probes` (version) and `token`; a group `volume_<n>` for each volume with its
metadata as attributes, `image` (z, y, x), and `plane_<p>` (probes, rows, columns), complex64 or float32, in chunks of a
few probes by a tile, each with a checksum: what a region touches is read, and no more.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import h5py
import numpy as np
import numpy.typing as npt

from voxelsigma.formats.hdf5 import open_hdf5

if TYPE_CHECKING:
    from torch import Tensor

VERSION: Final = 1
CHUNK_PROBES: Final = 8
BATCH_BYTES: Final = 2**20
"""Of probes that are read at a time."""

TOKEN_KEY: Final = "voxelsigma_kept_probes"
"""Metadata key by which an image says with which probe file it was made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeMeta:
    """What goes with the probes of a slice or volume.

    Parameters
    ----------
    counters
        The counters that name it: slice, contrast, phase, repetition, set.
    bias
        Factor on σ that the coil covariance's estimation calls for; the probes are kept without it.
    covariance_error
        Relative standard error of every σ from the covariance, common to all; 0 if unknown.
    independent_planes
        Whether the noise of its planes is independent, as their probes are.
    voxel_mm
        Size of a voxel `(z, y, x)`; zeros if unknown.
    model, seed, labels, units
        The reconstruction's name; the probes' seed; warnings (`uncalibrated`, `incomplete`); units of the image.
    """

    counters: Mapping[str, int] = field(default_factory=dict)
    bias: float = 1.0
    covariance_error: float = 0.0
    independent_planes: bool = True
    voxel_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)
    model: str = ""
    seed: str = ""
    labels: str = ""
    units: str = "SNR units"


def probe_path(output: Path) -> Path:
    """Where the probes of an image file are kept: `out.h5` has `out.probes.h5` beside it."""
    return output.with_name(f"{output.stem}.probes{output.suffix or '.h5'}")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KeptVolume:
    """The kept probes of a slice or volume, in an open file.

    Parameters
    ----------
    path
        The file.
    meta
        What goes with it.
    shape
        `(z, y, x)`.
    plane_axis
        Axis along which its planes lie.
    probes, complex_linear
        Of each plane.
    group
        Where it is.
    """

    path: Path
    meta: VolumeMeta
    shape: tuple[int, int, int]
    plane_axis: int
    probes: tuple[int, ...]
    complex_linear: tuple[bool, ...]
    group: h5py.Group

    def image(self) -> npt.NDArray[Any]:
        """The reconstruction, shape `(z, y, x)`, complex64 or float32."""
        return self._read(self.group["image"], ())

    def plane_image(self, number: int) -> npt.NDArray[Any]:
        """The reconstruction in one plane of probes: `(y, x)`, or `(z, y)` of a volume decoupled along the readout."""
        return self._read(self.group["image"], (slice(None),) * self.plane_axis + (number,))

    def batches(
        self, plane: int, rows: slice, columns: slice, *, limit: int | None = None, share: int = 1
    ) -> Iterator["Tensor"]:
        """Probes of a part of a plane, `(probes, rows, columns)`, in the image's units, the covariance's bias applied.

        Parameters
        ----------
        plane
            Which plane.
        rows, columns
            Which part; only its tiles are read, a few probes at a time.
        limit
            Read the first ones only; None for all.
        share
            Planes that are read side by side, and share the memory.

        Raises
        ------
        ValueError
            If the file is damaged.
        """
        import torch

        data = self.group[f"plane_{plane}"]
        count = self.probes[plane] if limit is None else limit
        part = len(range(*rows.indices(data.shape[1]))) * len(range(*columns.indices(data.shape[2])))
        step = max(1, BATCH_BYTES // (CHUNK_PROBES * share * part * data.dtype.itemsize)) * CHUNK_PROBES
        for first in range(0, count, step):
            found = self._read(data, (slice(first, min(first + step, count)), rows, columns))
            if not np.isfinite(found).all():
                raise ValueError(f"{self.path}: {data.name} holds NaN or Inf after probe {first}; the file is damaged")
            yield (
                torch.from_numpy(found)
                .to(torch.promote_types(torch.float64, torch.from_numpy(found).dtype))
                .mul_(self.meta.bias)
            )

    def _read(self, data: h5py.Dataset, part: tuple[slice | int, ...]) -> npt.NDArray[Any]:
        try:
            found: npt.NDArray[Any] = data[part]
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{self.path}: {data.name} cannot be read, the file is damaged ({error})") from error
        return found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ProbeFile:
    """An open file of kept probes.

    Parameters
    ----------
    path
        The file.
    token
        By which images made with it know it.
    volumes
        In the order in which they were made.
    """

    path: Path
    token: str
    volumes: tuple[KeptVolume, ...]


@contextmanager
def open_probes(path: Path) -> Iterator[ProbeFile]:
    """Open a file of kept probes; nothing but its structure is read.

    Raises
    ------
    FileNotFoundError, OSError
        If it is not there or cannot be read.
    ValueError
        If it is no such file, of another version, or damaged.
    """
    with open_hdf5(path, "kept probes") as root:
        version = root.attrs.get("voxelsigma_probes")
        if version is None:
            raise ValueError(f"{path}: holds no kept probes; expected a file that '--keep-probes' made")
        if int(version) != VERSION:
            raise ValueError(f"{path}: kept probes of version {version}; expected version {VERSION}")
        try:
            names = [f"volume_{number}" for number in range(len(root))]
            volumes = tuple(_volume(path, root[name]) for name in names)
            token = str(root.attrs["token"])
        except (KeyError, OSError, RuntimeError, ValueError, IndexError, AttributeError) as error:
            raise ValueError(f"{path}: its probes cannot be read, the file is damaged ({error})") from error
        if not volumes:
            raise ValueError(f"{path}: holds no volume; the file is damaged")
        yield ProbeFile(path=path, token=token, volumes=volumes)


def _volume(path: Path, group: h5py.Group) -> KeptVolume:
    shape = group["image"].shape
    axis = int(group.attrs["plane_axis"])
    flat = tuple(length for number, length in enumerate(shape) if number != axis)
    planes = [group[f"plane_{number}"] for number in range(shape[axis])]
    for plane in planes:
        if plane.shape[1:] != flat or plane.shape[0] < 2 or plane.dtype.kind not in "cf":
            raise ValueError(f"{plane.name} has shape {plane.shape}, {plane.dtype}; expected (probes, {flat})")
    attributes = dict(group.attrs)
    z, y, x = (float(size) for size in attributes["voxel_mm"])
    return KeptVolume(
        path=path,
        meta=VolumeMeta(
            counters={
                name.removeprefix("counter_"): int(value)
                for name, value in attributes.items()
                if name.startswith("counter_")
            },
            bias=float(attributes["bias"]),
            covariance_error=float(attributes["covariance_error"]),
            independent_planes=bool(attributes["independent_planes"]),
            voxel_mm=(z, y, x),
            model=str(attributes["model"]),
            seed=str(attributes["seed"]),
            labels=str(attributes["labels"]),
            units=str(attributes["units"]),
        ),
        shape=shape,
        plane_axis=axis,
        probes=tuple(plane.shape[0] for plane in planes),
        complex_linear=tuple(bool(plane.attrs["complex_linear"]) for plane in planes),
        group=group,
    )
