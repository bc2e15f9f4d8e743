"""Fully sampled measured scans as examples."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import scipy.io
import torch
from ismrmrd import constants
from numpy.typing import NDArray
from tests.training.scan_files import fastmri_file, images_of, ismrmrd_file

from voxelsigma.formats.coils import unit_norm
from voxelsigma.formats.raw_writer import write_raw
from voxelsigma.formats.simulate import BANDWIDTH, DWELL_US, NOISE_DWELL_US, SimulatedScan
from voxelsigma.models.encoding import SenseEncoding
from voxelsigma.training.example import Example
from voxelsigma.training.fastmri_scans import open_fastmri
from voxelsigma.training.head_slices import object_voxels
from voxelsigma.training.ismrmrd_scans import open_ismrmrd
from voxelsigma.training.sampling import ExampleSettings
from voxelsigma.training.scans import (
    MeasuredSlice,
    ScanFile,
    check_fully_sampled,
    draw_scan,
    prepare_slice,
    without_oversampling,
)

FORMATS: dict[str, tuple[Callable[..., SimulatedScan], Callable[[Path, str], ScanFile]]] = {
    "ismrmrd": (ismrmrd_file, open_ismrmrd),
    "fastmri": (fastmri_file, open_fastmri),
}
FULL = ExampleSettings(kinds=("random_2d",), acceleration=(1, 1), centre=0, support_share=0.0, snr=(1e4, 1e4))


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> MeasuredSlice:
    path = tmp_path_factory.mktemp("scan") / "a.h5"
    ismrmrd_file(path, snr=30)
    return prepare_slice(*open_ismrmrd(path, "a").read(0))


def own_snr(image: NDArray[np.complex64]) -> float:
    magnitude = np.abs(image)
    return float(magnitude[object_voxels(magnitude)].mean())


def test_a_real_brain(tmp_path: Path, shared_data: Path) -> None:
    kspace = scipy.io.loadmat(shared_data / "brain_8ch_full.mat")["full_kspace_data"]
    with h5py.File(tmp_path / "brain.h5", "w") as file:
        # (k1, k0, coils) -> (slices, coils, readout, phase encoding)
        file["kspace"] = np.moveaxis(kspace, 2, 0).swapaxes(1, 2)[None].astype(np.complex64)
    found = prepare_slice(*open_fastmri(tmp_path / "brain.h5", "brain").read(0))
    assert found.lines.all()
    # air at the corners: about one per component, of which the image keeps the part along the sensitivities
    corners = [
        found.image[rows, columns] for rows in (slice(8), slice(-8, None)) for columns in (slice(8), slice(-8, None))
    ]
    assert 0.5 < float(np.std(np.real(corners))) < 1.5
    assert 30 < own_snr(found.image) < 80
    example = draw_scan(found, ExampleSettings(snr=(20, 20), support_share=1.0), np.random.default_rng(0))
    assert own_snr(target_of(example).numpy()) == pytest.approx(20, rel=0.02)


def test_a_real_undersampled_scan_is_refused(shared_data: Path) -> None:
    with pytest.raises(
        ValueError, match=r"snr_r3\.h5: it has 36 lines for its header's matrix of 144; expected a fully"
    ):
        open_ismrmrd(shared_data / "snr_r3.h5", "a")


def target_of(example: Example) -> torch.Tensor:
    assert example.target is not None
    return example.target


@pytest.mark.parametrize(
    ("kind", "changes", "tolerance"),
    [
        # four standard errors, 1/sqrt(N) an entry, of 4096 noise samples, or of about 300 at the edge of k-space
        ("ismrmrd", {}, 0.065),
        ("ismrmrd", {"oversampling": 1}, 0.065),
        ("ismrmrd", {"averages": 2}, 0.065),
        ("ismrmrd", {"noise_samples": 0}, 0.25),
        ("fastmri", {}, 0.25),
    ],
)
def test_noise_is_white_with_unit_deviation_per_component(
    tmp_path: Path, kind: str, changes: dict[str, Any], tolerance: float
) -> None:
    write, opener = FORMATS[kind]
    truth = write(tmp_path / "a.h5", **changes)
    opened: Any = opener(tmp_path / "a.h5", "a")
    opened.read(0)
    scale = 1e-12 if kind == "fastmri" else 1.0
    covariance = scale * truth.covariance * NOISE_DWELL_US / (DWELL_US * BANDWIDTH)
    matrix = opened._whitening._matrix
    whitened = matrix.astype(np.complex128) @ covariance @ matrix.conj().T / 2
    assert np.abs(whitened - np.eye(len(whitened))).max() < tolerance
    assert np.trace(whitened).real / len(whitened) == pytest.approx(1, abs=tolerance / 2)


@pytest.mark.parametrize("kind", ["ismrmrd", "fastmri"])
def test_slices_are_the_simulated_object_seen_by_whitened_coils(tmp_path: Path, kind: str) -> None:
    write, opener = FORMATS[kind]
    truth = write(tmp_path / "a.h5", snr=200, matrix=(1, 64, 48), **({"padding": 0} if kind == "fastmri" else {}))
    opened: Any = opener(tmp_path / "a.h5", "a")
    assert (opened.slices, opened.coils) == (2, 4)
    for number in range(2):
        prepared = prepare_slice(*opened.read(number))
        scale = 1e-6 if kind == "fastmri" else 1.0
        seen = np.tensordot(opened._whitening._matrix, scale * truth.sensitivities[number, :, 0], axes=1)
        magnitude = np.linalg.norm(seen, axis=0) * np.abs(truth.objects[number, 0])
        inside = object_voxels(magnitude)
        agreement = np.abs((unit_norm(seen.astype(np.complex64)).conj() * prepared.sensitivities).sum(axis=0))
        assert agreement[inside].mean() > 0.995
        # the edges ring; the rest is the object
        error = np.abs(prepared.image)[inside] - magnitude[inside]
        assert np.median(np.abs(error)) < 0.05 * magnitude[inside].mean()
        norm = np.linalg.norm(prepared.sensitivities, axis=0)
        np.testing.assert_allclose(norm, 1, rtol=1e-4)


def test_padded_columns_are_no_measured_lines(tmp_path: Path) -> None:
    fastmri_file(tmp_path / "a.h5", padding=5)
    kspace, lines = open_fastmri(tmp_path / "a.h5", "a").read(0)
    assert kspace.shape == (4, 74, 48)
    assert np.flatnonzero(lines).tolist() == list(range(5, 69))
    assert (kspace[:, ~lines] == 0).all()
    example = draw_scan(prepare_slice(kspace, lines), FULL, np.random.default_rng(0))
    assert example.mask[0, :, 0].bool().tolist() == lines.tolist()


def test_the_size_of_the_reference_tells_the_oversampling_where_no_header_does(tmp_path: Path) -> None:
    fastmri_file(tmp_path / "a.h5", header=False, padding=0)
    assert open_fastmri(tmp_path / "a.h5", "a").read(0)[0].shape == (4, 64, 96)
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["reconstruction_rss"] = np.ones((2, 48, 48), np.float32)
    assert open_fastmri(tmp_path / "a.h5", "a").read(0)[0].shape == (4, 64, 48)


@pytest.mark.parametrize(("length", "size"), [(12, 6), (12, 7), (9, 4)])
def test_oversampling_is_cropped_in_the_image(length: int, size: int) -> None:
    rng = np.random.default_rng(0)
    kspace = (rng.standard_normal((2, 3, length)) + 1j * rng.standard_normal((2, 3, length))).astype(np.complex64)
    first = length // 2 - size // 2
    wanted = images_of(kspace)[..., first : first + size]
    np.testing.assert_allclose(images_of(without_oversampling(kspace, size)), wanted, rtol=0, atol=1e-5)


def test_all_samples_and_no_noise_give_the_target(scan: MeasuredSlice) -> None:
    example = draw_scan(scan, FULL, np.random.default_rng(0))
    found = SenseEncoding(example.sensitivities, example.mask).adjoint(example.kspace)
    torch.testing.assert_close(found, target_of(example), rtol=0, atol=1e-3)
    assert np.array_equal(target_of(example).numpy(), scan.image)


@pytest.mark.parametrize("share", [0.5, 0.25, 0.1])
def test_noise_lowers_the_snr_to_the_one_drawn(scan: MeasuredSlice, share: float) -> None:
    wanted = share * own_snr(scan.image)
    settings = replace(FULL, snr=(wanted, wanted))
    example = draw_scan(scan, settings, np.random.default_rng(0))
    assert own_snr(target_of(example).numpy()) == pytest.approx(wanted, rel=1e-4)
    # of unit variance per component are the scan's own part, share², and the rest, which was added
    added = (example.kspace - share * torch.from_numpy(scan.kspace)).numpy()
    assert np.mean(np.abs(added) ** 2) == pytest.approx(2 * (1 - share**2), rel=0.05)


def test_noise_is_never_taken_away(scan: MeasuredSlice) -> None:
    own = own_snr(scan.image)
    example = draw_scan(scan, replace(FULL, snr=(10 * own, 10 * own)), np.random.default_rng(0))
    assert own_snr(target_of(example).numpy()) == pytest.approx(own)
    assert np.array_equal(example.kspace.numpy(), scan.kspace)


def test_drawn_scans_have_the_settings_masks_and_supports(scan: MeasuredSlice) -> None:
    settings = ExampleSettings(kinds=("random_1d", "poisson_disc"), acceleration=(3, 3), support_share=1.0, snr=(5, 20))
    for seed in range(6):
        example = draw_scan(scan, settings, np.random.default_rng(seed))
        assert float(example.mask.mean()) == pytest.approx(1 / 3, rel=0.02)
        assert (example.kspace[(example.mask == 0).expand_as(example.kspace)] == 0).all()
        empty = example.sensitivities.abs().sum(dim=0) == 0
        assert 0 < float(empty.float().mean()) < 0.6
        assert (target_of(example)[empty] == 0).all()
        again = draw_scan(scan, settings, np.random.default_rng(seed))
        assert torch.equal(again.kspace, example.kspace)


def test_lines_that_make_no_reference_are_refused() -> None:
    lines = np.ones(32, bool)
    check_fully_sampled(lines)
    lines[:4] = lines[-4:] = False
    check_fully_sampled(lines)
    lines[7] = False
    with pytest.raises(ValueError, match="23 of the 24 lines between the first and the last are sampled"):
        check_fully_sampled(lines)
    with pytest.raises(ValueError, match="lines 9 to 31 of 32 are sampled; expected at least 60% of those"):
        check_fully_sampled(np.arange(32) > 8)
    with pytest.raises(ValueError, match="no line is sampled"):
        check_fully_sampled(np.zeros(8, bool))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"acceleration": 2.0}, "24 of the 47 lines between the first and the last are sampled"),
        ({"acceleration": 2.0, "mask": "random_1d", "reference_lines": 12}, "expected a fully sampled scan"),
        ({"matrix": (4, 16, 16), "slices": 1}, "the scan is cartesian with 4 partitions; expected a 2D"),
        ({"noise_samples": 3}, "it has 3 noise samples of 4 coils; more samples than coils are needed"),
    ],
)
def test_other_scans_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    ismrmrd_file(tmp_path / "a.h5", **changes)
    with pytest.raises(ValueError, match=message):
        open_ismrmrd(tmp_path / "a.h5", "a")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("center_sample", 20, r"a line has center_sample 20; expected 40"),
        ("discard_pre", 2, r"a line has discard_pre 2; expected 0"),
        ("encoding_space_ref", 1, r"a line has encoding_space_ref 1; expected 0"),
        ("flags", np.uint64(1 << (constants.ACQ_IS_REVERSE - 1)), "lines are read out in both directions"),
        ("flags", np.uint64(1 << (constants.ACQ_IS_NOISE_MEASUREMENT - 1)), "slice 0: 47 of the 48 lines"),
    ],
)
def test_lines_of_another_kind_are_refused(tmp_path: Path, field: str, value: Any, message: str) -> None:
    truth = ismrmrd_file(tmp_path / "a.h5", noise_samples=0)
    truth.blocks[0].headers[field][9] = value
    write_raw(tmp_path / "a.h5", truth.header_xml, truth.blocks)
    with pytest.raises(ValueError, match=message):
        open_ismrmrd(tmp_path / "a.h5", "a")


def test_lines_beyond_or_short_of_the_matrix_are_refused(tmp_path: Path) -> None:
    truth = ismrmrd_file(tmp_path / "a.h5", noise_samples=0)
    huge = truth.header_xml.replace(b"<y>48</y>", b"<y>65000</y>")
    write_raw(tmp_path / "a.h5", huge.replace(b"<center>24</center>", b"<center>32500</center>"), truth.blocks)
    with pytest.raises(ValueError, match="it has 96 lines for its header's matrix of 65000; expected a fully"):
        open_ismrmrd(tmp_path / "a.h5", "a")
    truth.blocks[0].headers["idx"]["kspace_encode_step_1"][3] = 48
    write_raw(tmp_path / "a.h5", truth.header_xml, truth.blocks)
    with pytest.raises(ValueError, match=r"lines 0 to 48 do not fit the encoded matrix of 48 \(centre 24\)"):
        open_ismrmrd(tmp_path / "a.h5", "a")


def test_unequal_averages_and_slices_are_refused(tmp_path: Path) -> None:
    truth = ismrmrd_file(tmp_path / "a.h5", noise_samples=0)
    first, second = truth.blocks
    write_raw(tmp_path / "a.h5", truth.header_xml, [first, second, first.select(slice(0, 1))])
    with pytest.raises(ValueError, match="slice 0: lines are sampled 1 to 2 times; expected equally"):
        open_ismrmrd(tmp_path / "a.h5", "a")
    write_raw(tmp_path / "a.h5", truth.header_xml, [first, second.select(slice(0, 46))])
    with pytest.raises(ValueError, match="slice 1: 46 lines are sampled, 48 of the slices before"):
        open_ismrmrd(tmp_path / "a.h5", "a")


def write_fastmri(path: Path, **datasets: Any) -> None:
    with h5py.File(path, "w") as file:
        for name, value in datasets.items():
            file[name] = value


def test_other_hdf5_files_are_refused_as_fastmri(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    whole = np.ones((2, 4, 16, 16), np.complex64)
    sparse = whole * (np.arange(16) % 2)
    header = ismrmrd_file(tmp_path / "b.h5").header_xml
    cases: list[tuple[dict[str, Any], str]] = [
        ({"other": whole}, r"a\.h5: has no dataset 'kspace'; found other"),
        ({"kspace": whole.real}, "dataset 'kspace' is float32; expected complex64"),
        ({"kspace": whole[0]}, r"'kspace' has shape \(4, 16, 16\); expected \(slices, coils, readout, phase"),
        ({"kspace": whole[:0]}, r"'kspace' has shape \(0, 4, 16, 16\)"),
        ({"kspace": sparse.astype(np.complex64)}, "8 of the 15 lines between the first and the last are sampled"),
        ({"kspace": 0 * whole}, "no line is sampled"),
        ({"kspace": whole, "ismrmrd_header": header}, "'kspace' has 16 readout samples; its header states 80"),
        ({"kspace": whole, "ismrmrd_header": b"<no"}, r"a\.h5: header: not well-formed XML"),
    ]
    for datasets, message in cases:
        write_fastmri(path, **datasets)
        with pytest.raises(ValueError, match=message):
            open_fastmri(path, "a")


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_what_a_file_cannot_hold_is_not_allocated(tmp_path: Path, compression: str | None) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        shape = (1000, 64, 4096, 4096)
        file.create_dataset("kspace", shape, np.complex64, chunks=(1, 1, 64, 64), compression=compression)
    with pytest.raises(ValueError, match=r"'kspace' of shape .* claims 8589934592000 bytes; the file holds 0 of it"):
        open_fastmri(tmp_path / "a.h5", "a")


@pytest.mark.parametrize("kind", ["ismrmrd", "fastmri"])
def test_every_truncation_is_refused(tmp_path: Path, kind: str) -> None:
    write, opener = FORMATS[kind]
    path = tmp_path / "a.h5"
    write(path)
    content = path.read_bytes()
    for length in (0, 7, 100, 2000, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises((ValueError, OSError), match=r"a\.h5"):
            opener(path, "a").read(1)
    with pytest.raises(FileNotFoundError, match=r"b\.h5: no such file"):
        opener(tmp_path / "b.h5", "b")


def test_samples_that_are_not_finite_or_all_zero_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    truth = ismrmrd_file(path)
    truth.blocks[-1].samples[3, 1, 2] = np.nan
    write_raw(path, truth.header_xml, truth.blocks)
    with pytest.raises(ValueError, match="holds NaN or Inf samples"):
        prepare_slice(*open_ismrmrd(path, "a").read(1))
    with pytest.raises(ValueError, match="all samples are zero"):
        prepare_slice(np.zeros((2, 16, 16), np.complex64), np.ones(16, bool))
    truth.blocks[0].samples[:, 2] = 0
    write_raw(path, truth.header_xml, truth.blocks)
    with pytest.raises(ValueError, match=r"a\.h5: .*not positive definite"):
        open_ismrmrd(path, "a").read(0)
