"""The shipped network on heads it has not seen."""

import os
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest

from voxelsigma.training.card import load_unrolled
from voxelsigma.training.evaluate import HELD_OUT, SETTINGS, compare, held_out_scans
from voxelsigma.training.volumes import load_volumes


def data_folder() -> Path:
    named = os.environ.get("VOXELSIGMA_TEST_DATA")
    folder = Path(named) if named else Path.cwd().parent / "shared" / "data"
    if not (folder / "head_labels").is_dir():
        pytest.skip(f"held-out heads are not at {folder}; VOXELSIGMA_TEST_DATA names their folder")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("support", "least"), [("full maps", 4.0), ("masked maps", 3.0)])
def test_network_is_decibels_above_the_linear_reconstruction(support: str, least: float) -> None:
    volumes = load_volumes(data_folder(), only=HELD_OUT)
    network = load_unrolled(Path(str(files("voxelsigma.models"))) / "unrolled_small.yaml")
    settings = replace(SETTINGS[f"2D random R=6, {support}"], matrix=(144, 144))
    scans = held_out_scans(volumes, settings, slices=8, seed=2)
    result = compare(network, scans, regularizations=(0.01, 0.02, 0.04, 0.08, 0.16))
    assert 0.01 < result.regularization < 0.16
    assert result.zero_filled < result.linear
    assert result.gain >= least
    assert min(result.gains) > 1
