"""Model cards: writing one with its weights, and reading the network back."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from textwrap import fill

import torch
import yaml
from safetensors.torch import save as to_safetensors
from torch import nn

from voxelsigma.models.cards import load_card, load_model
from voxelsigma.models.network import Network
from voxelsigma.models.unrolled import Unrolled


def write_card(
    card: Path, network: nn.Module, hyperparameters: Mapping[str, int], *, trained_on: str, evaluation: str
) -> None:
    """Write a card and, beside it, its weights; each file appears whole or not at all.

    Parameters
    ----------
    card
        Path of the YAML file; the weights take its name with the ending `.safetensors`.
    network
        Whose weights to save.
    hyperparameters
        What the network was built with.
    trained_on, evaluation
        Plain text of these two entries.
    """
    weights = card.with_suffix(".safetensors")
    content = to_safetensors({name: value.contiguous() for name, value in network.state_dict().items()})
    text = card_text(
        card.stem,
        hyperparameters,
        sha256=hashlib.sha256(content).hexdigest(),
        trained_on=trained_on,
        evaluation=evaluation,
    )
    write_whole(weights, content)
    write_whole(card, text.encode())


def card_text(name: str, hyperparameters: Mapping[str, int], *, sha256: str, trained_on: str, evaluation: str) -> str:
    """The YAML of a model card."""
    values = ", ".join(f"{key}: {value}" for key, value in hyperparameters.items())
    return (
        f"name: {name}\n"
        "architecture: unrolled\n"
        f"hyperparameters: {{{values}}}\n"
        f"weights: {name}.safetensors\n"
        f"sha256: {sha256}\n"
        "fit_for: {acceleration: [2, 8], coils: [4, 32], dimension: 2}\n"
        f"trained_on: >\n{_folded(trained_on)}\n"
        f"evaluation: >\n{_folded(evaluation)}\n"
        "licence: Apache-2.0\n"
    )


def write_whole(path: Path, content: bytes) -> None:
    """Write under a temporary name in the same folder, then rename."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_unrolled(card: Path) -> Unrolled:
    """The network of a card, ready to be trained further.

    Raises
    ------
    FileNotFoundError
        The card or its weights are missing.
    ValueError
        The card is not valid or of another architecture, or the weights are not those of the card.
    """
    model = load_model(load_card(str(card)), torch.device("cpu"))
    if not isinstance(model, Network) or not isinstance(model.function, Unrolled):
        raise ValueError(f"{card}: field 'architecture' must be 'unrolled' to be trained or evaluated")
    return model.function.requires_grad_(True)


def record(card: Path, evaluation: str) -> None:
    """Replace the entry `evaluation` of a card."""
    entries = yaml.safe_load(card.read_text(encoding="utf-8"))
    text = card_text(
        entries["name"],
        entries["hyperparameters"],
        sha256=entries["sha256"],
        trained_on=entries["trained_on"].strip(),
        evaluation=evaluation,
    )
    write_whole(card, text.encode())


def _folded(text: str) -> str:
    return fill(text, width=100, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
