"""Files of σ predictors: safetensors that name the network whose noise they predict."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save
from torch import Tensor

from voxelsigma.models.cards import ModelCard
from voxelsigma.models.predictor import SigmaPredictor
from voxelsigma.models.weights import fill, read_weights

MOST_CHANNELS: Final = 128
MOST_LEVELS: Final = 6

_SIZES: Final = {
    "channels": MOST_CHANNELS,
    "levels": MOST_LEVELS,
    "surrogate_channels": MOST_CHANNELS,
    "surrogate_levels": MOST_LEVELS,
}
_KEYS = ("model", *_SIZES)
_PREFIX_BYTES = 8
_MOST_HEADER = 2**20


def model_identity(card: ModelCard) -> str:
    """Hash of what the noise of a reconstruction depends on: architecture, hyperparameters, hash of the weights.

    Of a network without weights, and of the code behind `python:`, the name alone counts.
    """
    content = [card.architecture, dict(card.hyperparameters), card.sha256]
    described = json.dumps(content, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(described.encode()).hexdigest()


def predictor_content(predictor: SigmaPredictor, card: ModelCard) -> bytes:
    """The file of a predictor, the same bytes for the same predictor.

    Parameters
    ----------
    predictor
        Whose weights to save.
    card
        Of the network that it predicts.

    Raises
    ------
    ValueError
        If its sizes are none that a reader takes, weights are not finite, or a calibration is not above 0.
    """
    state = {name: value.detach().cpu().contiguous() for name, value in predictor.state_dict().items()}
    sizes = {
        "channels": state["last.weight"].shape[1],
        "levels": predictor.levels,
        "surrogate_channels": state["surrogate.last.weight"].shape[1],
        "surrogate_levels": predictor.surrogate.levels,
    }
    origin = Path(f"{card.name} (predictor)")
    metadata = {"model": model_identity(card), **{key: str(value) for key, value in sizes.items()}}
    _sizes(origin, metadata)
    _check_values(origin, state)
    return _with_metadata(save(state), metadata)


def load_predictor(card: ModelCard, device: torch.device) -> SigmaPredictor | None:
    """The predictor that a card names, ready to predict; None if it names none.

    Raises
    ------
    FileNotFoundError
        If the file is missing.
    ValueError
        If its hash is not the card's, it is of another network or other weights, its sizes are out of range, or its
        tensors are not those of a predictor, all of them finite.
    """
    path = card.predictor
    if path is None:
        return None
    if not path.is_file():
        raise FileNotFoundError(f"{card.path}: predictor {path} does not exist")
    tensors = read_weights(path, sha256=card.predictor_sha256, stated_by=card.path.name)
    metadata = _metadata(path)
    identity = model_identity(card)
    if metadata["model"] != identity:
        raise ValueError(
            f"{path}: predicts the network {metadata['model']}, the card {card.path} is of {identity}; "
            "distill a predictor of these weights"
        )
    sizes = _sizes(path, metadata)
    _check_values(path, tensors)
    # the random numbers of whoever loads it are not to be touched
    with torch.random.fork_rng(devices=[]):
        predictor = SigmaPredictor(**sizes)
    described = ", ".join(f"{key} {value}" for key, value in sizes.items())
    fill(predictor, tensors, origin=path, description=f"a predictor of {described}")
    return predictor.to(device).eval().requires_grad_(False)


def _sizes(path: Path, metadata: Mapping[str, str]) -> dict[str, int]:
    """Channels and levels, checked before anything of these sizes is built."""
    found = {}
    for key, most in _SIZES.items():
        text = metadata[key]
        if not (text.isascii() and text.isdecimal() and len(text) <= 3 and 1 <= int(text) <= most):
            raise ValueError(f"{path}: field {key!r} must be a whole number from 1 to {most}, got {text!r}")
        found[key] = int(text)
    return found


def _check_values(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse what no training leaves behind."""
    broken = sorted(key for key, value in tensors.items() if not bool(torch.isfinite(value).all()))
    if broken:
        raise ValueError(f"{path}: weights that are not finite: {', '.join(broken)}")
    calibration = tensors.get("calibration")
    if calibration is not None and not bool((calibration > 0).all()):
        raise ValueError(f"{path}: 'calibration' must be above 0, got {calibration.tolist()}")


def _metadata(path: Path) -> dict[str, str]:
    """What a safetensors file, which its own reader found in order, says of its network."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(_PREFIX_BYTES), "little")
        content = file.read(min(size, _MOST_HEADER))
    try:
        found = json.loads(content).get("__metadata__", {})
    except (ValueError, RecursionError):
        found = {}
    missing = [key for key in _KEYS if key not in found]
    if missing:
        raise ValueError(f"{path}: not the file of a predictor: lacks {', '.join(missing)} in its metadata")
    return dict(found)


def _with_metadata(content: bytes, metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with metadata; the library's own order of them changes from call to call."""
    size = int.from_bytes(content[:_PREFIX_BYTES], "little")
    header: dict[str, Any] = json.loads(content[_PREFIX_BYTES : _PREFIX_BYTES + size])
    text = json.dumps({"__metadata__": dict(metadata), **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _PREFIX_BYTES)
    return len(text).to_bytes(_PREFIX_BYTES, "little") + text + content[_PREFIX_BYTES + size :]
