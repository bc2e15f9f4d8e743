"""Folders of measured scans: those that are there stay, the others are made."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from voxelsigma.formats.atomic import write_whole

REPLACEMENT: Final = 2**24
"""From the number of a scan to that of the one in its place, where it cannot be made: beyond all that are asked for."""

_MOST_IN_A_ROW: Final = 5
_MOST_SHARE: Final = 0.1
_NOTE: Final = "replaced.json"
_TELL_EVERY: Final = 20

Tell = Callable[[str], None]


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
    tell: Tell,
) -> list[Path]:
    """Files `00000.npz` and so on of a folder, the missing and the damaged ones made.

    Where a scan cannot be made, another takes its place, and its file: that of its number and `REPLACEMENT`, or twice
    that, and so on. Which ones follows from the scans alone, not from where a run was interrupted.

    Parameters
    ----------
    folder
        Made if it is not there; the folder around it must be. Failures are noted in it, in `replaced.json`.
    count
        How many.
    make, load
        The scan of a number, always the same one, `ValueError` if it cannot be made; that of a file, `ValueError` if it
        is damaged.
    tell
        Called with lines of text: what is damaged, what cannot be made, how far it is, and the time to go.

    Raises
    ------
    ValueError
        Scans cannot be made, five in a row, or more than four and more than a tenth of `count`; the last one and its
        reason are named.
    OSError
        A file cannot be written.
    """
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{number:05d}.npz" for number in range(count)]
    missing = [number for number, path in enumerate(paths) if not _whole(path, load, tell)]
    there = count - len(missing)
    if missing and there:
        tell(f"{folder.name}: {there} of {count} are there")
    failures = _Failures(folder / _NOTE, count, _noted(folder / _NOTE, tell))
    start = time.monotonic()
    for done, number in enumerate(missing, start=1):
        _made(number, make, failures, tell).save(paths[number])
        if done % _TELL_EVERY == 0 or done == len(missing):
            seconds = (time.monotonic() - start) / done
            minutes = (len(missing) - done) * seconds / 60
            tell(f"{folder.name} {there + done}/{count}  {seconds:.2f} s each, {minutes:.0f} min to go")
    return paths


@dataclass(frozen=True, slots=True)
class _Failures:
    """Scans that could not be made, those that took their places too.

    Parameters
    ----------
    note
        Where they are noted, so that a run that was interrupted counts as one that was not.
    count
        How many scans are wanted.
    reasons
        By the numbers of the scans.
    """

    note: Path
    count: int
    reasons: dict[str, list[str]]

    def add(self, number: int, error: ValueError) -> None:
        """Note one.

        Raises
        ------
        ValueError
            It is one too many.
        """
        own = self.reasons.setdefault(str(number), [])
        own.append(str(error))
        write_whole(self.note, json.dumps(self.reasons, indent=1).encode())
        told = f"distill: {self.note.parent.name} {number} cannot be measured: {error}"
        if len(own) == _MOST_IN_A_ROW:
            raise ValueError(f"{told} (the last of {_MOST_IN_A_ROW} in a row)") from error
        failed = sum(map(len, self.reasons.values()))
        if failed >= _MOST_IN_A_ROW and failed > _MOST_SHARE * self.count:
            raise ValueError(f"{told} ({failed} failed, for {self.count} that are wanted; at most a tenth)") from error


def _made(number: int, make: Callable[[int], Target], failures: _Failures, tell: Tell) -> Target:
    """The scan of a number, or the first in its place that can be made."""
    # of a file that is made again
    failures.reasons.pop(str(number), None)
    place = number
    while True:
        try:
            return make(place)
        except ValueError as error:
            failures.add(number, error)
            tell(f"{failures.note.parent.name} {number} cannot be measured, another one is drawn: {error}")
        place += REPLACEMENT


def _noted(note: Path, tell: Tell) -> dict[str, list[str]]:
    """What was noted in an earlier run."""
    if not note.exists():
        return {}
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
        return {str(int(number)): [str(one) for one in reasons] for number, reasons in found.items()}
    except (ValueError, AttributeError, TypeError):
        tell(f"{note}: damaged; failures are counted anew")
        return {}


def _whole(path: Path, load: Callable[[Path], Target], tell: Tell) -> bool:
    if not path.exists():
        return False
    try:
        load(path)
    except ValueError as error:
        tell(f"measured again: {error}")
        return False
    return True
