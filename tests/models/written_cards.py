"""Cards to be read, and weights beside them."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save

from voxelsigma.models.unrolled import Unrolled

TINY = {"steps": 2, "blocks": 1, "channels": 3}


def tiny_weights() -> bytes:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return save(Unrolled(**TINY).state_dict())


def good_card() -> dict[str, Any]:
    return {
        "name": "tiny",
        "architecture": "unrolled",
        "hyperparameters": dict(TINY),
        "weights": "tiny.safetensors",
        "sha256": hashlib.sha256(tiny_weights()).hexdigest(),
        "fit_for": {"acceleration": [2, 6.5], "coils": [4, 16], "dimension": 2},
        "trained_on": "nothing",
        "licence": "Apache-2.0",
    }


def edited(**changes: Any) -> dict[str, Any]:
    card = {**good_card(), **changes}
    return {key: value for key, value in card.items() if value is not ...}


def fit_for(**changes: Any) -> dict[str, Any]:
    fit = {**good_card()["fit_for"], **changes}
    return edited(fit_for={key: value for key, value in fit.items() if value is not ...})


def card_writer(folder: Path) -> Callable[[Any], str]:
    """Writes a card, beside good weights; returns the card's path."""
    (folder / "tiny.safetensors").write_bytes(tiny_weights())

    def write_card(content: Any) -> str:
        path = folder / "tiny.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
        return str(path)

    return write_card
