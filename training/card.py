"""Model cards: writing one with its weights, reading the network back, and writing its figures into it."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill as fill_lines
from typing import Any

import torch
import yaml
from safetensors.torch import save as to_safetensors
from torch import nn

from voxelsigma.formats.atomic import write_whole
from voxelsigma.models.cards import ARCHITECTURES, ModelCard, checked_card, load_card, load_model
from voxelsigma.models.figures import Figures, checked_figures
from voxelsigma.models.network import Network
from voxelsigma.models.predictor import SigmaPredictor
from voxelsigma.models.predictor_file import predictor_content
from voxelsigma.models.weights import fill

_TEXTS = ("trained_on", "evaluation")


def write_card(
    card: Path,
    network: nn.Module,
    *,
    architecture: str,
    hyperparameters: Mapping[str, Any],
    fit_for: Mapping[str, Any],
    trained_on: str,
    evaluation: str,
    licence: str,
) -> None:
    """Write a card and, beside it, its weights; each file appears whole or not at all.

    The weights are replaced first. Where the card is not replaced after them, its hash is not theirs and it is refused
    by whoever reads it.

    Parameters
    ----------
    card
        Path of the YAML file; the weights take its name with the ending `.safetensors`.
    network
        Whose weights to save.
    architecture, hyperparameters
        What the network is, one of `ARCHITECTURES`, and what it was built with.
    fit_for
        Ranges `acceleration` and `coils`, each [smallest, largest], and `dimension`.
    trained_on, evaluation
        Plain text of these two entries.
    licence
        Of the weights.

    Raises
    ------
    ValueError
        If the network is not what architecture and hyperparameters build, its weights are not finite, or a reader
        would refuse the card: nothing is written.
    OSError
        If a file cannot be written.
    """
    if card.suffix not in (".yaml", ".yml"):
        raise ValueError(f"{card}: a model card must be a .yaml or .yml file")
    weights = card.with_suffix(".safetensors")
    state = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    _check_fits(card, state, architecture, hyperparameters)
    content = to_safetensors(state)
    entries = {
        "name": card.stem,
        "architecture": architecture,
        "hyperparameters": dict(hyperparameters),
        "weights": weights.name,
        "sha256": hashlib.sha256(content).hexdigest(),
        "fit_for": {key: list(value) if isinstance(value, tuple) else value for key, value in fit_for.items()},
        "trained_on": trained_on,
        "evaluation": evaluation,
        "licence": licence,
    }
    text = "".join(_entry(key, value) for key, value in entries.items())
    checked_card(card, yaml.safe_load(text))
    write_whole(weights, content)
    write_whole(card, text.encode())


def load_network(card: Path) -> nn.Module:
    """The network of a card, in training mode, ready to be trained further.

    Raises
    ------
    FileNotFoundError
        The card or its weights are missing.
    ValueError
        The card is not valid or of no architecture of ours, or the weights are not those of the card.
    """
    checked = load_card(str(card))
    if checked.architecture not in ARCHITECTURES:
        raise ValueError(
            f"{card}: field 'architecture' must be one of {', '.join(ARCHITECTURES)} to be trained, got "
            f"{checked.architecture!r}"
        )
    model = load_model(checked, torch.device("cpu"))
    assert isinstance(model, Network)
    assert isinstance(model.function, nn.Module)
    return model.function.requires_grad_(True).train()


def record(card: Path, evaluation: str, figures: Sequence[Figures] = ()) -> None:
    """Replace the entries `evaluation` and `figures` of a card; all others stay as they are written.

    Raises
    ------
    ValueError
        If figures are not finite, or the card does not have its fields at the beginning of a line each.
    """
    text = card.read_text(encoding="utf-8")
    before = yaml.safe_load(text)
    wanted = {**before, "evaluation": evaluation, "figures": [row.entry() for row in figures]}
    checked_figures(card, wanted["figures"])
    if not figures:
        del wanted["figures"]
    for key in ("evaluation", "figures"):
        text = _replaced(text, key, _entry(key, wanted[key]) if key in wanted else "")
    if _compared(text) != {**wanted, "evaluation": " ".join(evaluation.split())}:
        raise ValueError(f"{card}: figures cannot be recorded; expected every field at the beginning of a line")
    write_whole(card, text.encode())


def save_predictor(path: Path, predictor: SigmaPredictor, card: ModelCard) -> str:
    """Write a predictor's file, whole or not at all.

    Parameters
    ----------
    path
        Where to.
    predictor
        Whose weights to save.
    card
        Of the network that it predicts.

    Returns
    -------
        Hash of the file, for the card.

    Raises
    ------
    ValueError
        If a reader would refuse it (`predictor_content`).
    OSError
        If it cannot be written.
    """
    content = predictor_content(predictor, card)
    write_whole(path, content)
    return hashlib.sha256(content).hexdigest()


def record_predictor(card: Path, predictor: str, sha256: str, *, into: Path | None = None) -> None:
    """Put the entries `predictor` and `predictor_sha256` into a card; all others stay as they are written.

    Parameters
    ----------
    card
        The YAML file.
    predictor, sha256
        Name of the predictor's file, which lies beside the card, and its hash.
    into
        The file to write; None for the card itself.

    Raises
    ------
    ValueError
        If a reader would refuse the card, or it does not have its fields at the beginning of a line each.
    """
    text = card.read_text(encoding="utf-8")
    entries = {"predictor": predictor, "predictor_sha256": sha256}
    wanted = {**yaml.safe_load(text), **entries}
    path = into or card
    checked_card(path, wanted)
    for key, value in entries.items():
        text = _replaced(text, key, _entry(key, value))
    if _entries(text) != wanted:
        raise ValueError(f"{card}: a predictor cannot be recorded; expected every field at the beginning of a line")
    write_whole(path, text.encode())


def _check_fits(card: Path, state: Mapping[str, torch.Tensor], architecture: str, values: Mapping[str, Any]) -> None:
    """Whether a state is that of the network that a reader of the card will build."""
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{card}: field 'architecture' must be one of {', '.join(ARCHITECTURES)}, got {architecture!r}"
        )
    # the random numbers of whoever is training are not to be touched
    with torch.random.fork_rng(devices=[]):
        try:
            expected = ARCHITECTURES[architecture](**values)
        except TypeError as error:
            raise ValueError(f"{card}: hyperparameters do not fit {architecture} ({error})") from None
    fill(expected, state, origin=card, description=f"{architecture} {dict(values)}")
    broken = sorted(key for key, value in state.items() if not bool(value.isfinite().all()))
    if broken:
        raise ValueError(f"{card}: weights that are not finite: {', '.join(broken)}")


def _entry(key: str, value: Any) -> str:
    """One field of a card, as lines."""
    if key in _TEXTS:
        return f"{key}: >\n{_folded(value)}\n" if value.strip() else f'{key}: ""\n'
    if key == "figures":
        return "figures:\n" + "".join(f"  - {_flow(row)}\n" for row in value)
    return f"{key}: {_flow(value)}\n"


def _flow(value: Any) -> str:
    """A value in one line."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=2**30, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def _replaced(text: str, key: str, lines: str) -> str:
    """A card's text with the lines of one field replaced, or added before its licence, or at its end."""
    # a field goes on in lines that are empty, indented, or items of a list
    field = re.compile(rf"^{key}[ ]*:.*\n?(?:(?:[ \t-].*)?\n)*(?:[ \t-].+)?", re.MULTILINE)
    if field.search(text):
        return field.sub(lambda _: lines, text, count=1)
    ended = text if text.endswith("\n") else f"{text}\n"
    licence = re.search(r"^licence[ ]*:", ended, re.MULTILINE)
    return f"{ended}{lines}" if licence is None else ended[: licence.start()] + lines + ended[licence.start() :]


def _compared(text: str) -> Any:
    """The entries of a card's text, the evaluation without its line breaks."""
    entries = _entries(text)
    if isinstance(entries, dict) and isinstance(entries.get("evaluation"), str):
        entries["evaluation"] = " ".join(entries["evaluation"].split())
    return entries


def _entries(text: str) -> Any:
    """What a card's text says, None where it is not valid YAML."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None


def _folded(text: str) -> str:
    return fill_lines(text, width=100, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
