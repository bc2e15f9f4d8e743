"""Writing ISMRMRD raw data files."""

from collections.abc import Iterable
from pathlib import Path

import h5py
import numpy as np
from ismrmrd.hdf5 import acquisition_dtype

from voxelsigma.formats.atomic import whole_file
from voxelsigma.formats.readouts import ReadoutBlock


def write_raw(path: Path, header_xml: bytes, blocks: Iterable[ReadoutBlock], group: str = "dataset") -> int:
    """Write an ISMRMRD raw data file: under a temporary name, renamed when whole.

    Parameters
    ----------
    path
        The file; an older one of that name is replaced at the end.
    header_xml
        The ISMRMRD header.
    blocks
        The readouts.
    group
        Name of the dataset group.

    Returns
    -------
        Number of acquisitions written.

    Raises
    ------
    FileNotFoundError, OSError
        If the folder does not exist or cannot be written.
    """
    written = 0
    with whole_file(path) as temporary, h5py.File(temporary, "w") as file:
        dataset = file.create_group(group)
        text = dataset.create_dataset("xml", shape=(1,), dtype=h5py.special_dtype(vlen=bytes))
        text[0] = header_xml
        data = dataset.create_dataset("data", shape=(0,), maxshape=(None,), chunks=(64,), dtype=acquisition_dtype)
        for block in blocks:
            data.resize(written + len(block), axis=0)
            data[written:] = _records(block)
            written += len(block)
    return written


def _records(block: ReadoutBlock) -> np.ndarray[tuple[int], np.dtype[np.void]]:
    """HDF5 records of a block."""
    records = np.empty(len(block), dtype=acquisition_dtype)
    records["head"] = block.headers
    for number in range(len(block)):
        records["data"][number] = np.ascontiguousarray(block.samples[number]).view(np.float32).ravel()
        records["traj"][number] = block.trajectory[number].ravel()
    return records
