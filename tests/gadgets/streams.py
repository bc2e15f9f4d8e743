"""Items through chains and over the wire, in process."""

import io
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from voxelsigma.formats.header import parse_header
from voxelsigma.gadgets.chaining import GadgetSpec, chain
from voxelsigma.gadgets.context import Context
from voxelsigma.gadgets.external import items_of
from voxelsigma.gadgets.wire import CONFIG, HEADER, Close, Reader, close_message, message, read_message, read_text
from voxelsigma.gadgets.wire_items import to_wire

Gadgets = tuple[tuple[str, dict[str, str]], ...]


def through(context: Context, items: Iterable[Any], gadgets: Gadgets) -> list[Any]:
    return list(chain([GadgetSpec(name, properties) for name, properties in gadgets], context)(iter(items)))


def parsed(content: bytes) -> list[Any]:
    """Items of the messages in some bytes, up to their CLOSE."""
    reader = Reader(io.BytesIO(content).read)
    return list(items_of(itertools.takewhile(lambda found: not isinstance(found, Close), messages(reader))))


def messages(reader: Reader) -> Iterator[Any]:
    while True:
        yield read_message(reader)


def over_the_wire(*items: Any) -> list[Any]:
    """Items as they arrive in another process."""
    return parsed(b"".join(message(part) for item in items for part in to_wire(item)) + close_message())


def recording(path: Path) -> tuple[Context, list[Any]]:
    """The scan and the items that a server sent."""
    content = path.read_bytes()
    reader = Reader(io.BytesIO(content).read)
    read_text(reader, CONFIG, "a configuration")
    header = read_text(reader, HEADER, "a header")
    return Context(header=parse_header(header)), parsed(content[reader.total :])
