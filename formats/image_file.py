"""Writing and reading ISMRMRD image series in HDF5, laid out as Gadgetron's own client does."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import h5py
import ismrmrd
import numpy as np
import numpy.typing as npt
from ismrmrd.hdf5 import image_header_dtype

from voxelsigma.formats.atomic import unwritable, whole_file
from voxelsigma.formats.hdf5 import open_hdf5
from voxelsigma.formats.steady_file import SteadyFile

_PARTS = {"data", "header", "attributes"}


@dataclass(frozen=True, slots=True)
class Series:
    """One image series of a file.

    Parameters
    ----------
    index
        Its `image_series_index`.
    headers
        ISMRMRD image headers, shape `(images,)`.
    attributes
        Metadata of each image.
    data
        Shape `(images, channels, z, y, x)`.
    """

    index: int
    headers: npt.NDArray[np.void]
    attributes: tuple[ismrmrd.Meta, ...]
    data: npt.NDArray[np.generic]


class ImageWriter:
    """Appends images to `/<group>/image_<series>/{data,header,attributes}`."""

    def __init__(self, path: Path, file: SteadyFile, dataset: ismrmrd.Dataset) -> None:
        self._path = path
        self._file = file
        self._dataset = dataset
        self._layouts: dict[int, tuple[int, tuple[int, ...]]] = {}
        self.images = 0

    def write(self, image: ismrmrd.Image) -> None:
        """Append one image to its series.

        Raises
        ------
        ValueError
            If the series already holds images of another data type or size.
        OSError
            If the disk is full.
        """
        series, layout = image.image_series_index, (image.data_type, image.data.shape)
        expected = self._layouts.setdefault(series, layout)
        if layout != expected:
            raise ValueError(
                f"image series {series}: an image of type {layout[0]} and shape {layout[1]} cannot follow images of "
                f"type {expected[0]} and shape {expected[1]}; each series has one type and one size"
            )
        self._dataset.append_image(f"image_{series}", image)
        self.images += 1
        if self._file.failure is not None:
            raise unwritable(self._path, self._file.failure)


@contextmanager
def image_writer(path: Path, group: str = "dataset") -> Iterator[ImageWriter]:
    """Write a file of image series: under a temporary name, renamed when whole.

    Parameters
    ----------
    path
        The file; an older one of that name is replaced at the end.
    group
        Name of the dataset group.

    Raises
    ------
    FileNotFoundError
        If its folder does not exist.
    OSError
        If the disk is full or the folder cannot be written; nothing is left under the final name.
    """
    with whole_file(path) as temporary:
        file = SteadyFile(temporary)
        try:
            dataset = ismrmrd.Dataset(file, group, create_if_needed=True)
            try:
                yield ImageWriter(path, file, dataset)
            finally:
                dataset.close()
        finally:
            file.close()
        if file.failure is not None:
            raise unwritable(path, file.failure)


def read_series(path: Path, group: str = "dataset") -> tuple[Series, ...]:
    """Read all image series of a file, in the order of their index.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such file, or it holds no image series.
    """
    with open_hdf5(path, "ISMRMRD images") as file:
        names = series_names(file, group)
        if not names:
            raise ValueError(f"{path}: has no image series in group {group!r}; groups present: {list(file)}")
        found = [_read_one(file[group][name], int(name.removeprefix("image_"))) for name in names]
    return tuple(sorted(found, key=lambda series: series.index))


def series_names(file: h5py.File, group: str) -> list[str]:
    """Names of the image series in a group of an open file; none where there is no such group."""
    found = file.get(group)
    if not isinstance(found, h5py.Group):
        return []
    return [name for name, entry in found.items() if re.fullmatch(r"image_\d+", name) and set(entry) >= _PARTS]


def _read_one(entry: h5py.Group, index: int) -> Series:
    data = entry["data"][:]
    if data.dtype.names == ("real", "imag"):
        data = data["real"] + 1j * data["imag"]
    texts = [text.decode() if isinstance(text, bytes) else text for text in entry["attributes"][:].ravel()]
    return Series(
        index=index,
        headers=entry["header"][:].astype(image_header_dtype),
        attributes=tuple(ismrmrd.Meta.deserialize(text) for text in texts),
        data=data,
    )
