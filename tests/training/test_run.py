"""Training from the configuration to the card, in this process and as the command."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from voxelsigma.models.cards import load_card
from voxelsigma.training.card import load_network, record
from voxelsigma.training.config import TrainConfig, load_config
from voxelsigma.training.run import fingerprint, train
from voxelsigma.training.sources import open_source

TEXT = """
name: tiny
architecture: {architecture}
hyperparameters: {hyperparameters}
{more}
data: {{exclude: [other], licences: PDDL{labelled}}}
examples: {{matrix: [24, 32], coils: [3, 4], many_coils_share: 0.0, acceleration: [2, 3], kinds: [random_2d],
  centre: 6}}
fit: {{steps: {steps}, warm_up: 2, checkpoint_every: 2, log_every: 2, learning_rate: 0.002}}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("volumes")
    z, y, x = np.ogrid[-1:1:24j, -1:1:28j, -1:1:26j]
    radius = np.sqrt(z**2 + y**2 + x**2)
    for name, inner in (("ball", 0.5), ("bowl", 0.7), ("other", 0.2)):
        np.savez(folder / f"{name}.npz", vol=100 * ((radius < 0.95).astype(np.int16) + (radius < inner)))
    return folder


def config(
    folder: Path,
    data: Path,
    *,
    architecture: str = "unrolled",
    hyperparameters: str = "{steps: 2, blocks: 1, channels: 4}",
    steps: int = 4,
    more: str = "",
    labelled: str = "",
) -> tuple[Path, TrainConfig]:
    folder.mkdir(exist_ok=True)
    path = folder / "train.yaml"
    values = {"architecture": architecture, "hyperparameters": hyperparameters, "steps": steps, "more": more}
    path.write_text(TEXT.format(**values, labelled=labelled))
    return path, load_config(str(path), folder=str(data))


def weights(card: Path) -> torch.Tensor:
    return torch.cat([value.flatten() for value in load_network(card).state_dict().values()])


def test_the_card_says_how_it_was_made(tmp_path: Path, data: Path) -> None:
    _, settings = config(tmp_path, data)
    lines: list[str] = []
    path = train(settings, tmp_path, accelerator="cpu", report=lines.append)
    card = load_card(str(path))
    assert (card.name, card.architecture, card.acceleration, card.coils) == ("tiny", "unrolled", (2, 3), (3, 4))
    told = " ".join(yaml.safe_load(path.read_text())["trained_on"].split())
    assert told.startswith(
        "Simulated scans of ball, bowl (PDDL): 4 steps of 2, objective supervised, matrices 24 to 32, 3"
    )
    assert "3 to 4 coils, masks random_2d" in told
    assert told.endswith("Held out: other.")
    assert lines[-1].startswith("step 4/4")
    # the run is kept beside it, so that the same command does nothing more
    before = weights(path)
    record(path, "PSNR 40 dB")
    train(settings, tmp_path, accelerator="cpu", report=lines.append)
    assert lines[-1] == "resumed after step 4 of 4"
    assert torch.equal(weights(path), before)
    assert "PSNR 40 dB" in path.read_text()


@pytest.mark.parametrize("objective", ["noise2recon", "vortex", "ssdu"])
def test_scans_without_references_train(tmp_path: Path, data: Path, objective: str) -> None:
    labelled = "[]" if objective == "ssdu" else "[ball]"
    _, settings = config(tmp_path, data, more=f"objective: {objective}", labelled=f", labelled: {labelled}")
    card = train(settings, tmp_path, accelerator="cpu")
    told = " ".join(yaml.safe_load(card.read_text())["trained_on"].split())
    assert f"objective {objective}" in told
    assert f"References of {labelled.strip('[]') or 'none'} alone were used." in told


def test_training_goes_on_from_a_card(tmp_path: Path, data: Path) -> None:
    _, first = config(tmp_path / "a", data)
    card = train(first, tmp_path / "a", accelerator="cpu")
    _, more = config(tmp_path / "b", data, more=f"start: {card}")
    further = train(more, tmp_path / "b", accelerator="cpu")
    assert "Started from tiny." in further.read_text()
    # close to where it started, and not there
    assert 0 < float((weights(card) - weights(further)).abs().max()) < 0.1
    _, wider = config(tmp_path / "c", data, hyperparameters="{steps: 2, blocks: 1, channels: 6}", more=f"start: {card}")
    with pytest.raises(ValueError, match=r"train: field 'start' names .*tiny\.yaml, a unrolled with .*'channels': 4"):
        train(wider, tmp_path / "c", accelerator="cpu")
    assert not (tmp_path / "c" / "tiny.yaml").exists()


def test_the_fingerprint_is_of_what_the_weights_depend_on(tmp_path: Path, data: Path) -> None:
    _, settings = config(tmp_path, data)
    source = open_source("volumes", data, exclude=("other",))
    one = fingerprint(settings, source)
    _, longer = config(tmp_path, data, steps=8)
    assert fingerprint(longer, source) != one
    path, _ = config(tmp_path, data)
    path.write_text(path.read_text().replace("checkpoint_every: 2", "checkpoint_every: 3"))
    assert fingerprint(load_config(str(path), folder="elsewhere"), source) == one
    assert fingerprint(settings, open_source("volumes", data)) != one


def test_bad_input_leaves_nothing(tmp_path: Path, data: Path) -> None:
    _, settings = config(tmp_path / "x", data, more="objective_settings: {label_share: 0.2}")
    with pytest.raises(ValueError, match="label_share"):
        train(settings, tmp_path / "out", accelerator="cpu")
    _, settings = config(tmp_path / "x", tmp_path / "nowhere")
    with pytest.raises((ValueError, FileNotFoundError), match="nowhere"):
        train(settings, tmp_path / "out", accelerator="cpu")
    assert not (tmp_path / "out").exists()


# --- the command


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "voxelsigma", "train", *map(str, arguments), "--accelerator", "cpu", "--threads", "1"]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_a_killed_run_ends_as_one_that_was_not(tmp_path: Path, data: Path) -> None:
    path, settings = config(tmp_path, data, steps=60)
    whole = train(settings, tmp_path / "whole", accelerator="cpu")
    arguments = command(path, "--data", data, "-o", tmp_path / "killed")
    checkpoint = tmp_path / "killed" / "tiny.run" / "last.ckpt"
    process = subprocess.Popen(arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + 300
        while not checkpoint.exists() and time.monotonic() < end and process.poll() is None:
            time.sleep(0.02)
        assert checkpoint.exists()
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.communicate(timeout=60)
    assert not (tmp_path / "killed" / "tiny.yaml").exists()
    done = subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=600, check=True)
    assert "resumed after step" in done.stdout
    assert torch.equal(weights(whole), weights(tmp_path / "killed" / "tiny.yaml"))


@pytest.mark.slow
def test_two_processes_share_a_step(tmp_path: Path, data: Path) -> None:
    path, _ = config(tmp_path, data, steps=4)
    path.write_text(path.read_text().replace("fit: {", "fit: {devices: 2, "))
    arguments = command(path, "--data", data, "-o", tmp_path)
    done = subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=600, check=True)
    told = " ".join((tmp_path / "tiny.yaml").read_text().split())
    assert "4 steps of 4" in told
    assert done.stdout.count("step 4/4") == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nothing"], "no training preset is called 'nothing'"),
        (["none.yaml"], "none.yaml: no such training configuration"),
        (["modl_small", "--data", "empty"], "empty"),
    ],
)
def test_the_command_fails_in_one_line(tmp_path: Path, arguments: list[str], told: str) -> None:
    (tmp_path / "empty").mkdir()
    done = subprocess.run(
        command(*arguments), env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert told in done.stderr
