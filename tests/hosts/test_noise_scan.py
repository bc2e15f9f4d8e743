"""A noise scan of its own, and the scan that depends on it."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from ismrmrd import constants
from tests.gadgets.storage_server import storage_service

from voxelsigma.formats.image_file import read_series
from voxelsigma.formats.raw_writer import write_raw
from voxelsigma.formats.simulate import SimulatedScan

Outcome = subprocess.CompletedProcess[str]

DEPENDING = (
    b"<measurementInformation><measurementID>dev_patient_study_2</measurementID>"
    b"<patientPosition>HFS</patientPosition><measurementDependency><dependencyType>Noise</dependencyType>"
    b"<measurementID>dev_patient_study_1</measurementID></measurementDependency></measurementInformation>"
)
NOISE = (
    b"<measurementInformation><measurementID>dev_patient_study_1</measurementID>"
    b"<patientPosition>HFS</patientPosition></measurementInformation>"
)


@pytest.fixture
def scans(scan: SimulatedScan, tmp_path: Path) -> tuple[Path, Path]:
    """The noise readouts of the small scan in a file, and the others in another."""
    start, end = (scan.header_xml.index(tag) for tag in (b"<measurementInformation", b"<acquisitionSystemInformation"))
    paths = tmp_path / "noise.h5", tmp_path / "data.h5"
    for path, wanted, information in zip(paths, (True, False), (NOISE, DEPENDING), strict=True):
        marks = [block.flagged(constants.ACQ_IS_NOISE_MEASUREMENT) for block in scan.blocks]
        kept = [block.select(mark == wanted) for block, mark in zip(scan.blocks, marks, strict=True)]
        header = scan.header_xml[:start] + information + scan.header_xml[end:]
        write_raw(path, header, [block for block in kept if len(block)])
    return paths


def sources(path: Path) -> set[str]:
    return {str(meta["voxelsigma_noise_source"]) for entry in read_series(path, "dataset") for meta in entry.attributes}


def test_a_noise_scan_is_stored_and_found(
    scans: tuple[Path, Path], cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    noise, data = scans
    with storage_service() as storage:
        environment = {"GADGETRON_STORAGE_ADDRESS": storage.address}
        found = cli("replay", noise, "-p", "sense_sigma.xml", "-o", "none.h5", **environment)
        assert found.returncode == 0, found.stderr
        assert found.stdout == f"{noise}: a noise scan (32 readouts): its covariance is stored, there is no image\n"
        assert not (tmp_path / "none.h5").exists()
        found = cli("replay", data, "-p", "sense_sigma.xml", "-o", "out.h5", **environment)
        assert found.returncode == 0, found.stderr
    (source,) = sources(tmp_path / "out.h5")
    assert "dev_patient_study_1" in source


def test_a_noise_scan_that_nobody_keeps_is_an_error(
    scans: tuple[Path, Path], cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    found = cli("replay", scans[0], "-p", "sense_sigma.xml", "-o", "none.h5", GADGETRON_STORAGE_ADDRESS="")
    assert found.returncode == 1
    assert "noise readouts only" in found.stderr
    assert not (tmp_path / "none.h5").exists()


def test_a_noise_scan_may_be_given_as_a_file(
    scans: tuple[Path, Path], cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    noise, data = scans
    found = cli("replay", data, "-p", "sense_sigma.xml", "-o", "out.h5", "--noise", noise)
    assert found.returncode == 0, found.stderr
    (source,) = sources(tmp_path / "out.h5")
    assert "noise.h5" in source
