"""Reading label maps and intensity volumes."""

import io
import zipfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from voxelsigma.training.volumes import load_volumes, read_volume


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    labels = np.zeros((12, 10, 8), dtype=np.int16)
    labels[2:9, 3:7, 1:6] = 2
    labels[4, 4, 4] = 530
    (tmp_path / "inner").mkdir()
    nib.save(nib.Nifti1Image(labels, np.eye(4)), tmp_path / "inner" / "head_a.nii.gz")  # type: ignore[no-untyped-call]
    intensities = np.zeros((9, 9, 9), dtype=np.int16)
    intensities[1:8, 2:8, 3:8] = 200
    intensities[0, 0, 0] = -5
    np.savez(tmp_path / "scan.npz", vol=intensities)
    return tmp_path


def test_labels_are_renumbered_and_borders_cut(folder: Path) -> None:
    head, scan = load_volumes(folder)
    assert (head.name, head.labels, head.values.shape) == ("head_a", 3, (7, 4, 5))
    assert np.unique(head.values).tolist() == [1, 2]
    assert head.values[2, 1, 3] == 2
    assert (scan.name, scan.labels, scan.values.shape) == ("scan", 0, (7, 6, 5))
    assert (scan.values == 200).all()


def test_names_choose_volumes(folder: Path) -> None:
    assert [volume.name for volume in load_volumes(folder, exclude=["scan"])] == ["head_a"]
    assert [volume.name for volume in load_volumes(folder, only=["scan"])] == ["scan"]


def test_missing_volumes_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"volumes: .*nowhere is not a folder"):
        load_volumes(tmp_path / "nowhere")
    with pytest.raises(
        ValueError, match=r"holds no .nii.gz, .nii, .npz file named other; found 2 others: head_a, scan$"
    ):
        load_volumes(folder, only=["other"])
    with pytest.raises(ValueError, match=r"file named a, b; found 2 others: head_a, scan$"):
        load_volumes(folder, only=["scan", "b", "a"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no .nii.gz, .nii, .npz file; found 0 others$"):
        load_volumes(tmp_path / "empty")


def test_volumes_of_another_form_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", other=np.ones(3))
    with pytest.raises(ValueError, match=r"a\.npz must hold an array 'vol', found other"):
        load_volumes(tmp_path)
    np.savez(tmp_path / "a.npz", vol=np.ones((3, 3)))
    with pytest.raises(ValueError, match=r"must have three axes, got shape \(3, 3\)"):
        load_volumes(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.ones((3, 3, 3), np.complex64), "must hold real numbers, got complex64"),
        (np.array([[["a"]]]), "must hold real numbers, got <U1"),
        (np.full((3, 3, 3), np.nan), "holds NaN or Inf; expected finite values"),
        (-np.ones((3, 3, 3)), "is empty: no value is above 0"),
        (np.ones((3, 0, 3)), r"must have three axes, got shape \(3, 0, 3\)"),
    ],
)
def test_values_that_are_no_intensities_are_refused(tmp_path: Path, values: np.ndarray[Any, Any], message: str) -> None:
    np.savez(tmp_path / "a.npz", vol=values)
    with pytest.raises(ValueError, match=message):
        read_volume(tmp_path / "a.npz")


def test_labels_are_bounded(tmp_path: Path) -> None:
    labels = np.full((4, 4, 4), 2**30, np.int32)
    nib.save(nib.Nifti1Image(labels, np.eye(4)), tmp_path / "a.nii")  # type: ignore[no-untyped-call]
    with pytest.raises(ValueError, match=r"a\.nii has the label 1073741824; expected at most 65535"):
        read_volume(tmp_path / "a.nii")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((4, 4, 4), 2.5, np.float32), r"a\.nii holds 2\.5; a NIfTI file must be a label map of whole numbers"),
        (
            np.arange(17 * 60).reshape(17, 10, 6).astype(np.int16),
            r"a\.nii holds 1020 different values; a NIfTI file must be a label map of at most 1000",
        ),
        (np.arange(40000).reshape(40, 40, 25).astype(np.int32), r"a\.nii holds 40000 different values"),
    ],
)
def test_intensities_are_no_label_maps(tmp_path: Path, values: np.ndarray[Any, Any], message: str) -> None:
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "a.nii")  # type: ignore[no-untyped-call]
    with pytest.raises(ValueError, match=message):
        read_volume(tmp_path / "a.nii")


def test_whole_numbers_stored_as_floats_are_labels(tmp_path: Path) -> None:
    labels = np.arange(1000).reshape(10, 10, 10).astype(np.float32) * 60
    nib.save(nib.Nifti1Image(labels, np.eye(4)), tmp_path / "a.nii")  # type: ignore[no-untyped-call]
    found = read_volume(tmp_path / "a.nii")
    assert (found.labels, found.values.max()) == (1000, 999)


@pytest.mark.parametrize("name", ["inner/head_a.nii.gz", "scan.npz"])
def test_damaged_files_are_refused(folder: Path, name: str) -> None:
    path = folder / name
    content = path.read_bytes()
    for length in (0, 5, len(content) // 3, len(content) // 2):
        path.write_bytes(content[:length])
        with pytest.raises((ValueError, OSError), match=path.name):
            read_volume(path)


def test_what_a_file_cannot_hold_is_not_allocated(tmp_path: Path) -> None:
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"shape": (10**4,) * 3, "fortran_order": False, "descr": "<f8"})
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("vol.npy", head.getvalue())
    with pytest.raises(ValueError, match=r"a\.npz states 8000000000000 bytes of shape .*; it holds at most 128"):
        read_volume(tmp_path / "a.npz")
    header: Any = nib.Nifti1Image(np.zeros((1, 1, 1), np.int16), np.eye(4)).header  # type: ignore[no-untyped-call]
    header.set_data_shape((20000, 20000, 20000))
    (tmp_path / "b.nii").write_bytes(header.binaryblock + bytes(4 + 1000))
    with pytest.raises(ValueError, match=r"b\.nii states 16000000000000 bytes of shape .*; it holds at most 1352"):
        read_volume(tmp_path / "b.nii")
