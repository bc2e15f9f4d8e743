"""Model cards: what a reconstruction is, what it was made for, and its weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from torch import Tensor, nn

from voxelsigma.models.figures import Figures, checked_figures
from voxelsigma.models.grid import Window
from voxelsigma.models.imported import PREFIX, build, check_name
from voxelsigma.models.modl import Modl
from voxelsigma.models.network import Network, NetworkFunction
from voxelsigma.models.problem import PlaneProblem
from voxelsigma.models.sense import Sense
from voxelsigma.models.unet import ImageUNet
from voxelsigma.models.unrolled import Unrolled
from voxelsigma.models.varnet import VarNet
from voxelsigma.models.weights import SUFFIXES, fill, read_weights

CARD_FOLDER = Path(__file__).parent

ARCHITECTURES: Mapping[str, Callable[..., nn.Module]] = {
    "modl": Modl,
    "unet": ImageUNet,
    "unrolled": Unrolled,
    "varnet": VarNet,
}
"""Networks by the name that a card gives as its architecture."""

PREDICTOR_SUFFIX = ".sigma.safetensors"
"""How the file of a predictor of σ maps ends."""

_KEYS = {
    "name": str,
    "architecture": str,
    "hyperparameters": dict,
    "weights": str,
    "sha256": str,
    "predictor": str,
    "predictor_sha256": str,
    "estimates_sensitivities": bool,
    "fit_for": dict,
    "trained_on": str,
    "evaluation": str,
    "figures": list,
    "licence": str,
}
_REQUIRED = ("name", "architecture", "fit_for", "licence")
_FIT_KEYS = ("acceleration", "coils", "dimension")


class BoundReconstruction(Protocol):
    """The reconstruction of one plane."""

    @property
    def windows(self) -> tuple[Window, Window]:
        """The grid it reconstructs on, as parts of the encoded axes."""
        ...

    def __call__(self, kspace: Tensor) -> Tensor:
        """From k-space on the encoded matrix, `(coils, k1, k0)`, to the wanted image, `(y, x)`."""
        ...


class Reconstructor(Protocol):
    """A reconstruction method that can be bound to a plane."""

    def bind(self, problem: PlaneProblem) -> BoundReconstruction:
        """Reconstruction of one plane."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """A checked model card.

    Parameters
    ----------
    path
        The YAML file.
    name
        Its name.
    architecture
        `sense`, a network of `ARCHITECTURES`, or `python:package.module:Name` for an importable one.
    hyperparameters
        Arguments of the architecture.
    weights
        The file beside the card; None for a method without any.
    sha256
        Of the weights.
    predictor
        The file of its predictor of σ maps, beside the card; None without one.
    predictor_sha256
        Of that file.
    acceleration, coils
        Smallest and largest value it is fit for.
    dimension
        Number of image dimensions it sees at a time.
    estimates_sensitivities
        Whether the model estimates sensitivities of its own, so that none are held fixed.
    figures
        What was measured of it on held-out scans, if anything.
    licence
        Of the weights.
    """

    path: Path
    name: str
    architecture: str
    hyperparameters: Mapping[str, Any]
    weights: Path | None
    sha256: str
    acceleration: tuple[float, float]
    coils: tuple[int, int]
    dimension: int
    predictor: Path | None = None
    predictor_sha256: str = ""
    estimates_sensitivities: bool = False
    figures: tuple[Figures, ...] = ()
    licence: str = ""

    def unfit(self, *, acceleration: float, coils: int, dimension: int) -> str:
        """What the data ask beyond what the model is fit for, in words; empty if nothing."""
        reasons = []
        if not self.acceleration[0] <= round(acceleration, 1) <= self.acceleration[1]:
            low, high = self.acceleration
            reasons.append(f"acceleration {acceleration:.1f} (fit for {low:g} to {high:g})")
        if not self.coils[0] <= coils <= self.coils[1]:
            reasons.append(f"{coils} coils (fit for {self.coils[0]} to {self.coils[1]})")
        if dimension != self.dimension:
            reasons.append(f"{dimension}D data (fit for {self.dimension}D)")
        return ", ".join(reasons)


def available_cards() -> tuple[str, ...]:
    """Names of the cards that are shipped."""
    return tuple(sorted(path.stem for path in CARD_FOLDER.glob("*.yaml")))


def load_card(name: str) -> ModelCard:
    """Read a card by the name of a shipped one, or by the path of a YAML file.

    Raises
    ------
    FileNotFoundError
        If there is no such card; the text lists those shipped.
    ValueError
        If it is not a valid card; the text names the file and the field.
    """
    is_path = name.endswith((".yaml", ".yml"))
    path = Path(name) if is_path else CARD_FOLDER / f"{name}.yaml"
    if not is_path and name not in available_cards():
        raise FileNotFoundError(f"no model card is called {name!r}; shipped are {', '.join(available_cards())}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such model card")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML ({str(error).splitlines()[0]})") from None
    return checked_card(path, content)


def load_model(card: ModelCard, device: torch.device, **overrides: Any) -> Reconstructor:
    """Build the reconstruction that a card describes, with its weights.

    Parameters
    ----------
    card
        The card.
    device
        Where it is to run.
    overrides
        Hyperparameters other than the card's, for methods without weights.

    Raises
    ------
    FileNotFoundError, ValueError
        If the weights are missing, their hash differs, or their keys or shapes do not fit the architecture; if
        what the card names cannot be imported.
    """
    try:
        if card.architecture == "sense":
            return Sense(**{**card.hyperparameters, **overrides})
        function = _built(card)
    except TypeError as error:
        raise ValueError(f"{card.path}: hyperparameters do not fit {card.architecture} ({error})") from None
    if card.weights is not None:
        _load_weights(function, card)
    if isinstance(function, nn.Module):
        function = function.to(device).eval().requires_grad_(False)
    return Network(function=function, estimates_sensitivities=card.estimates_sensitivities)


def _built(card: ModelCard) -> NetworkFunction:
    """The network of a card, without its weights."""
    if card.architecture.startswith(PREFIX):
        return build(card.architecture, card.hyperparameters, origin=card.path)
    return ARCHITECTURES[card.architecture](**card.hyperparameters)


def _load_weights(network: NetworkFunction, card: ModelCard) -> None:
    """Fill a network, all keys or none."""
    assert card.weights is not None
    if not isinstance(network, nn.Module):
        raise ValueError(f"{card.path}: field 'weights' is for modules, {card.architecture} is a function")
    if not card.weights.is_file():
        raise FileNotFoundError(f"{card.path}: weights {card.weights} do not exist")
    tensors = read_weights(card.weights, sha256=card.sha256, stated_by=card.path.name)
    fill(network, tensors, origin=card.weights, description=f"{card.architecture} {dict(card.hyperparameters)}")


def checked_card(path: Path, content: Any) -> ModelCard:
    """The card that a file's content makes.

    Raises
    ------
    ValueError
        If it is not valid; the text names the file and the field.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a model card must be a mapping, got {type(content).__name__}")
    for key, value in content.items():
        if key not in _KEYS:
            raise ValueError(f"{path}: unknown field {key!r}; known are {', '.join(_KEYS)}")
        if not isinstance(value, _KEYS[key]):
            raise ValueError(f"{path}: field {key!r} must be a {_KEYS[key].__name__}, got {value!r}")
    missing = [key for key in _REQUIRED if key not in content]
    if missing:
        raise ValueError(f"{path}: lacks the fields {', '.join(missing)}")
    architecture = content["architecture"]
    ours = architecture in ARCHITECTURES
    imported = architecture.startswith(PREFIX)
    if imported:
        check_name(architecture, origin=path)
    elif architecture != "sense" and not ours:
        raise ValueError(
            f"{path}: field 'architecture' must be one of sense, {', '.join(ARCHITECTURES)}, or "
            f"{PREFIX}package.module:Name, got {architecture!r}"
        )
    with_weights = ours or (imported and ("weights" in content or "sha256" in content))
    if with_weights and not {"weights", "sha256"} <= set(content):
        raise ValueError(f"{path}: lacks 'weights' or 'sha256', which {architecture!r} needs")
    fit = _fit(path, content["fit_for"])
    return ModelCard(
        path=path,
        name=content["name"],
        architecture=architecture,
        hyperparameters=content.get("hyperparameters", {}),
        weights=_weights_path(path, content["weights"]) if with_weights else None,
        sha256=content.get("sha256", ""),
        predictor=_predictor_path(path, content),
        predictor_sha256=content.get("predictor_sha256", ""),
        estimates_sensitivities=_estimates(path, content),
        figures=checked_figures(path, content.get("figures", [])),
        licence=content["licence"],
        **fit,
    )


def _fit(path: Path, fit: Mapping[str, Any]) -> dict[str, Any]:
    """Check `fit_for`."""
    if set(fit) != set(_FIT_KEYS):
        raise ValueError(f"{path}: field 'fit_for' must have {', '.join(_FIT_KEYS)}, got {', '.join(map(str, fit))}")
    for key in ("acceleration", "coils"):
        values = fit[key]
        if not (
            isinstance(values, list)
            and len(values) == 2
            and all(isinstance(value, int | float) for value in values)
            and values[0] <= values[1]
        ):
            raise ValueError(f"{path}: field 'fit_for.{key}' must be [smallest, largest], got {values!r}")
    if fit["dimension"] not in (2, 3):
        raise ValueError(f"{path}: field 'fit_for.dimension' must be 2 or 3, got {fit['dimension']!r}")
    return {
        "acceleration": tuple(fit["acceleration"]),
        "coils": tuple(fit["coils"]),
        "dimension": fit["dimension"],
    }


def _estimates(path: Path, content: Mapping[str, Any]) -> bool:
    """Whether the model estimates its own sensitivities; of networks of ours that is known."""
    known = getattr(ARCHITECTURES.get(content["architecture"]), "estimates_sensitivities", False)
    stated = content.get("estimates_sensitivities", known)
    if stated != known and not content["architecture"].startswith(PREFIX):
        raise ValueError(
            f"{path}: field 'estimates_sensitivities' must be {str(known).lower()} for "
            f"{content['architecture']!r}, got {str(stated).lower()}"
        )
    return stated


def _weights_path(path: Path, name: str) -> Path:
    """Weights lie beside their card."""
    if Path(name).name != name or not name.endswith(SUFFIXES):
        raise ValueError(
            f"{path}: field 'weights' must name a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file beside the card, "
            f"got {name!r}"
        )
    return path.parent / name


def _predictor_path(path: Path, content: Mapping[str, Any]) -> Path | None:
    """A predictor lies beside its card, and is named with its hash or not at all."""
    given = [key for key in ("predictor", "predictor_sha256") if key in content]
    if not given:
        return None
    if len(given) == 1:
        raise ValueError(f"{path}: has only {given[0]!r} of 'predictor' and 'predictor_sha256'; expected both or none")
    name = content["predictor"]
    if Path(name).name != name or not name.endswith(PREDICTOR_SUFFIX):
        raise ValueError(f"{path}: field 'predictor' must name a {PREDICTOR_SUFFIX} file beside the card, got {name!r}")
    return path.parent / name
