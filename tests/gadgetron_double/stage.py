"""What a test needs, ended with it."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from tests.gadgetron_double.listener import Listener, Peer
from tests.gadgetron_double.pipeline import pipeline
from tests.gadgetron_double.server import Double

# folder of `stock_toys`, for a PYTHONPATH
TOYS: Final = str(Path(__file__).parent / "modules")


class Stage(ExitStack):
    """Starts doubles and listeners, and ends them; a fixture makes one per test.

    Parameters
    ----------
    folder
        Gets the log.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._log = folder / "log.txt"

    def double(
        self,
        *nodes: str,
        readers: tuple[str, ...] = ("Acquisition", "Image"),
        writers: tuple[str, ...] = ("Acquisition", "Image"),
        environment: dict[str, str] | None = None,
        **given: Any,
    ) -> Double:
        """A double with a pipeline of these nodes, whose children find `stock_toys`."""
        xml = pipeline(*nodes, readers=readers, writers=writers)
        return self.enter_context(Double(xml, {"PYTHONPATH": TOYS, **(environment or {})}, log=self._log, **given))

    def listener(self, part: Callable[[Peer], None]) -> int:
        """The port of a listening external that plays a part."""
        return self.enter_context(Listener(part)).port
