"""One finding of `voxelsigma doctor`."""

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Check:
    """Something that was looked at.

    Parameters
    ----------
    name
        What was looked at.
    ok
        Whether it is as it must be; None where that cannot be said, or does not apply.
    found
        What was found.
    remedy
        What to do about it, in one line; empty where nothing needs to be done.
    """

    name: str
    ok: bool | None
    found: str
    remedy: str = ""


def lines(checks: Iterable[Check]) -> list[str]:
    """A line for each check, its remedy behind an arrow."""
    marks = {True: "ok  ", False: "FAIL", None: "note"}
    return [
        f"{marks[check.ok]}  {check.name}: {' '.join(check.found.split())}"
        + (f" -> {check.remedy}" if check.remedy else "")
        for check in checks
    ]


def failed(checks: Iterable[Check]) -> bool:
    """Whether something must be put right."""
    return any(check.ok is False for check in checks)


def older(version: str, minimum: str) -> bool:
    """Whether a version is older than another; suffixes such as `+cpu` and `rc1` do not count."""
    return _numbers(version) < _numbers(minimum)


def _numbers(version: str) -> tuple[int, ...]:
    leading = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in leading.group().split(".")] if leading else []
    # 2.4 and 2.4.0 are the same
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
