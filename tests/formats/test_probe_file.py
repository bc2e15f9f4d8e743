"""Files of kept probes: round trips, that a file is whole or not there, and that little of it is read."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from voxelsigma.formats.probe_file import KeptVolume, VolumeMeta, open_probes, probe_path
from voxelsigma.formats.probe_writer import probe_writer

META = VolumeMeta(
    counters={"slice": 3, "contrast": 0, "phase": 1, "repetition": 2, "set": 0},
    bias=1.25,
    covariance_error=0.027,
    independent_planes=False,
    voxel_mm=(5.0, 1.5, 1.25),
    model="unrolled_small",
    seed="17",
    labels="uncalibrated",
)


def random_complex(shape: tuple[int, ...], seed: int) -> NDArray[np.complex64]:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(np.complex64)


def write(path: Path, image: NDArray[Any], probes: list[NDArray[Any]], *, axis: int = 0, batch: int = 8) -> str:
    """Keep the probes of a volume, of each plane all of an array, and give the token."""
    with probe_writer(path) as writer:
        volume = writer.volume(META, image, plane_axis=axis, probes=max(map(len, probes)))
        for number, plane in enumerate(probes):
            add = volume.plane(number, complex_linear=number == 0)
            for part in torch.from_numpy(plane).split(batch):
                add(part)
    return writer.token


def all_of(volume: KeptVolume, plane: int, rows: slice = slice(None), columns: slice = slice(None)) -> NDArray[Any]:
    return torch.cat(list(volume.batches(plane, rows, columns))).numpy()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@settings(deadline=None, max_examples=15)
@given(
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    counts=st.lists(st.integers(2, 20), min_size=1, max_size=3),
    volumetric=st.booleans(),
    batch=st.integers(1, 9),
    data=st.data(),
)
def test_what_was_kept_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    size: tuple[int, int],
    counts: list[int],
    volumetric: bool,
    batch: int,
    data: st.DataObject,
) -> None:
    path = tmp_path_factory.mktemp("probes") / "out.probes.h5"
    axis = 2 if volumetric else 0
    shape = (*size, len(counts)) if volumetric else (len(counts), *size)
    image = random_complex(shape, 1)
    probes = [random_complex((count, *size), number) for number, count in enumerate(counts)]
    token = write(path, image, probes, axis=axis, batch=batch)
    with open_probes(path) as kept:
        assert kept.token == token
        (volume,) = kept.volumes
        assert volume.meta == META
        assert (volume.shape, volume.plane_axis, volume.probes) == (shape, axis, tuple(counts))
        assert volume.complex_linear == tuple(number == 0 for number in range(len(counts)))
        np.testing.assert_array_equal(volume.image(), image)
        rows, columns = (
            slice(*sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)).filter(lambda e: e[0] != e[1]))))
            for n in size
        )
        for number, plane in enumerate(probes):
            np.testing.assert_array_equal(volume.plane_image(number), np.take(image, number, axis=axis))
            np.testing.assert_allclose(all_of(volume, number, rows, columns), 1.25 * plane[:, rows, columns])
            (first,) = volume.batches(number, rows, columns, limit=2)
            assert len(first) == 2


def test_real_images_keep_real_probes(tmp_path: Path) -> None:
    path = tmp_path / "p.h5"
    probes = random_complex((5, 6, 7), 1).real
    write(path, np.ones((1, 6, 7)), [probes])
    with open_probes(path) as kept:
        found = all_of(kept.volumes[0], 0)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, 1.25 * probes)


def test_many_probes_come_in_batches_of_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("voxelsigma.formats.probe_file.BATCH_BYTES", 16 * 40 * 40 * 8)
    path = tmp_path / "p.h5"
    probes = random_complex((50, 40, 40), 1)
    write(path, random_complex((1, 40, 40), 2), [probes])
    with open_probes(path) as kept:
        batches = list(kept.volumes[0].batches(0, slice(None), slice(None)))
        assert [len(batch) for batch in batches] == [16, 16, 16, 2]
        shared = kept.volumes[0].batches(0, slice(0, 20), slice(None), share=4)
        assert len(next(shared)) == 8


def test_only_the_tiles_that_a_region_touches_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.h5"
    write(path, random_complex((1, 256, 256), 2), [random_complex((32, 256, 256), 1)])
    with open_probes(path) as kept:
        before = _bytes_read()
        all_of(kept.volumes[0], 0, slice(40, 44), slice(70, 90))
        one = _bytes_read() - before
    # 4 chunks of 8 probes by 32 by 32, and what HDF5 needs to find them, of 16 MiB
    assert one < 2**20


def _bytes_read() -> int:
    """Bytes that this process asked the system for, Linux only."""
    file = Path("/proc/self/io")
    if not file.is_file():
        pytest.skip("no /proc/self/io here")
    return int(dict(line.split(": ") for line in file.read_text().splitlines())["rchar"])


def test_where_probes_are_kept() -> None:
    assert probe_path(Path("a/out.h5")) == Path("a/out.probes.h5")
    assert probe_path(Path("out.1.mrd")) == Path("out.1.probes.mrd")
    assert probe_path(Path("out")) == Path("out.probes.h5")


# --- whole or not there


def test_a_disk_without_room_is_told_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5 * 10**7))
    with pytest.raises(
        OSError, match=r"p\.h5: 1000 probes of 1 x 64 x 64 voxels need 0\.03 GB, 0\.05 GB are free .*keep fewer"
    ):
        _begin(tmp_path / "p.h5", 1000)
    assert names(tmp_path) == []


def _begin(path: Path, probes: int, size: int = 64) -> None:
    with probe_writer(path) as writer:
        writer.volume(META, random_complex((1, size, size), 1), plane_axis=0, probes=probes)


def test_a_disk_that_fills_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, content: bytes, offset: int) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", refuse)
    probes = random_complex((64, 64, 64), 1)
    with pytest.raises(OSError, match=r"p\.h5: cannot be written \(No space left on device\)$"):
        write(tmp_path / "p.h5", probes[:1], [probes])
    assert names(tmp_path) == []


def keep_nothing(path: Path) -> None:
    with probe_writer(path):
        pass


def keep_half(path: Path) -> None:
    with probe_writer(path) as writer:
        volume = writer.volume(META, random_complex((3, 4, 4), 1), plane_axis=0, probes=9)
        volume.plane(0)(torch.from_numpy(random_complex((9, 4, 4), 2)))
        volume.plane(2)(torch.from_numpy(random_complex((1, 4, 4), 2)))


def keep_and_fail(path: Path) -> None:
    with probe_writer(path) as writer:
        writer.volume(META, random_complex((3, 4, 4), 1), plane_axis=0, probes=9)
        raise KeyError("gadget failed")


@pytest.mark.parametrize(
    ("keep", "error", "text"),
    [
        (keep_nothing, ValueError, r"p\.h5: no probes were pushed, so there are none to keep; .* 'sketch'"),
        (keep_half, ValueError, r"volume 0 is not whole: 2 of 3 planes have fewer than 2 probes \(first 1\)"),
        (keep_and_fail, KeyError, "gadget failed"),
    ],
)
def test_what_is_not_whole_leaves_no_file(
    tmp_path: Path, keep: Callable[[Path], None], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        keep(tmp_path / "p.h5")
    assert names(tmp_path) == []


def test_what_does_not_fit_a_volume_is_refused(tmp_path: Path) -> None:
    with probe_writer(tmp_path / "p.h5") as writer:
        volume = writer.volume(META, np.ones((2, 4, 5)), plane_axis=0, probes=9)
        volume.plane(1)(torch.ones(3, 4, 5))
        add = volume.plane(0)
        add(torch.ones(3, 4, 5))
        for wrong in (torch.ones(3, 5, 4), torch.ones(3, 4, 5, dtype=torch.complex64)):
            with pytest.raises(ValueError, match=r"for plane 0; expected float32, \(probes, 4, 5\)"):
                add(wrong)
        for number in (-1, 0, 2):
            with pytest.raises(ValueError, match=f"plane {number} of 2 is none, or was kept before"):
                volume.plane(number)
    with open_probes(tmp_path / "p.h5") as found:
        assert found.volumes[0].probes == (3, 3)


# --- damaged files


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    path = tmp_path / "p.h5"
    write(path, random_complex((1, 40, 40), 2), [random_complex((16, 40, 40), 1)])
    return path


def read(path: Path) -> None:
    with open_probes(path) as kept:
        for volume in kept.volumes:
            volume.image()
            all_of(volume, 0)


def test_every_truncation_is_an_error(kept: Path) -> None:
    whole = kept.read_bytes()
    for size in range(0, len(whole), len(whole) // 60):
        kept.write_bytes(whole[:size])
        with pytest.raises((ValueError, OSError), match=r"p\.h5: (not an HDF5 file|cannot be read|.*damaged)"):
            read(kept)


def test_a_flipped_bit_is_an_error_or_reads_the_same(kept: Path) -> None:
    whole = kept.read_bytes()
    # probes are nearly all of the file; metadata of HDF5 have no checksum of their own
    place = len(whole) // 2
    kept.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
    with pytest.raises(ValueError, match=r"p\.h5: /volume_0/plane_0 cannot be read, the file is damaged"):
        read(kept)


def drop_token(root: h5py.File) -> None:
    del root.attrs["token"]


def drop_image(root: h5py.File) -> None:
    del root["volume_0/image"]


def drop_volume(root: h5py.File) -> None:
    del root["volume_0"]


def drop_plane(root: h5py.File) -> None:
    del root["volume_0/plane_0"]


def drop_bias(root: h5py.File) -> None:
    del root["volume_0"].attrs["bias"]


def shorten(root: h5py.File) -> None:
    root["volume_0/plane_0"].resize(1, axis=0)


def break_probe(root: h5py.File) -> None:
    root["volume_0/plane_0"][3, 2, 1] = np.nan


def break_axis(root: h5py.File) -> None:
    root["volume_0"].attrs["plane_axis"] = 7


@pytest.mark.parametrize(
    "damage", [drop_token, drop_image, drop_volume, drop_plane, drop_bias, shorten, break_probe, break_axis]
)
def test_what_is_missing_or_broken_is_an_error(kept: Path, damage: Callable[[h5py.File], None]) -> None:
    with h5py.File(kept, "r+") as root:
        damage(root)
    with pytest.raises(ValueError, match=r"p\.h5: .*damaged"):
        read(kept)


def test_other_files_are_told_apart(kept: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.h5: no such file"):
        read(tmp_path / "none.h5")
    with h5py.File(kept, "r+") as root:
        root.attrs["voxelsigma_probes"] = 2
    with pytest.raises(ValueError, match=r"p\.h5: kept probes of version 2; expected version 1"):
        read(kept)
    with h5py.File(kept, "r+") as root:
        del root.attrs["voxelsigma_probes"]
    with pytest.raises(ValueError, match=r"p\.h5: holds no kept probes; expected a file that '--keep-probes' made"):
        read(kept)
