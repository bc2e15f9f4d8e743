"""Which value a piece of memory holds, as a program writes into it and looks at it through views."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from voxelsigma.noise.tape_call import Push, Rule


@dataclass(frozen=True, slots=True)
class Layout:
    """How a tensor lies in its memory, counted in real numbers; a complex one has an axis of 2 behind the others."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @property
    def simple(self) -> bool:
        """Whether the numbers lie as in a fresh tensor."""
        count, expected = 1, []
        for size in reversed(self.size):
            expected.append(count)
            count *= size
        return self.offset == 0 and tuple(reversed(expected)) == self.stride


@dataclass(frozen=True, slots=True)
class Content:
    """What a piece of memory holds.

    Parameters
    ----------
    slot
        Number of the value; None for a constant, negative for one that nobody knows.
    layout
        How the value lies in all of the memory.
    version
        How often it was written into.
    memory
        The memory itself; a weak reference keeps its address from being used again.
    """

    slot: int | None
    layout: Layout
    version: int
    memory: StorageWeakRef


def address(tensor: Tensor) -> int:
    """Where a tensor's memory is; 0 for tensors of other kinds."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return 0


def layout_of(tensor: Tensor) -> Layout:
    """The layout of a tensor."""
    if not tensor.is_complex():
        return Layout(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()), tensor.dtype)
    stride = (*(2 * step for step in tensor.stride()), 1)
    return Layout((*tensor.shape, 2), stride, 2 * int(tensor.storage_offset()), tensor.dtype.to_real())


def fills_memory(tensor: Tensor) -> bool:
    """Whether a tensor takes all of its memory, each place once."""
    if tensor.numel() * tensor.element_size() != tensor.untyped_storage().nbytes():
        return False
    expected = 1
    steps = sorted(zip(tensor.stride(), tensor.shape, strict=True))
    for stride, size in steps:
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def flat_layout(tensor: Tensor) -> Layout:
    """All of a tensor's memory as one axis."""
    real = tensor.dtype.to_real() if tensor.is_complex() else tensor.dtype
    count = tensor.untyped_storage().nbytes() // real.itemsize
    return Layout((count,), (1,), 0, real)


def flattening(layout: Layout, count: int) -> Rule:
    """From the tangent of a tensor that fills its memory to that of the memory as one axis."""

    def push(tangents: Sequence[Tensor], free: Sequence[bool]) -> Tensor:
        tangent = _as_real(tangents[0])
        if layout.simple:
            return tangent.reshape(tangent.shape[0], count)
        flat = tangent.new_empty(tangent.shape[0], count)
        _seen(flat, layout).copy_(tangent)
        return flat

    return Rule(push, view=True)


def reading(layout: Layout, *, is_complex: bool) -> Rule:
    """From the tangent of all memory to that of a view."""

    def push(tangents: Sequence[Tensor], free: Sequence[bool]) -> Tensor:
        view = _seen(tangents[0].contiguous(), layout)
        return torch.view_as_complex(view) if is_complex else view

    return Rule(push, view=True)


def writing(layout: Layout, count: int, *, before: bool, after: bool) -> Rule:
    """From the tangents of all memory (if it has one) and of what is written through a view to that of all memory."""
    return Rule(_writing(layout, count, before, after), view=before)


def _writing(layout: Layout, count: int, before: bool, after: bool) -> Push:
    def push(tangents: Sequence[Tensor], free: Sequence[bool]) -> Tensor:
        written = _as_real(tangents[-1])
        if before:
            flat = tangents[0].contiguous() if free[0] else tangents[0].clone(memory_format=torch.contiguous_format)
        else:
            flat = written.new_zeros(written.shape[0], count, dtype=layout.dtype)
        view = _seen(flat, layout)
        if after:
            view.copy_(written)
        else:
            view.zero_()
        return flat

    return push


def _as_real(tangent: Tensor) -> Tensor:
    return torch.view_as_real(tangent.resolve_conj()) if tangent.is_complex() else tangent.resolve_neg()


def _seen(flat: Tensor, layout: Layout) -> Tensor:
    """A flat tangent `(probes, count)` through a view, `(probes, *size)`."""
    probes, count = flat.shape
    return flat.as_strided((probes, *layout.size), (count, *layout.stride), flat.storage_offset() + layout.offset)
