"""Reading label maps and intensity volumes."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from voxelsigma.training.volumes import load_volumes


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
    with pytest.raises(ValueError, match=r"holds no .nii.gz, .nii, .npz file named other; found 2 others"):
        load_volumes(folder, only=["other"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no .nii.gz, .nii, .npz file; found 0 others"):
        load_volumes(tmp_path / "empty")


def test_volumes_of_another_form_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", other=np.ones(3))
    with pytest.raises(ValueError, match=r"a\.npz must hold an array 'vol', found other"):
        load_volumes(tmp_path)
    np.savez(tmp_path / "a.npz", vol=np.ones((3, 3)))
    with pytest.raises(ValueError, match=r"must have three axes, got shape \(3, 3\)"):
        load_volumes(tmp_path)
