"""Keeping pushed probes in a file (`formats/probe_file.py` has its layout)."""

import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import h5py
import numpy as np
import numpy.typing as npt

from voxelsigma.formats.atomic import unwritable, whole_file
from voxelsigma.formats.probe_file import CHUNK_PROBES, VERSION, VolumeMeta
from voxelsigma.formats.steady_file import SteadyFile

if TYPE_CHECKING:
    from torch import Tensor

TILE: Final = 32
SPARE_BYTES: Final = 2**26
"""Of the disk, beyond the probes, that must be free before they are written."""


class VolumeWriter:
    """Takes the probes of a volume, plane by plane."""

    def __init__(self, owner: "ProbeWriter", group: h5py.Group, plane_axis: int, image: npt.NDArray[Any]) -> None:
        self._owner = owner
        self._group = group
        self._plane_axis = plane_axis
        self._shape = tuple(length for axis, length in enumerate(image.shape) if axis != plane_axis)
        self._planes = image.shape[plane_axis]
        self._dtype = image.dtype

    def plane(self, number: int, *, complex_linear: bool = False) -> Callable[["Tensor"], None]:
        """Begin a plane; what is returned takes its pushed probes, batch by batch.

        Raises
        ------
        ValueError
            If there is no such plane, or it was begun before.
        """
        name = f"plane_{number}"
        if not 0 <= number < self._planes or name in self._group:
            raise ValueError(f"{self._owner.path}: plane {number} of {self._planes} is none, or was kept before")
        with self._owner.lock:
            data = self._group.create_dataset(
                name,
                shape=(0, *self._shape),
                maxshape=(None, *self._shape),
                chunks=(CHUNK_PROBES, *map(_tile, self._shape)),
                dtype=self._dtype,
                fletcher32=True,
            )
            data.attrs["complex_linear"] = complex_linear

        def add(batch: "Tensor") -> None:
            self._add(data, number, batch)

        return add

    def _add(self, data: h5py.Dataset, number: int, batch: "Tensor") -> None:
        array = np.asarray(batch.detach().cpu().resolve_conj().numpy())
        if array.shape[1:] != self._shape or (np.iscomplexobj(array) and self._dtype.kind != "c"):
            raise ValueError(
                f"{self._owner.path}: probes {array.dtype} of shape {array.shape} for plane {number}; expected "
                f"{self._dtype}, (probes, {self._shape[0]}, {self._shape[1]})"
            )
        with self._owner.lock:
            start = data.shape[0]
            data.resize(start + len(array), axis=0)
            data[start:] = array.astype(self._dtype, copy=False)
            self._owner.check()

    def missing(self) -> str:
        """What the volume lacks, in words; empty if it is whole."""
        counts = [self._group[name].shape[0] if name in self._group else 0 for name in self._names()]
        poor = [number for number, count in enumerate(counts) if count < 2]
        return f"{len(poor)} of {len(counts)} planes have fewer than 2 probes (first {poor[0]})" if poor else ""

    def _names(self) -> list[str]:
        return [f"plane_{number}" for number in range(self._planes)]


class ProbeWriter:
    """Keeps pushed probes; several threads may write to volumes of their own.

    Parameters
    ----------
    path
        The file's final name, for messages.
    file, root
        The file that is being written.
    """

    def __init__(self, path: Path, file: SteadyFile, root: h5py.File) -> None:
        self.path = path
        self.lock = threading.RLock()
        self.token = uuid.uuid4().hex
        self._file = file
        self._root = root
        self._volumes: list[VolumeWriter] = []
        root.attrs["voxelsigma_probes"] = VERSION
        root.attrs["token"] = self.token

    def volume(self, meta: VolumeMeta, image: npt.NDArray[Any], *, plane_axis: int, probes: int) -> VolumeWriter:
        """Begin a slice or volume.

        Parameters
        ----------
        meta
            What goes with it.
        image
            The reconstruction, shape `(z, y, x)`, complex, or real where the reconstruction's output is.
        plane_axis
            Axis along which its planes lie: 0 for a slice `(1, y, x)`, 2 for a volume decoupled along the readout.
        probes
            The most that each plane may get.

        Raises
        ------
        OSError
            If the disk has no room for them.
        """
        dtype = np.dtype(np.complex64 if np.iscomplexobj(image) else np.float32)
        stored = np.ascontiguousarray(image, dtype=dtype)
        needed = stored.nbytes * probes
        free = shutil.disk_usage(self.path.absolute().parent).free
        if needed + SPARE_BYTES > free:
            raise OSError(
                f"{self.path}: {probes} probes of {' x '.join(map(str, image.shape))} voxels need "
                f"{needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free on the disk; keep fewer, or write elsewhere"
            )
        with self.lock:
            group = self._root.create_group(f"volume_{len(self._volumes)}")
            group.create_dataset("image", data=stored)
            group.attrs["plane_axis"] = plane_axis
            for name, value in asdict(meta).items():
                if name != "counters":
                    group.attrs[name] = value
            for name, value in meta.counters.items():
                group.attrs[f"counter_{name}"] = value
            writer = VolumeWriter(self, group, plane_axis, stored)
            self._volumes.append(writer)
            self.check()
        return writer

    def check(self) -> None:
        """Raise if the disk refused something."""
        if self._file.failure is not None:
            raise unwritable(self.path, self._file.failure)

    def finish(self) -> None:
        """Refuse a file that keeps nothing, or half of something."""
        if not self._volumes:
            raise ValueError(
                f"{self.path}: no probes were pushed, so there are none to keep; the pipeline needs a 'sketch' of ours "
                "that runs in this process"
            )
        for number, volume in enumerate(self._volumes):
            if missing := volume.missing():
                raise ValueError(f"{self.path}: volume {number} is not whole: {missing}")


@contextmanager
def probe_writer(path: Path) -> Iterator[ProbeWriter]:
    """Write a file of probes: under a temporary name, renamed when whole.

    Parameters
    ----------
    path
        The file; an older one of that name is replaced at the end.

    Raises
    ------
    ValueError
        If nothing was kept, or a volume lacks planes.
    FileNotFoundError
        If its folder does not exist.
    OSError
        If the disk is full or the folder cannot be written; nothing is left under the final name.
    """
    with whole_file(path) as temporary:
        file = SteadyFile(temporary)
        try:
            with h5py.File(file, "w") as root:
                writer = ProbeWriter(path, file, root)
                yield writer
                writer.finish()
        finally:
            file.close()
        writer.check()


def _tile(length: int) -> int:
    """Tiles of equal size, so that the last one of a row is not nearly empty."""
    return -(-length // -(-length // TILE))
