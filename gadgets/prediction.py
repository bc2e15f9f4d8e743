"""Predicted σ maps for the sketch to begin with, where the model card has a predictor."""

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypeAlias

import torch
from torch import Tensor

from voxelsigma.gadgets.planes import Plane
from voxelsigma.gadgets.reconstruction import MOST_LOADED
from voxelsigma.models.cards import ModelCard
from voxelsigma.models.predictor import SigmaPredictor, plane_features, probe_features
from voxelsigma.models.predictor_file import load_predictor
from voxelsigma.noise.instant import Predict, Priors
from voxelsigma.noise.sketch import Covariate, Sketch

logger = logging.getLogger("voxelsigma.sketch")

_Key: TypeAlias = tuple[str, str, str, int, int]

_MOST_OFF: Final = 10.0
"""Relative error beyond which a figure says nothing more."""


@dataclass(frozen=True, slots=True)
class Refused:
    """A predictor that cannot be used.

    Parameters
    ----------
    reason
        Why, in ASCII and without paths: it goes into images.
    """

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What became of the prediction of a plane; no more of it is kept.

    Parameters
    ----------
    certified
        Whether it is part of the plane's maps.
    worst
        By how much a region is off, as a relative error of σ.
    refused
        Why nothing was predicted at all; None where something was.
    """

    certified: bool = False
    worst: float = 0.0
    refused: Refused | None = None


_lock = threading.Lock()
_loaded: dict[_Key, SigmaPredictor | Refused] = {}
_told: set[_Key] = set()


def predictor_of(card: ModelCard, device: torch.device) -> SigmaPredictor | Refused | None:
    """The predictor of a card, None where the card names none; what was loaded once is kept.

    One that cannot be used is left out, and warned of once a process. It is tried again when its card or its file has
    changed.
    """
    if card.predictor is None:
        return None
    key = str(card.path.absolute()), repr(card), str(device), *_stamp(card.predictor)
    with _lock:
        if key not in _loaded:
            _loaded[key] = _load(card, device, key)
            while len(_loaded) > MOST_LOADED:
                del _loaded[next(iter(_loaded))]
        return _loaded[key]


def prediction(
    predictor: SigmaPredictor, plane: Plane, image: Tensor, covariate: Covariate
) -> tuple[Predict, Covariate]:
    """What the predictor says of an image of a plane, for any sketch of it with the covariate that it makes of one."""
    of_scan = plane_features(plane.problem, plane.kspace, image, covariate)
    real = not image.is_complex()

    def predict(state: Sketch) -> Priors:
        features = torch.cat([of_scan, probe_features(state, covariate.variance, real=real).to(of_scan.device)])
        found = predictor.predict(features, covariate.variance)
        return {"magnitude": found["magnitude"]} if real else found

    assert covariate.normal is not None
    learned = predictor.surrogate.surrogate(of_scan, covariate.normal)
    return predict, replace(covariate, learned=learned)


def told_of(judged: Sequence[Judged]) -> str:
    """What became of the predictions of the planes of a volume, in words."""
    refused = [one.refused for one in judged if one.refused is not None]
    if refused:
        # a file may be exchanged while a volume is at work
        some = "" if len(refused) == len(judged) else f" for {len(refused)} of {len(judged)} planes"
        return f"refused{some}: {refused[0].reason}"
    if not judged:
        return "none"
    dropped = [one.worst for one in judged if not one.certified]
    if not dropped:
        return "certified"
    # what is no number is off by more, too
    known = all(one <= _MOST_OFF for one in dropped)
    off = f"{100 * max(dropped):.0f} % or more" if known else f"more than {100 * _MOST_OFF:.0f} %"
    return f"dropped for {len(dropped)} of {len(judged)} planes: a region is off by {off}"


def with_prior(name: str, judged: Sequence[Judged]) -> str:
    """Name of an estimator, with the part that predictions have in the maps of a volume."""
    certified = [one.certified for one in judged]
    if not any(certified):
        return name
    return f"{name}, predicted prior" if all(certified) else f"{name}, in part with a predicted prior"


def _stamp(path: Path) -> tuple[int, int]:
    """When a file was written, in ns, and its bytes; zeros where there is none."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return 0, 0
    return found.st_mtime_ns, found.st_size


def _load(card: ModelCard, device: torch.device, key: _Key) -> SigmaPredictor | Refused:
    try:
        found = load_predictor(card, device)
        assert found is not None
        return found
    except (ValueError, OSError) as error:
        # what was left out of the loaded ones fails again
        if key not in _told:
            _told.add(key)
            logger.warning("no prediction of sigma maps, the sketch runs alone: %s", error)
        if isinstance(error, OSError):
            missing = isinstance(error, FileNotFoundError)
            return Refused("the predictor's file is missing" if missing else "the predictor's file cannot be read")
        return Refused("the predictor is damaged, or not made for this network")
