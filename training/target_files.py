"""Folders of measured scans: those that are there stay, the others are made."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

_TELL_EVERY: Final = 20


class Target(Protocol):
    """A measured scan."""

    def save(self, path: Path) -> None:
        """Write it, whole or not at all."""
        ...


def target_files(
    folder: Path,
    count: int,
    *,
    make: Callable[[int], Target],
    load: Callable[[Path], Target],
    tell: Callable[[str], None],
) -> list[Path]:
    """Files `00000.npz` and so on of a folder, the missing and the damaged ones made.

    Parameters
    ----------
    folder
        Made if it is not there; the folder around it must be.
    count
        How many.
    make, load
        The scan of a number, always the same one; that of a file, `ValueError` if it is damaged.
    tell
        Called with lines of text: what is damaged, how far it is, and the time to go.

    Raises
    ------
    ValueError
        A scan cannot be made; its number is named.
    OSError
        A file cannot be written.
    """
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{number:05d}.npz" for number in range(count)]
    missing = [number for number, path in enumerate(paths) if not _whole(path, load, tell)]
    there = count - len(missing)
    if missing and there:
        tell(f"{folder.name}: {there} of {count} are there")
    start = time.monotonic()
    for done, number in enumerate(missing, start=1):
        try:
            found = make(number)
        except ValueError as error:
            raise ValueError(f"distill: {folder.name} {number} cannot be measured: {error}") from error
        found.save(paths[number])
        if done % _TELL_EVERY == 0 or done == len(missing):
            seconds = (time.monotonic() - start) / done
            minutes = (len(missing) - done) * seconds / 60
            tell(f"{folder.name} {there + done}/{count}  {seconds:.2f} s each, {minutes:.0f} min to go")
    return paths


def _whole(path: Path, load: Callable[[Path], Target], tell: Callable[[str], None]) -> bool:
    if not path.exists():
        return False
    try:
        load(path)
    except ValueError as error:
        tell(f"measured again: {error}")
        return False
    return True
