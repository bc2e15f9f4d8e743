"""Predicted σ maps for the sketch to begin with, where the model card has a predictor."""

import logging
import threading
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from voxelsigma.gadgets.planes import Plane
from voxelsigma.models.cards import ModelCard
from voxelsigma.models.predictor import SigmaPredictor, plane_features, probe_features
from voxelsigma.models.predictor_file import load_predictor
from voxelsigma.noise.instant import Predict, Priors
from voxelsigma.noise.sketch import Covariate, Sketch

logger = logging.getLogger("voxelsigma.sketch")

_loaded: dict[tuple[Path, str, str, str], SigmaPredictor | None] = {}
_lock = threading.Lock()


def predictor_of(card: ModelCard, device: torch.device) -> SigmaPredictor | None:
    """The predictor of a card, None without; one that cannot be used is warned of once a process, and left out."""
    key = card.path.absolute(), card.sha256, card.predictor_sha256, str(device)
    with _lock:
        if key not in _loaded:
            try:
                _loaded[key] = load_predictor(card, device)
            except (ValueError, OSError) as error:
                logger.warning("no prediction of sigma maps, the sketch runs alone: %s", error)
                _loaded[key] = None
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
