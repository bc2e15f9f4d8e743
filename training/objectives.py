"""What a network is trained to do: the objectives, by name."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from voxelsigma.training.examples import Example
from voxelsigma.training.losses import object_magnitude, relative_error
from voxelsigma.training.noise2recon import Noise2Recon
from voxelsigma.training.ssdu import Ssdu
from voxelsigma.training.supervised import Supervised
from voxelsigma.training.vortex import Vortex

__all__ = [
    "OBJECTIVES",
    "Noise2Recon",
    "Objective",
    "Ssdu",
    "Supervised",
    "Vortex",
    "make_objective",
    "object_magnitude",
    "relative_error",
]


class Objective(Protocol):
    """The loss of a network on a batch of examples."""

    def __call__(
        self, network: nn.Module, example: Example, rng: np.random.Generator, *, progress: float = 1.0
    ) -> Tensor:
        """Loss, a function of its arguments alone.

        Parameters
        ----------
        network
            Called with `(kspace, sensitivities, mask)`, returns images `(batch, y, x)`, complex or real.
        example
            A batch, `kspace` of shape `(batch, coils, k1, k0)`. It is not changed.
        rng
            Source of all randomness.
        progress
            Share of the training that is done, 0 to 1.

        Returns
        -------
            Scalar, real, with a gradient for the network's parameters.
        """
        ...


OBJECTIVES: Mapping[str, Callable[..., Objective]] = MappingProxyType(
    {"supervised": Supervised, "noise2recon": Noise2Recon, "vortex": Vortex, "ssdu": Ssdu}
)


def make_objective(name: str, hyperparameters: Mapping[str, Any]) -> Objective:
    """Make an objective from its name and its hyperparameters, as read from a configuration.

    Parameters
    ----------
    name
        A name in `OBJECTIVES`.
    hyperparameters
        Those that are not at their defaults; lists stand for ranges.

    Raises
    ------
    ValueError
        The name or a hyperparameter is unknown, or a value is not valid.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {name!r}")
    make = OBJECTIVES[name]
    known = [field.name for field in fields(make)]  # type: ignore[arg-type]
    for given in hyperparameters:
        if given not in known:
            raise ValueError(f"{name}: hyperparameter {given!r} is unknown; expected {_names(known)}")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in hyperparameters.items()}
    return make(**values)


def _names(known: list[str]) -> str:
    return f"some of {', '.join(known)}" if known else "none"
