"""The gadget `accumulate`: `<execute name="voxelsigma.gadgets.accumulate" target="gadget" type="python"/>`."""

from typing import Any


def gadget(connection: Any) -> None:
    """Serve one connection of Gadgetron's `external` node."""
    from voxelsigma.gadgets.entry import run

    run(connection, "accumulate")
