"""Image series in files: round trips, and that a file is whole or not there."""

import os
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

import h5py
import ismrmrd
import numpy as np
import pytest
from numpy.typing import DTypeLike, NDArray

from voxelsigma.formats.image_file import image_writer, read_series
from voxelsigma.formats.steady_file import SteadyFile


def image_of(
    series: int = 1, index: int = 1, shape: tuple[int, ...] = (1, 2, 5, 4), dtype: DTypeLike = np.float32
) -> ismrmrd.Image:
    rng = np.random.default_rng(index)
    array: NDArray[np.generic] = (100 * rng.random(shape)).astype(dtype)
    image = ismrmrd.Image.from_array(array, transpose=False, image_series_index=series, image_index=index)
    image.position[:] = (1.5, -2.5, index)
    image.field_of_view[:] = (240, 200, 8)
    image.slice = index + 3
    image.meta = ismrmrd.Meta({"DataRole": ["Quantitative", "STD_MAP"], "ImageComments": f"number {index}, σ"})
    return image


def write(path: Path, images: list[ismrmrd.Image], group: str = "dataset") -> None:
    with image_writer(path, group) as writer:
        for image in images:
            writer.write(image)
        assert writer.images == len(images)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_half(path: Path) -> None:
    with image_writer(path) as writer:
        writer.write(image_of())
        raise KeyError("gadget failed")


@pytest.mark.parametrize("dtype", [np.uint16, np.float32, np.float64, np.complex64, np.complex128, np.int16, np.uint32])
def test_what_was_written_is_read(tmp_path: Path, dtype: DTypeLike) -> None:
    images = [image_of(index=number, dtype=dtype) for number in (1, 2, 3)]
    write(tmp_path / "out.h5", images)
    (series,) = read_series(tmp_path / "out.h5")
    assert series.index == 1
    assert series.data.dtype == dtype
    np.testing.assert_array_equal(series.data, [image.data for image in images])
    assert series.headers["image_index"].tolist() == [1, 2, 3]
    assert series.headers["slice"].tolist() == [4, 5, 6]
    np.testing.assert_array_equal(series.headers["position"][:, 2], [1, 2, 3])
    np.testing.assert_array_equal(series.headers["matrix_size"], [[4, 5, 2]] * 3)
    assert [meta["ImageComments"] for meta in series.attributes] == [f"number {number}, σ" for number in (1, 2, 3)]
    assert series.attributes[0]["DataRole"] == ["Quantitative", "STD_MAP"]


def test_series_come_in_the_order_of_their_index(tmp_path: Path) -> None:
    write(tmp_path / "out.h5", [image_of(series) for series in (2200, 1, 300, 2000)])
    assert [series.index for series in read_series(tmp_path / "out.h5")] == [1, 300, 2000, 2200]


def test_ismrmrd_reads_the_file(tmp_path: Path) -> None:
    images = [image_of(2000, number) for number in (1, 2)]
    write(tmp_path / "out.h5", images, "results")
    with closing(ismrmrd.Dataset(str(tmp_path / "out.h5"), "results", create_if_needed=False)) as dataset:
        assert list(dataset.list()) == ["image_2000"]
        assert dataset.number_of_images("image_2000") == 2
        found = dataset.read_image("image_2000", 1)
    np.testing.assert_array_equal(found.data, images[1].data)
    assert bytes(found.getHead()) == bytes(images[1].getHead())
    assert ismrmrd.Meta.deserialize(found.attribute_string)["ImageComments"] == "number 2, σ"


def test_the_layout_is_that_of_gadgetrons_client(tmp_path: Path) -> None:
    write(tmp_path / "out.h5", [image_of(2000)])
    with h5py.File(tmp_path / "out.h5") as file:
        assert sorted(file["dataset/image_2000"]) == ["attributes", "data", "header"]
        assert file["dataset/image_2000/data"].shape == (1, 1, 2, 5, 4)


@pytest.mark.parametrize(
    "other", [image_of(dtype=np.uint16), image_of(shape=(1, 2, 4, 5)), image_of(shape=(2, 2, 5, 4))]
)
def test_a_series_never_mixes_types_or_sizes(tmp_path: Path, other: ismrmrd.Image) -> None:
    images = [image_of(), image_of(2000, dtype=np.uint16), other]
    with pytest.raises(ValueError, match=r"image series 1: an image of type .* cannot follow .*one type and one size"):
        write(tmp_path / "out.h5", images)
    assert names(tmp_path) == []


def test_an_exception_leaves_neither_file_nor_remains(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="gadget failed"):
        write_half(tmp_path / "out.h5")
    assert names(tmp_path) == []


def test_an_exception_leaves_an_older_output_alone(tmp_path: Path) -> None:
    write(tmp_path / "out.h5", [image_of(index=9)])
    before = (tmp_path / "out.h5").read_bytes()
    with pytest.raises(KeyError, match="gadget failed"):
        write_half(tmp_path / "out.h5")
    assert (tmp_path / "out.h5").read_bytes() == before
    assert names(tmp_path) == ["out.h5"]


def test_an_older_output_is_replaced_not_added_to(tmp_path: Path) -> None:
    write(tmp_path / "out.h5", [image_of(1), image_of(2000)])
    write(tmp_path / "out.h5", [image_of(2100)])
    assert [series.index for series in read_series(tmp_path / "out.h5")] == [2100]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"out\.h5: folder .*nowhere does not exist"):
        write(tmp_path / "nowhere" / "out.h5", [])


def write_counted(path: Path, images: Iterable[ismrmrd.Image], written: list[int]) -> None:
    with image_writer(path) as writer:
        for image in images:
            writer.write(image)
            written.append(image.image_index)


@pytest.mark.parametrize("images", [1, 3])
def test_a_full_disk_is_one_error_at_the_image_that_did_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: int
) -> None:
    """Where the disk is full HDF5 cannot close its file, complains of each of its objects, and crashes in the end."""
    written: list[int] = []

    def refuse(descriptor: int, content: bytes, offset: int) -> int:
        if len(written) >= images - 1:
            raise OSError(28, "No space left on device")
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.write(descriptor, content)

    monkeypatch.setattr(os, "pwrite", refuse)
    # large enough for HDF5 not to hold it back
    large = (image_of(index=number, shape=(1, 1, 512, 512)) for number in range(1, 10))
    with pytest.raises(OSError, match=r"out\.h5: cannot be written \(No space left on device\)$"):
        write_counted(tmp_path / "out.h5", large, written)
    assert written == list(range(1, images))
    assert names(tmp_path) == []


def test_a_disk_that_fills_while_the_file_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def close(file: SteadyFile) -> None:
        original(file)
        file.failure = OSError(122, "Disk quota exceeded")

    original = SteadyFile.close
    monkeypatch.setattr(SteadyFile, "close", close)
    with pytest.raises(OSError, match=r"out\.h5: cannot be written .Disk quota exceeded"):
        write(tmp_path / "out.h5", [image_of()])
    assert names(tmp_path) == []


def test_files_without_series_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.h5"
    with pytest.raises(FileNotFoundError, match=r"out\.h5: no such file"):
        read_series(path)
    path.write_bytes(b"text")
    with pytest.raises(ValueError, match=r"out\.h5: not an HDF5 file; expected ISMRMRD images in HDF5"):
        read_series(path)
    write(path, [image_of()], "results")
    with pytest.raises(
        ValueError, match=r"out\.h5: has no image series in group 'dataset'; groups present: .'results'."
    ):
        read_series(path)
    with h5py.File(path, "w") as file:
        file["dataset/data"] = np.zeros(3)
    with pytest.raises(ValueError, match="has no image series in group 'dataset'"):
        read_series(path)
