"""What a client may ask of a server: a pipeline by its name, or its XML where that is allowed, and parameters."""

import copy
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final
from xml.etree.ElementTree import Element, SubElement

from voxelsigma.gadgets.registry import GADGETS
from voxelsigma.hosts.pipeline import OWN_PREFIX, PIPELINE_FOLDER, External, Node, Pipeline, parse_pipeline

logger = logging.getLogger("voxelsigma.server")

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_LEGACY: Final = "gadgetronStreamConfiguration"

MAX_PARAMETERS: Final = 256 * 2**10


def named_pipeline(name: str, folders: Sequence[Path]) -> Pipeline:
    """The pipeline of a name, from the first of some folders that has it, then from those shipped.

    Raises
    ------
    ValueError
        If the name is no plain file name.
    FileNotFoundError
        If no folder has it; the text lists what there is.
    """
    if not _NAME.fullmatch(name) or ".." in name:
        raise ValueError(f"pipeline {name[:200]!r}: expected a plain file name, without '/' or '..'")
    wanted = name if name.endswith(".xml") else f"{name}.xml"
    for folder in (*folders, PIPELINE_FOLDER):
        path = folder / wanted
        if path.is_file():
            return parse_pipeline(path.read_bytes(), wanted)
    known = sorted({path.name for folder in (*folders, PIPELINE_FOLDER) for path in folder.glob("*.xml")})
    raise FileNotFoundError(f"pipeline {name!r}: there is none of that name; there are {', '.join(known)}")


def sent_pipeline(xml: bytes) -> Pipeline:
    """A pipeline that a client sends, which may hold our own gadgets only and name no files.

    Raises
    ------
    ValueError
        If it holds anything else.
    """
    found = parse_pipeline(xml, "the configuration sent")
    for node in found.nodes:
        if not isinstance(node, External) or not node.module.startswith(OWN_PREFIX):
            named = node.module if isinstance(node, External) else type(node).__name__
            raise ValueError(f"{found.source}: the node {named!r} is refused; a client may use voxelsigma.gadgets only")
        for element in node.configuration.iter("property"):
            _check_value(element.get("name") or "", element.get("value") or "")
    return found


def is_noise_query(xml: bytes) -> bool:
    """Whether a configuration is the stock client's question for stored noise: a legacy script with one gadget."""
    return _LEGACY.encode() in xml and b"NoiseSummaryGadget" in xml


def parameters_of(text: str) -> dict[str, Any]:
    """The parameters of a JSON text as FIRE clients send it; empty if it is none.

    A JSON text is an object whose `parameters` hold the values; any other text is logged and otherwise ignored.

    Raises
    ------
    ValueError
        If it is an object of more than 256 KiB.
    """
    if len(text) > MAX_PARAMETERS and text.lstrip().startswith("{"):
        raise ValueError(f"parameters: a JSON text of {len(text)} characters; at most {MAX_PARAMETERS} are accepted")
    try:
        # halves of characters, which JSON can spell, have no bytes: no log could be written
        found = json.loads(json.dumps(json.loads(text), ensure_ascii=False).encode(errors="replace"))
    except (ValueError, RecursionError):
        logger.info("text from the client: %s", text[:1000])
        return {}
    values = found.get("parameters", {}) if isinstance(found, dict) else {}
    return dict(values) if isinstance(values, dict) else {}


def with_parameters(pipeline: Pipeline, parameters: Mapping[str, Any]) -> Pipeline:
    """A pipeline with properties of its gadgets set by parameters called `GADGET.PROPERTY` or `GADGET_PROPERTY`.

    Parameters that name no gadget of ours are the console's own: they are logged and otherwise ignored.

    Raises
    ------
    ValueError
        If a parameter names a gadget that the pipeline does not have, or its value names a file.
    """
    pipeline = replace(pipeline, nodes=tuple(map(_copied, pipeline.nodes)))
    for name, value in parameters.items():
        parts = _gadget_and_property(name)
        if parts is None:
            if name != "config":
                logger.info("parameter %r is not for a gadget: ignored", name)
            continue
        text = str(value).lower() if isinstance(value, bool) else str(value)
        _check_value(name, text)
        _set_property(pipeline, *parts, text)
    return pipeline


def _copied(node: Node) -> Node:
    return replace(node, configuration=copy.deepcopy(node.configuration)) if isinstance(node, External) else node


def _gadget_and_property(name: str) -> tuple[str, str] | None:
    for gadget in sorted(GADGETS, key=len, reverse=True):
        for separator in "._":
            if name.startswith(gadget + separator):
                return gadget, name[len(gadget) + 1 :]
    return None


def _set_property(pipeline: Pipeline, gadget: str, name: str, value: str) -> None:
    elements = [
        element for node in pipeline.nodes if isinstance(node, External) for element in _elements_of(gadget, node)
    ]
    for element in elements:
        for old in [child for child in element.findall("property") if child.get("name") == name]:
            element.remove(old)
        SubElement(element, "property", {"name": name, "value": value})
    if not elements:
        raise ValueError(f"parameter '{gadget}.{name}': {pipeline.source} has no gadget {gadget!r}")


def _elements_of(gadget: str, node: External) -> Iterator[Element]:
    """Where the properties of a gadget stand in a node's configuration."""
    if node.module == OWN_PREFIX + gadget:
        yield node.configuration
    elif node.module == f"{OWN_PREFIX}chain":
        yield from (element for element in node.configuration.findall("gadget") if element.get("name") == gadget)


def _check_value(name: str, value: str) -> None:
    """Refuse what could be a path: a client must not make the server read its files."""
    path = "/" in value or "\\" in value or ".." in value or "\0" in value
    # in the server's own folder a file needs no slash
    if path or name.endswith("noise_file") or value.strip().lower().endswith((".yaml", ".yml")):
        raise ValueError(f"parameter {name!r}: {value[:200]!r} is refused; a client may not name files of the server")
