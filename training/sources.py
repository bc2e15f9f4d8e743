"""Where scans to train on come from: folders of volumes, of ISMRMRD files, or of fastMRI files."""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Final, Protocol, TypeVar

import numpy as np

from voxelsigma.training.example import Example, collate
from voxelsigma.training.examples import labelled_pools, stream
from voxelsigma.training.fastmri_scans import open_fastmri
from voxelsigma.training.ismrmrd_scans import open_ismrmrd
from voxelsigma.training.sampling import ExampleSettings
from voxelsigma.training.scans import MeasuredSlice, ScanFile, draw_scan, prepare_slice
from voxelsigma.training.volumes import VOLUME_ENDINGS, Volume, read_volume, volume_name

Opened = TypeVar("Opened")

KINDS: Final = ("volumes", "ismrmrd", "fastmri")

_SCAN_ENDINGS: Final = (".h5", ".hdf5", ".mrd")
_CACHE_BYTES: Final = 512 * 2**20
_ATTEMPTS: Final = 50
_PROBLEMS_SHOWN: Final = 3
_HELD_BACK: Final = 5


class Source(Protocol):
    """Batches without end."""

    @property
    def names(self) -> tuple[str, ...]:
        """Volumes or files that are used."""

    @property
    def skipped(self) -> tuple[str, ...]:
        """What is not used, and why: `file: reason`."""

    @property
    def coils(self) -> tuple[int, int] | None:
        """Least and most coils over the files of measured scans; None for volumes, where the settings decide."""

    def batches(self, settings: ExampleSettings, *, batch: int, seed: int, start: int = 0) -> Iterator[Example]:
        """Batches from number `start` on; batch number i depends on the seed and i alone."""


def open_source(
    kind: str, folder: Path, *, exclude: Sequence[str] = (), labelled: Collection[str] | None = None
) -> Source:
    """Open a folder of data to train on, and the folders in it.

    Parameters
    ----------
    kind
        `volumes`: label maps and intensities, `ismrmrd` or `fastmri`: fully sampled scans.
    folder
        Where the files are.
    exclude
        Names to hold out: of a volume its file's name, of a scan its path in the folder, both without ending.
    labelled
        Names of those with references, see `stream`.

    Returns
    -------
        With at least one usable file.

    Raises
    ------
    ValueError
        The kind is unknown, the folder does not exist or holds no usable file (the text names the first three
        problems), or `labelled` names what is not there.
    """
    if kind not in KINDS:
        raise ValueError(f"data: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if not folder.is_dir():
        raise ValueError(f"data: {folder} is not a folder")
    endings = VOLUME_ENDINGS if kind == "volumes" else _SCAN_ENDINGS
    paths = [path for path in sorted(folder.rglob("*")) if path.name.lower().endswith(endings) and path.is_file()]
    if not paths:
        raise ValueError(f"data: {folder} holds no {', '.join(endings)} file")
    names = [volume_name(path) if kind == "volumes" else _scan_name(path, folder) for path in paths]
    problems = [f"{name}: named in exclude, but there is none" for name in exclude if name not in names]
    chosen = [(path, name) for path, name in zip(paths, names, strict=True) if name not in exclude]
    if not chosen:
        raise ValueError(f"data: all {len(paths)} files in {folder} are excluded; expected at least one to train on")
    if kind == "volumes":
        volumes = _usable(lambda path, _: read_volume(path), chosen, folder, problems)
        labelled_pools(volumes, [volume.name for volume in volumes], labelled)
        return VolumeSource(tuple(volumes), labelled, tuple(problems))
    opener: Callable[[Path, str], ScanFile] = open_ismrmrd if kind == "ismrmrd" else open_fastmri
    files = _usable(opener, chosen, folder, problems)
    labelled_pools(files, [file.name for file in files], labelled)
    return ScanSource(folder, tuple(files), labelled, problems)


@dataclass(frozen=True, slots=True)
class VolumeSource:
    """Simulated scans of volumes."""

    volumes: tuple[Volume, ...]
    labelled: Collection[str] | None = None
    skipped: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Volumes that are used."""
        return tuple(volume.name for volume in self.volumes)

    @property
    def coils(self) -> None:
        """See `Source`."""
        return None

    def batches(self, settings: ExampleSettings, *, batch: int, seed: int, start: int = 0) -> Iterator[Example]:
        """See `stream`."""
        return stream(self.volumes, settings, batch=batch, seed=seed, start=start, labelled=self.labelled)


@dataclass(slots=True, eq=False)
class ScanSource:
    """Measured scans; slices are read when they are drawn, and the latest are kept in memory.

    The examples of a batch are of slices of one file, which share matrix and coils; files are drawn with the number
    of their slices. A slice that turns out to be damaged is warned of once, not read again, and replaced by another
    one, drawn from a stream of its own: what else is drawn stays the same.

    Parameters
    ----------
    folder, files
        Where they are, and which are used.
    labelled
        See `stream`.
    problems
        What is not used, and why.
    cache_bytes
        Memory for slices that were read.
    chosen
        Numbers of the slices to draw from, by the paths of the files; None for all.
    """

    folder: Path
    files: tuple[ScanFile, ...]
    labelled: Collection[str] | None = None
    problems: list[str] = field(default_factory=list)
    cache_bytes: int = _CACHE_BYTES
    chosen: Mapping[Path, Sequence[int]] | None = None
    _cache: OrderedDict[tuple[Path, int], MeasuredSlice] = field(default_factory=OrderedDict)
    _unusable: set[tuple[Path, int]] = field(default_factory=set)

    @property
    def names(self) -> tuple[str, ...]:
        """Files that are used."""
        return tuple(file.name for file in self.files)

    @property
    def skipped(self) -> tuple[str, ...]:
        """What is not used, and why; slices join it when they turn out to be damaged."""
        return tuple(self.problems)

    @property
    def coils(self) -> tuple[int, int]:
        """See `Source`."""
        found = [file.coils for file in self.files]
        return min(found), max(found)

    def batches(self, settings: ExampleSettings, *, batch: int, seed: int, start: int = 0) -> Iterator[Example]:
        """See `Source`.

        Raises
        ------
        ValueError
            If fifty draws in a row hold no usable slice, or the settings' centre does not fit the matrix.
        """
        pools = labelled_pools(self.files, self.names, self.labelled)
        for number in count(start):
            rng = np.random.default_rng([seed, number])
            files, has_target = pools[number % len(pools)]
            slices = self._draw_slices(files, batch, rng, (seed, number))
            drawn = collate([draw_scan(one, settings, rng) for one in slices])
            yield drawn if has_target else replace(drawn, target=None)

    def _draw_slices(
        self, files: Sequence[ScanFile], batch: int, rng: np.random.Generator, key: tuple[int, int]
    ) -> list[MeasuredSlice]:
        """Slices of a file; damaged ones are replaced by others of it, or all of them where none is usable.

        What replaces them depends on the key (seed and number of the batch) and the attempt, not on what was read
        before, so that processes with other memories draw alike.
        """
        chosen = [range(file.slices) if self.chosen is None else self.chosen[file.path] for file in files]
        counts = np.array([len(one) for one in chosen])
        usable: list[MeasuredSlice] = []
        for attempt in range(_ATTEMPTS):
            # entropy that ends in 0 is the same as without it: attempts count from 1
            source = rng if attempt == 0 else np.random.default_rng([*key, attempt])
            if not usable:
                which = source.choice(len(files), p=counts / counts.sum())
            places = source.integers(len(chosen[which]), size=batch - len(usable)).tolist()
            found = [self._slice(files[which], chosen[which][place]) for place in places]
            usable += [one for one in found if one is not None]
            if len(usable) == batch:
                return usable
        if not usable:
            problems = _shown(self.problems)
            raise ValueError(f"data: {_ATTEMPTS} draws from {self.folder} in a row were damaged: {problems}")
        # nearly all slices of the file are damaged
        return [usable[place % len(usable)] for place in range(batch)]

    def _slice(self, file: ScanFile, number: int) -> MeasuredSlice | None:
        """A slice, read and prepared unless it is in the cache; None, with a warning, if it is damaged."""
        key = (file.path, number)
        if key in self._unusable:
            return None
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        try:
            found = prepare_slice(*file.read(number))
        except (ValueError, OSError) as error:
            problem = f"{file.name}: slice {number}: {_reason(error, file.path)}"
            self._unusable.add(key)
            self.problems.append(problem)
            warnings.warn(f"data: {problem}; another one is drawn", RuntimeWarning, stacklevel=2)
            return None
        self._cache[key] = found
        while len(self._cache) > 1 and sum(one.nbytes for one in self._cache.values()) > self.cache_bytes:
            self._cache.popitem(last=False)
        return found


@dataclass(frozen=True, slots=True)
class Parts:
    """A source in two.

    Parameters
    ----------
    learned, checked
        What is learned from, and what tells how well: the same where nothing can be held back.
    held_back
        What only `checked` draws from: names of files, or of files and the places of slices in the object.
    """

    learned: Source
    checked: Source
    held_back: tuple[str, ...]


def divided(source: Source) -> Parts:
    """Hold back every fifth file of measured scans, or of fewer than five files every fifth slice, at least one.

    Repetitions of a slice go together. Of volumes nothing is held back: scans of them are simulated anew each time, and
    differ in slice, contrast, coils, mask and noise, though not in the head. Of a single slice nothing can be.
    """
    if not isinstance(source, ScanSource):
        return Parts(source, source, ())
    places = [sorted({(file.path, position) for position in file.positions}) for file in source.files]
    whole = len(places) >= _HELD_BACK
    names = source.names
    if not whole:
        names = tuple(f"{name} (slice {one})" for name, own in zip(names, places, strict=True) for _, one in own)
        places = [[place] for own in places for place in own]
    if len(places) == 1:
        return Parts(source, source, ())
    step = min(_HELD_BACK, len(places))
    held = {place for own in places[step // 2 :: step] for place in own}
    learned, checked = (
        {
            file.path: [number for number, one in enumerate(file.positions) if ((file.path, one) in held) == back]
            for file in source.files
        }
        for back in (False, True)
    )
    return Parts(_part(source, learned), _part(source, checked), names[step // 2 :: step])


def _part(source: ScanSource, chosen: Mapping[Path, Sequence[int]]) -> ScanSource:
    """Some slices; what was read, and what is damaged, is shared with the whole."""
    return replace(source, files=tuple(file for file in source.files if chosen[file.path]), chosen=chosen)


def _scan_name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).with_suffix("").as_posix()


def _usable(
    opener: Callable[[Path, str], Opened], chosen: Sequence[tuple[Path, str]], folder: Path, problems: list[str]
) -> list[Opened]:
    """What can be opened; the reasons of the others join `problems`."""
    found, reasons = [], []
    for path, name in chosen:
        opened, reason = _opened(opener, path, name)
        if opened is None:
            reasons.append(f"{path.relative_to(folder)}: {reason}")
        else:
            found.append(opened)
    if not found:
        raise ValueError(f"data: none of the {len(chosen)} files in {folder} is usable: {_shown(reasons)}")
    problems += reasons
    return found


def _opened(opener: Callable[[Path, str], Opened], path: Path, name: str) -> tuple[Opened | None, str]:
    """What can be opened, or why it cannot."""
    try:
        return opener(path, name), ""
    except (ValueError, OSError) as error:
        return None, _reason(error, path)


def _reason(error: Exception, path: Path) -> str:
    """An error's text without the path that it begins with."""
    return str(error).removeprefix("volumes: ").removeprefix(f"{path}").removeprefix(":").strip()


def _shown(problems: Sequence[str]) -> str:
    more = len(problems) - _PROBLEMS_SHOWN
    return "; ".join(problems[:_PROBLEMS_SHOWN]) + (f"; and {more} more" if more > 0 else "")
