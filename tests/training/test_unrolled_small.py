"""The shipped network on heads it has not seen."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from voxelsigma.models.cards import load_card, load_model
from voxelsigma.models.network import Network
from voxelsigma.training.compare import applied, baselines, compared, scores
from voxelsigma.training.held_out import HELD_OUT, Setting, held_out_slices
from voxelsigma.training.volumes import load_volumes


def data_folder() -> Path:
    named = os.environ.get("VOXELSIGMA_TEST_DATA")
    folder = Path(named) if named else Path.cwd().parent / "shared" / "data"
    if not (folder / "head_labels").is_dir():
        pytest.skip(f"held-out heads are not at {folder}; VOXELSIGMA_TEST_DATA names their folder")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("maps", "least"), [("full", 4.0), ("masked", 3.0)])
def test_network_is_decibels_above_the_linear_reconstruction(maps: Any, least: float) -> None:
    volumes = load_volumes(data_folder(), only=HELD_OUT)
    model = load_model(load_card("unrolled_small"), torch.device("cpu"))
    assert isinstance(model, Network)
    setting = Setting(mask="random_2d", acceleration=6, maps=maps, matrix=144)
    scans = held_out_slices(volumes, setting.examples(), slices=8, seed=2)
    result = compared(scores(applied(model), scans), baselines(scans))
    assert 0.01 < result.regularization < 0.64
    assert result.zero_filled < result.linear
    assert result.gain >= least
    assert min(result.gains) > 1
