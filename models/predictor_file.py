"""Files of σ predictors: safetensors that name the network whose noise they predict."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypedDict

import torch
from safetensors.torch import save
from torch import Tensor, nn

from voxelsigma.models.cards import ModelCard
from voxelsigma.models.predictor import SigmaPredictor
from voxelsigma.models.surrogate_net import LARGEST_WEIGHT, MOST_STAGES, SMALLEST_WEIGHT, check_stages
from voxelsigma.models.weights import shape_differences, weights_of

CALIBRATION_RANGE: Final = (0.05, 20.0)
"""Smallest and largest factor on the degrees of freedom of a prediction."""

MOST_CHANNELS: Final = 128
MOST_LEVELS: Final = 6


class _Sizes(TypedDict):
    """What a predictor is built with."""

    channels: int
    levels: int
    surrogate_channels: int
    surrogate_levels: int
    surrogate_stages: tuple[float, ...]


_KEYS = ("model", *_Sizes.__annotations__)
_PREFIX_BYTES = 8
_MOST_HEADER = 2**20
_MOST_TOLD = 5
_LONGEST = 40
_NUMBER: Final = re.compile(r"[0-9]{1,3}(\.[0-9]{1,20})?")
_TYPES = (torch.float16, torch.float32)


def model_identity(card: ModelCard) -> str:
    """Hash of what the noise of a reconstruction depends on: architecture, hyperparameters, hash of the weights.

    Of a network without weights, and of the code behind `python:`, the name alone counts.
    """
    content = [card.architecture, dict(card.hyperparameters), card.sha256]
    described = json.dumps(content, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(described.encode()).hexdigest()


@torch.no_grad()
def round_weights(network: nn.Module) -> None:
    """Round the weights of a predictor, or of its surrogate, to those that its file will hold: float16.

    What is measured of a predictor that is to be saved, its calibration above all, is measured after this. Buffers, as
    the calibration itself, stay.

    Raises
    ------
    ValueError
        If weights are not finite, or beyond 65504.
    """
    weights = dict(network.named_parameters())
    for name, half in _halves("predictor", weights).items():
        weights[name].copy_(half)


def predictor_content(predictor: SigmaPredictor, card: ModelCard) -> bytes:
    """The file of a predictor, the same bytes for the same predictor; its weights are float16 (`round_weights`).

    Parameters
    ----------
    predictor
        Whose weights to save.
    card
        Of the network that it predicts.

    Raises
    ------
    ValueError
        If its sizes are none that a reader takes, weights are not finite or beyond 65504, or a calibration is not
        within `CALIBRATION_RANGE`.
    """
    sizes = _Sizes(
        channels=predictor.last.in_channels,
        levels=predictor.levels,
        surrogate_channels=predictor.surrogate.last.in_channels,
        surrogate_levels=predictor.surrogate.levels,
        surrogate_stages=predictor.surrogate.stages,
    )
    origin = f"{card.name} (predictor)"
    metadata = {"model": model_identity(card), **_texts(sizes)}
    _sizes(origin, metadata)
    halves = _halves(origin, dict(predictor.named_parameters()))
    state = {name: halves.get(name, value.float()) for name, value in predictor.state_dict().items()}
    _check_values(origin, state)
    return _with_metadata(save({name: value.detach().cpu().contiguous() for name, value in state.items()}), metadata)


def load_predictor(card: ModelCard, device: torch.device) -> SigmaPredictor | None:
    """The predictor that a card names, ready to predict; None if it names none.

    Raises
    ------
    FileNotFoundError
        If the file is missing.
    ValueError
        If its hash is not the card's, it is of another network or other weights, its sizes or its calibration are out
        of range, or its tensors are not those of a predictor, all of them finite.
    """
    path = card.predictor
    if path is None:
        return None
    if not path.is_file():
        raise FileNotFoundError(f"{card.path}: predictor {path} does not exist")
    # read once: what was hashed is what is used
    content = path.read_bytes()
    tensors = weights_of(path, content, sha256=card.predictor_sha256, stated_by=card.path.name)
    metadata = _metadata(path, content)
    identity = model_identity(card)
    if metadata["model"] != identity:
        raise ValueError(
            f"{path}: predicts the network {metadata['model'][:64]}, the card {card.path} is of {identity}; "
            "distill a predictor of these weights"
        )
    sizes = _sizes(path, metadata)
    # what sizes say takes no memory before the file is found to hold as much
    with torch.device("meta"):
        predictor = SigmaPredictor(**sizes)
    described = ", ".join(f"{key} {value}" for key, value in _texts(sizes).items())
    _check_fits(path, tensors, predictor.state_dict(), described)
    _check_values(path, tensors)
    predictor.load_state_dict({name: value.float() for name, value in tensors.items()}, assign=True)
    return predictor.to(device).eval().requires_grad_(False)


def _texts(sizes: _Sizes) -> dict[str, str]:
    """Sizes as the metadata have them."""
    return {key: " ".join(map(str, value)) if isinstance(value, tuple) else str(value) for key, value in sizes.items()}


def _sizes(origin: Path | str, metadata: Mapping[str, str]) -> _Sizes:
    """Sizes, checked before anything of them is built."""

    def refused(key: str, wanted: str) -> ValueError:
        text = metadata[key]
        return ValueError(f"{origin}: field {key!r} must be {wanted}, got {text[:_LONGEST]!r}")

    def whole(key: str, most: int) -> int:
        text = metadata[key]
        if not (text.isascii() and text.isdecimal() and len(text) <= 3 and 1 <= int(text) <= most):
            raise refused(key, f"a whole number from 1 to {most}")
        return int(text)

    def numbers(key: str) -> tuple[float, ...]:
        parts = metadata[key].split(" ")
        try:
            if not all(_NUMBER.fullmatch(part) for part in parts):
                raise ValueError("not numbers")
            found = tuple(map(float, parts))
            check_stages(found)
        except ValueError:
            wanted = f"1 to {MOST_STAGES} numbers, each 0 or from {SMALLEST_WEIGHT} to {LARGEST_WEIGHT:g}"
            raise refused(key, wanted) from None
        return found

    return _Sizes(
        channels=whole("channels", MOST_CHANNELS),
        levels=whole("levels", MOST_LEVELS),
        surrogate_channels=whole("surrogate_channels", MOST_CHANNELS),
        surrogate_levels=whole("surrogate_levels", MOST_LEVELS),
        surrogate_stages=numbers("surrogate_stages"),
    )


def _halves(origin: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights in float16."""
    found = {name: value.detach().half() for name, value in weights.items()}
    broken = sorted(name for name, value in found.items() if not bool(torch.isfinite(value).all()))
    if broken:
        most = torch.finfo(torch.float16).max
        raise ValueError(f"{origin}: weights that are not finite, or beyond {most:g} (float16): {_told(broken)}")
    return found


def _check_fits(path: Path, tensors: Mapping[str, Tensor], needed: Mapping[str, Tensor], described: str) -> None:
    """Names, shapes and types of what a file holds, against those of a predictor that takes no memory yet."""
    differing = shape_differences(tensors, needed) or [
        f"{name} (is {_type(one.dtype)}, needs {' or '.join(map(_type, _TYPES))})"
        for name, one in sorted(tensors.items())
        if one.dtype not in _TYPES
    ]
    if differing:
        raise ValueError(f"{path}: does not fit a predictor of {described}: {_told(differing)}")


def _check_values(origin: Path | str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse what no training leaves behind."""
    broken = sorted(key for key, value in tensors.items() if not bool(torch.isfinite(value).all()))
    if broken:
        raise ValueError(f"{origin}: weights that are not finite: {_told(broken)}")
    calibration = tensors["calibration"]
    low, high = CALIBRATION_RANGE
    # as the file's type has the limits themselves
    if not bool(((calibration >= low) & (calibration <= high)).all()):
        raise ValueError(f"{origin}: 'calibration' must be from {low:g} to {high:g}, got {calibration.tolist()}")


def _told(names: Sequence[str]) -> str:
    """The first of them, and how many more there are."""
    more = len(names) - _MOST_TOLD
    return ", ".join(names[:_MOST_TOLD]) + (f" and {more} more" if more > 0 else "")


def _type(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")


def _metadata(path: Path, content: bytes) -> dict[str, str]:
    """What a safetensors file, which its own reader found in order, says of its network."""
    size = int.from_bytes(content[:_PREFIX_BYTES], "little")
    try:
        found = json.loads(content[_PREFIX_BYTES : _PREFIX_BYTES + min(size, _MOST_HEADER)]).get("__metadata__", {})
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
