"""Predicted σ maps for the sketch to begin with, where the model card has a predictor."""

import logging
import threading
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

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

_lock = threading.Lock()
_loaded: dict[_Key, SigmaPredictor | None] = {}
_told: set[_Key] = set()


def predictor_of(card: ModelCard, device: torch.device) -> SigmaPredictor | None:
    """The predictor of a card, None without; what was loaded once is kept.

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


def _stamp(path: Path) -> tuple[int, int]:
    """When a file was written, in ns, and its bytes; zeros where there is none."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return 0, 0
    return found.st_mtime_ns, found.st_size


def _load(card: ModelCard, device: torch.device, key: _Key) -> SigmaPredictor | None:
    try:
        return load_predictor(card, device)
    except (ValueError, OSError) as error:
        # what was left out of the loaded ones fails again
        if key not in _told:
            _told.add(key)
            logger.warning("no prediction of sigma maps, the sketch runs alone: %s", error)
        return None
