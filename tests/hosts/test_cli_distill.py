"""`voxelsigma distill`: what it is told reaches the run, and what is wrong is told in one line."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from voxelsigma.hosts.cli import app
from voxelsigma.training import distill as distilling
from voxelsigma.training.config import DataSettings
from voxelsigma.training.distill_settings import DistillSettings


class Called:
    """Stands for the run, and keeps what it was called with."""

    def __init__(self) -> None:
        self.arguments: tuple[Any, ...] = ()
        self.more: dict[str, Any] = {}

    def __call__(self, *arguments: Any, **more: Any) -> Path:
        self.arguments, self.more = arguments, more
        more["report"]("step 1/1")
        return Path("mine.yaml")


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Called:
    run = Called()
    monkeypatch.setattr(distilling, "distill", run)
    return run


def invoke(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, ["distill", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_defaults(called: Called, tmp_path: Path) -> None:
    for name in ("head_01.nii.gz", "head_09.nii.gz"):
        (tmp_path / name).touch()
    told = invoke("unrolled_small", "--data", tmp_path)
    assert told.splitlines()[0] == "step 1/1"
    assert "mine.yaml: names its predictor now" in told
    assert called.arguments == ("unrolled_small", DataSettings(folder=str(tmp_path), exclude=("head_09",)))
    assert called.more["settings"] == DistillSettings()
    assert (called.more["out"], called.more["accelerator"]) == (None, "auto")


def test_options(called: Called, tmp_path: Path) -> None:
    options = "--kind fastmri --exclude a/b --exclude c --scans 5 --probes 6 --steps 7 --seed 8 --accelerator cpu"
    invoke("my.yaml", "--data", tmp_path, "--out", tmp_path / "out", *options.split())
    data = DataSettings(folder=str(tmp_path), kind="fastmri", exclude=("a/b", "c"))
    assert called.arguments == ("my.yaml", data)
    assert called.more["settings"] == DistillSettings(scans=5, probes=6, steps=7, seed=8)
    assert (called.more["out"], called.more["accelerator"]) == (tmp_path / "out", "cpu")


def test_nothing_is_excluded_where_that_is_asked_for(called: Called, tmp_path: Path) -> None:
    (tmp_path / "head_09.nii.gz").touch()
    invoke("my.yaml", "--data", tmp_path, "--exclude", "")
    assert called.arguments[1].exclude == ()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nothing", "--data", "."], "no model card is called 'nothing'"),
        (["none.yaml", "--data", "."], "none.yaml: no such model card"),
        (["unrolled_small", "--data", ".", "--out", "x"], "data: . holds no .nii.gz, .nii, .npz file"),
        (["unrolled_small", "--data", "nowhere", "--out", "x"], "data: nowhere is not a folder"),
        (["unrolled_small", "--data", ".", "--out", "x", "--kind", "dicom"], "kind must be one of volumes, ismrmrd"),
        (["unrolled_small", "--data", ".", "--threads", "-3"], "distill: threads must be a whole number of at least 0"),
        (["unrolled_small", "--data", ".", "--probes", "1"], "distill: probes must be a whole number of at least 2"),
    ],
)
def test_what_is_wrong_is_told(
    tmp_path: Path, arguments: list[str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["distill", *arguments])
    assert told in str(result.exception)
    assert not list(tmp_path.iterdir())


def test_training_refuses_the_same_threads(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["train", "nothing.yaml", "-o", str(tmp_path / "out"), "--threads", "-3"])
    assert "train: threads must be a whole number of at least 0, got -3" in str(result.exception)
    assert not list(tmp_path.iterdir())


def test_failures_are_told_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "voxelsigma", "distill", "sense", "--data", "."],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert "sense.yaml: 'sense' is linear: its σ needs no predictor" in done.stderr
