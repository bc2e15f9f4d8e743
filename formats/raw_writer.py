"""Writing ISMRMRD raw data files."""

from collections.abc import Iterable
from pathlib import Path

import h5py
import numpy as np
from ismrmrd.hdf5 import acquisition_dtype

from voxelsigma.formats.atomic import unwritable, whole_file
from voxelsigma.formats.readouts import ReadoutBlock
from voxelsigma.formats.steady_file import SteadyFile


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
        If the folder does not exist or cannot be written, or the disk is full.
    """
    with whole_file(path) as temporary:
        file = SteadyFile(temporary)
        try:
            with h5py.File(file, "w") as opened:
                written = _write(opened.create_group(group), header_xml, blocks, file)
        finally:
            file.close()
        if file.failure is not None:
            raise unwritable(path, file.failure)
    return written


def _write(dataset: h5py.Group, header_xml: bytes, blocks: Iterable[ReadoutBlock], file: SteadyFile) -> int:
    """Fill a dataset group; stops where the disk is full."""
    text = dataset.create_dataset("xml", shape=(1,), dtype=h5py.special_dtype(vlen=bytes))
    text[0] = header_xml
    data = dataset.create_dataset("data", shape=(0,), maxshape=(None,), chunks=(64,), dtype=acquisition_dtype)
    written = 0
    for block in blocks:
        data.resize(written + len(block), axis=0)
        data[written:] = _records(block)
        written += len(block)
        if file.failure is not None:
            break
    return written


def _records(block: ReadoutBlock) -> np.ndarray[tuple[int], np.dtype[np.void]]:
    """HDF5 records of a block."""
    records = np.empty(len(block), dtype=acquisition_dtype)
    records["head"] = block.headers
    for number in range(len(block)):
        records["data"][number] = np.ascontiguousarray(block.samples[number]).view(np.float32).ravel()
        records["traj"][number] = block.trajectory[number].ravel()
    return records
