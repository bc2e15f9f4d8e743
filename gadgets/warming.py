"""Models loaded, and run once, before the first scan needs them."""

from collections.abc import Iterable

import torch

from voxelsigma.gadgets.chaining import GadgetSpec
from voxelsigma.gadgets.planes import pick_device
from voxelsigma.gadgets.prediction import predictor_of
from voxelsigma.gadgets.properties import parse_properties
from voxelsigma.gadgets.reconstruction import ReconstructProperties, load_method
from voxelsigma.models.cards import Reconstructor, load_card
from voxelsigma.models.problem import PlaneProblem
from voxelsigma.noise.linearize import linearize

_SIZE = 64
_COILS = 4


def warm(specs: Iterable[GadgetSpec]) -> tuple[str, ...]:
    """Load the models of all `reconstruct` gadgets, and their predictors, and push a probe through each.

    Returns
    -------
        The models' names.

    Raises
    ------
    ValueError, OSError
        If a property or a model card is bad.
    """
    names = []
    for spec in specs:
        if spec.name != "reconstruct":
            continue
        properties = parse_properties(ReconstructProperties, spec.name, spec.properties)
        card, device = load_card(properties.model), pick_device(properties.device)
        _run_once(load_method(card, device, properties.regularization), device)
        predictor_of(card, device)
        names.append(card.name)
    return tuple(dict.fromkeys(names))


def _run_once(method: Reconstructor, device: torch.device) -> None:
    size = (_SIZE, _SIZE)
    limits = ((0, _SIZE - 1), (0, _SIZE - 1))
    problem = PlaneProblem(
        sensitivities=torch.full((_COILS, *size), _COILS**-0.5, dtype=torch.complex64, device=device),
        variance=torch.full(size, 2.0, device=device),
        weights=torch.ones(size, device=device),
        limits=limits,
        size=size,
    )
    kspace = torch.ones((_COILS, *size), dtype=torch.complex64, device=device)
    linearize(method.bind(problem), kspace).push(kspace.unsqueeze(0))
