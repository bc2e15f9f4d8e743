"""Predicted σ maps for the sketch to begin with, where the model card has a predictor."""

import logging
import threading
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from voxelsigma.gadgets.planes import Plane
from voxelsigma.models.cards import ModelCard
from voxelsigma.models.predictor import SigmaPredictor, scan_features
from voxelsigma.models.predictor_file import load_predictor
from voxelsigma.noise.prior import Prior
from voxelsigma.noise.sigma import MapKind
from voxelsigma.noise.sketch import Covariate

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


def predicted(predictor: SigmaPredictor, plane: Plane, image: Tensor, covariate: Covariate) -> Mapping[MapKind, Prior]:
    """Predicted variances of the image of a plane, before any probe."""
    assert covariate.correlation is not None
    problem = plane.problem
    windows = problem.windows(symmetric=True)
    features = scan_features(
        image,
        covariate.push(plane.kspace.unsqueeze(0))[0],
        covariate.variance,
        covariate.correlation,
        float((problem.cropped_weights(windows) > 0).float().mean()),
    )
    found = predictor.predict(features, covariate.variance)
    return found if image.is_complex() else {"magnitude": found["magnitude"]}
