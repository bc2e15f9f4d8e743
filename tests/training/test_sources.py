"""Folders of data to train on."""

from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from tests.training.scan_files import fastmri_file, ismrmrd_file

from voxelsigma.formats.raw_writer import write_raw
from voxelsigma.training.example import Example
from voxelsigma.training.sampling import ExampleSettings
from voxelsigma.training.scans import MeasuredSlice
from voxelsigma.training.sources import ScanSource, Source, divided, open_source

SETTINGS = ExampleSettings(matrix=(24, 32), coils=(3, 4), many_coils_share=0.0, acceleration=(2, 4), snr=(5, 20))


def equal(one: Example, other: Example) -> bool:
    return all(torch.equal(getattr(one, f.name), getattr(other, f.name)) for f in fields(Example))


def batches(source: Source, *, start: int = 0) -> Iterator[Example]:
    return source.batches(SETTINGS, batch=2, seed=3, start=start)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each kind, with two files of different sizes."""
    folder = tmp_path_factory.mktemp("data")
    for kind in ("volumes", "ismrmrd", "fastmri"):
        (folder / kind / "inner").mkdir(parents=True)
    radius = np.sqrt(sum(axis**2 for axis in np.ogrid[-1:1:24j, -1:1:28j, -1:1:26j]))
    for name in ("a", "inner/b"):
        np.savez(folder / "volumes" / name, vol=np.maximum(100 - 100 * radius, 0).astype(np.int16))
        rows = 48 if name == "a" else 32
        ismrmrd_file(folder / "ismrmrd" / f"{name}.h5", matrix=(1, rows, 40))
        fastmri_file(folder / "fastmri" / f"{name}.h5", matrix=(1, rows + 16, 48), coils=3 if name == "a" else 4)
    return folder


@pytest.mark.parametrize("kind", ["volumes", "ismrmrd", "fastmri"])
def test_batches_depend_on_seed_and_number_alone(folders: Path, kind: str) -> None:
    source = open_source(kind, folders / kind)
    assert source.names == (("a", "b") if kind == "volumes" else ("a", "inner/b"))
    assert source.skipped == ()
    assert source.coils == {"volumes": None, "ismrmrd": (4, 4), "fastmri": (3, 4)}[kind]
    whole = list(islice(batches(source), 6))
    again = list(islice(batches(open_source(kind, folders / kind)), 6))
    assert all(equal(a, b) for a, b in zip(whole, again, strict=True))
    assert equal(next(batches(open_source(kind, folders / kind), start=4)), whole[4])
    assert not equal(whole[0], next(source.batches(SETTINGS, batch=2, seed=4)))
    for example in whole:
        assert example.target is not None
        assert len(example.kspace) == 2
        assert example.kspace.dtype == example.target.dtype == torch.complex64
        assert example.kspace.shape == example.sensitivities.shape
        assert example.mask.shape == (2, 1, *example.kspace.shape[-2:])


@pytest.mark.parametrize("kind", ["ismrmrd", "fastmri"])
def test_both_files_are_drawn_from(folders: Path, kind: str) -> None:
    drawn = islice(batches(open_source(kind, folders / kind)), 12)
    assert len({tuple(example.kspace.shape) for example in drawn}) == 2


@pytest.mark.parametrize("kind", ["volumes", "ismrmrd", "fastmri"])
def test_scans_without_references_have_no_target(folders: Path, kind: str) -> None:
    source = open_source(kind, folders / kind, labelled=["a"])
    assert [example.target is None for example in islice(batches(source), 4)] == [False, True, False, True]
    assert next(batches(open_source(kind, folders / kind, labelled=()))).target is None
    with pytest.raises(ValueError, match="labelled names c, which is not there; there are a, "):
        open_source(kind, folders / kind, labelled=["c"])


@pytest.mark.parametrize("kind", ["volumes", "ismrmrd", "fastmri"])
def test_names_are_held_out(folders: Path, kind: str) -> None:
    source = open_source(kind, folders / kind, exclude=["a", "head_77"])
    assert source.names == (("b",) if kind == "volumes" else ("inner/b",))
    assert source.skipped == ("head_77: named in exclude, but there is none",)
    with pytest.raises(ValueError, match=r"all 2 files in .* are excluded"):
        open_source(kind, folders / kind, exclude=["a", "b", "inner/b"])


def test_folders_without_usable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kind must be one of volumes, ismrmrd, fastmri, got 'dicom'"):
        open_source("dicom", tmp_path)
    for kind in ("volumes", "ismrmrd", "fastmri"):
        with pytest.raises(ValueError, match=r"data: .*nowhere is not a folder"):
            open_source(kind, tmp_path / "nowhere")
        with pytest.raises(ValueError, match=r"data: .* holds no \.(nii\.gz|h5), .* file"):
            open_source(kind, tmp_path)
    for number in range(5):
        (tmp_path / f"{number}.h5").write_bytes(b"no")
        (tmp_path / f"{number}.nii").write_bytes(b"no")
    for kind in ("ismrmrd", "fastmri"):
        with pytest.raises(
            ValueError, match=r"none of the 5 files in .*: 0\.h5: not an HDF5 .*; 2\.h5: .*; and 2 more"
        ):
            open_source(kind, tmp_path)
    with pytest.raises(ValueError, match=r"none of the 5 files in .* is usable: 0\.nii: is damaged .*; and 2 more"):
        open_source("volumes", tmp_path)


@pytest.mark.parametrize("kind", ["volumes", "ismrmrd", "fastmri"])
def test_unusable_files_are_told_of(folders: Path, tmp_path: Path, kind: str) -> None:
    ending = ".npz" if kind == "volumes" else ".h5"
    (tmp_path / f"good{ending}").write_bytes((folders / kind / f"a{ending}").read_bytes())
    (tmp_path / f"bad{ending}").write_bytes(b"no")
    source = open_source(kind, tmp_path)
    assert source.names == ("good",)
    (told,) = source.skipped
    assert told.startswith(f"bad{ending}: ")
    assert str(tmp_path) not in told
    assert next(batches(source)).target is not None


def test_damaged_slices_are_warned_of_once_and_others_drawn(tmp_path: Path) -> None:
    truth = ismrmrd_file(tmp_path / "a.h5")
    truth.blocks[-1].samples[3, 1, 2] = np.nan
    write_raw(tmp_path / "a.h5", truth.header_xml, truth.blocks)
    source = open_source("ismrmrd", tmp_path)
    drawn = source.batches(SETTINGS, batch=1, seed=0)
    with pytest.warns(RuntimeWarning, match="data: a: slice 1: holds NaN or Inf samples; expected finite") as told:
        whole = list(islice(drawn, 8))
    assert len(told) == 1
    assert len(source.skipped) == 1
    with pytest.warns(RuntimeWarning, match="slice 1"):
        again = list(islice(open_source("ismrmrd", tmp_path).batches(SETTINGS, batch=1, seed=0), 8))
    assert all(equal(a, b) for a, b in zip(whole, again, strict=True))


def slices_of(source: ScanSource, number: int) -> list[MeasuredSlice]:
    return source._draw_slices(source.files, 6, np.random.default_rng([3, number]), (3, number))


def test_only_damaged_slices_are_replaced(tmp_path: Path) -> None:
    """The others of the batch are those of a folder in which nothing is damaged."""
    (tmp_path / "good").mkdir()
    (tmp_path / "bad").mkdir()
    fastmri_file(tmp_path / "good" / "a.h5", slices=4, matrix=(1, 40, 32), coils=3)
    (tmp_path / "bad" / "a.h5").write_bytes((tmp_path / "good" / "a.h5").read_bytes())
    with h5py.File(tmp_path / "bad" / "a.h5", "a") as file:
        file["kspace"][1, 1, 20, 20] = np.inf
    good, bad = (open_source("fastmri", tmp_path / kind) for kind in ("good", "bad"))
    assert isinstance(good, ScanSource)
    assert isinstance(bad, ScanSource)
    with pytest.warns(RuntimeWarning, match="a: slice 1: holds NaN or Inf") as told:
        drawn = [[slices_of(one, number) for one in (good, bad)] for number in range(12)]
    assert len(told) == 1
    damaged = good._slice(good.files[0], 1)
    assert damaged is not None
    replaced = 0
    for whole, mended in drawn:
        kept = [one for one in whole if not np.array_equal(one.image, damaged.image)]
        assert all(np.array_equal(a.image, b.image) for a, b in zip(kept, mended, strict=False))
        assert len(mended) == 6
        replaced += 6 - len(kept)
    assert replaced > 6


@pytest.mark.filterwarnings("ignore:data. a. slice:RuntimeWarning")
def test_a_long_run_outlives_many_damaged_slices(tmp_path: Path) -> None:
    fastmri_file(tmp_path / "a.h5", slices=8, matrix=(1, 40, 32), coils=3)
    with h5py.File(tmp_path / "a.h5", "a") as file:
        for number in (1, 2, 3, 5, 6):
            file["kspace"][number, 1, 20, 20] = np.inf
    source = open_source("fastmri", tmp_path)
    # of whole batches of 8 hardly one in 2,500 holds no damaged slice
    drawn = list(islice(source.batches(SETTINGS, batch=8, seed=0), 10))
    assert len(drawn) == 10
    assert len(source.skipped) == 5
    # neither the start nor what is remembered changes a batch
    fresh = next(open_source("fastmri", tmp_path).batches(SETTINGS, batch=8, seed=0, start=7))
    assert equal(fresh, drawn[7])
    assert equal(next(source.batches(SETTINGS, batch=8, seed=0, start=2)), drawn[2])


@pytest.mark.filterwarnings("ignore:data. a. slice:RuntimeWarning")
def test_a_file_of_damaged_slices_leaves_the_others(tmp_path: Path) -> None:
    fastmri_file(tmp_path / "a.h5", slices=3, matrix=(1, 40, 32), coils=3)
    fastmri_file(tmp_path / "b.h5", slices=1, matrix=(1, 40, 32), coils=4)
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["kspace"][:, 1, 20, 20] = np.inf
    drawn = islice(open_source("fastmri", tmp_path).batches(SETTINGS, batch=3, seed=1), 6)
    assert [example.kspace.shape[:2] for example in drawn] == [(3, 4)] * 6


def test_a_folder_of_damaged_slices_ends_the_stream(tmp_path: Path) -> None:
    fastmri_file(tmp_path / "a.h5", slices=1)
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["kspace"][0, 1, 2, 30] = np.inf
    source = open_source("fastmri", tmp_path)
    with (
        pytest.warns(RuntimeWarning, match="a: slice 0: holds NaN or Inf samples"),
        pytest.raises(ValueError, match=r"50 draws from .* in a row were damaged: a: slice 0: holds NaN or Inf"),
    ):
        next(batches(source))


def test_settings_that_fit_no_scan_are_refused_rather_than_skipped(folders: Path) -> None:
    settings = ExampleSettings(kinds=("random_1d",), acceleration=(8, 8), centre=24)
    with pytest.raises(ValueError, match=r"centre must be at most the . lines of acceleration"):
        next(open_source("ismrmrd", folders / "ismrmrd").batches(settings, batch=1, seed=0))


def test_the_memory_of_prepared_slices_is_bounded(folders: Path) -> None:
    source = open_source("ismrmrd", folders / "ismrmrd")
    assert isinstance(source, ScanSource)
    list(islice(batches(source), 8))
    kept = list(source._cache.values())
    assert len(kept) == 4
    source.cache_bytes = kept[0].nbytes + 1
    tight = open_source("ismrmrd", folders / "ismrmrd")
    assert isinstance(tight, ScanSource)
    tight.cache_bytes = kept[0].nbytes + 1
    first, second = (list(islice(batches(one), 8)) for one in (source, tight))
    assert sum(one.nbytes for one in tight._cache.values()) <= tight.cache_bytes
    assert all(equal(a, b) for a, b in zip(first, second, strict=True))


# --- what is held back


def images(source: Source, *, count: int = 40) -> set[bytes]:
    """Which slices are drawn: their references, without the noise and the support that are drawn with them."""
    plain = replace(SETTINGS, snr=(1e6, 1e6), support_share=0.0)
    drawn = (example.target for example in islice(source.batches(plain, batch=1, seed=3), count))
    return {target.numpy().tobytes() for target in drawn if target is not None}


@pytest.mark.parametrize(("files", "held"), [(5, ("2",)), (6, ("2",)), (8, ("2", "7"))])
def test_every_fifth_file_is_held_back(tmp_path: Path, files: int, held: tuple[str, ...]) -> None:
    for number in range(files):
        fastmri_file(tmp_path / f"{number}.h5", slices=1, matrix=(1, 40, 32), coils=3, seed=number)
    parts = divided(open_source("fastmri", tmp_path))
    assert parts.held_back == parts.checked.names == held
    assert parts.learned.names == tuple(str(number) for number in range(files) if str(number) not in held)
    learned, checked = images(parts.learned), images(parts.checked)
    assert (len(learned), len(checked)) == (files - len(held), len(held))
    assert not learned & checked


@pytest.mark.parametrize(
    ("slices", "held"),
    [
        ((2,), ("0 (slice 1)",)),
        ((4,), ("0 (slice 2)",)),
        ((8,), ("0 (slice 2)", "0 (slice 7)")),
        ((1, 1), ("1 (slice 0)",)),
        ((3, 1, 5), ("0 (slice 2)", "2 (slice 3)")),
    ],
)
def test_of_few_files_every_fifth_slice_is_held_back(
    tmp_path: Path, slices: tuple[int, ...], held: tuple[str, ...]
) -> None:
    for number, count in enumerate(slices):
        fastmri_file(tmp_path / f"{number}.h5", slices=count, matrix=(1, 40, 32), coils=3, seed=number)
    parts = divided(open_source("fastmri", tmp_path))
    assert parts.held_back == held
    learned, checked = images(parts.learned, count=80), images(parts.checked, count=80)
    assert (len(learned), len(checked)) == (sum(slices) - len(held), len(held))
    assert not learned & checked
    assert learned | checked == images(open_source("fastmri", tmp_path), count=160)


def test_repetitions_of_a_slice_are_held_back_together(tmp_path: Path) -> None:
    ismrmrd_file(tmp_path / "a.h5", slices=3, repetitions=2)
    source = open_source("ismrmrd", tmp_path)
    assert isinstance(source, ScanSource)
    assert source.files[0].positions == (0, 0, 1, 1, 2, 2)
    parts = divided(source)
    assert parts.held_back == ("a (slice 1)",)
    learned, checked = images(parts.learned), images(parts.checked)
    assert (len(learned), len(checked)) == (4, 2)
    assert not learned & checked


def test_of_one_slice_and_of_volumes_nothing_is_held_back(folders: Path, tmp_path: Path) -> None:
    ismrmrd_file(tmp_path / "a.h5", slices=1, repetitions=2)
    for source in (open_source("ismrmrd", tmp_path), open_source("volumes", folders / "volumes")):
        parts = divided(source)
        assert parts.held_back == ()
        assert parts.learned is parts.checked is source


def test_damaged_slices_are_named_by_their_own_numbers(tmp_path: Path) -> None:
    fastmri_file(tmp_path / "a.h5", slices=6, matrix=(1, 40, 32), coils=3)
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["kspace"][4, 1, 20, 20] = np.inf
    parts = divided(open_source("fastmri", tmp_path))
    assert parts.held_back == ("a (slice 2)",)
    with pytest.warns(RuntimeWarning, match="data: a: slice 4: holds NaN or Inf"):
        assert len(images(parts.learned)) == 4
    assert len(images(parts.checked)) == 1
