"""Noise covariances in files of both kinds."""

from pathlib import Path

import numpy as np
import pytest

from voxelsigma.formats.noise_blob import encode_noise_blob
from voxelsigma.formats.noise_file import covariance_of_noise, read_noise_file
from voxelsigma.formats.raw_writer import write_raw
from voxelsigma.formats.simulate import SimulatedScan, Simulation, simulate


@pytest.fixture(scope="module")
def scan() -> SimulatedScan:
    return simulate(
        Simulation(
            matrix=(1, 32, 32), coils=4, acceleration=2, mask="uniform_1d", reference_lines=8, noise_samples=2048
        )
    )


def with_bandwidth(scan: SimulatedScan, value: str) -> bytes:
    return scan.header_xml.replace(b"Bandwidth>0.793<", f"Bandwidth>{value}<".encode())


def without_bandwidth(scan: SimulatedScan) -> bytes:
    return scan.header_xml.replace(b"<relativeReceiverNoiseBandwidth>0.793</relativeReceiverNoiseBandwidth>", b"")


def test_noise_readouts_of_a_whole_scan(scan: SimulatedScan, tmp_path: Path) -> None:
    noise, imaging = scan.blocks
    path = tmp_path / "scan.h5"
    # noise in several places, imaging readouts between
    write_raw(path, scan.header_xml, [imaging, noise.select(slice(0, 10)), imaging, noise.select(slice(10, None))])
    found = read_noise_file(path)
    direct = covariance_of_noise([noise], bandwidth=None, labels=())
    np.testing.assert_allclose(found.matrix, direct.matrix, rtol=1e-12)
    assert (found.samples, found.dwell_time_us) == (2048, 10.0)
    assert found.labels == ("SIM000", "SIM001", "SIM002", "SIM003")
    assert found.source == "noise file scan.h5"
    assert found.calibrated


def test_the_bandwidth_is_the_imaging_headers_then_the_files_then_gadgetrons(
    scan: SimulatedScan, tmp_path: Path
) -> None:
    own, silent, blob = tmp_path / "own.h5", tmp_path / "silent.h5", tmp_path / "noise.bin"
    write_raw(own, with_bandwidth(scan, "0.6"), scan.blocks[:1])
    write_raw(silent, without_bandwidth(scan), scan.blocks[:1])
    blob.write_bytes(encode_noise_blob(read_noise_file(own)))
    assert read_noise_file(own, bandwidth=0.5).bandwidth == 0.5
    assert read_noise_file(own).bandwidth == 0.6
    assert read_noise_file(silent).bandwidth == 0.793
    assert read_noise_file(blob, bandwidth=0.5).bandwidth == 0.5
    assert read_noise_file(blob).bandwidth == 0.793


def test_a_blob_holds_the_same_noise(scan: SimulatedScan, tmp_path: Path) -> None:
    raw, blob = tmp_path / "noise.h5", tmp_path / "noise.sfndam"
    write_raw(raw, scan.header_xml, scan.blocks[:1])
    expected = read_noise_file(raw)
    blob.write_bytes(encode_noise_blob(expected))
    found = read_noise_file(blob)
    np.testing.assert_allclose(found.matrix, expected.matrix, rtol=1e-6)
    assert (found.samples, found.labels) == (expected.samples, expected.labels)
    assert found.source == "noise file noise.sfndam"


def test_real_noise(shared_data: Path) -> None:
    found = read_noise_file(shared_data / "snr_r3.h5")
    assert (found.coils, found.samples, found.dwell_time_us) == (14, 384, 20.0)
    assert 330 < found.effective_samples < 340
    assert found.labels[2] == "Spine_32:1:S52"


def test_a_file_name_becomes_ascii(scan: SimulatedScan, tmp_path: Path) -> None:
    path = tmp_path / "Räuschen.h5"
    write_raw(path, scan.header_xml, scan.blocks[:1])
    assert read_noise_file(path).source == r"noise file R\xe4uschen.h5"


def test_files_that_hold_no_noise(scan: SimulatedScan, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.h5: no such file; expected raw data with noise readouts"):
        read_noise_file(tmp_path / "none.h5")
    quiet = tmp_path / "quiet.h5"
    write_raw(quiet, scan.header_xml, scan.blocks[1:])
    with pytest.raises(ValueError, match=r"quiet\.h5: none of its 20 acquisitions is flagged as a noise measurement"):
        read_noise_file(quiet)
    text = tmp_path / "text.h5"
    text.write_text("neither of them")
    with pytest.raises(ValueError, match=r"text\.h5: not an HDF5 file"):
        read_noise_file(text)
    broken = tmp_path / "broken.bin"
    broken.write_bytes(b"SFNDAM\x02\0\0\0\x07\0\0\0\x02\0\0\0")
    with pytest.raises(ValueError, match=r"broken\.bin: noise blob: version is 2"):
        read_noise_file(broken)
    short = tmp_path / "short.h5"
    noise = scan.blocks[0]
    headers = noise.headers[:1].copy()
    headers["number_of_samples"] = 4
    few = type(noise)(headers, noise.samples[:1, :, :4], noise.trajectory[:1, :4])
    write_raw(short, scan.header_xml, [few])
    with pytest.raises(ValueError, match=r"short\.h5: noise covariance: 4 noise samples for 4 coils"):
        read_noise_file(short)
