"""Everything that can be wrong with a scan, a pipeline or a disk: one line that says what, and no output file."""

import dataclasses
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml
from ismrmrd import constants

import voxelsigma.models
from voxelsigma.formats.image_file import Series, read_series
from voxelsigma.formats.raw_file import open_raw
from voxelsigma.formats.raw_writer import write_raw
from voxelsigma.formats.readouts import ReadoutBlock
from voxelsigma.models.cards import available_cards

Gadgets = list[tuple[str, dict[str, str]]]
Outcome = subprocess.CompletedProcess[str]
Change = Callable[[Path], object]

# cases that fail before a reconstruction go without torch
FRONT: Gadgets = [("prewhiten", {}), ("accumulate", {})]
MAPS: Gadgets = [*FRONT, ("coil_maps", {"kernel": "4"})]
CHAIN: Gadgets = [*MAPS, ("reconstruct", {"regularization": "0.01"}), ("sketch", {"seed": "1"})]


def with_model(name: str) -> Gadgets:
    return [*MAPS, ("reconstruct", {"model": name})]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What is done to the file of the small scan, how it is replayed, and what is said."""

    text: str
    change: Change = lambda path: None
    gadgets: Gadgets = dataclasses.field(default_factory=lambda: FRONT)
    options: tuple[str, ...] = ()
    output: str = "out.h5"
    file_size: int | None = None


def in_file(change: Callable[[h5py.File], object]) -> Change:
    """Change the HDF5 file."""

    def edit(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            change(file)

    return edit


def in_header(old: bytes, new: bytes) -> Change:
    def change(file: h5py.File) -> None:
        text = file["dataset/xml"][0]
        assert old in text
        file["dataset/xml"][0] = text.replace(old, new)

    return in_file(change)


def in_readouts(change: Callable[[ReadoutBlock, ReadoutBlock], list[ReadoutBlock]]) -> Change:
    """Change the noise and the imaging readouts."""

    def rewrite(path: Path) -> None:
        with open_raw(path) as raw:
            (block,) = raw.blocks()
            xml = raw.header.xml
        noisy = block.flagged(constants.ACQ_IS_NOISE_MEASUREMENT)
        write_raw(path, xml, change(block.select(noisy), block.select(~noisy)))

    return rewrite


def with_field(name: str, number: int | None, value: int) -> Change:
    """Another value in the header of one imaging readout, or of all of them."""

    def change(noise: ReadoutBlock, imaging: ReadoutBlock) -> list[ReadoutBlock]:
        headers = imaging.headers["idx"] if name.startswith("kspace") else imaging.headers
        headers[name][slice(None) if number is None else number] = value
        return [noise, imaging]

    return in_readouts(change)


def with_sample(value: complex) -> Change:
    def change(noise: ReadoutBlock, imaging: ReadoutBlock) -> list[ReadoutBlock]:
        imaging.samples[7, 2, 30] = value
        return [noise, imaging]

    return in_readouts(change)


def fewer_channels(noise: ReadoutBlock, imaging: ReadoutBlock) -> list[ReadoutBlock]:
    """From the eleventh imaging readout on there are three channels."""
    first, rest = imaging.select(slice(0, 10)), imaging.select(slice(10, None))
    rest.headers["active_channels"] = 3
    return [noise, first, rest.with_samples(rest.samples[:, :3])]


def few_noise_samples(noise: ReadoutBlock, imaging: ReadoutBlock) -> list[ReadoutBlock]:
    noise = noise.select(slice(0, 1))
    noise.headers["number_of_samples"] = 3
    return [ReadoutBlock(noise.headers, noise.samples[:, :, :3], noise.trajectory[:, :3]), imaging]


def with_trajectory(noise: ReadoutBlock, imaging: ReadoutBlock) -> list[ReadoutBlock]:
    imaging.headers["trajectory_dimensions"] = 2
    return [noise, dataclasses.replace(imaging, trajectory=np.zeros((len(imaging), 64, 2), dtype=np.float32))]


def without_reference(noise: ReadoutBlock, imaging: ReadoutBlock) -> list[ReadoutBlock]:
    imaging = imaging.select(~imaging.flagged(constants.ACQ_IS_PARALLEL_CALIBRATION))
    both = np.uint64(1 << (constants.ACQ_IS_PARALLEL_CALIBRATION_AND_IMAGING - 1))
    imaging.headers["flags"] &= ~both
    return [noise, imaging]


def truncated(noise: ReadoutBlock, imaging: ReadoutBlock) -> list[ReadoutBlock]:
    return [noise, imaging.select(slice(0, 17))]


def card_of_other_weights(path: Path) -> None:
    """Beside the scan, a card that states another hash than its weights have."""
    folder = Path(voxelsigma.models.__path__[0])
    shutil.copy(folder / "unrolled_small.safetensors", path.parent)
    card = (folder / "unrolled_small.yaml").read_text()
    start = card.index("sha256: ") + len("sha256: ")
    (path.parent / "card.yaml").write_text(card[:start] + 64 * "f" + card[start + 64 :])


def no_group(file: h5py.File) -> None:
    del file["dataset"]


def other_groups(file: h5py.File) -> None:
    file.move("dataset", "measurement")
    file.create_group("calibration")


def no_header(file: h5py.File) -> None:
    del file["dataset/xml"]


def malformed_header(file: h5py.File) -> None:
    file["dataset/xml"][0] = b"<ismrmrdHeader><encoding>"


def no_acquisitions(file: h5py.File) -> None:
    file["dataset/data"].resize(0, axis=0)


def lying_size(file: h5py.File) -> None:
    record = file["dataset/data"][40]
    record["data"] = record["data"][:100]
    file["dataset/data"][40] = record


CASES = {
    "no file": Case(text=r"scan\.h5: no such file", change=Path.unlink),
    "not HDF5": Case(
        text=r"scan\.h5: not an HDF5 file; expected ISMRMRD raw data in HDF5",
        change=lambda path: path.write_text("a P-file"),
    ),
    "no group at all": Case(text=r"scan\.h5: has no group 'dataset'; groups present: none", change=in_file(no_group)),
    "other groups": Case(
        text=r"scan\.h5: has no group 'dataset'; groups present: 'calibration', 'measurement'",
        change=in_file(other_groups),
    ),
    "no header": Case(
        text=r"scan\.h5: group 'dataset' has no XML header \('xml'\); expected ISMRMRD raw data",
        change=in_file(no_header),
    ),
    "malformed header": Case(
        text=r"scan\.h5: header: not well-formed XML \(.*line 1", change=in_file(malformed_header)
    ),
    "wrong header": Case(
        text=r"scan\.h5: header: encoding 0: encodedSpace.matrixSize is \(0, 32, 1\); each of x, y, z must be from 1",
        change=in_header(b"<x>64</x>", b"<x>0</x>"),
    ),
    "no acquisitions": Case(
        text=r"scan\.h5: group 'dataset' has no acquisitions \('data'\); expected at least one",
        change=in_file(no_acquisitions),
    ),
    "size that does not match": Case(
        text=r"scan\.h5: acquisition 40: data holds 100 numbers; its header \(4 channels of 64 samples\) states 512",
        change=in_file(lying_size),
    ),
    "noise only": Case(
        text=r"prewhiten: the stream holds noise readouts only \(32\) and no imaging readout",
        change=in_readouts(lambda noise, imaging: [noise]),
    ),
    "fewer noise samples than coils": Case(
        text=r"noise covariance: 3 .*samples .* 4 coils", change=in_readouts(few_noise_samples)
    ),
    "channels change": Case(
        text=r"readout 43 has 3 channels, the noise covariance 4; the number of channels must not change in a scan",
        change=in_readouts(fewer_channels),
    ),
    "NaN": Case(
        text=r"readout 40 holds NaN or Inf samples; expected finite samples", change=with_sample(complex("nan"))
    ),
    "Inf": Case(
        text=r"readout 40 holds NaN or Inf samples; expected finite samples", change=with_sample(complex("inf"))
    ),
    "line outside": Case(
        text=r"readout 38 has kspace_encode_step_1 32; with the centre at 16 only 0 to 31 fit the encoded matrix of 32",
        change=with_field("kspace_encode_step_1", 5, 32),
    ),
    "no reference lines": Case(
        text=r"coil_maps: slice 0 has no reference lines, and only 1 fully sampled .*lines around the centre of "
        r"k-space; at least 8 are needed",
        change=in_readouts(without_reference),
        gadgets=MAPS,
    ),
    "non-Cartesian header": Case(
        text=r"the header's trajectory is 'spiral'; only 'cartesian' can be placed",
        change=in_header(b"<trajectory>cartesian", b"<trajectory>spiral"),
    ),
    "non-Cartesian readouts": Case(
        text=r"readout 33 brings a trajectory of 2 dimensions; only Cartesian readouts without one can be placed",
        change=in_readouts(with_trajectory),
    ),
    "readout that does not fit": Case(
        text=r"readout 33 of 64 samples \(discard 0 and 0, centre 5\) does not fit the encoded readout of 64 samples",
        change=with_field("center_sample", None, 5),
    ),
    "output folder missing": Case(text=r"nowhere/out\.h5: folder .*nowhere does not exist", output="nowhere/out.h5"),
    "output is a folder": Case(
        text=r"\.: cannot be written \(it is a folder or a device; expected the name of a file\)", output="."
    ),
    "output is the scan": Case(
        text=r"scan\.h5: is the scan itself; the images need a file of their own", output="scan.h5"
    ),
    "full disk": Case(text=r"out\.h5: cannot be written \(File too large\)", gadgets=CHAIN, file_size=8192),
    "no such card": Case(
        text=f"no model card is called 'unrolled_large'; shipped are {', '.join(available_cards())}$",
        gadgets=with_model("unrolled_large"),
    ),
    "other weights": Case(
        text=r"unrolled_small\.safetensors: sha256 is [0-9a-f]{64}, the card card\.yaml states f{64}",
        change=card_of_other_weights,
        gadgets=with_model("card.yaml"),
    ),
    "unknown property": Case(
        text=r"accumulate: unknown property 'colour'; known are forward, incomplete, prewhitened, sampling",
        gadgets=[("prewhiten", {}), ("accumulate", {"colour": "red"})],
    ),
    "bad property": Case(
        text=r"accumulate: property 'incomplete' must be one of error, emit, got 'maybe'",
        gadgets=[("prewhiten", {}), ("accumulate", {"incomplete": "maybe"})],
    ),
    "unknown gadget": Case(
        text=r"no gadget is called 'denoise'; known are prewhiten, accumulate, coil_maps", gadgets=[("denoise", {})]
    ),
    "incomplete volume": Case(
        text=r"accumulate: the volume slice 0 is incomplete: 11 of 16 lines.* incomplete='emit' to get a labelled",
        change=in_readouts(truncated),
    ),
    "nothing came out": Case(text=r"scan\.h5: no image came out of .*pipeline\.xml; nothing was written"),
}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of the test's folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_failure_is_one_line(
    case: Case, raw: Callable[..., Path], pipeline: Callable[..., Path], cli: Callable[..., Outcome]
) -> None:
    path = raw()
    case.change(path)
    chain = pipeline(("voxelsigma.gadgets.chain", "gadget", case.gadgets))
    before = contents(path.parent)
    found = cli("replay", path, "-p", chain, "-o", case.output, *case.options, file_size=case.file_size)
    assert found.returncode == 1
    assert found.stdout == ""
    assert found.stderr.count("\n") == 1
    assert re.search("^error: .*" + case.text, found.stderr)
    assert contents(path.parent) == before


def warnings_of(found: Outcome) -> list[str]:
    """The warnings of a run that ended well; all else that it said is its progress."""
    assert found.returncode == 0, found.stderr
    lines = found.stderr.splitlines()
    assert all(re.match(r"warning: |(readouts|slices|probes): \d+ of \d+$", line) for line in lines)
    return [line for line in lines if line.startswith("warning: ")]


def series_of(folder: Path) -> tuple[Series, ...]:
    assert [path.name for path in sorted(folder.glob("*.h5"))] == ["out.h5", "scan.h5"]
    return read_series(folder / "out.h5")


def test_without_noise_readouts_maps_are_labelled(
    raw: Callable[..., Path], cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    path = raw(noise_samples=0, matrix=(1, 64, 64))
    found = cli("replay", path, "-p", "sense_sigma.xml", "-o", "out.h5")
    (warning,) = warnings_of(found)
    assert re.search("no noise readouts: the covariance is estimated .* labelled uncalibrated", warning)
    assert found.stdout.count(" uncalibrated\n") == 4
    series = series_of(tmp_path)
    assert [entry.index for entry in series] == [1, 2000, 2100, 2200]
    for entry in series:
        (meta,) = entry.attributes
        for key in ("ImageComments", "GADGETRON_ImageComment"):
            assert meta[key].endswith(" uncalibrated")
        for key in ("SeriesDescriptionAdditional", "SequenceDescriptionAdditional", "GADGETRON_SeqDescription"):
            assert meta[key].endswith("_uncalibrated")
        assert meta["voxelsigma_noise_calibrated"] == "no: uncalibrated"
        assert meta["voxelsigma_noise_source"] == "edge of k-space"


def test_an_incomplete_volume_on_request_is_labelled(
    raw: Callable[..., Path], pipeline: Callable[..., Path], cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    path = raw()
    in_readouts(truncated)(path)
    gadgets: Gadgets = [(name, {"incomplete": "emit"} if name == "accumulate" else given) for name, given in CHAIN]
    chain = pipeline(("voxelsigma.gadgets.chain", "gadget", gadgets))
    found = cli("replay", path, "-p", chain, "-o", "out.h5")
    (warning,) = warnings_of(found)
    assert re.search("the volume slice 0 is incomplete .11 of 16 lines.*: its series are labelled", warning)
    for entry in series_of(tmp_path):
        (meta,) = entry.attributes
        assert meta["ImageComments"].endswith(" incomplete")
        assert meta["SeriesDescriptionAdditional"].endswith("_incomplete")
        assert meta["voxelsigma_incomplete"].startswith("11 of 16 lines")


def test_a_model_that_is_unfit_is_warned_of(
    raw: Callable[..., Path], pipeline: Callable[..., Path], cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    card = yaml.safe_load((Path(voxelsigma.models.__path__[0]) / "unrolled_small.yaml").read_text())
    (slowest, fastest), (fewest, most) = card["fit_for"]["acceleration"], card["fit_for"]["coils"]
    reason = f"acceleration 1.0 (fit for {slowest} to {fastest}), 2 coils (fit for {fewest} to {most})"
    chain = pipeline(("voxelsigma.gadgets.chain", "gadget", with_model("unrolled_small")))
    found = cli("replay", raw(acceleration=1, coils=2), "-p", chain, "-o", "out.h5")
    assert warnings_of(found) == [f"warning: reconstruct: model 'unrolled_small' was not made for this data: {reason}"]
    (entry,) = series_of(tmp_path)
    assert entry.attributes[0]["voxelsigma_unfit"] == reason
