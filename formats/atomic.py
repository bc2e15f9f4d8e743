"""Files that are whole or not there."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, renamed to it when the block ends well, removed when it does not.

    Yields
    ------
        The temporary path; nothing is there yet.

    Raises
    ------
    FileNotFoundError
        If the folder does not exist.
    OSError
        If it cannot be written, with the file and the reason in one line.
    """
    folder = path.absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{path}: folder {folder} does not exist")
    if path.exists() and not path.is_file():
        raise OSError(f"{path}: cannot be written (it is a folder or a device; expected the name of a file)")
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=folder)
    except OSError as error:
        raise unwritable(path, error) from error
    os.close(handle)
    temporary = Path(name)
    mode = 0o666 & ~_umask()
    # some writers insist on creating the file themselves
    temporary.unlink()
    try:
        yield temporary
        _move(temporary, path, mode)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file at once.

    Raises
    ------
    OSError
        As `whole_file`, and where the disk is full.
    """
    with whole_file(path) as temporary:
        try:
            temporary.write_bytes(content)
        except OSError as error:
            raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> OSError:
    """The error to raise where a write to a file failed: one line with the file and the reason."""
    return OSError(f"{path}: cannot be written ({error.strerror or error})")


def _move(temporary: Path, path: Path, mode: int) -> None:
    """Put a file that is whole, and on the disk, under its final name."""
    try:
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(mode)
        temporary.replace(path)
    except OSError as error:
        raise unwritable(path, error) from error


def _umask() -> int:
    """The process's file mode creation mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
