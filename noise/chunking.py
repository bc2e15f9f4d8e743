"""How many tangents to push at a time."""

import os

import torch

from voxelsigma.noise.linearize import Linearization

# measured: on a CPU larger batches are no faster (they leave the caches); a GPU wants to be filled
_MOST = {"cpu": 8, "cuda": 64}
# of the free memory: others need some, and an allocator cannot use all of it
_SHARE = 0.5
_UNKNOWN_BYTES = 2**28


def default_chunk(
    linearization: Linearization | int, *, free_memory: int | None = None, device: torch.device | None = None
) -> int:
    r"""Choose the number of tangents of one push from the memory that they need.

    .. math:: \min\left(C, \max\left(1, \lfloor F / (2 B) \rfloor\right)\right)

    for `F` free bytes, `B` bytes a tangent, and the number C from which on a larger batch is no faster: 8 on a CPU,
    64 on a GPU.

    Parameters
    ----------
    linearization
        What will be pushed through; or the bytes that one tangent needs on its way.
    free_memory
        Bytes; None asks the device.
    device
        Where; None for the device of the linearization's value, or the CPU.

    Raises
    ------
    ValueError
        If a size is negative.
    """
    if isinstance(linearization, Linearization):
        device = linearization.value.device if device is None else device
        needed = linearization.probe_bytes or _UNKNOWN_BYTES
    else:
        needed = linearization
    if needed <= 0:
        raise ValueError(f"default_chunk: a tangent needs {needed} bytes; expected a positive number")
    device = torch.device("cpu") if device is None else device
    free = _free_memory(device) if free_memory is None else free_memory
    if free < 0:
        raise ValueError(f"default_chunk: free_memory is {free}; expected bytes, at least 0")
    return min(_MOST.get(device.type, 1), max(1, int(free * _SHARE) // needed))


def _free_memory(device: torch.device) -> int:
    """Free bytes of a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        # this system does not say
        return 4 * _UNKNOWN_BYTES
