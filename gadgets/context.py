"""What a gadget is told by whoever runs it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from voxelsigma.formats.header import ScanHeader
from voxelsigma.gadgets.items import Stream
from voxelsigma.gadgets.turns import Turns

if TYPE_CHECKING:
    from voxelsigma.formats.probe_writer import ProbeWriter


def _silent(stage: str, done: int, total: int) -> None:
    del stage, done, total


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """The scan, and where progress is reported.

    Parameters
    ----------
    header
        The ISMRMRD header.
    progress
        Told (stage, done, total) now and then; total is 0 where it is not known.
    turns
        Turns on the device, shared by the scans of a process.
    noise
        A noise scan or covariance to use instead of the stream's own.
    probes
        Where pushed probes are kept; None if nobody wants them. Only the host says so, never a configuration.
    """

    header: ScanHeader
    progress: Callable[[str, int, int], None] = field(default=_silent)
    turns: Turns = field(default_factory=Turns)
    noise: Path | None = None
    probes: "ProbeWriter | None" = None


class Gadget(Protocol):
    """A callable on a stream of items."""

    def __call__(self, items: Stream) -> Stream:
        """Items in, items out; what the gadget does not know passes unchanged and in order."""
        ...
