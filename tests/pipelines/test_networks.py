"""The pipelines of networks, with networks that nobody trained, end to end on the embedded host."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.pipelines.runs import check_image_and_maps, run, write_scan

import voxelsigma.pipelines
from voxelsigma.models.cards import ARCHITECTURES
from voxelsigma.training.card import write_card

FOLDER = Path(voxelsigma.pipelines.__path__[0])
SMALL: dict[str, dict[str, Any]] = {
    "modl": {"steps": 2, "blocks": 1, "channels": 4},
    "unet": {"channels": 4, "levels": 2, "residual": True},
    "unrolled": {"steps": 2, "blocks": 1, "channels": 4},
    "varnet": {"cascades": 1, "channels": 4, "levels": 2, "sensitivity_channels": 2, "sensitivity_levels": 2},
}


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scan(tmp_path_factory.mktemp("scan"))


def test_every_architecture_with_a_pipeline_is_tried() -> None:
    assert {name for name in ARCHITECTURES if (FOLDER / f"{name}_sigma.xml").is_file()} == set(SMALL)


@pytest.mark.parametrize("architecture", sorted(SMALL))
def test_a_pipeline_with_a_network_of_its_architecture(scan: Path, tmp_path: Path, architecture: str) -> None:
    card = tmp_path / "mine.yaml"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        network = ARCHITECTURES[architecture](**SMALL[architecture])
    write_card(
        card,
        network,
        architecture=architecture,
        hyperparameters=SMALL[architecture],
        fit_for={"acceleration": [1, 8], "coils": [1, 32], "dimension": 2},
        trained_on="nothing",
        evaluation="none",
        licence="none",
    )
    text = (FOLDER / f"{architecture}_sigma.xml").read_text(encoding="utf-8")
    shipped = f'value="{architecture}_small"'
    assert text.count(shipped) == 1
    pipeline = tmp_path / "mine.xml"
    pipeline.write_text(text.replace(shipped, f'value="{card}"'), encoding="utf-8")
    series = run(scan, str(pipeline), tmp_path / "out.h5")
    own = getattr(ARCHITECTURES[architecture], "estimates_sensitivities", False)
    check_image_and_maps(series, model="mine", own_sensitivities=own)
    (meta,) = series[1].attributes
    assert meta["voxelsigma_model_card"] == str(card)
