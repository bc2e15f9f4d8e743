"""Gadgets in an installation that is broken: children find it as the module `broken_imports`."""

import importlib.abc
import sys
from typing import Any


class Broken(importlib.abc.MetaPathFinder):
    """Finds that a module cannot be imported."""

    def __init__(self, module: str) -> None:
        self.module = module

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        del path, target
        if name == self.module:
            raise ImportError(f"{self.module} is broken")


def whitening(connection: Any) -> None:
    """What only the gadget itself needs is broken."""
    _run(connection, "voxelsigma.gadgets.whitening")


def wire(connection: Any) -> None:
    """Not even messages can be read."""
    _run(connection, "voxelsigma.gadgets.wire")


def _run(connection: Any, broken: str) -> None:
    sys.meta_path.insert(0, Broken(broken))
    from voxelsigma.gadgets.entry import run

    run(connection, "prewhiten")
