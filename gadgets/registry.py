"""The gadgets by name."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from voxelsigma.gadgets.context import Context, Gadget
from voxelsigma.gadgets.properties import parse_properties


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a gadget is implemented, and which items of others it needs.

    Parameters
    ----------
    module, gadget, properties
        Module, class and class of its properties.
    needs
        What an earlier gadget of a chain must forward to it.
    """

    module: str
    gadget: str
    properties: str
    needs: tuple[str, ...] = ()


GADGETS = {
    "prewhiten": Entry("voxelsigma.gadgets.whitening", "Prewhiten", "PrewhitenProperties"),
    "accumulate": Entry("voxelsigma.gadgets.accumulation", "Accumulate", "AccumulateProperties", needs=("covariance",)),
    "coil_maps": Entry("voxelsigma.gadgets.mapping", "CoilMaps", "CoilMapsProperties", needs=("kspace",)),
    "reconstruct": Entry(
        "voxelsigma.gadgets.reconstruction",
        "Reconstruct",
        "ReconstructProperties",
        needs=("kspace", "sensitivities"),
    ),
    "sketch": Entry("voxelsigma.gadgets.sketching", "Sketch", "SketchProperties", needs=("kspace", "sensitivities")),
}


def create(name: str, properties: Mapping[str, str], context: Context) -> Gadget:
    """Build a gadget from its property texts.

    Raises
    ------
    ValueError
        If there is no such gadget, or a property is unknown or bad.
    """
    entry = entry_of(name)
    module: Any = import_module(entry.module)
    values = parse_properties(getattr(module, entry.properties), name, properties)
    gadget: Gadget = getattr(module, entry.gadget)(values, context)
    return gadget


def entry_of(name: str) -> Entry:
    """The entry of a gadget; ValueError with the known names if there is none."""
    if name not in GADGETS:
        raise ValueError(f"no gadget is called {name!r}; known are {', '.join(GADGETS)}")
    return GADGETS[name]
