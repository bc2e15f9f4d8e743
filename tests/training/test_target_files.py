"""Folders of measured scans: what is missing is made, and what cannot be made is replaced, or said."""

import json
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

import pytest
from tests.training.distilled import same, tiny_network

from voxelsigma.training.example import Example
from voxelsigma.training.target_files import REPLACEMENT, target_files
from voxelsigma.training.targets import ScanTarget, measure

REASON = "linearize: the reconstruction is not differentiable"


@pytest.fixture(scope="module")
def target(scan: Example) -> ScanTarget:
    return measure(tiny_network(), scan, first=8, probes=4, seed=3, number=2)


def test_the_missing_and_the_damaged_are_made(tmp_path: Path, target: ScanTarget) -> None:
    made: list[int] = []
    lines: list[str] = []

    def make(number: int) -> ScanTarget:
        made.append(number)
        return target

    def run(count: int) -> list[Path]:
        made.clear()
        lines.clear()
        return target_files(tmp_path / "scans", count, load=ScanTarget.load, make=make, tell=lines.append)

    paths = run(3)
    assert made == [0, 1, 2]
    assert [path.name for path in paths] == ["00000.npz", "00001.npz", "00002.npz"]
    assert len(lines) == 1
    assert lines[0].startswith("scans 3/3  ")
    assert lines[0].endswith(" s each, 0 min to go")
    run(3)
    assert (made, lines) == ([], [])
    paths[1].write_bytes(paths[1].read_bytes()[:1000])
    run(5)
    assert made == [1, 3, 4]
    assert "00001.npz: damaged" in lines[0]
    assert lines[1] == "scans: 2 of 5 are there"
    assert same(ScanTarget.load(paths[1]), target)


# --- scans that cannot be made


class Numbered:
    """A scan that is but its number."""

    def __init__(self, number: int) -> None:
        self.number = number

    def save(self, path: Path) -> None:
        path.write_text(str(self.number))


def load(path: Path) -> Numbered:
    return Numbered(int(path.read_text()))


class Stop(BaseException):
    """A kill."""


def maker(failing: Collection[int], *, stop: int | None = None) -> Callable[[int], Numbered]:
    calls = 0

    def make(number: int) -> Numbered:
        nonlocal calls
        calls += 1
        if calls == stop:
            raise Stop
        if number in failing:
            raise ValueError(f"{REASON} ({number % REPLACEMENT}, {number // REPLACEMENT})")
        return Numbered(number)

    return make


def made(folder: Path, count: int, make: Callable[[int], Numbered], lines: list[str] | None = None) -> list[int]:
    """The numbers of the scans behind the files."""
    told = [] if lines is None else lines
    paths = target_files(folder, count, make=make, load=load, tell=told.append)
    assert [path.name for path in paths] == [f"{number:05d}.npz" for number in range(count)]
    return [load(path).number for path in paths]


def test_a_scan_that_cannot_be_made_is_named_and_replaced(tmp_path: Path) -> None:
    lines: list[str] = []
    failing = (2, 5, 5 + REPLACEMENT)
    expected = [0, 1, 2 + REPLACEMENT, 3, 4, 5 + 2 * REPLACEMENT, 6]
    assert made(tmp_path / "scans", 7, maker(failing), lines) == expected
    assert lines[:-1] == [
        f"scans 2 cannot be measured, another one is drawn: {REASON} (2, 0)",
        f"scans 5 cannot be measured, another one is drawn: {REASON} (5, 0)",
        f"scans 5 cannot be measured, another one is drawn: {REASON} (5, 1)",
    ]
    assert lines[-1].startswith("scans 7/7  ")
    # damaged, it is replaced by the same one; what is there stays
    (tmp_path / "scans" / "00005.npz").write_text("")
    assert made(tmp_path / "scans", 7, maker(failing)) == expected
    assert made(tmp_path / "scans", 7, maker(range(9))) == expected


def test_five_failures_in_a_row_end_it_with_the_reason(tmp_path: Path) -> None:
    failing = [3 + attempt * REPLACEMENT for attempt in range(5)]
    assert made(tmp_path / "most", 60, maker(failing[:4]))[3] == 3 + 4 * REPLACEMENT
    # and once more, as nothing has changed
    for _ in range(2):
        with pytest.raises(
            ValueError,
            match=r"^distill: scans 3 cannot be measured: linearize: .* \(3, 4\) \(the last of 5 in a row\)$",
        ):
            made(tmp_path / "scans", 60, maker(failing))
        assert sorted(path.name for path in (tmp_path / "scans").glob("*.npz")) == [
            "00000.npz",
            "00001.npz",
            "00002.npz",
        ]


@pytest.mark.parametrize(("count", "most"), [(6, 4), (40, 4), (60, 6)])
def test_more_than_a_tenth_of_failures_end_it(tmp_path: Path, count: int, most: int) -> None:
    assert made(tmp_path / "most", count, maker(range(most)))[:most] == [n + REPLACEMENT for n in range(most)]
    told = rf"^distill: scans {most} cannot be measured: linearize: .*\({most + 1} failed, for {count} that are wanted"
    for _ in range(2):
        with pytest.raises(ValueError, match=told):
            made(tmp_path / "scans", count, maker(range(most + 1)))
    # what was failing does so no more
    assert made(tmp_path / "scans", count, maker(()))[most] == most


@pytest.mark.parametrize("stop", range(1, 70, 4))
def test_a_run_that_was_stopped_gives_the_same_scans_or_the_same_error(tmp_path: Path, stop: int) -> None:
    good, bad = (1, 1 + REPLACEMENT, 7, 30, 30 + REPLACEMENT, 59), (1, 1 + REPLACEMENT, 7, 30, 30 + REPLACEMENT, 55, 59)
    whole = made(tmp_path / "whole", 60, maker(good))
    for failing, folder in ((good, tmp_path / "good"), (bad, tmp_path / "bad")):
        with suppress(Stop, ValueError):
            made(folder, 60, maker(failing, stop=stop))
    assert made(tmp_path / "good", 60, maker(good)) == whole
    with pytest.raises(ValueError, match=r"bad 59 cannot be measured: .*\(7 failed, for 60"):
        made(tmp_path / "bad", 60, maker(bad))


@pytest.mark.parametrize("content", ["{", "[]", '{"a": []}', '{"1": 3}', "\xff"])
def test_a_damaged_note_of_failures_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "scans").mkdir()
    note = tmp_path / "scans" / "replaced.json"
    note.write_bytes(content.encode("latin-1"))
    lines: list[str] = []
    assert made(tmp_path / "scans", 4, maker((2,)), lines)[2] == 2 + REPLACEMENT
    assert lines[0].endswith("replaced.json: damaged; failures are counted anew")
    assert json.loads(note.read_text()) == {"2": [f"{REASON} (2, 0)"]}


def test_other_errors_end_it_at_once(tmp_path: Path) -> None:
    def make(number: int) -> Numbered:
        raise MemoryError("no more")

    with pytest.raises(MemoryError, match="no more"):
        made(tmp_path / "scans", 2, make)
