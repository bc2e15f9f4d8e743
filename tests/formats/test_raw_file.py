"""Raw data files: what is read, what is refused, and that reading gives back what was written."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import h5py
import ismrmrd
import numpy as np
import pytest
from ismrmrd.hdf5 import waveform_dtype

from voxelsigma.formats.raw_file import open_raw
from voxelsigma.formats.raw_writer import write_raw
from voxelsigma.formats.readouts import HEADER_DTYPE, ReadoutBlock
from voxelsigma.formats.simulate import SimulatedScan

Raw = Callable[..., Path]


def joined(blocks: list[ReadoutBlock]) -> tuple[Any, Any]:
    """Headers and samples of blocks, one after the other."""
    return np.concatenate([block.headers for block in blocks]), [row for block in blocks for row in block.samples]


def edit(path: Path, change: Callable[[h5py.File], None]) -> Path:
    with h5py.File(path, "r+") as file:
        change(file)
    return path


def opened(path: Path, group: str = "dataset") -> list[ReadoutBlock]:
    with open_raw(path, group) as raw:
        return list(raw.blocks())


def test_what_was_written_is_read(scan: SimulatedScan, raw: Raw) -> None:
    with open_raw(raw()) as file:
        assert len(file) == 54
        assert file.header.xml == scan.header_xml
        blocks = list(file.blocks())
        assert list(file.waveforms()) == []
    headers, samples = joined(blocks)
    expected_headers, expected_samples = joined(scan.blocks)
    np.testing.assert_array_equal(headers, expected_headers)
    np.testing.assert_array_equal(samples, expected_samples)
    assert headers.dtype == HEADER_DTYPE
    assert blocks[0].samples.dtype == np.complex64
    assert blocks[0].trajectory.shape == (54, 64, 0)


@pytest.mark.parametrize("size", [1, 7, 54, 1000])
def test_blocks_have_at_most_the_wanted_size_and_keep_the_order(raw: Raw, size: int) -> None:
    with open_raw(raw()) as file:
        blocks = list(file.blocks(size))
    assert all(len(block) <= size for block in blocks)
    assert np.concatenate([block.headers["scan_counter"] for block in blocks]).tolist() == list(range(1, 55))


def test_a_block_holds_readouts_of_one_shape(scan: SimulatedScan, raw: Raw) -> None:
    block = scan.blocks[1]
    headers = block.headers[:4].copy()
    headers["number_of_samples"] = 16
    short = ReadoutBlock(headers, block.samples[:4, :, :16], block.trajectory[:4, :16])
    path = raw(blocks=[block.select(slice(0, 3)), short, block.select(slice(3, 6))])
    assert [block.samples.shape for block in opened(path)] == [(3, 4, 64), (4, 4, 16), (3, 4, 64)]


def test_trajectories_are_kept(scan: SimulatedScan, raw: Raw) -> None:
    block = scan.blocks[1].select(slice(0, 5))
    headers = block.headers.copy()
    headers["trajectory_dimensions"] = 2
    trajectory = np.random.default_rng(0).normal(size=(5, 64, 2)).astype(np.float32)
    (found,) = opened(raw(blocks=[ReadoutBlock(headers, block.samples, trajectory)]))
    np.testing.assert_array_equal(found.trajectory, trajectory)


def test_a_file_written_here_is_read_by_ismrmrd(scan: SimulatedScan, raw: Raw) -> None:
    with closing(ismrmrd.Dataset(str(raw()), "dataset", create_if_needed=False)) as dataset:
        assert dataset.read_xml_header() == scan.header_xml
        assert dataset.number_of_acquisitions() == 54
        acquisition = dataset.read_acquisition(40)
    np.testing.assert_array_equal(acquisition.data, scan.blocks[1].samples[8])
    assert acquisition.scan_counter == 41
    assert acquisition.is_flag_set(ismrmrd.ACQ_IS_NOISE_MEASUREMENT) is False


def test_a_file_written_by_ismrmrd_is_read_here(scan: SimulatedScan, tmp_path: Path) -> None:
    samples = np.arange(24, dtype=np.complex64).reshape(3, 8)
    acquisition = ismrmrd.Acquisition.from_array(samples)
    acquisition.scan_counter = 7
    with closing(ismrmrd.Dataset(str(tmp_path / "theirs.h5"), "dataset")) as dataset:
        dataset.write_xml_header(scan.header_xml)
        dataset.append_acquisition(acquisition)
    (block,) = opened(tmp_path / "theirs.h5")
    np.testing.assert_array_equal(block.samples, samples[None])
    assert block.headers["scan_counter"].tolist() == [7]


def add_waveforms(count: int, *, short: bool = False) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        records = np.zeros(count, dtype=waveform_dtype)
        records["head"]["channels"], records["head"]["number_of_samples"] = 2, 3
        records["head"]["time_stamp"] = 100 + np.arange(count)
        for number in range(count):
            records["data"][number] = np.arange(5 if short else 6, dtype=np.uint32) + 10 * number
        file["dataset"].create_dataset("waveforms", data=records)

    return change


def test_waveforms_are_read_in_order(raw: Raw) -> None:
    with open_raw(edit(raw(), add_waveforms(3))) as file:
        waveforms = list(file.waveforms())
    assert [item.time_stamp for item in waveforms] == [100, 101, 102]
    np.testing.assert_array_equal(waveforms[1].data, [[10, 11, 12], [13, 14, 15]])


def test_a_waveform_that_does_not_match_its_header_is_refused(raw: Raw) -> None:
    path = edit(raw(), add_waveforms(1, short=True))
    with (
        open_raw(path) as file,
        pytest.raises(ValueError, match=f"{path}: waveform 0 holds 5 values; its header states 6"),
    ):
        list(file.waveforms())


def test_another_group_can_be_read(raw: Raw) -> None:
    assert len(opened(raw("images"), "images")) == 1


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"scan\.h5: no such file"):
        opened(tmp_path / "scan.h5")


@pytest.mark.parametrize("content", [b"", b"not HDF5", b"\x89HDF\r\n\x1a\n"[:6]])
def test_a_file_that_is_not_hdf5(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "scan.h5").write_bytes(content)
    with pytest.raises(ValueError, match=r"scan\.h5: not an HDF5 file; expected ISMRMRD raw data in HDF5"):
        opened(tmp_path / "scan.h5")


def test_a_truncated_file(raw: Raw) -> None:
    path = raw()
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(OSError, match=r"scan\.h5: cannot be read .*truncated file"):
        opened(path)


def test_a_damaged_file(raw: Raw) -> None:
    class Damaged:
        shape = (600,)

        def __getitem__(self, chosen: slice) -> None:
            raise OSError("Can't synchronously read data (inflate() failed)")

    path = raw()
    with (
        open_raw(path) as file,
        pytest.raises(OSError, match=f"{path}: cannot be read after acquisition 0 .Can't synch"),
    ):
        list(dataclasses.replace(file, group={"data": Damaged()}).blocks())


def test_a_missing_group_lists_those_present(raw: Raw) -> None:
    path = raw("first")

    def change(file: h5py.File) -> None:
        file.create_group("second")
        file["values"] = np.zeros(3)

    edit(path, change)
    with pytest.raises(ValueError, match=f"{path}: has no group 'dataset'; groups present: 'first', 'second'$"):
        opened(path)


def test_a_file_without_any_group(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "scan.h5", "w") as file:
        file["dataset"] = np.zeros(3)
    with pytest.raises(ValueError, match="has no group 'dataset'; groups present: none"):
        opened(tmp_path / "scan.h5")


def without(name: str) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file["dataset"][name]

    return change


def no_readouts(file: h5py.File) -> None:
    file["dataset"]["data"].resize(0, axis=0)


def plain_data(file: h5py.File) -> None:
    del file["dataset"]["data"]
    file["dataset"]["data"] = np.zeros((4, 4), dtype=np.float32)


def broken_xml(file: h5py.File) -> None:
    file["dataset"]["xml"][0] = b"<ismrmrdHeader>"


def short_readout(file: h5py.File) -> None:
    record = file["dataset"]["data"][40]
    record["data"] = record["data"][:100]
    file["dataset"]["data"][40] = record


def lying_header(file: h5py.File) -> None:
    record = file["dataset"]["data"][40]
    record["head"]["trajectory_dimensions"] = 2
    file["dataset"]["data"][40] = record


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (without("xml"), "group 'dataset' has no XML header .'xml'.; expected ISMRMRD raw data"),
        (without("data"), "group 'dataset' has no acquisitions .'data'.; expected at least one"),
        (no_readouts, "group 'dataset' has no acquisitions .'data'.; expected at least one"),
        (plain_data, "group 'dataset': 'data' has fields .*; expected ISMRMRD's head, traj, data"),
        (broken_xml, "header: not well-formed XML"),
        (
            short_readout,
            r"acquisition 40: data holds 100 numbers; its header \(4 channels of 64 samples\) states 512",
        ),
        (lying_header, "acquisition 40: traj holds 0 numbers; its header .* states 128"),
    ],
)
def test_bad_files_are_refused(raw: Raw, change: Callable[[h5py.File], None], text: str) -> None:
    path = edit(raw(), change)
    with pytest.raises(ValueError, match=f"{path}: {text}"):
        opened(path)


def test_a_file_is_closed_behind_an_error(raw: Raw) -> None:
    path = raw()
    with pytest.raises(KeyError, match="stop"), open_raw(path) as file:
        raise KeyError("stop")
    assert not file.group


def test_a_failing_source_leaves_no_file(scan: SimulatedScan, tmp_path: Path) -> None:
    def failing() -> Iterator[ReadoutBlock]:
        yield scan.blocks[0]
        raise ValueError("no more readouts")

    with pytest.raises(ValueError, match="no more readouts"):
        write_raw(tmp_path / "scan.h5", scan.header_xml, failing())
    assert list(tmp_path.iterdir()) == []


def test_an_older_file_is_replaced(scan: SimulatedScan, raw: Raw) -> None:
    path = raw()
    assert write_raw(path, scan.header_xml, scan.blocks[:1]) == 32
    assert len(opened(path)[0]) == 32


def test_a_real_scan_is_read_whole(shared_data: Path) -> None:
    with open_raw(shared_data / "snr_r3.h5") as raw:
        blocks = list(raw.blocks())
        assert len(raw) == 69
    assert [block.samples.shape[1:] for block in blocks] == [(14, 384)] * len(blocks)
    assert sum(map(len, blocks)) == 69
    noisy = np.concatenate([block.flagged(ismrmrd.ACQ_IS_NOISE_MEASUREMENT) for block in blocks])
    assert np.flatnonzero(noisy).tolist() == [0]
