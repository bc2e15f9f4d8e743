"""One node of a chain at its connection: configuration and header in, a gadget built, items through it."""

import logging
import re
from typing import Any
from xml.etree.ElementTree import Element

import defusedxml.ElementTree
from defusedxml.common import DefusedXmlException

from voxelsigma.formats.header import parse_header
from voxelsigma.gadgets.chaining import build
from voxelsigma.gadgets.context import Context, Gadget
from voxelsigma.gadgets.external import Incoming, items_of
from voxelsigma.gadgets.outgoing import Outgoing
from voxelsigma.gadgets.registry import GADGETS

logger = logging.getLogger("voxelsigma.node")


def parse_configuration(xml: bytes) -> Element:
    """The `<configuration>` of a node, entities off.

    Raises
    ------
    ValueError
        If it is not well-formed, or brings a document type or entities.
    """
    # a node that has none is sent a declaration with nothing behind it
    if not re.sub(rb"^\s*<\?xml[^>]*\?>", b"", xml).strip(b"\0 \r\n\t"):
        return Element("configuration")
    try:
        root: Element = defusedxml.ElementTree.fromstring(xml.rstrip(b"\0"), forbid_dtd=True)
    except DefusedXmlException as error:
        raise ValueError(f"configuration: document types and entities are refused ({error})") from None
    except SyntaxError as error:
        raise ValueError(f"configuration: not well-formed XML ({error})") from None
    return root


def converse(gadget: Gadget, source: Incoming, send: Outgoing, first: Any = None) -> None:
    """Items of a connection through a gadget, and what it makes of them back.

    Parameters
    ----------
    gadget
        What to run.
    source, send
        The two directions of the connection.
    first
        A message that was taken from the source already.
    """
    messages = source.messages(first)
    for item in gadget(items_of(messages)):
        send(item)
    # a gadget may have enough before the end; whether the stream was whole is known only there
    for _ in messages:
        pass


def run_node(name: str, configuration: bytes, header: bytes, source: Incoming, send: Outgoing) -> None:
    """Build a gadget by its name and run it on a connection."""
    context = Context(header=parse_header(header))
    converse(build(name, parse_configuration(configuration), context), source, send)


def described(error: BaseException, node: str) -> str:
    """What went wrong, and in which gadget of a node.

    Libraries' errors do not say whose they are: the innermost gadget that an error came through tells it. What came
    from a gadget's input is not its own.
    """
    kind = type(error).__name__
    text = str(error)
    if not text or isinstance(error, KeyError):
        text = f"{kind}: {text}".rstrip(": ")
    gadgets = {entry.module: name for name, entry in GADGETS.items()}
    found, trace = "", error.__traceback__
    while trace is not None:
        module = trace.tb_frame.f_globals.get("__name__", "")
        found = "" if module == items_of.__module__ else gadgets.get(module, found)
        trace = trace.tb_next
    return f"{found}: {text}" if found not in ("", node) and not text.startswith(f"{found}:") else text
