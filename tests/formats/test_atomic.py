"""Files that are whole or not there, also where the disk is full."""

import errno
import os
from pathlib import Path

import pytest

from voxelsigma.formats.atomic import unwritable, whole_file, write_whole
from voxelsigma.formats.steady_file import SteadyFile


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_half(path: Path) -> None:
    with whole_file(path) as temporary:
        temporary.write_text("half")
        raise KeyError("halfway")


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with whole_file(path) as temporary:
        assert temporary.parent == tmp_path
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert names(tmp_path) == ["file"]


def test_a_file_has_the_usual_permissions(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        write_whole(tmp_path / "file", b"content")
    finally:
        os.umask(mask)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_a_failure_leaves_neither_the_file_nor_a_temporary_one(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="halfway"):
        write_half(tmp_path / "file")
    assert names(tmp_path) == []


def test_a_failure_leaves_an_older_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyError, match="halfway"):
        write_half(path)
    assert path.read_text() == "old"
    with whole_file(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert names(tmp_path) == ["file"]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "file"
    with pytest.raises(FileNotFoundError, match=f"{path}: folder {tmp_path / 'nowhere'} does not exist"):
        write_whole(path, b"")


@pytest.mark.parametrize("kind", ["folder", "device"])
def test_only_files_are_replaced(tmp_path: Path, kind: str) -> None:
    path = tmp_path if kind == "folder" else Path(os.devnull)
    with pytest.raises(OSError, match=f"{path}: cannot be written .it is a folder or a device; expected the name of"):
        write_whole(path, b"content")
    assert names(tmp_path) == []
    assert not Path(os.devnull).is_file()


def test_a_file_that_vanished_is_reported(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match=r"file: cannot be written \(No such file or directory"),
        whole_file(tmp_path / "file"),
    ):
        pass
    assert names(tmp_path) == []


def test_a_system_error_becomes_one_line() -> None:
    error = unwritable(Path("out.h5"), OSError(errno.ENOSPC, "No space left on device", "/tmp/.out.part"))
    assert str(error) == "out.h5: cannot be written (No space left on device)"
    assert str(unwritable(Path("out.h5"), OSError("odd"))) == "out.h5: cannot be written (odd)"


def test_a_steady_file_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    file = SteadyFile(path)
    assert file.write(b"abcdef") == 6
    assert (file.tell(), file.seek(2)) == (6, 2)
    assert file.read(3) == b"cde"
    assert file.seek(-1, os.SEEK_CUR) == 4
    file.write(b"XYZ")
    assert file.seek(0, os.SEEK_END) == 7
    file.seek(10)
    file.write(b"!")
    file.flush()
    file.seek(0)
    file.write(b"a")
    assert file.seek(0, os.SEEK_END) == 11
    file.seek(0)
    assert file.read(11) == b"abcdXYZ\0\0\0!"
    assert file.truncate(9) == 9
    file.close()
    assert file.failure is None
    assert path.read_bytes() == b"abcdXYZ\0\0"
    with pytest.raises(FileExistsError, match="file"):
        SteadyFile(path)


class Full:
    """A disk on which a file can grow to some size only."""

    def __init__(self, room: int) -> None:
        self.room = room

    def pwrite(self, descriptor: int, content: bytes, offset: int) -> int:
        fitting = content[: max(0, self.room - offset)]
        if not fitting:
            raise OSError(errno.ENOSPC, "No space left on device")
        # os.pwrite itself is patched in the test
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.write(descriptor, fitting)

    def ftruncate(self, descriptor: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_what_the_disk_refuses_is_kept_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    file = SteadyFile(path)
    monkeypatch.setattr(os, "pwrite", Full(room=8).pwrite)
    file.write(b"01234")
    assert file.failure is None
    file.write(b"56789")
    assert file.failure is not None
    assert file.failure.errno == errno.ENOSPC
    file.seek(2)
    file.write(b"CD")
    file.seek(20)
    file.write(b"end")
    file.seek(0)
    assert file.read(24) == b"01CD456789" + bytes(10) + b"end\0"
    assert file.seek(0, os.SEEK_END) == 23
    file.truncate(64)
    assert file.seek(0, os.SEEK_END) == 64
    file.close()
    assert path.read_bytes() == b"01234567"


def test_a_length_that_the_disk_refuses_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = SteadyFile(tmp_path / "file")
    monkeypatch.setattr(os, "ftruncate", Full(room=0).ftruncate)
    file.truncate(64)
    assert file.failure is not None
    file.close()


def test_a_failure_at_closing_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = SteadyFile(tmp_path / "file")

    def close(descriptor: int) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with monkeypatch.context() as patch:
        patch.setattr(os, "close", close)
        file.close()
    assert file.failure is not None
    assert file.failure.errno == errno.EDQUOT
    file.close()
