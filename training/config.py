"""What a training run is made of, read from YAML and checked once."""

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from voxelsigma.models.cards import ARCHITECTURES
from voxelsigma.training.examples import ExampleSettings
from voxelsigma.training.objectives import OBJECTIVES

PRESET_FOLDER = Path(__file__).parent / "presets"

_Settings = TypeVar("_Settings")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSettings:
    """Where scans to train on come from.

    Parameters
    ----------
    folder
        Folder with the files; a relative one belongs to the working directory.
    kind
        `volumes` (label maps and intensities to simulate scans of), `ismrmrd` or `fastmri` (fully sampled scans).
    exclude
        Names of volumes or files to hold out.
    labelled
        Names of those whose references may be used; None for all. The others are undersampled-only scans.
    licences
        Licences of the data, for the model card.
    """

    folder: str = ""
    kind: Literal["volumes", "ismrmrd", "fastmri"] = "volumes"
    exclude: tuple[str, ...] = ()
    labelled: tuple[str, ...] | None = None
    licences: str = "licences not stated"


@dataclass(frozen=True, slots=True, kw_only=True)
class FitSettings:
    """How long and how fast to train.

    Parameters
    ----------
    steps
        Optimiser steps.
    batch
        Examples a step, on each device.
    learning_rate
        Adam's step size after the warm-up; it falls to 0 along half a cosine.
    warm_up
        Steps over which the learning rate rises first.
    clip
        Largest norm of the gradient.
    scalar_rate
        How many times faster step sizes and weights of the data learn than convolutions.
    weight_decay
        Adam's, added to the gradient.
    schedule
        `cosine`, or `constant` after the warm-up.
    precision
        `32-true`, `bf16-mixed` or `64-true`.
    devices
        Processes of a data-parallel run, each with batches of its own.
    workers
        Processes that draw examples ahead, for each device; 0 draws them in the training process.
    checkpoint_every, log_every
        Steps between two.
    logger
        `csv` or `tensorboard`.
    seed
        Of weights, examples and objectives.
    """

    steps: int = 16000
    batch: int = 2
    learning_rate: float = 1e-3
    warm_up: int = 100
    clip: float = 1.0
    scalar_rate: float = 10.0
    weight_decay: float = 0.0
    schedule: Literal["cosine", "constant"] = "cosine"
    precision: Literal["32-true", "bf16-mixed", "64-true"] = "32-true"
    devices: int = 1
    workers: int = 0
    checkpoint_every: int = 500
    log_every: int = 50
    logger: Literal["csv", "tensorboard"] = "csv"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch",
            "learning_rate",
            "clip",
            "scalar_rate",
            "devices",
            "checkpoint_every",
            "log_every",
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("warm_up", "workers", "weight_decay", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """A training run.

    Parameters
    ----------
    name
        Of the model card to make.
    architecture, hyperparameters
        As on a model card.
    start
        Card whose weights to begin with; empty for seeded ones.
    objective, objective_settings
        One of `OBJECTIVES` and its hyperparameters.
    data, examples, fit
        See their types.
    licence
        Of the weights, for the model card.
    notes
        For the model card.
    """

    name: str
    architecture: str
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    start: str = ""
    objective: str = "supervised"
    objective_settings: Mapping[str, Any] = field(default_factory=dict)
    data: DataSettings = field(default_factory=DataSettings)
    examples: ExampleSettings = field(default_factory=ExampleSettings)
    fit: FitSettings = field(default_factory=FitSettings)
    licence: str = "not stated"
    notes: str = ""

    def __post_init__(self) -> None:
        if not self.name or Path(self.name).name != self.name or self.name.startswith("."):
            raise ValueError(f"name must be a file name without folders, got {self.name!r}")
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}, got {self.architecture!r}")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}")
        if not self.data.folder:
            raise ValueError("data.folder is missing: name it here or with --data")
        _check_references(self.objective, self.objective_settings, self.data.labelled)


def _check_references(objective: str, settings: Mapping[str, Any], labelled: tuple[str, ...] | None) -> None:
    """Refuse objectives that would silently be others, or nothing, for want of references or of scans without."""
    if objective == "supervised" and labelled is not None:
        raise ValueError(
            "objective 'supervised' takes references of all scans: leave data.labelled out, use data.exclude"
        )
    if objective in ("noise2recon", "vortex"):
        if labelled is None and not settings.get("supervised_consistency"):
            raise ValueError(
                f"objective {objective!r} needs scans without references, else it is 'supervised': name under "
                "data.labelled those that have one, or set objective_settings.supervised_consistency"
            )
        if labelled == ():
            raise ValueError(f"objective {objective!r} needs references of some scans: data.labelled is empty")


def available_presets() -> tuple[str, ...]:
    """Names of the configurations that are shipped."""
    return tuple(sorted(path.stem for path in PRESET_FOLDER.glob("*.yaml")))


def load_config(name: str, *, folder: str | None = None) -> TrainConfig:
    """Read a configuration by the path of a YAML file, or by the name of a preset.

    Parameters
    ----------
    name
        `FILE.yaml`, or a name of `available_presets`.
    folder
        Data folder instead of the configuration's.

    Raises
    ------
    FileNotFoundError
        If there is none; the text lists the presets.
    ValueError
        If it is not valid; the text names the file and the field.
    """
    is_path = name.endswith((".yaml", ".yml"))
    if not is_path and name not in available_presets():
        raise FileNotFoundError(
            f"no training preset is called {name!r}; name a YAML file, or one of {', '.join(available_presets())}"
        )
    path = Path(name) if is_path else PRESET_FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such training configuration")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML ({str(error).splitlines()[0]})") from None
    if folder is not None and isinstance(content, dict):
        data = content.get("data", {})
        content = {**content, "data": {**data, "folder": folder} if isinstance(data, dict) else data}
    return _built(TrainConfig, content, origin=str(path), place="")


def _built(kind: type[_Settings], content: Any, *, origin: str, place: str) -> _Settings:
    """A settings dataclass from a mapping, every key and type checked."""
    where = f"field {place!r}" if place else "a training configuration"
    if not isinstance(content, dict):
        raise ValueError(f"{origin}: {where} must be a mapping, got {type(content).__name__}")
    known = {one.name: one for one in fields(kind)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(kind)
    values = {}
    for key, value in content.items():
        if key not in known:
            raise ValueError(f"{origin}: unknown field {_joined(place, str(key))!r}; known are {', '.join(known)}")
        values[key] = _value(hints[key], value, origin=origin, place=_joined(place, key))
    missing = [
        name
        for name, one in known.items()
        if name not in values and one.default is MISSING and one.default_factory is MISSING
    ]
    if missing:
        raise ValueError(f"{origin}: lacks the fields {', '.join(_joined(place, name) for name in missing)}")
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{origin}: {place + ': ' if place else ''}{error}") from None


def _joined(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def _value(hint: Any, value: Any, *, origin: str, place: str) -> Any:
    """One value as its annotation wants it."""
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(one for one in typing.get_args(hint) if one is not type(None))
    if isinstance(hint, type) and hasattr(hint, "__dataclass_fields__"):
        return _built(hint, value, origin=origin, place=place)
    kind, arguments = typing.get_origin(hint), typing.get_args(hint)
    if kind is Literal:
        if value not in arguments:
            raise ValueError(
                f"{origin}: field {place!r} must be one of {', '.join(map(str, arguments))}, got {value!r}"
            )
        return value
    if kind is tuple:
        fixed = len(arguments) if Ellipsis not in arguments else None
        if not isinstance(value, list) or (fixed is not None and len(value) != fixed):
            wanted = f"a list of {fixed}" if fixed is not None else "a list"
            raise ValueError(f"{origin}: field {place!r} must be {wanted}, got {value!r}")
        each = arguments if fixed is not None else (arguments[0],) * len(value)
        return tuple(_value(one, item, origin=origin, place=place) for one, item in zip(each, value, strict=True))
    plain = Mapping if kind is not None else hint
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, plain) or (isinstance(value, bool) and plain is not bool):
        name = "mapping" if plain is Mapping else {str: "text", int: "whole number", float: "number"}.get(hint, hint)
        raise ValueError(f"{origin}: field {place!r} must be a {name}, got {value!r}")
    return value
