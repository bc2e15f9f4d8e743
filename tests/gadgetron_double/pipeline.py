"""A Gadgetron configuration as the double understands it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias
from xml.etree import ElementTree

from tests.gadgetron_double.framing import ACQUISITION, BUCKET, IMAGE, IMAGE_ARRAY, RECON_DATA, TEXT, WAVEFORM

DECLARATION: Final = b'<?xml version="1.0"?>\n'

CLASSES: Final = {
    "Acquisition": ACQUISITION,
    "Waveform": WAVEFORM,
    "Image": IMAGE,
    "Buffer": RECON_DATA,
    "IsmrmrdImageArray": IMAGE_ARRAY,
    "AcquisitionBucket": BUCKET,
    "Text": TEXT,
}


class ConfigurationError(ValueError):
    """A configuration that the server, or the double, cannot run."""


@dataclass(frozen=True, slots=True)
class Execute:
    module: str
    target: str
    kind: str


@dataclass(frozen=True, slots=True)
class Connect:
    address: str
    port: int


@dataclass(frozen=True, slots=True)
class External:
    """An external node; `configuration` is what its CONFIG message holds."""

    action: Execute | Connect
    configuration: bytes

    @property
    def name(self) -> str:
        if isinstance(self.action, Connect):
            return f"{self.action.address}:{self.action.port}"
        return f"{self.action.module}.{self.action.target}"


@dataclass(frozen=True, slots=True)
class Parallel:
    """Every message to every stream."""

    streams: tuple["tuple[Node, ...]", ...]


Node: TypeAlias = External | Parallel


@dataclass(frozen=True, slots=True)
class Pipeline:
    """What the client may send, what it gets, and the nodes between; `natives` are leading C++ gadgets."""

    readers: frozenset[int]
    writers: frozenset[int]
    natives: tuple[str, ...]
    nodes: tuple[Node, ...]


def parse_pipeline(content: str | bytes) -> Pipeline:
    """Raises `ConfigurationError` for what the server rejects, and for what the double has no code for."""
    try:
        root = ElementTree.fromstring(content)
    except ElementTree.ParseError as error:
        raise ConfigurationError(f"Failed to parse configuration: {error}") from None
    if root.tag != "configuration" or (root.findtext("version") or "").strip() != "2":
        raise ConfigurationError(f"the double has no gadgets for a <{root.tag}> that is not version 2")
    _check_properties(root)
    stream = root.find("stream")
    children = [] if stream is None else list(stream)
    count = next((number for number, child in enumerate(children) if child.tag != "gadget"), len(children))
    return Pipeline(
        readers=_identifiers(root, "reader"),
        writers=_identifiers(root, "writer"),
        natives=tuple(child.findtext("classname") or "" for child in children[:count]),
        nodes=tuple(map(_node, children[count:])),
    )


def reserialised(element: ElementTree.Element | None) -> bytes:
    """An external's configuration as it arrives: comments dropped, indented with tabs."""
    if element is None:
        return DECLARATION
    copy = ElementTree.fromstring(ElementTree.tostring(element))
    copy.tail = None
    ElementTree.indent(copy, "\t")
    return DECLARATION + ElementTree.tostring(copy, encoding="utf-8") + b"\n"


def execute(module: str, target: str = "gadget", configuration: str | None = None) -> str:
    """The XML of an external that the server starts."""
    return _external(f'<execute name="{module}" target="{target}" type="python"/>', configuration)


def connect(port: int, configuration: str | None = None) -> str:
    """The XML of an external that listens."""
    return _external(f'<connect port="{port}"/>', configuration)


def pipeline(
    *nodes: str, readers: Sequence[str] = ("Acquisition", "Waveform"), writers: Sequence[str] = ("Image",)
) -> str:
    """The XML of a configuration; without a reader or a writer the server loses that kind of message."""
    listed = {
        role: "".join(
            f"<{role}><dll>gadgetron_core_{role}s</dll><classname>{name}{role.title()}</classname></{role}>"
            for name in names
        )
        for role, names in (("reader", readers), ("writer", writers))
    }
    return (
        f"<configuration><version>2</version><readers>{listed['reader']}</readers>"
        f"<writers>{listed['writer']}</writers><stream>{''.join(nodes)}</stream></configuration>"
    )


def _external(action: str, configuration: str | None) -> str:
    given = "" if configuration is None else f"<configuration>{configuration}</configuration>"
    return f"<external>{action}{given}</external>"


def _identifiers(root: ElementTree.Element, role: str) -> frozenset[int]:
    names = [node.findtext("classname") or "" for node in root.iterfind(f"{role}s/{role}")]
    try:
        return frozenset(CLASSES[name.removesuffix(role.title())] for name in names)
    except KeyError as error:
        raise ConfigurationError(f"the double has no {role} {error}") from None


def _node(element: ElementTree.Element) -> Node:
    if element.tag == "external":
        return _parse_external(element)
    if element.tag == "parallel":
        return Parallel(tuple(tuple(map(_node, stream)) for stream in element.iterfind("stream")))
    name = element.findtext("classname") or ""
    raise ConfigurationError(f"the double cannot run <{element.tag}> {name}".strip())


def _parse_external(element: ElementTree.Element) -> External:
    configuration = reserialised(element.find("configuration"))
    if (action := element.find("execute")) is not None:
        if (kind := action.get("type", "").lower()) != "python":
            # the server knows matlab as well, the double does not
            raise ConfigurationError("map::at")
        found = Execute(action.get("name", ""), action.get("target", ""), kind)
        return External(found, configuration)
    if (action := element.find("connect")) is not None:
        return External(Connect(action.get("address", "localhost"), int(action.get("port", "0"))), configuration)
    raise ConfigurationError("an <external> has neither <execute> nor <connect>")


def _check_properties(root: ElementTree.Element) -> None:
    """Properties are read everywhere, an external's own configuration included; `@` refers to another one's."""
    for node in root.iter():
        properties = node.findall("property")
        for found in properties:
            if found.get("name") is None or found.get("value") is None:
                text = ElementTree.tostring(found, encoding="unicode").strip()
                raise ConfigurationError(f"Unable to parse property {text}")
        if node.find("name") is not None and any("@" in found.get("value", "") for found in properties):
            raise ConfigurationError("map::at")
