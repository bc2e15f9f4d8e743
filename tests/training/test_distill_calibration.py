"""What a distillation is calibrated with, and what it does where a scan cannot be measured."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.training.distilled import run
from tests.training.scan_files import fastmri_file, ismrmrd_file

from voxelsigma.training import distill as distilling
from voxelsigma.training.config import DataSettings
from voxelsigma.training.distill_settings import CALIBRATION_FIRST
from voxelsigma.training.example import Example
from voxelsigma.training.responses import ResponseTarget, measure_response
from voxelsigma.training.target_files import REPLACEMENT
from voxelsigma.training.targets import ScanTarget, measure


class Seen:
    """Scans by the folders that they are measured for, each by the slice that it is of, and their numbers."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.slices: dict[str, set[bytes]] = {"responses": set(), "scans": set(), "calibration": set()}
        patch.setattr(distilling, "measure_response", self.response)
        patch.setattr(distilling, "measure", self.scan)

    def response(self, network: Any, scan: Example, **more: Any) -> ResponseTarget:
        self.note("responses", scan)
        return measure_response(network, scan, **more)

    def scan(self, network: Any, scan: Example, *, number: int, **more: Any) -> ScanTarget:
        self.note("calibration" if number >= CALIBRATION_FIRST else "scans", scan)
        return measure(network, scan, number=number, **more)

    def note(self, name: str, scan: Example) -> None:
        # every slice has coils of its own
        self.slices[name].add((scan.sensitivities * scan.sensitivities[:1].conj())[:, 20:22, 20:22].numpy().tobytes())


@pytest.mark.parametrize("kind", ["ismrmrd", "fastmri"])
def test_what_is_calibrated_with_is_not_learned_from(
    tmp_path: Path, card: Path, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "scans"
    folder.mkdir()
    write = ismrmrd_file if kind == "ismrmrd" else fastmri_file
    write(folder / "one.h5", matrix=(1, 48, 40), slices=3)
    data = DataSettings(folder=str(folder), kind=kind)
    seen = Seen(monkeypatch)
    content, lines = run(card, data, tmp_path / "out", surrogate_scans=6, calibration_scans=4)
    assert len(seen.slices["calibration"]) == 1
    assert len(seen.slices["scans"] | seen.slices["responses"]) == 2
    assert not seen.slices["calibration"] & (seen.slices["scans"] | seen.slices["responses"])
    assert lines[0] == "calibration: held back are one (slice 1)"
    note = tmp_path / "out" / "tiny.distill" / "run.json"
    described = json.loads(note.read_text())
    assert described["held back"] == ["one (slice 1)"]
    assert run(card, data, tmp_path / "out", surrogate_scans=6, calibration_scans=4)[0] == content
    # a run that held nothing back is another one
    note.write_text(json.dumps({key: value for key, value in described.items() if key != "held back"}))
    with pytest.raises(ValueError, match=r"tiny\.distill: holds another run \(differing in held back\)"):
        run(card, data, tmp_path / "out", surrogate_scans=6, calibration_scans=4)


def test_many_files_that_are_held_back_fit_a_line(tmp_path: Path, card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "scans"
    folder.mkdir()
    fastmri_file(folder / "00.h5", matrix=(1, 48, 40), slices=1)
    for number in range(1, 36):
        (folder / f"{number:02d}.h5").write_bytes((folder / "00.h5").read_bytes())

    def refused(*_: Any, **__: Any) -> None:
        raise ValueError("that will do")

    monkeypatch.setattr(distilling, "claim", refused)
    lines: list[str] = []
    with pytest.raises(ValueError, match="that will do"):
        distilling.distill(card, DataSettings(folder=str(folder), kind="fastmri"), out=tmp_path, report=lines.append)
    assert lines == ["calibration: held back are 02, 07, 12, 17, 22 and 2 more"]


def test_of_a_single_slice_it_is_told_that_nothing_is_held_back(tmp_path: Path, card: Path) -> None:
    folder = tmp_path / "scans"
    folder.mkdir()
    ismrmrd_file(folder / "one.h5", matrix=(1, 48, 40), slices=1)
    _, lines = run(card, DataSettings(folder=str(folder), kind="ismrmrd"), tmp_path / "out")
    assert lines[0].startswith("calibration: of a single slice nothing can be held back; with what was learned from,")
    assert json.loads((tmp_path / "out" / "tiny.distill" / "run.json").read_text())["held back"] == []


def test_a_run_of_volumes_is_described_as_ever(whole: Path) -> None:
    """Runs that take hours go on after an update."""
    described = json.loads((whole / "tiny.distill" / "run.json").read_text())
    expected = ["model", "surrogate", "start", "seed", "probes", "features", "examples", "data", "versions"]
    assert list(described) == expected
    assert described["data"] == ["volumes", "ball"]
    assert described["surrogate"] == {
        "channels": 4,
        "levels": 2,
        "surrogate_scans": 4,
        "surrogate_steps": 4,
        "surrogate_channels": 4,
        "surrogate_levels": 2,
        "surrogate_stages": [0.0, 0.0],
        "precision": "32-true",
    }


# --- scans that cannot be measured


class Stop(BaseException):
    """A kill."""


@pytest.mark.parametrize("stop", [4, 10])
def test_scans_that_cannot_be_measured_are_replaced(
    tmp_path: Path, card: Path, data: DataSettings, whole: Path, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the same ones in a run that was stopped, and by none that another folder has."""
    failing = {2, 2 + REPLACEMENT, CALIBRATION_FIRST + 1}
    asked: list[int] = []
    left = 0

    def measured(*arguments: Any, number: int, **more: Any) -> ScanTarget:
        asked.append(number)
        if len(asked) == left:
            raise Stop
        if number in failing:
            raise ValueError("linearize: the derivative is not finite")
        return measure(*arguments, number=number, **more)

    monkeypatch.setattr(distilling, "measure", measured)
    for folder in (tmp_path / "one", tmp_path / "other"):
        # the surrogate is there
        shutil.copytree(whole, folder)
        for name in ("scans", "calibration"):
            shutil.rmtree(folder / "tiny.distill" / name)
        (folder / "tiny.distill" / "last.ckpt").unlink()
    found, lines = run(card, data, tmp_path / "one")
    expected = [0, 1, 2, 2 + REPLACEMENT, 2 + 2 * REPLACEMENT, 3, 4, 5]
    checks = [CALIBRATION_FIRST, CALIBRATION_FIRST + 1, CALIBRATION_FIRST + 1 + REPLACEMENT]
    assert asked == [*expected, *checks]
    told = [line for line in lines if "cannot be measured" in line]
    reason = "cannot be measured, another one is drawn: linearize: the derivative is not finite"
    assert told == [f"scans 2 {reason}", f"scans 2 {reason}", f"calibration 1 {reason}"]
    assert found != (whole / "tiny.sigma.safetensors").read_bytes()
    asked.clear()
    left = stop
    with pytest.raises(Stop):
        run(card, data, tmp_path / "other")
    left = 0
    assert run(card, data, tmp_path / "other")[0] == found
