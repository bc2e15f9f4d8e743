"""A user's own network, by the name that Python imports it under."""

import functools
import importlib
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from torch import nn

from voxelsigma.models.network import NetworkFunction

PREFIX: Final = "python:"
_NAME = re.compile(r"python:[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def check_name(name: str, *, origin: Path) -> None:
    """Refuse a name that is not of the form `python:package.module:Name`; nothing is imported."""
    if _NAME.fullmatch(name) is None:
        raise ValueError(f"{origin}: field 'architecture' must be {PREFIX}package.module:Name, got {name!r}")


def build(name: str, hyperparameters: Mapping[str, Any], *, origin: Path) -> NetworkFunction:
    """Import what a card names, and make a network of it.

    A class is called with the hyperparameters; a function is given them beside its three arguments. Either way the
    result is called as `network(kspace, sensitivities, mask)`:

    - `kspace`, `(coils, k1, k0)`, complex64, whitened, 0 where nothing was sampled; k0 is the readout;
    - `sensitivities`, `(coils, y, x)`, complex64, unit-norm, 0 where no coil sees anything;
    - `mask`, `(k1, k0)`, float32, 1 where sampled;

    and returns an image `(y, x)`, complex, or real where it has no phase, made of differentiable torch operations.
    All axes are centred: index n // 2 is the origin of k-space and of the image, y belongs to k1 and x to k0.

    Parameters
    ----------
    name
        `python:package.module:Name`.
    hyperparameters
        Keyword arguments.
    origin
        The card, for error texts. Only a card may name code: never data or a pipeline.

    Raises
    ------
    ValueError
        If the module cannot be imported, has no such name, or the name is nothing to call.
    TypeError
        If the hyperparameters do not fit.
    """
    module_name, _, path = name.removeprefix(PREFIX).partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # a module can raise anything while it is imported
        raise ValueError(
            f"{origin}: field 'architecture' names {name!r}, but module {module_name!r} cannot be imported "
            f"({type(error).__name__}: {error}); install it, or put its folder on PYTHONPATH"
        ) from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise ValueError(
                f"{origin}: field 'architecture' names {name!r}, but {module_name!r} has no {path!r}"
            ) from None
        found = getattr(found, part)
    if inspect.isclass(found):
        found = found(**hyperparameters)
        hyperparameters = {}
    if not callable(found):
        raise ValueError(f"{origin}: field 'architecture' names {name!r}, a {type(found).__name__}, nothing to call")
    if isinstance(found, nn.Module) or not hyperparameters:
        if hyperparameters:
            raise TypeError(f"{name!r} is a module that is built already, it takes none")
        return found
    inspect.signature(found).bind(None, None, None, **hyperparameters)
    return functools.partial(found, **hyperparameters)
