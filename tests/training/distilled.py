"""Small networks and data to distill from, made for the tests."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from voxelsigma.models.cards import load_card
from voxelsigma.models.network import Network
from voxelsigma.models.predictor_file import load_predictor
from voxelsigma.training.card import write_card
from voxelsigma.training.config import DataSettings
from voxelsigma.training.distill import distill
from voxelsigma.training.distill_settings import DistillSettings
from voxelsigma.training.examples import Example, ExampleSettings, stream
from voxelsigma.training.start import start_network
from voxelsigma.training.stored import StoredScan
from voxelsigma.training.volumes import Volume

TINY = {"steps": 1, "blocks": 1, "channels": 4}
SETTINGS = DistillSettings(
    scans=6,
    probes=4,
    calibration_scans=2,
    calibration_probes=8,
    matrix=(48, 48),
    steps=4,
    batch=2,
    crop=32,
    channels=4,
    levels=2,
    surrogate_scans=4,
    surrogate_steps=4,
    surrogate_channels=4,
    surrogate_levels=2,
    precision="32-true",
    checkpoint_every=2,
    log_every=2,
)


def volume_folder(folder: Path) -> DataSettings:
    """A folder with two volumes, one of which is excluded."""
    folder.mkdir(exist_ok=True)
    z, y, x = np.ogrid[-1:1:24j, -1:1:28j, -1:1:26j]
    radius = np.sqrt(z**2 + y**2 + x**2)
    for name, inner in (("ball", 0.5), ("head_07", 0.7)):
        np.savez(folder / f"{name}.npz", vol=100 * ((radius < 0.95).astype(np.int16) + (radius < inner)))
    return DataSettings(folder=str(folder), exclude=("head_07",))


def tiny_card(folder: Path, *, seed: int = 1, **changes: Any) -> Path:
    """A card of a network that was not trained, with its weights."""
    folder.mkdir(exist_ok=True)
    card = folder / "tiny.yaml"
    arguments = {
        "architecture": "unrolled",
        "hyperparameters": TINY,
        "fit_for": {"acceleration": [2, 3], "coils": [3, 4], "dimension": 2},
        "trained_on": "nothing: as it was seeded",
        "evaluation": "Not measured yet.",
        "licence": "CC0-1.0",
        **changes,
    }
    write_card(card, start_network("unrolled", TINY, seed=seed), **arguments)
    return card


def tiny_network(*, real: bool = False) -> Network:
    """The same as a network, or its magnitude."""
    network = start_network("unrolled", TINY, seed=1).requires_grad_(False)

    def magnitude(kspace: Tensor, sensitivities: Tensor, mask: Tensor) -> Tensor:
        return torch.view_as_real(network(kspace, sensitivities, mask)).square().sum(dim=-1).add(1e-3).sqrt()

    return Network(function=magnitude if real else network)


def tiny_scan(number: int = 0) -> Example:
    """A simulated scan of 24 to 32 voxels a side, without a batch axis."""
    z, y, x = np.ogrid[-1:1:24j, -1:1:28j, -1:1:26j]
    radius = np.sqrt(z**2 + y**2 + x**2)
    volumes = [Volume("ball", (radius < 0.95).astype(np.int16) + (radius < 0.5), 3)]
    settings = ExampleSettings(
        matrix=(24, 32), coils=(3, 4), many_coils_share=0.0, acceleration=(2, 3), kinds=("random_2d",), centre=6
    )
    batch = next(stream(volumes, settings, batch=1, seed=0, start=number))
    return Example(batch.kspace[0], batch.sensitivities[0], batch.mask[0], None)


def run(
    card: Path, data: DataSettings, out: Path | None = None, *, start: Path | None = None, **changes: Any
) -> tuple[bytes, list[str]]:
    """Distill; the predictor's file, and what was told."""
    lines: list[str] = []
    settings = replace(SETTINGS, **changes)
    path = distill(card, data, out=out, settings=settings, start=start, accelerator="cpu", report=lines.append)
    found = load_card(str(path))
    assert found.predictor is not None
    assert load_predictor(found, torch.device("cpu")) is not None
    return found.predictor.read_bytes(), lines


def same(one: StoredScan, other: StoredScan) -> bool:
    """Whether all their fields are."""
    return type(one) is type(other) and all(
        np.array_equal(getattr(one, field.name), getattr(other, field.name)) for field in fields(one)
    )


def nan(values: NDArray[Any]) -> NDArray[Any]:
    """The same with one value that is not a number."""
    changed = values.copy()
    changed.flat[3] = np.nan
    return changed
