"""What a process holds in memory, kept from growing by holes between its blocks."""

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch

_GROWTH: Final = 1.005
# the first steps leave more holes than all others: what they meet was left by other work
_SETTLING: Final = 2


class FlatHeap:
    """Gives free memory back to the system when the steps of a loop make the process grow.

    Blocks of changing sizes leave holes in the C library's heap into which the next ones do not fit, so that a loop
    that keeps nothing grows nevertheless, by several percent in a thousand steps. To return what is free costs a page
    fault for each page that is used again; so it is done once after the first two steps, and from then on only when
    the process has grown beyond what it held after these.

    Parameters
    ----------
    device
        Where the steps compute. Elsewhere than on the CPU nothing is done, nor with a C library that cannot trim or a
        system that does not say what a process holds.
    held
        Bytes that the process holds; None asks the system.
    trim
        Returns what is free; None takes the C library's.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        held: Callable[[], int | None] | None = None,
        trim: Callable[[], None] | None = None,
    ) -> None:
        self._held = held or _anonymous_bytes
        self._trim = (trim or _c_trim()) if device.type == "cpu" else None
        self._steps = 0
        self._settled = 0

    def before_step(self) -> None:
        """Called before every step of the loop, the first one too."""
        if self._trim is None:
            return
        done, self._steps = self._steps, self._steps + 1
        found = self._held() if done > 0 else None
        if found is None:
            return
        if done <= _SETTLING:
            self._settled = max(self._settled, found)
        if done == _SETTLING or found > _GROWTH * self._settled:
            self._trim()
            # what is left is not free, so it is no holes that made it grow
            self._settled = max(self._settled, self._held() or 0)


def _anonymous_bytes() -> int | None:
    """Memory of this process that no file stands behind; None where the system does not say."""
    try:
        with Path("/proc/self/statm").open(encoding="ascii") as file:
            resident, shared = (int(number) for number in file.read().split()[1:3])
    except (OSError, ValueError):
        return None
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def _c_trim() -> Callable[[], None] | None:
    """The C library's way to return free memory, where it has one."""
    try:
        function = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None
    function.argtypes = [ctypes.c_size_t]

    def trim() -> None:
        function(0)

    return trim
