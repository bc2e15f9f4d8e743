"""The embedded host: runs a Gadgetron pipeline with no Gadgetron at all."""

from collections.abc import Generator

from voxelsigma.gadgets.chaining import build
from voxelsigma.gadgets.context import Context
from voxelsigma.gadgets.items import Item, Stream
from voxelsigma.gadgets.registry import GADGETS
from voxelsigma.hosts.child import ChildNode
from voxelsigma.hosts.family import Family
from voxelsigma.hosts.pipeline import OWN_PREFIX, External, Listening, Native, Pipeline
from voxelsigma.hosts.remote import ConnectNode


def connect(
    pipeline: Pipeline, context: Context, items: Stream, *, in_process: bool = True
) -> Generator[Item, None, None]:
    """Run items through a pipeline.

    Our own externals run in this process; any other Python external runs as Gadgetron would run it, in a child process
    behind a socket.

    Parameters
    ----------
    pipeline
        What to run.
    context
        The scan.
    items
        What goes in.
    in_process
        False runs our own externals in child processes too, as a Gadgetron server does.

    Returns
    -------
        What comes out; close it where it is not read to its end.

    Raises
    ------
    ValueError
        For a C++ node, an unknown gadget of ours, or a bad property.
    """
    for node in pipeline.nodes:
        if isinstance(node, Native):
            named = f"{node.name} ({node.classname})" if node.name else node.classname
            raise ValueError(
                f"{pipeline.source}: the C++ gadget {named} needs a real Gadgetron server; "
                "the embedded host runs Python externals only"
            )
    family = Family()
    for node in pipeline.nodes:
        if isinstance(node, Listening):
            items = ConnectNode(node, context, family)(items)
            continue
        assert isinstance(node, External)
        own = _own_name(pipeline, node)
        if own is not None and in_process:
            items = build(own, node.configuration, context)(items)
        else:
            items = ChildNode(node, context, family)(items)
    return _supervised(items, family)


def _supervised(items: Stream, family: Family) -> Generator[Item, None, None]:
    """The same items; no child outlives them, however they end."""
    try:
        yield from items
    finally:
        family.end()


def _own_name(pipeline: Pipeline, node: External) -> str | None:
    """Name of one of our gadgets; None for a foreign module."""
    if not node.module.startswith(OWN_PREFIX):
        return None
    name = node.module.removeprefix(OWN_PREFIX)
    if name not in (*GADGETS, "chain") or node.target != "gadget":
        raise ValueError(
            f"{pipeline.source}: <execute name={node.module!r} target={node.target!r}> is no gadget of voxelsigma; "
            f"known are {', '.join(OWN_PREFIX + known for known in (*GADGETS, 'chain'))} with target 'gadget'"
        )
    return name
