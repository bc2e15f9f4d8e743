"""Model cards as a list: what each is, how large, and what was measured of it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from voxelsigma.models.figures import MASK_TITLES

if TYPE_CHECKING:
    from voxelsigma.models.cards import ModelCard
    from voxelsigma.models.figures import Figures
    from voxelsigma.training.tables import Grid

_GAINS_AT = (4.0, 6.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """A model card in a list.

    Parameters
    ----------
    name, path, architecture, licence
        Of the card.
    parameters
        Numbers in its weights; 0 without any.
    size
        Bytes of the weights; 0 without any.
    predictor
        Bytes of the predictor of its σ maps; 0 without one.
    acceleration, coils, dimension
        What it is fit for.
    figures
        What was measured of it.
    """

    name: str
    path: str
    architecture: str
    parameters: int
    size: int
    predictor: int
    acceleration: tuple[float, float]
    coils: tuple[int, int]
    dimension: int
    licence: str
    figures: tuple["Figures", ...]


def listed(name: str) -> Listed:
    """What a list says of a card, by its name or path; its weights and its predictor are read and checked.

    Raises
    ------
    FileNotFoundError, ValueError
        If the card is bad, or its weights or its predictor are missing, others, or cannot be read.
    """
    from voxelsigma.models.cards import load_card

    card = load_card(name)
    return Listed(
        name=card.name,
        path=str(card.path),
        architecture=card.architecture,
        parameters=_parameters(card),
        size=0 if card.weights is None else card.weights.stat().st_size,
        predictor=_predictor_size(card),
        acceleration=card.acceleration,
        coils=card.coils,
        dimension=card.dimension,
        licence=card.licence,
        figures=card.figures,
    )


def models_grid(found: list[Listed]) -> "Grid":
    """The list as a table."""
    from voxelsigma.training.tables import Grid

    headings = (
        "name",
        "architecture",
        "parameters",
        "kB",
        "σ predictor, kB",
        "R",
        "coils",
        "dim",
        "dB above linear at R=4, 6",
        "licence",
    )
    return Grid("model cards", headings, tuple(_row(card) for card in found))


def _row(card: Listed) -> tuple[str, ...]:
    return (
        card.name,
        card.architecture,
        f"{card.parameters:,}" if card.size else "-",
        f"{card.size / 1000:,.0f}" if card.size else "-",
        f"{card.predictor / 1000:,.0f}" if card.predictor else "-",
        _range(card.acceleration),
        _range(card.coils),
        f"{card.dimension}D",
        gains(card.figures),
        card.licence,
    )


def gains(figures: "tuple[Figures, ...]") -> str:
    """PSNR above the linear reconstruction's at R = 4 and 6, a pair for each mask; of several maps the first."""
    pairs = []
    for mask, title in MASK_TITLES.items():
        found = [
            next((f"{row.gain:+.1f}" for row in figures if (row.mask, row.acceleration) == (mask, wanted)), "-")
            for wanted in _GAINS_AT
        ]
        if found != ["-"] * len(_GAINS_AT):
            pairs.append(f"{title} {', '.join(found)}")
    return "; ".join(pairs) or "-"


def _parameters(card: "ModelCard") -> int:
    from voxelsigma.models.weights import read_weights

    if card.weights is None:
        return 0
    tensors = read_weights(card.weights, sha256=card.sha256, stated_by=card.path.name)
    return sum(tensor.numel() for tensor in tensors.values())


def _predictor_size(card: "ModelCard") -> int:
    import torch

    from voxelsigma.models.predictor_file import load_predictor

    if card.predictor is None:
        return 0
    load_predictor(card, torch.device("cpu"))
    return card.predictor.stat().st_size


def _range(limits: tuple[float, float]) -> str:
    return f"{limits[0]:g}-{limits[1]:g}"
