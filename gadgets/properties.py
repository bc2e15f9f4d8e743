"""Gadget properties: strings from XML, checked once into frozen dataclasses."""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, TypeVar

Values = TypeVar("Values")

SIDECARS = ("covariance", "kspace", "sensitivities")


@dataclass(frozen=True, slots=True)
class _Rule:
    """How a property's text becomes a value."""

    parse: Callable[[str], Any]
    valid: str


def integer(default: int | None, low: int, high: int) -> Any:
    """An integer property from `low` to `high`; `default` None means it may be absent."""

    def parse(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise ValueError
        return value

    return _property(default, parse, f"an integer from {low} to {high}")


def number(default: float | None, low: float, high: float) -> Any:
    """A finite number property from `low` to `high`."""

    def parse(text: str) -> float:
        value = float(text)
        if not low <= value <= high:
            raise ValueError
        return value

    return _property(default, parse, f"a number from {low:g} to {high:g}")


def boolean(default: bool) -> Any:
    """A property that is true or false."""

    def parse(text: str) -> bool:
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()]

    return _property(default, parse, "true or false")


def choice(default: str, *names: str) -> Any:
    """A property that is one of some names."""

    def parse(text: str) -> str:
        if text not in names:
            raise ValueError
        return text

    return _property(default, parse, f"one of {', '.join(names)}")


def several(default: tuple[str, ...], *names: str) -> Any:
    """A property that lists some of some names, separated by blanks or commas."""

    def parse(text: str) -> tuple[str, ...]:
        listed = tuple(text.replace(",", " ").split())
        if not set(listed) <= set(names):
            raise ValueError
        return listed

    return _property(default, parse, f"any of {', '.join(names)}, separated by blanks")


def text(default: str) -> Any:
    """A property that is any text that is not empty."""

    def parse(value: str) -> str:
        if not value.strip():
            raise ValueError
        return value.strip()

    return _property(default, parse, "a text that is not empty")


def sidecars() -> Any:
    """The property `forward`: which sidecar items go on to the next gadget."""
    return several((), *SIDECARS)


def parse_properties(cls: type[Values], gadget: str, given: Mapping[str, str]) -> Values:
    """Check the properties of a gadget.

    Parameters
    ----------
    cls
        Frozen dataclass whose fields were made by the functions above.
    gadget
        The gadget's name, for messages.
    given
        Property texts by name.

    Raises
    ------
    ValueError
        For an unknown property or a bad value; names the gadget, the property, the value and what is valid.
    """
    known = {entry.name: entry for entry in fields(cls)}  # type: ignore[arg-type]  # any dataclass
    values = {}
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"{gadget}: unknown property {name!r}; known are {', '.join(sorted(known))}")
        rule: _Rule = known[name].metadata["rule"]
        try:
            values[name] = rule.parse(value)
        except (ValueError, KeyError):
            raise ValueError(f"{gadget}: property {name!r} must be {rule.valid}, got {value!r}") from None
    return cls(**values)


def _property(default: Any, parse: Callable[[str], Any], valid: str) -> Any:
    assert default is not MISSING
    return field(default=default, metadata={"rule": _Rule(parse, valid)})
