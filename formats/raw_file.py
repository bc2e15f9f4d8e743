"""Reading ISMRMRD raw data files."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from ismrmrd import Waveform

from voxelsigma.formats.hdf5 import open_hdf5
from voxelsigma.formats.header import ScanHeader, parse_header
from voxelsigma.formats.readouts import ReadoutBlock, shape_of

READOUTS_PER_BLOCK = 256


@dataclass(frozen=True, slots=True)
class RawFile:
    """An open ISMRMRD raw data file.

    Parameters
    ----------
    path
        Where it is, for messages.
    header
        Its parsed header.
    group
        The open HDF5 group.
    """

    path: Path
    header: ScanHeader
    group: Any

    def __len__(self) -> int:
        """Number of acquisitions."""
        return int(self.group["data"].shape[0])

    def blocks(self, size: int = READOUTS_PER_BLOCK) -> Iterator[ReadoutBlock]:
        """Its readouts, in order, in blocks of one shape and at most `size` readouts.

        Raises
        ------
        ValueError
            If an acquisition's samples do not match its header.
        OSError
            If the file is damaged.
        """
        for first in range(0, len(self), size):
            try:
                records = self.group["data"][first : first + size]
            except OSError as error:
                raise OSError(f"{self.path}: cannot be read after acquisition {first} ({error})") from error
            yield from self._split(records, first)

    def waveforms(self) -> Iterator[Waveform]:
        """Its waveforms, in order."""
        if "waveforms" not in self.group:
            return
        for number, entry in enumerate(self.group["waveforms"]):
            head = np.zeros(1, dtype=_waveform_dtype())
            head[0] = entry["head"]
            waveform = Waveform(head)
            expected = waveform.channels * waveform.number_of_samples
            if entry["data"].size != expected:
                raise ValueError(
                    f"{self.path}: waveform {number} holds {entry['data'].size} values; its header states {expected}"
                )
            waveform.data[:] = entry["data"].view(np.uint32).reshape(waveform.data.shape)
            yield waveform

    def _split(self, records: Any, first: int) -> Iterator[ReadoutBlock]:
        """Blocks of one shape, of records that were read together."""
        shapes = [shape_of(head) for head in records["head"]]
        start = 0
        for stop in range(1, len(records) + 1):
            if stop < len(records) and shapes[stop] == shapes[start]:
                continue
            yield self._block(records[start:stop], shapes[start], first + start)
            start = stop

    def _block(self, records: Any, shape: tuple[int, int, int], first: int) -> ReadoutBlock:
        coils, length, dimensions = shape
        for offset, record in enumerate(records):
            for field, expected in (("data", 2 * coils * length), ("traj", dimensions * length)):
                if record[field].size != expected:
                    raise ValueError(
                        f"{self.path}: acquisition {first + offset}: {field} holds {record[field].size} numbers; "
                        f"its header ({coils} channels of {length} samples) states {expected}"
                    )
        count = len(records)
        samples = np.concatenate(list(records["data"])).astype(np.float32, copy=False)
        trajectory = np.concatenate(list(records["traj"])).astype(np.float32, copy=False)
        return ReadoutBlock(
            headers=np.ascontiguousarray(records["head"]),
            samples=samples.view(np.complex64).reshape(count, coils, length),
            trajectory=trajectory.reshape(count, length, dimensions),
        )


@contextmanager
def open_raw(path: Path, group: str = "dataset") -> Iterator[RawFile]:
    """Open an ISMRMRD raw data file for reading.

    Parameters
    ----------
    path
        The HDF5 file.
    group
        Name of the dataset group.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is not HDF5, has no such group (the text lists those present), no valid header or no acquisitions.
    OSError
        If it cannot be read, or is damaged.
    """
    with open_hdf5(path, "ISMRMRD raw data") as file:
        yield RawFile(path=path, header=_header(path, _group(path, file, group)), group=file[group])


def _group(path: Path, file: Any, name: str) -> Any:
    present = [key for key, value in file.items() if isinstance(value, h5py.Group)]
    if name not in present:
        listed = ", ".join(repr(key) for key in present) if present else "none"
        raise ValueError(f"{path}: has no group {name!r}; groups present: {listed}")
    return file[name]


def _header(path: Path, group: Any) -> ScanHeader:
    """Check a dataset group and parse its header."""
    where = f"{path}: group {group.name.lstrip('/')!r}"
    if "xml" not in group or group["xml"].shape != (1,):
        raise ValueError(f"{where} has no XML header ('xml'); expected ISMRMRD raw data")
    if "data" not in group or group["data"].shape == (0,):
        raise ValueError(f"{where} has no acquisitions ('data'); expected at least one")
    names = group["data"].dtype.names or ()
    if not {"head", "data", "traj"} <= set(names):
        raise ValueError(f"{where}: 'data' has fields {names}; expected ISMRMRD's head, traj, data")
    text = group["xml"][0]
    try:
        return parse_header(text if isinstance(text, bytes) else str(text).encode())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _waveform_dtype() -> Any:
    from ismrmrd.hdf5 import waveform_header_dtype

    return waveform_header_dtype
