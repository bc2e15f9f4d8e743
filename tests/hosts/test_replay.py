"""A recorded scan through the shipped pipelines, in this process and in children, by the command line."""

import dataclasses
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import ismrmrd
import numpy as np
import pytest
from ismrmrd.hdf5 import waveform_dtype
from numpy.typing import NDArray

from voxelsigma.formats.image_file import Series, read_series
from voxelsigma.formats.raw_file import open_raw
from voxelsigma.formats.raw_writer import write_raw
from voxelsigma.formats.readouts import Headers
from voxelsigma.formats.simulate import SimulatedScan, Simulation, simulate
from voxelsigma.gadgets import wire
from voxelsigma.hosts.replay import replay
from voxelsigma.hosts.scan_items import scan_items

Outcome = subprocess.CompletedProcess[str]
Gadgets = list[tuple[str, dict[str, str]]]

ROLES = {2000: "STD_MAP", 2100: "SNR_MAP", 2200: "GFACTOR"}
ESTIMATORS = {"sense": "exact", "unrolled_small": "sketch with control variate, predicted prior"}
PASS_THROUGH: tuple[str, str, Gadgets] = ("gadgetron.examples.pass_through", "pass_through", [])
SKETCHED: Gadgets = [
    ("prewhiten", {}),
    ("accumulate", {}),
    ("coil_maps", {"kernel": "4"}),
    ("reconstruct", {}),
    ("sketch", {"seed": "11", "probes": "24", "estimator": "sketch", "maps": "magnitude snr"}),
]


@dataclasses.dataclass(frozen=True)
class Replayed:
    """A scan of two slices and two repetitions, oblique, and what the command line made of it."""

    scan: SimulatedScan
    outcome: Outcome
    series: tuple[Series, ...]
    model: str

    def central(self, image: int) -> Any:
        """Header of the imaging readout that an image takes its own from: nearest the centre of k-space."""
        block = self.scan.blocks[1 + image]
        lines = block.headers["idx"]["kspace_encode_step_1"]
        imaging = ~block.flagged(ismrmrd.ACQ_IS_PARALLEL_CALIBRATION)
        return block.headers[imaging][np.argmin(np.abs(lines[imaging].astype(int) - 16))]


def oblique(slices: int, repetitions: int) -> SimulatedScan:
    """A scan whose slices are turned and off-centre."""
    scan = simulate(
        Simulation(
            matrix=(1, 32, 32),
            coils=4,
            acceleration=2,
            mask="uniform_1d",
            reference_lines=12,
            slices=slices,
            repetitions=repetitions,
            noise_samples=2048,
        )
    )
    for block in scan.blocks:
        block.headers["position"] += (10, -20, 30)
        block.headers["read_dir"], block.headers["phase_dir"] = (0.6, 0.8, 0), (-0.8, 0.6, 0)
        block.headers["patient_table_position"] = (1, 2, 3)
        block.headers["physiology_time_stamp"][:, 0] = block.headers["scan_counter"] * 5
        block.headers["idx"]["contrast"] = 0
    return scan


@pytest.fixture(scope="module", params=["sense", "unrolled_small"])
def replayed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, command: Callable[..., Outcome]
) -> Replayed:
    folder = tmp_path_factory.mktemp("replay")
    scan = oblique(2, 2) if request.param == "sense" else oblique(2, 1)
    write_raw(folder / "scan.h5", scan.header_xml, scan.blocks)
    pipeline = {"sense": "sense_sigma.xml", "unrolled_small": "unrolled_sigma.xml"}[request.param]
    outcome = command(folder, "replay", "scan.h5", "-p", pipeline, "-o", "out.h5", "--output-group", "images")
    assert outcome.returncode == 0, outcome.stderr
    return Replayed(scan, outcome, read_series(folder / "out.h5", "images"), request.param)


def test_the_series_are_those_of_the_pipeline(replayed: Replayed) -> None:
    images = len(replayed.scan.blocks) - 1
    assert [series.index for series in replayed.series] == [1, 2000, 2100, 2200]
    for series in replayed.series:
        assert series.data.shape == (images, 1, 1, 32, 32)
        assert series.data.dtype == np.float32
        assert np.isfinite(series.data).all()
    last = "g-factor" if replayed.model == "sense" else "noise ratio to full sampling, not lost contrast"
    assert replayed.outcome.stdout.splitlines() == [
        "out.h5:",
        f"  series 1: {images} images, {replayed.model} image, SNR units",
        f"  series 2000: {images} images, sigma magnitude, SNR units",
        f"  series 2100: {images} images, SNR",
        f"  series 2200: {images} images, {last}",
    ]


def test_progress_is_told_in_plain_lines(replayed: Replayed) -> None:
    readouts = sum(map(len, replayed.scan.blocks))
    lines = set(replayed.outcome.stderr.splitlines())
    expected = {f"readouts: {readouts} of {readouts}"}
    pushed = replayed.series[1].attributes[0]["voxelsigma_probes"]
    wanted = expected if replayed.model == "sense" else expected | {f"probes: {pushed} of {pushed}"}
    assert wanted <= lines
    # a slow machine says more: how far it is
    assert all(re.fullmatch(r"(readouts|slices|probes): \d+( of \d+)?", line) for line in lines - wanted)


def test_geometry_and_counters_are_those_of_the_readouts(replayed: Replayed) -> None:
    copied = (
        "slice",
        "contrast",
        "phase",
        "repetition",
        "set",
        "position",
        "read_dir",
        "phase_dir",
        "slice_dir",
        "patient_table_position",
        "acquisition_time_stamp",
        "physiology_time_stamp",
        "measurement_uid",
    )
    for series in replayed.series:
        for number, header in enumerate(series.headers):
            readout = replayed.central(number)
            for name in copied:
                counters = readout["idx"] if name in readout["idx"].dtype.names else readout
                np.testing.assert_array_equal(header[name], counters[name], err_msg=f"{series.index} {number} {name}")
            np.testing.assert_array_equal(header["field_of_view"], [240, 240, 5])
            np.testing.assert_array_equal(header["matrix_size"], [32, 32, 1])
            assert header["image_series_index"] == series.index
            assert header["image_index"] == number + 1
            assert header["image_type"] == ismrmrd.IMTYPE_MAGNITUDE
            assert header["data_type"] == ismrmrd.DATATYPE_FLOAT


def test_roles_and_descriptions(replayed: Replayed) -> None:
    for series in replayed.series:
        for meta in series.attributes:
            role = ROLES.get(series.index, "Image")
            assert meta["DataRole"] == (["Quantitative", role] if series.index in ROLES else "Image")
            assert meta["GADGETRON_DataRole"] == role
            assert meta["ImageComments"] == meta["GADGETRON_ImageComment"]
            described = meta["ImageComments"].replace(" ", "_")
            for key in ("SeriesDescriptionAdditional", "SequenceDescriptionAdditional", "GADGETRON_SeqDescription"):
                assert meta[key] == described
            assert meta["ImageProcessingHistory"][0] == "voxelsigma"
            assert float(meta["WindowWidth"]) > 0
            assert meta["voxelsigma_model"] == replayed.model
            assert meta["voxelsigma_noise_source"] == "noise readouts"
            assert meta["voxelsigma_noise_calibrated"] == "yes"
            assert "None" not in meta.values()
            if series.index in ROLES:
                assert meta["voxelsigma_kind"] == "magnitude"
                assert meta["voxelsigma_estimator"] == ESTIMATORS[replayed.model]


def test_snr_is_the_image_over_sigma(replayed: Replayed) -> None:
    image, sigma, snr, ratio = (series.data.astype(np.float64) for series in replayed.series)
    filled = sigma > 0
    np.testing.assert_allclose(snr[filled], image[filled] / sigma[filled], rtol=1e-5)
    assert (snr[~filled] == 0).all()
    if replayed.model == "sense":
        # unit-norm sensitivities: σ of a fully sampled image is 1; covariance from 2,048 samples widens by 0.2 %
        np.testing.assert_allclose(ratio, sigma / np.sqrt(2), rtol=5e-3)
        assert ratio.min() > 0.99


def images_of(path: Path) -> dict[int, NDArray[np.float64]]:
    """Series of magnitudes, shape `(images, channels, z, y, x)` each."""
    return {series.index: series.data.astype(np.float64) for series in read_series(path)}


def assert_same_images(one: Path, other: Path) -> None:
    """Equal up to the rounding of blocks that are cut elsewhere."""
    ours, theirs = images_of(one), images_of(other)
    assert ours.keys() == theirs.keys()
    for series, image in ours.items():
        np.testing.assert_allclose(image, theirs[series], rtol=1e-4, atol=1e-4 * np.abs(image).max())


@pytest.fixture(scope="module")
def sketched(tmp_path_factory: pytest.TempPathFactory, scan_file: Path) -> Path:
    """The small scan through the chain with a sketch of a fixed seed, in this process."""
    folder = tmp_path_factory.mktemp("sketched")
    gadgets = "".join(
        f'<gadget name="{name}">{"".join(f"<property name={k!r} value={v!r}/>" for k, v in given.items())}</gadget>'
        for name, given in SKETCHED
    )
    (folder / "pipeline.xml").write_text(
        "<configuration><version>2</version><stream><external>"
        '<execute name="voxelsigma.gadgets.chain" target="gadget" type="python"/>'
        f"<configuration>{gadgets}</configuration></external></stream></configuration>"
    )
    summary = replay(scan_file, str(folder / "pipeline.xml"), folder / "out.h5")
    assert summary.images == {1: 1, 2000: 1, 2100: 1}
    assert summary.dropped == {}
    return folder / "out.h5"


def test_a_foreign_external_before_the_chain_changes_nothing(
    cli: Callable[..., Outcome], pipeline: Callable[..., Path], scan_file: Path, sketched: Path, tmp_path: Path
) -> None:
    path = pipeline(PASS_THROUGH, ("voxelsigma.gadgets.chain", "gadget", SKETCHED))
    found = cli("replay", scan_file, "-p", path, "-o", "out.h5")
    assert found.returncode == 0, found.stderr
    assert sorted(found.stderr.splitlines()) == ["probes: 24 of 24", "readouts: 54 of 54"]
    assert_same_images(tmp_path / "out.h5", sketched)


def test_a_child_process_gives_the_sigma_of_this_process(
    cli: Callable[..., Outcome], pipeline: Callable[..., Path], scan_file: Path, sketched: Path, tmp_path: Path
) -> None:
    path = pipeline(("voxelsigma.gadgets.chain", "gadget", SKETCHED))
    found = cli("replay", scan_file, "-p", path, "-o", "out.h5", "--processes")
    assert found.returncode == 0, found.stderr
    assert_same_images(tmp_path / "out.h5", sketched)
    metas = [[series.attributes[0] for series in read_series(file)] for file in (tmp_path / "out.h5", sketched)]
    assert [dict(meta) for meta in metas[0]] == [dict(meta) for meta in metas[1]]


@pytest.mark.slow
def test_a_process_a_gadget_gives_the_sigma_of_the_chain(
    cli: Callable[..., Outcome], pipeline: Callable[..., Path], scan_file: Path, sketched: Path, tmp_path: Path
) -> None:
    forward = {"prewhiten": "covariance", "coil_maps": "kspace", "reconstruct": "kspace sensitivities"}
    externals = [
        (f"voxelsigma.gadgets.{name}", "gadget", {**given, **({"forward": forward[name]} if name in forward else {})})
        for name, given in SKETCHED
    ]
    found = cli("replay", scan_file, "-p", pipeline(*externals), "-o", "out.h5", "--processes")
    assert found.returncode == 0, found.stderr
    assert_same_images(tmp_path / "out.h5", sketched)


def test_what_is_no_image_is_counted(scan_file: Path, tmp_path: Path, pipeline: Callable[..., Path]) -> None:
    gadgets: Gadgets = [*SKETCHED[:2], ("coil_maps", {"kernel": "4", "forward": "kspace"}), ("reconstruct", {})]
    gadgets[3][1]["forward"] = "kspace sensitivities"
    summary = replay(scan_file, str(pipeline(("voxelsigma.gadgets.chain", "gadget", gadgets))), tmp_path / "out.h5")
    assert summary.images == {1: 1}
    assert summary.dropped == {"Sensitivities": 1, "KSpace": 1}
    assert summary.comments == {1: "sense image, SNR units"}


def test_waveforms_pass_between_the_readouts_they_were_taken_at(scan_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "scan.h5"
    shutil.copy(scan_file, path)
    records = np.zeros(3, dtype=waveform_dtype)
    # readout n (from 0) has the time stamp 2n: before the first, between the 10th and 11th, after all
    records["head"]["time_stamp"] = [0, 19, 1000]
    records["head"]["channels"], records["head"]["number_of_samples"] = 1, 2
    for number in range(3):
        records["data"][number] = np.zeros(2, dtype=np.uint32)
    with h5py.File(path, "r+") as file:
        file["dataset"].create_dataset("waveforms", data=records)
    told: list[tuple[str, int, int]] = []
    with open_raw(path) as file:
        items = list(scan_items(file, lambda *report: told.append(report)))
    kinds = [len(item) if hasattr(item, "headers") else item.time_stamp for item in items]
    assert kinds == [0, 10, 19, 44, 1000]
    counters = np.concatenate([counters_of(item.headers) for item in items if hasattr(item, "headers")])
    np.testing.assert_array_equal(counters, np.arange(54) + 1)
    assert told == [("readouts", 54, 54)]


def counters_of(headers: Headers) -> NDArray[np.uint32]:
    found: NDArray[np.uint32] = headers["scan_counter"]
    return found


def gadgetrons_maps(path: Path) -> dict[str, NDArray[np.float64]]:
    """The maps of a recorded GRAPPA reconstruction of Gadgetron's own, shape `(y, x)`, by their role."""
    found = {}
    with path.open("rb") as file:
        reader = wire.Reader(file.read)
        wire.read_text(reader, wire.CONFIG, "a configuration")
        wire.read_text(reader, wire.HEADER, "a header")
        while not isinstance(item := wire.read_message(reader), wire.Close):
            role = ismrmrd.Meta.deserialize(np.ravel(item.meta)[0])["GADGETRON_DataRole"]
            found[str(role)] = np.abs(item.data.squeeze()).T.astype(np.float64)
    return found


# the gadgetron package reads headers of an array of images so that numpy has to guess their size
@pytest.mark.filterwarnings("ignore:A builtin ctypes object gave a PEP3118 format:RuntimeWarning")
def test_the_snr_of_a_real_scan_is_that_of_gadgetrons_grappa(
    shared_data: Path, cli: Callable[..., Outcome], pipeline: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copy(shared_data / "snr_r3.h5", tmp_path / "scan.h5")
    gadgets: Gadgets = [
        ("prewhiten", {}),
        ("accumulate", {}),
        # without a crop the voxels outside the object are unfolded too, and cost SNR inside it
        ("coil_maps", {"crop": "0.8"}),
        ("reconstruct", {}),
        ("sketch", {"maps": "magnitude snr gfactor"}),
    ]
    found = cli("replay", "scan.h5", "-p", pipeline(("voxelsigma.gadgets.chain", "gadget", gadgets)), "-o", "out.h5")
    assert found.returncode == 0, found.stderr
    ours = {index: data[0, 0, 0] for index, data in images_of(tmp_path / "out.h5").items()}
    theirs = gadgetrons_maps(shared_data / "wire" / "snr_imagearray.bin")
    assert ours[1].shape == theirs["Image"].shape == (144, 192)
    inside = theirs["SNR_MAP"] > 0.2 * np.percentile(theirs["SNR_MAP"], 99)
    assert 0.3 < inside.mean() < 0.5
    # two methods, two estimates of g (1.09 and 1.15): a tenth apart at most
    assert np.median(ours[2200][inside]) == pytest.approx(np.median(theirs["Gfactor"][inside]), rel=0.1)
    assert np.median(ours[2100][inside] / theirs["SNR_MAP"][inside]) == pytest.approx(1, rel=0.1)
    assert np.corrcoef(ours[2100][inside], theirs["SNR_MAP"][inside])[0, 1] > 0.8
    assert np.median(ours[2000][inside]) == pytest.approx(np.sqrt(3) * np.median(ours[2200][inside]), rel=0.05)
