"""Opening HDF5 files, with errors that name them."""

from pathlib import Path

import h5py


def open_hdf5(path: Path, what: str) -> h5py.File:
    """Open a file for reading.

    Parameters
    ----------
    path
        The file.
    what
        What is expected in it, for messages.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is not HDF5.
    OSError
        If it cannot be read, or is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with path.open("rb"):
            pass
        if not h5py.is_hdf5(path):
            raise ValueError(f"{path}: not an HDF5 file; expected {what} in HDF5")
        return h5py.File(path, "r")
    except OSError as error:
        raise OSError(f"{path}: cannot be read ({error.strerror or error})") from error
