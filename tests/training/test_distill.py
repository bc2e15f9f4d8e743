"""Distillation: it goes on where it was, ends with the same predictor, and its predictor says what it is worth."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.distilled import SETTINGS, TINY, tiny_card, volume_folder
from tests.training.scan_files import ismrmrd_file

from voxelsigma.models.cards import load_card
from voxelsigma.models.predictor_file import load_predictor
from voxelsigma.noise.instant import PREDICTED_AT
from voxelsigma.training import distill as distilling
from voxelsigma.training.card import record_predictor, write_card
from voxelsigma.training.config import DataSettings
from voxelsigma.training.distill import FIRST_PROBES, distill
from voxelsigma.training.start import start_network
from voxelsigma.training.targets import ScanTarget
from voxelsigma.training.teaching import prediction_loss

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSettings:
    return volume_folder(tmp_path_factory.mktemp("volumes"))


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_card(tmp_path_factory.mktemp("card"))


def run(card: Path, data: DataSettings, out: Path | None = None, **changes: Any) -> tuple[bytes, list[str]]:
    """The predictor's file, and what was told."""
    lines: list[str] = []
    settings = replace(SETTINGS, **changes)
    found = load_card(str(distill(card, data, out=out, settings=settings, accelerator="cpu", report=lines.append)))
    assert found.predictor is not None
    assert load_predictor(found, CPU) is not None
    return found.predictor.read_bytes(), lines


@pytest.fixture(scope="module")
def whole(card: Path, data: DataSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was not interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    run(card, data, folder)
    return folder


def predictor_of(folder: Path) -> bytes:
    return (folder / "tiny.sigma.safetensors").read_bytes()


def copied(whole: Path, to: Path) -> Path:
    return Path(shutil.copytree(whole, to))


# --- the run


def test_a_card_names_its_predictor(tmp_path: Path, data: DataSettings) -> None:
    path = tiny_card(tmp_path)
    before = path.read_text()
    content, lines = run(path, data)
    text = path.read_text()
    added = [line for line in text.splitlines() if line not in before.splitlines()]
    assert [line.split(":")[0] for line in added] == ["predictor", "predictor_sha256"]
    assert text.replace("".join(f"{line}\n" for line in added), "") == before
    card = load_card(str(path))
    predictor = load_predictor(card, CPU)
    assert predictor is not None
    assert float(predictor.calibration.max()) != 1
    assert [line.split("  ")[0] for line in lines[:-1]] == ["scans 6/6", "calibration 2/2", "step 2/4", "step 4/4"]
    assert lines[-1].startswith("calibrated: magnitude freedom x ")
    # once more there is nothing to do, and nothing changes
    again, lines = run(path, data)
    assert again == content
    assert path.read_text() == text
    assert [line.split(":")[0] for line in lines] == ["resumed after step 4 of 4", "calibrated"]


def test_a_copy_leaves_the_card_as_it_is(card: Path, data: DataSettings, whole: Path) -> None:
    assert "predictor" not in card.read_text()
    assert sorted(path.name for path in card.parent.iterdir()) == ["tiny.safetensors", "tiny.yaml"]
    assert (whole / "tiny.safetensors").read_bytes() == (card.parent / "tiny.safetensors").read_bytes()
    assert {"tiny.yaml", "tiny.distill", "tiny.sigma.safetensors"} < {path.name for path in whole.iterdir()}


def test_scans_begin_as_pipelines_do(
    tmp_path: Path, card: Path, data: DataSettings, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With as many first probes as a prediction is made of, drawn for every scan from the seed and its number."""
    folder = whole / "tiny.distill"
    target = ScanTarget.load(folder / "scans" / "00000.npz")
    asked: dict[int, int] = {}

    def noted(*_: Any, number: int, first: int, **__: Any) -> ScanTarget:
        asked[number] = first
        if len(asked) == 41:
            raise Stop
        return target

    with monkeypatch.context() as patch:
        patch.setattr(distilling, "measure", noted)
        with pytest.raises(Stop):
            run(card, data, tmp_path, scans=60)
    assert set(asked.values()) == set(FIRST_PROBES) == set(PREDICTED_AT)
    # half of them of the fewest: 20 of 40, a standard deviation of 3.2; five of them
    assert 5 <= list(asked.values()).count(8) <= 36
    found = [ScanTarget.load(path) for path in sorted((folder / "scans").iterdir())]
    assert [one.first for one in found] == [asked[number] for number in range(6)]
    assert {one.probes for one in found} == {4}


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_every_precision_makes_a_predictor(
    tmp_path: Path, card: Path, data: DataSettings, whole: Path, precision: str
) -> None:
    folder = copied(whole, tmp_path / "copy")
    (folder / "tiny.distill" / "last.ckpt").unlink()
    content, lines = run(card, data, folder, precision=precision)
    assert lines[0].startswith("step 2/4")
    assert len(content) == len(predictor_of(whole))
    assert content != predictor_of(whole)


class Stop(BaseException):
    """A kill."""


@pytest.mark.parametrize(
    ("stage", "call"),
    # of the scans, and of those to calibrate with
    [("measure", 3), ("measure", 8), ("calibrate", 1), ("save_predictor", 1), ("record_predictor", 1)],
)
def test_a_run_stopped_anywhere_ends_as_one_that_was_not(
    tmp_path: Path, card: Path, data: DataSettings, whole: Path, stage: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    real: Callable[..., Any] = getattr(distilling, stage)

    def stopping(*arguments: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Stop
        return real(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(distilling, stage, stopping)
        with pytest.raises(Stop):
            run(card, data, tmp_path)
    assert not (tmp_path / "tiny.yaml").exists()
    found, _ = run(card, data, tmp_path)
    assert found == predictor_of(whole)


@pytest.mark.parametrize("step", [1, 3])
def test_a_fit_stopped_anywhere_ends_as_one_that_was_not(
    tmp_path: Path, card: Path, data: DataSettings, whole: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(whole, tmp_path / "copy")
    for name in ("tiny.yaml", "tiny.sigma.safetensors", "tiny.distill/last.ckpt"):
        (folder / name).unlink()
    calls = 0

    def stopping(*arguments: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > step:
            raise Stop
        return prediction_loss(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(distilling, "prediction_loss", stopping)
        with pytest.raises(Stop):
            run(card, data, folder)
    found, lines = run(card, data, folder)
    assert found == predictor_of(whole)
    # a checkpoint every two steps
    assert (lines[0] == "resumed after step 2 of 4") == (step == 3)


def test_damaged_scans_are_measured_again(tmp_path: Path, card: Path, data: DataSettings, whole: Path) -> None:
    folder = copied(whole, tmp_path / "copy")
    for name in ("scans/00002", "calibration/00001"):
        path = folder / "tiny.distill" / f"{name}.npz"
        path.write_bytes(path.read_bytes()[:5000])
    (folder / "tiny.distill" / "last.ckpt").unlink()
    found, lines = run(card, data, folder)
    assert found == predictor_of(whole)
    told = [line for line in lines if line.startswith("measured again: ")]
    assert len(told) == 2
    assert "00002.npz: damaged" in told[0]


def test_more_scans_are_added_to_those_that_are_there(
    tmp_path: Path, card: Path, data: DataSettings, whole: Path
) -> None:
    folder = copied(whole, tmp_path / "copy")
    with pytest.raises(ValueError, match=r"last\.ckpt: is of another run"):
        run(card, data, folder, scans=8)
    assert len(list((folder / "tiny.distill" / "scans").iterdir())) == 8
    (folder / "tiny.distill" / "last.ckpt").unlink()
    found, lines = run(card, data, folder, scans=8)
    assert found != predictor_of(whole)
    assert lines[0].startswith("step 2/4")


KILLED = """
import sys
from pathlib import Path
from tests.training.distilled import SETTINGS
from voxelsigma.training.config import DataSettings
from voxelsigma.training.distill import distill
card, folder, out = sys.argv[1:]
data = DataSettings(folder=folder, exclude=("head_07",))
distill(card, data, out=Path(out), settings=SETTINGS, accelerator="cpu")
"""


@pytest.mark.slow
@pytest.mark.parametrize("place", ["scans/00001.npz", "calibration/00000.npz", "last.ckpt"])
def test_a_killed_run_ends_as_one_that_was_not(
    tmp_path: Path, card: Path, data: DataSettings, whole: Path, place: str
) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(Path.cwd())}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(card), data.folder, str(tmp_path)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + 300
        while not (there := (tmp_path / "tiny.distill" / place).exists()) and time.monotonic() < end:
            if process.poll() is not None:
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait(timeout=60)
    assert there
    assert run(card, data, tmp_path)[0] == predictor_of(whole)


# --- what is refused


@pytest.mark.parametrize(
    ("changes", "differing"),
    [({"probes": 5}, "probes"), ({"seed": 1}, "seed"), ({"matrix": (80, 84)}, "examples")],
)
def test_another_run_in_the_folder_is_refused(
    card: Path, data: DataSettings, whole: Path, changes: dict[str, Any], differing: str
) -> None:
    before = predictor_of(whole)
    with pytest.raises(ValueError, match=rf"tiny\.distill: holds another run \(differing in {differing}\); delete it"):
        run(card, data, whole, **changes)
    assert predictor_of(whole) == before


def test_other_data_or_a_broken_note_are_refused(tmp_path: Path, card: Path, data: DataSettings, whole: Path) -> None:
    with pytest.raises(ValueError, match=r"holds another run \(differing in data\)"):
        run(card, replace(data, exclude=()), whole)
    folder = copied(whole, tmp_path / "copy")
    for content in ("{", "[]"):
        (folder / "tiny.distill" / "run.json").write_text(content)
        with pytest.raises(ValueError, match=r"run\.json: not the note of a run; delete the folder .*tiny\.distill"):
            run(card, data, folder)


def test_a_folder_with_another_network_is_refused(tmp_path: Path, card: Path, data: DataSettings) -> None:
    other = tiny_card(tmp_path, seed=2)
    with pytest.raises(ValueError, match=r"tiny\.yaml: is the card of another network than .*tiny\.yaml"):
        run(card, data, tmp_path)
    other.unlink()
    with pytest.raises(ValueError, match=r"tiny\.safetensors: are other weights than those of .*tiny\.yaml"):
        run(card, data, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.safetensors"]


def test_a_linear_reconstruction_needs_none(tmp_path: Path, data: DataSettings) -> None:
    with pytest.raises(ValueError, match=r"sense\.yaml: 'sense' is linear: its σ needs no predictor"):
        distill("sense", data, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_that_cannot_be_written_are_refused_first(
    tmp_path: Path, card: Path, data: DataSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(OSError, match=r"file: cannot be written, and the predictor lies beside its card; .*--out"):
        run(card, data, file)
    with pytest.raises(OSError, match="cannot be written"):
        run(card, data, file / "below")
    # who runs as root may write everywhere
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OSError, match=r"card.*: cannot be written"):
        run(card, data)
    assert sorted(path.name for path in card.parent.iterdir()) == ["tiny.safetensors", "tiny.yaml"]


def test_bad_data_leave_nothing(tmp_path: Path, card: Path, data: DataSettings) -> None:
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        run(card, DataSettings(folder=str(tmp_path / "nowhere")), tmp_path / "out")
    with pytest.raises(ValueError, match="examples: matrix must be a range of multiples of 4"):
        run(card, data, tmp_path / "out", matrix=(81, 81))
    far = tiny_card(tmp_path / "far", fit_for={"acceleration": [2, 12], "coils": [3, 4], "dimension": 2})
    with pytest.raises(ValueError, match=r"examples: .* cannot be drawn with centre random, matrix 4"):
        run(far, data, tmp_path / "out", matrix=(4, 4))
    assert not (tmp_path / "out").exists()


# --- networks and data of all kinds


def test_measured_scans_are_distilled(tmp_path: Path, card: Path) -> None:
    folder = tmp_path / "scans"
    folder.mkdir()
    # smaller than a crop, and not square
    ismrmrd_file(folder / "one.h5", matrix=(1, 48, 28))
    content, _ = run(card, DataSettings(folder=str(folder), kind="ismrmrd"), tmp_path / "out")
    assert content
    assert ScanTarget.load(tmp_path / "out" / "tiny.distill" / "scans" / "00000.npz").shape == (48, 28)


def test_other_weights_make_the_predictor_invalid(tmp_path: Path, data: DataSettings) -> None:
    path = tiny_card(tmp_path)
    run(path, data)
    named = load_card(str(path))
    assert named.predictor is not None
    fit_for = {"acceleration": [2, 3], "coils": [3, 4], "dimension": 2}
    network = start_network("unrolled", TINY, seed=5)
    entries = {"architecture": "unrolled", "hyperparameters": TINY, "fit_for": fit_for, "licence": "CC0-1.0"}
    write_card(path, network, trained_on="", evaluation="", **entries)  # type: ignore[arg-type]
    assert load_card(str(path)).predictor is None
    record_predictor(path, named.predictor.name, named.predictor_sha256)
    with pytest.raises(
        ValueError, match=r"tiny\.sigma\.safetensors: predicts the network .*, the card .*tiny\.yaml is"
    ):
        load_predictor(load_card(str(path)), CPU)
    # and its scans are not mixed with the others'
    with pytest.raises(ValueError, match=r"tiny\.distill: holds another run \(differing in model\)"):
        run(path, data)


def test_own_networks_are_distilled(tmp_path: Path, data: DataSettings) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(
        "name: own\narchitecture: python:tests.training.own_magnitude:magnitude\n"
        "fit_for: {acceleration: [2, 3], coils: [3, 4], dimension: 2}\nlicence: none\n"
    )
    run(path, data)
    assert ScanTarget.load(tmp_path / "own.distill" / "scans" / "00000.npz").real
    predictor = load_predictor(load_card(str(path)), CPU)
    assert predictor is not None
    assert float(predictor.calibration[0]) != 1
    assert float(predictor.calibration[1]) == 1
