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
from tests.training.distilled import TINY, run, tiny_card
from tests.training.scan_files import ismrmrd_file

from voxelsigma.models.cards import load_card
from voxelsigma.models.predictor import SigmaPredictor
from voxelsigma.models.predictor_file import load_predictor
from voxelsigma.models.surrogate_net import GRADIENT_STAGES
from voxelsigma.noise.instant import PREDICTED_AT
from voxelsigma.training import distill as distilling
from voxelsigma.training import distill_files as filing
from voxelsigma.training.card import record_predictor, write_card
from voxelsigma.training.config import DataSettings
from voxelsigma.training.distill import FIRST_PROBES
from voxelsigma.training.start import start_network
from voxelsigma.training.targets import ScanTarget, measure
from voxelsigma.training.teaching import calibrate

CPU = torch.device("cpu")


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
    told = ["responses 4/4", "surrogate: step 2/4", "surrogate: step 4/4"]
    told += ["scans 6/6", "calibration 2/2", "step 2/4", "step 4/4"]
    assert [line.split("  ")[0] for line in lines[:-1]] == told
    assert lines[-1].startswith("calibrated: magnitude freedom x ")
    # once more there is nothing to do, and nothing changes
    again, lines = run(path, data)
    assert again == content
    assert path.read_text() == text
    assert lines[:2] == ["surrogate: resumed after step 4 of 4", "resumed after step 4 of 4"]
    assert [line.split(":")[0] for line in lines[2:]] == ["calibrated"]


def test_a_copy_leaves_the_card_as_it_is(card: Path, data: DataSettings, whole: Path) -> None:
    assert "predictor" not in card.read_text()
    assert sorted(path.name for path in card.parent.iterdir()) == ["tiny.safetensors", "tiny.yaml"]
    assert (whole / "tiny.safetensors").read_bytes() == (card.parent / "tiny.safetensors").read_bytes()
    assert {"tiny.yaml", "tiny.distill", "tiny.sigma.safetensors"} < {path.name for path in whole.iterdir()}


def test_a_predictors_surrogate_is_the_one_of_the_first_stage(whole: Path) -> None:
    predictor = load_predictor(load_card(str(whole / "tiny.yaml")), CPU)
    assert predictor is not None
    found = predictor.surrogate.state_dict()
    trained = torch.load(whole / "tiny.distill" / "surrogate" / "last.ckpt", weights_only=True)["network"]
    assert set(found) == set(trained)
    for name, value in trained.items():
        assert torch.equal(found[name], value.half().float())
    # four steps from a filter that is the zero-filled image itself
    assert 0 < float(found["last.weight"].abs().max()) < 0.1
    assert predictor.surrogate.stages == GRADIENT_STAGES
    names = sorted(path.name for path in (whole / "tiny.distill" / "responses").iterdir())
    assert names == [f"{number:05d}.npz" for number in range(4)]


def test_scans_to_predict_are_sketched_with_the_surrogate(
    tmp_path: Path, card: Path, data: DataSettings, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = load_predictor(load_card(str(whole / "tiny.yaml")), CPU)
    assert predictor is not None
    folder = copied(whole, tmp_path / "copy")
    (folder / "tiny.distill" / "scans" / "00003.npz").unlink()
    asked: list[dict[str, Any]] = []

    def noted(*arguments: Any, **more: Any) -> ScanTarget:
        asked.append(more)
        return measure(*arguments, **more)

    monkeypatch.setattr(distilling, "measure", noted)
    assert run(card, data, folder)[0] == predictor_of(whole)
    (more,) = asked
    assert more["number"] == 3
    for name, value in predictor.surrogate.state_dict().items():
        assert torch.equal(more["surrogate"].state_dict()[name], value)


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
    found = [ScanTarget.load(path) for path in sorted((folder / "scans").glob("*.npz"))]
    assert [one.first for one in found] == [asked[number] for number in range(6)]
    assert {one.probes for one in found} == {4}


def test_calibration_is_of_the_weights_that_are_stored(
    tmp_path: Path, card: Path, data: DataSettings, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(whole, tmp_path / "copy")
    seen: list[dict[str, torch.Tensor]] = []

    def noted(predictor: SigmaPredictor, scans: list[ScanTarget]) -> Any:
        seen.append({name: value.clone() for name, value in predictor.named_parameters()})
        return calibrate(predictor, scans)

    monkeypatch.setattr(distilling, "calibrate", noted)
    run(card, data, folder)
    predictor = load_predictor(load_card(str(folder / "tiny.yaml")), CPU)
    assert predictor is not None
    (weights,) = seen
    for name, value in predictor.named_parameters():
        assert torch.equal(weights[name], value)


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_every_precision_makes_a_predictor(
    tmp_path: Path, card: Path, data: DataSettings, whole: Path, precision: str
) -> None:
    folder = copied(whole, tmp_path / "copy")
    # of what is there, the surrogate's scans alone do not depend on it
    for name in ("run.json", "surrogate/last.ckpt", "last.ckpt"):
        (folder / "tiny.distill" / name).unlink()
    for name in ("scans", "calibration"):
        shutil.rmtree(folder / "tiny.distill" / name)
    content, lines = run(card, data, folder, precision=precision)
    assert [line.split("  ")[0] for line in lines[:2]] == ["surrogate: step 2/4", "surrogate: step 4/4"]
    assert any(line.startswith("step 4/4") for line in lines)
    assert len(content) == len(predictor_of(whole))
    assert content != predictor_of(whole)


class Stop(BaseException):
    """A kill."""


@pytest.mark.parametrize(
    ("stage", "call"),
    # of the surrogate's scans, of the scans, and of those to calibrate with
    [
        ("measure_response", 3),
        ("measure", 3),
        ("measure", 8),
        ("calibrate", 1),
        ("save_predictor", 1),
        ("record", 1),
        ("record_predictor", 1),
    ],
)
def test_a_run_stopped_anywhere_ends_as_one_that_was_not(
    tmp_path: Path, card: Path, data: DataSettings, whole: Path, stage: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    module = filing if stage == "record_predictor" else distilling
    real: Callable[..., Any] = getattr(module, stage)

    def stopping(*arguments: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Stop
        return real(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(module, stage, stopping)
        with pytest.raises(Stop):
            run(card, data, tmp_path)
    assert not (tmp_path / "tiny.yaml").exists()
    found, _ = run(card, data, tmp_path)
    assert found == predictor_of(whole)


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("loss", ["ResponseLoss", "prediction_loss"])
def test_a_fit_stopped_anywhere_ends_as_one_that_was_not(
    tmp_path: Path, card: Path, data: DataSettings, whole: Path, loss: str, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(whole, tmp_path / "copy")
    for name in ("tiny.yaml", "tiny.sigma.safetensors", "tiny.distill/last.ckpt"):
        (folder / name).unlink()
    own = ""
    if loss == "ResponseLoss":
        # what comes after the surrogate is not there yet
        own = "surrogate: "
        (folder / "tiny.distill" / "surrogate" / "last.ckpt").unlink()
        for name in ("scans", "calibration"):
            shutil.rmtree(folder / "tiny.distill" / name)
    calls = 0
    real: Callable[..., Any] = getattr(distilling, loss)

    def stopping(*arguments: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > step:
            raise Stop
        one = real(GRADIENT_STAGES) if loss == "ResponseLoss" else real
        return one(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(distilling, loss, (lambda _: stopping) if loss == "ResponseLoss" else stopping)
        with pytest.raises(Stop):
            run(card, data, folder)
    found, lines = run(card, data, folder)
    assert found == predictor_of(whole)
    # a checkpoint every two steps
    assert (f"{own}resumed after step 2 of 4" in lines) == (step == 3)
    assert ("surrogate: resumed after step 4 of 4" in lines) == (loss == "prediction_loss")


def test_damaged_scans_are_measured_again(tmp_path: Path, card: Path, data: DataSettings, whole: Path) -> None:
    folder = copied(whole, tmp_path / "copy")
    for name in ("responses/00003", "scans/00002", "calibration/00001"):
        path = folder / "tiny.distill" / f"{name}.npz"
        path.write_bytes(path.read_bytes()[:5000])
    for name in ("surrogate/last.ckpt", "last.ckpt"):
        (folder / "tiny.distill" / name).unlink()
    found, lines = run(card, data, folder)
    assert found == predictor_of(whole)
    told = [line for line in lines if line.startswith("measured again: ")]
    assert len(told) == 3
    for line, place in zip(told, ("responses/00003", "scans/00002", "calibration/00001"), strict=True):
        assert f"{place}.npz: damaged" in line


def test_more_scans_are_added_to_those_that_are_there(
    tmp_path: Path, card: Path, data: DataSettings, whole: Path
) -> None:
    folder = copied(whole, tmp_path / "copy")
    with pytest.raises(ValueError, match=r"tiny\.distill/last\.ckpt: is of another run"):
        run(card, data, folder, scans=8)
    (folder / "tiny.distill" / "last.ckpt").unlink()
    assert len(list((folder / "tiny.distill" / "scans").glob("*.npz"))) == 8
    found, lines = run(card, data, folder, scans=8)
    assert found != predictor_of(whole)
    assert lines[0].startswith("surrogate: resumed")


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
@pytest.mark.parametrize("place", ["surrogate/last.ckpt", "scans/00001.npz", "calibration/00000.npz", "last.ckpt"])
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
    [
        ({"probes": 5}, "probes"),
        ({"seed": 1}, "seed"),
        ({"matrix": (80, 84)}, "examples"),
        ({"surrogate_scans": 5}, "surrogate"),
        ({"surrogate_channels": 5}, "surrogate"),
    ],
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
