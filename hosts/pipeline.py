"""Gadgetron XML pipelines, version 2: parsed with entities off, and checked."""

from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias
from xml.etree.ElementTree import Element

import defusedxml.ElementTree
from defusedxml.common import DefusedXmlException

import voxelsigma.pipelines
from voxelsigma.gadgets.chaining import GadgetSpec, properties_of, specs_of

OWN_PREFIX = "voxelsigma.gadgets."
PIPELINE_FOLDER = Path(voxelsigma.pipelines.__path__[0])
MAX_DEPTH = 32


@dataclass(frozen=True, slots=True)
class External:
    """An `<external>` node started by `<execute>`.

    Parameters
    ----------
    module, target
        What `python -m gadgetron` imports and calls.
    configuration
        Its `<configuration>` element.
    """

    module: str
    target: str
    configuration: Element


@dataclass(frozen=True, slots=True)
class Listening:
    """An `<external>` node that runs already and is reached by `<connect>`.

    Parameters
    ----------
    host, port
        Where it listens.
    configuration
        Its `<configuration>` element.
    """

    host: str
    port: int
    configuration: Element


@dataclass(frozen=True, slots=True)
class Native:
    """A C++ `<gadget>` node of Gadgetron."""

    name: str
    classname: str


Node: TypeAlias = External | Listening | Native


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A parsed pipeline.

    Parameters
    ----------
    source
        File or name, for messages.
    nodes
        Nodes of its stream, in order.
    """

    source: str
    nodes: tuple[Node, ...]


def shipped_pipelines() -> tuple[str, ...]:
    """File names of the pipelines that come with the package."""
    return tuple(sorted(path.name for path in PIPELINE_FOLDER.glob("*.xml")))


def load_pipeline(name: str) -> Pipeline:
    """Read a pipeline: a file's path, or the file name of one that is shipped.

    Raises
    ------
    FileNotFoundError
        If there is neither; the text lists those shipped.
    ValueError
        If it is not a valid pipeline; the text names the file and the element.
    """
    path = Path(name)
    if not path.is_file():
        if path.name != name or name not in shipped_pipelines():
            raise FileNotFoundError(f"{name}: no such pipeline file; shipped are {', '.join(shipped_pipelines())}")
        path = PIPELINE_FOLDER / name
    return parse_pipeline(path.read_bytes(), str(path))


def gadgets_of(pipeline: Pipeline) -> list[GadgetSpec]:
    """The gadgets of ours that a pipeline lists, in order."""
    found: list[GadgetSpec] = []
    for node in pipeline.nodes:
        if isinstance(node, Listening) or (isinstance(node, External) and node.module == f"{OWN_PREFIX}chain"):
            found += specs_of(node.configuration)
        elif isinstance(node, External) and node.module.startswith(OWN_PREFIX):
            name = node.module.removeprefix(OWN_PREFIX)
            found.append(GadgetSpec(name, properties_of(node.configuration, name)))
    return found


def parse_pipeline(xml: bytes, source: str) -> Pipeline:
    """Parse a pipeline's XML.

    Raises
    ------
    ValueError
        If it is not well-formed, brings entities, is of the legacy format, or has a node that Gadgetron would not take.
    """
    try:
        root = defusedxml.ElementTree.fromstring(xml, forbid_dtd=True)
    except DefusedXmlException as error:
        raise ValueError(f"{source}: document types and entities are refused ({error})") from None
    except SyntaxError as error:
        raise ValueError(f"{source}: not well-formed XML ({error})") from None
    if _deeper(root, MAX_DEPTH):
        raise ValueError(f"{source}: elements are nested more than {MAX_DEPTH} deep")
    version = root.findtext("version")
    if root.tag != "configuration" or version is None or version.strip() != "2":
        found = f"<{root.tag}>" if root.tag != "configuration" else f"<version>{version}</version>"
        raise ValueError(
            f"{source}: expected <configuration><version>2</version>…, Gadgetron's version 2 format, got {found}"
        )
    stream = root.find("stream")
    if stream is None or not len(stream):
        raise ValueError(f"{source}: has no <stream> with nodes")
    return Pipeline(source=source, nodes=tuple(_node(element, source) for element in stream))


def _deeper(root: Element, limit: int) -> bool:
    """Whether elements are nested deeper than some limit; what recurses into such a tree would crash."""
    level = [root]
    for _ in range(limit):
        level = [child for element in level for child in element]
    return bool(level)


def _node(element: Element, source: str) -> Node:
    if element.tag == "gadget":
        return Native((element.findtext("name") or "").strip(), (element.findtext("classname") or "unnamed").strip())
    if element.tag != "external":
        raise ValueError(
            f"{source}: <{element.tag}> nodes run in a real Gadgetron server only; "
            "the embedded host runs <external> nodes"
        )
    execute = element.find("execute")
    if execute is None:
        return _listening(element, source)
    module, target, language = (execute.get(name) or "" for name in ("name", "target", "type"))
    if not module or not target:
        raise ValueError(f"{source}: <execute> needs the attributes name and target, got {dict(execute.attrib)}")
    if language.lower() != "python":
        raise ValueError(f"{source}: <execute name={module!r}> is of type {language!r}; only 'python' can be run")
    return External(module, target, _configuration(element))


def _listening(element: Element, source: str) -> Listening:
    connect = element.find("connect")
    if connect is None:
        raise ValueError(f"{source}: an <external> node with neither <execute> nor <connect>")
    port = connect.get("port") or ""
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"{source}: <connect port={port!r}>; expected a port from 1 to 65535")
    return Listening(connect.get("address") or "localhost", int(port), _configuration(element))


def _configuration(element: Element) -> Element:
    found = element.find("configuration")
    return Element("configuration") if found is None else found
