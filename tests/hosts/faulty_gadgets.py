"""A gadget that fails as it is told, for children (as the module `faulty_gadgets`) and for workers inside a test."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from voxelsigma.formats.readouts import ReadoutBlock
from voxelsigma.gadgets.context import Context
from voxelsigma.gadgets.items import Stream
from voxelsigma.gadgets.properties import choice, sidecars
from voxelsigma.gadgets.registry import GADGETS, Entry

FOLDER: Final = str(Path(__file__).parent)
"""For a PYTHONPATH."""
MIDDLE: Final = 8
"""Readouts that pass before it fails in the middle of its input."""
ENTRY: Final = Entry(__name__, "Faulty", "FaultyProperties")


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultyProperties:
    """When to fail; sidecars pass, whatever is to be forwarded."""

    how: str = choice("never", "never", "first", "middle", "end", "killed")
    forward: tuple[str, ...] = sidecars()


@dataclass(frozen=True, slots=True)
class Faulty:
    """Passes items until it is time to fail; its errors do not say whose they are."""

    properties: FaultyProperties
    context: Context

    def __call__(self, items: Stream) -> Stream:
        how, passed = self.properties.how, 0
        for item in items:
            if how == "first":
                raise RuntimeError("no chocolate at all")
            if how in ("middle", "killed") and isinstance(item, ReadoutBlock):
                if passed + len(item) > MIDDLE:
                    yield item.select(slice(0, MIDDLE - passed))
                    if how == "killed":
                        os.kill(os.getpid(), signal.SIGKILL)
                    raise RuntimeError("no chocolate left")
                passed += len(item)
            yield item
        if how == "end":
            raise RuntimeError("no chocolate for you")


def gadget(connection: Any) -> None:
    """A chain that knows the gadget `faulty`."""
    from voxelsigma.gadgets.entry import run

    GADGETS["faulty"] = ENTRY
    run(connection, "chain")
