"""Checks of hyperparameters, each refused with one line that names the objective and the field."""

from collections.abc import Sequence
from typing import Any


def is_number(value: Any) -> bool:
    """Whether a value is a real number; True and False are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_number(owner: str, name: str, value: Any, low: float, high: float = float("inf")) -> None:
    """Refuse what is not a number from `low` to `high`.

    Raises
    ------
    ValueError
        The value is not a number, not finite, or out of range.
    """
    wanted = f"from {low:g} to {high:g}" if high < float("inf") else f"of at least {low:g}"
    if not is_number(value) or not low <= value <= high or value == float("inf"):
        raise ValueError(f"{owner}: {name} must be a number {wanted}, got {value!r}")


def check_whole(owner: str, name: str, value: Any, low: int) -> None:
    """Refuse what is not a whole number of at least `low`.

    Raises
    ------
    ValueError
        The value is not a whole number, or too small.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{owner}: {name} must be a whole number of at least {low}, got {value!r}")


def check_range(owner: str, name: str, value: Any) -> None:
    """Refuse what is not a pair of finite numbers `(low, high)`, 0 <= low <= high.

    Raises
    ------
    ValueError
        The value is not such a pair.
    """
    good = isinstance(value, tuple) and len(value) == 2 and all(map(is_number, value))
    if not good or not 0 <= value[0] <= value[1] < float("inf"):
        raise ValueError(f"{owner}: {name} must be two numbers (low, high) with 0 <= low <= high, got {value!r}")


def check_choice(owner: str, name: str, value: Any, known: Sequence[Any]) -> None:
    """Refuse what is not one of the known values.

    Raises
    ------
    ValueError
        The value is not among them.
    """
    # True == 1, but neither stands for the other
    if not any(type(value) is type(choice) and value == choice for choice in known):
        raise ValueError(f"{owner}: {name} must be one of {', '.join(map(repr, known))}, got {value!r}")
