"""Several gadgets in one process, one after the other."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from voxelsigma.gadgets.context import Context, Gadget
from voxelsigma.gadgets.items import Stream
from voxelsigma.gadgets.registry import create, entry_of


@dataclass(frozen=True, slots=True)
class GadgetSpec:
    """A gadget as a configuration lists it: its name and the texts of its properties."""

    name: str
    properties: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Chain:
    """Function composition of gadgets."""

    gadgets: tuple[Gadget, ...]

    def __call__(self, items: Stream) -> Stream:
        """Items through all gadgets in order."""
        for gadget in self.gadgets:
            items = gadget(items)
        return items


def chain(specs: list[GadgetSpec], context: Context) -> Chain:
    """Build a chain; what a gadget must forward follows from those behind it.

    Raises
    ------
    ValueError
        If the list is empty, a gadget is unknown, or a property is unknown or bad.
    """
    if not specs:
        raise ValueError('chain: its configuration lists no gadget; expected <gadget name="…"/> elements')
    wanted = [_wanted_behind(specs[number + 1 :]) for number in range(len(specs))]
    built = []
    for number, (spec, behind) in enumerate(zip(specs, wanted, strict=True)):
        entry_of(spec.name)
        properties = dict(spec.properties)
        names = [*properties.get("forward", "").replace(",", " ").split(), *behind]
        if spec.name == "reconstruct" and any(later.name == "sketch" for later in specs[number + 1 :]):
            names.append("linearization")
        if names:
            properties["forward"] = " ".join(sorted(set(names)))
        built.append(create(spec.name, properties, context))
    return Chain(tuple(built))


def specs_of(configuration: Element) -> list[GadgetSpec]:
    """The gadgets that a chain's `<configuration>` lists as `<gadget name="…"><property name="…" value="…"/>`.

    Raises
    ------
    ValueError
        For an element that does not belong there or lacks its name or value.
    """
    specs = []
    for element in configuration:
        name = element.get("name")
        if element.tag != "gadget" or not name:
            raise ValueError(f'chain: unexpected <{element.tag}>; expected <gadget name="…"> elements')
        specs.append(GadgetSpec(name, properties_of(element, name)))
    return specs


def properties_of(element: Element, gadget: str) -> dict[str, str]:
    """Texts of the `<property name="…" value="…"/>` children.

    Raises
    ------
    ValueError
        For another child, a property without name or value, or one given twice.
    """
    found: dict[str, str] = {}
    for child in element:
        name, value = child.get("name"), child.get("value")
        if child.tag != "property" or not name or value is None:
            raise ValueError(f'{gadget}: unexpected <{child.tag}>; expected <property name="…" value="…"/>')
        if name in found:
            raise ValueError(f"{gadget}: property {name!r} is given twice")
        found[name] = value
    return found


def build(name: str, configuration: Element, context: Context) -> Gadget:
    """A gadget or chain from the name in its `execute` element and its `<configuration>`."""
    if name == "chain":
        return chain(specs_of(configuration), context)
    return create(name, properties_of(configuration, name), context)


def _wanted_behind(specs: list[GadgetSpec]) -> Iterator[str]:
    """Sidecars that later gadgets need."""
    return (need for spec in specs for need in entry_of(spec.name).needs)
