"""The command line's other commands, and how it fails."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

import voxelsigma
from voxelsigma.formats.raw_file import open_raw
from voxelsigma.formats.simulate import SimulatedScan, Simulation, simulate
from voxelsigma.hosts.info import describe
from voxelsigma.hosts.replay import replay

Outcome = subprocess.CompletedProcess[str]


def assert_one_error(found: Outcome, text: str) -> None:
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr.count("\n") == 1
    assert re.match(f"error: {text}", found.stderr)


def test_the_version(cli: Callable[..., Outcome]) -> None:
    found = cli("--version")
    assert (found.returncode, found.stdout, found.stderr) == (0, f"voxelsigma {voxelsigma.__version__}\n", "")


def test_the_console_script_is_the_module(cli: Callable[..., Outcome], scan_file: Path) -> None:
    script = shutil.which("voxelsigma", path=Path(sys.executable).parent)
    assert script
    arguments = [script, "info", str(scan_file)]
    found = subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=False)
    assert (found.returncode, found.stdout, found.stderr) == (0, cli("info", scan_file).stdout, "")
    failed = subprocess.run([script, "info", "none.h5"], capture_output=True, text=True, timeout=300, check=False)
    assert_one_error(failed, r"none\.h5: no such file")


def test_without_a_command_there_is_help(cli: Callable[..., Outcome]) -> None:
    found = cli()
    assert found.returncode != 0
    for command in ("replay", "simulate", "info", "picture"):
        assert command in found.stdout + found.stderr


def test_a_simulated_scan_is_the_functions(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    arguments = "--matrix 24x32 --coils 3 -R 3 --mask random_1d --reference-lines 4 --snr 30 --seed 4"
    found = cli("simulate", "-o", "scan.h5", "--noise-samples", 500, *arguments.split())
    assert (found.returncode, found.stderr) == (0, "")
    expected = simulate(
        Simulation(
            matrix=(1, 24, 32),
            coils=3,
            acceleration=3,
            mask="random_1d",
            reference_lines=4,
            snr=30,
            seed=4,
            noise_samples=500,
        )
    )
    readouts = sum(map(len, expected.blocks))
    assert found.stdout == f"scan.h5: {readouts} readouts of 3 coils, imaging lines sampled at R = 3.00 (random_1d)\n"
    with open_raw(tmp_path / "scan.h5") as raw:
        assert raw.header.xml == expected.header_xml
        samples = np.concatenate([block.samples for block in raw.blocks()])
    np.testing.assert_array_equal(samples, np.concatenate([block.samples for block in expected.blocks]))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("--matrix 32xmany", "simulate: matrix must be YxX or ZxYxX, got '32xmany'"),
        ("--matrix 8x8", r"simulate: matrix must have y and x from 16 to 1024 and z from 1, got .* \(1, 8, 8\)"),
        ("--mask spiral", "simulate: mask must be one of uniform_1d, random_1d, random_2d, poisson_disc, got 'spiral'"),
        ("--coils 0", "simulate: coils must be from 1 to 128, got 0"),
        (
            "--matrix 64x64",
            "simulate: no mask with acceleration 4 and reference_lines 24: centre must be at most the 16 lines of",
        ),
        ("--matrix 16x16 --mask uniform_1d -o nowhere/scan.h5", "nowhere/scan.h5: folder .*nowhere does not exist"),
    ],
)
def test_a_scan_that_cannot_be_simulated(
    cli: Callable[..., Outcome], tmp_path: Path, arguments: str, text: str
) -> None:
    assert_one_error(cli("simulate", "-o", "scan.h5", *arguments.split()), text)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_while_simulating(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    found = cli("simulate", "-o", "scan.h5", "--matrix", "64x64", "-R", 2, file_size=50_000)
    assert_one_error(found, r"scan\.h5: cannot be written \(File too large\)")
    assert list(tmp_path.iterdir()) == []


def test_an_option_that_is_not_known_is_a_wrong_use(cli: Callable[..., Outcome]) -> None:
    found = cli("replay", "scan.h5", "--colour", "red")
    assert found.returncode == 2
    assert "--colour" in found.stderr


@pytest.fixture(scope="module")
def images(scan_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small scan's image and maps."""
    path = tmp_path_factory.mktemp("images") / "out.h5"
    replay(scan_file, "sense_sigma.xml", path)
    return path


def test_what_a_raw_file_holds(cli: Callable[..., Outcome], scan_file: Path) -> None:
    found = cli("info", scan_file)
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.splitlines() == [
        f"{scan_file}: ISMRMRD raw data, 54 readouts, protocol voxelsigma simulation",
        "  encoding 0: cartesian, matrix 64 x 32 x 1 over 480 x 240 x 5 mm, image 32 x 32 x 1 over 240 x 240 x 5 mm, "
        "acceleration 2 x 1",
        "    k1: lines 0 to 31, centre 16",
        "  4 channels; readouts: 32 noise, 6 reference only, 6 reference and imaging",
        "  noise: 2048 samples a channel, dwell times 10 us (noise) and 5 us (imaging), relative bandwidth 0.793",
    ]


def test_what_a_raw_file_lacks(raw: Callable[..., Path], scan: SimulatedScan) -> None:
    xml = re.sub(rb"<measurementInformation>.*</measurementInformation>\n", b"", scan.header_xml, flags=re.DOTALL)
    xml = re.sub(rb"<relativeReceiverNoiseBandwidth>.*</relativeReceiverNoiseBandwidth>", b"", xml)
    lines = list(describe(raw({"header_xml": xml})))
    assert lines[0].endswith("ISMRMRD raw data, 54 readouts")
    assert lines[-1].endswith("relative bandwidth not stated")
    lines = list(describe(raw({"blocks": scan.blocks[1:]})))
    assert lines[-1] == "  noise: no noise readouts; maps of this scan would be uncalibrated"


def test_counters_are_told_where_there_are_several(raw: Callable[..., Path]) -> None:
    lines = list(describe(raw(slices=3, repetitions=2, averages=4)))
    assert "    3 slices, 2 repetitions, 4 averages" in lines


def test_what_an_image_file_holds(cli: Callable[..., Outcome], images: Path) -> None:
    found = cli("info", images)
    assert (found.returncode, found.stderr) == (0, "")
    first, *lines = found.stdout.splitlines()
    assert first == f"{images}: ISMRMRD images, group 'dataset'"
    assert lines[:4] == [
        "  series 1: 1 x 32 x 32, float32, sense image, SNR units",
        "  series 2000: 1 x 32 x 32, float32, sigma magnitude, SNR units",
        "  series 2100: 1 x 32 x 32, float32, SNR",
        "  series 2200: 1 x 32 x 32, float32, g-factor",
    ]
    assert "  noise samples: 2048" in lines
    assert "  estimator: exact" in lines


@pytest.mark.parametrize("name", ["info", "picture"])
def test_files_that_hold_neither(cli: Callable[..., Outcome], tmp_path: Path, name: str) -> None:
    options = ["-o", "out.png"] if name == "picture" else []
    assert_one_error(cli(name, "none.h5", *options), r"none\.h5: no such file")
    (tmp_path / "text.h5").write_text("text")
    assert_one_error(cli(name, "text.h5", *options), r"text\.h5: not an HDF5 file; expected ISMRMRD")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["measurement/values"] = np.zeros(3)
        file["dataset"] = np.zeros(3)
    found = cli(name, "other.h5", *options)
    assert_one_error(
        found, r"other\.h5: has no (group|image series in group) 'dataset'; groups present: .*'measurement'"
    )
    assert not (tmp_path / "out.png").exists()


def test_a_picture(cli: Callable[..., Outcome], images: Path, tmp_path: Path) -> None:
    found = cli("picture", images, "-o", "out.png")
    assert (found.returncode, found.stderr) == (0, "")
    assert (tmp_path / "out.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    first, *lines = found.stdout.splitlines()
    assert first == "out.png:"
    assert [line.split(" (series")[0] for line in lines] == [
        "  Image",
        "  Noise σ, magnitude",
        "  SNR = image / σ",
        "  g-factor",
    ]


@pytest.mark.parametrize(
    ("options", "file_size", "text"),
    [
        (["-o", "out.png", "--image", "1"], None, "series 1 has 1 images; there is none with number 1"),
        (["-o", "out.png"], 1000, r"out\.png: cannot be written \(File too large\)"),
    ],
)
def test_a_picture_that_cannot_be_drawn(
    cli: Callable[..., Outcome], images: Path, tmp_path: Path, options: list[str], file_size: int | None, text: str
) -> None:
    assert_one_error(cli("picture", images, *options, file_size=file_size), text)
    assert list(tmp_path.iterdir()) == []


def test_what_is_done_is_logged_on_request(
    cli: Callable[..., Outcome], scan_file: Path, pipeline: Callable[..., Path]
) -> None:
    path = pipeline(("voxelsigma.gadgets.prewhiten", "gadget", {}))
    quiet = cli("replay", scan_file, "-p", path, "-o", "out.h5")
    loud = cli("--verbose", "replay", scan_file, "-p", path, "-o", "out.h5")
    assert quiet.stderr.count("\n") == 1
    lines = loud.stderr.splitlines()
    assert lines[-1] == quiet.stderr.rstrip("\n")
    assert lines[0].startswith("info: prewhiten: covariance of 4 coils from noise readouts: 2048 samples")


def test_where_an_error_came_from_is_told_on_request(cli: Callable[..., Outcome]) -> None:
    found = cli("info", "none.h5", VOXELSIGMA_DEBUG="1")
    assert found.returncode == 1
    assert found.stderr.startswith("Traceback")
    assert found.stderr.splitlines()[-1] == "error: none.h5: no such file"


def test_what_nobody_thought_of_is_one_line_too(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    """An error of a kind that no part of voxelsigma means to raise, from a gadget or a library."""
    (tmp_path / "sitecustomize.py").write_text(
        "import voxelsigma.hosts.info\n"
        "def describe(file, group):\n"
        "    raise AttributeError('two\\nlines')\n"
        "voxelsigma.hosts.info.describe = describe\n"
    )
    searched = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    found = cli("info", "none.h5", PYTHONPATH=searched)
    assert found.returncode == 70
    expected = "error: internal: AttributeError: two lines (please report it; VOXELSIGMA_DEBUG=1 shows where)\n"
    assert found.stderr == expected
