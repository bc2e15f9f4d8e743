"""One recorded operation, and the rule that pushes tangents through it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from voxelsigma.noise.tape_lowering import Lowering, is_lowered

Push: TypeAlias = Callable[[Sequence[Tensor], Sequence[bool]], Any]
"""From the tangents of the dependent arguments, each `(probes, *shape)`, to those of the outputs.

The second argument says which tangents nobody needs afterwards: they may be overwritten.
"""


Shift: TypeAlias = tuple[tuple[int, int, int], ...]
"""A cyclic shift of an image: axis counted from the end, places to go forward, length of the axis."""


@dataclass(frozen=True, slots=True)
class Scale:
    """A product with a constant.

    Parameters
    ----------
    factor
        The constant, broadcastable to `shape`.
    before
        Shape of the value that is multiplied.
    shape, dtype
        Of the product.
    """

    factor: Tensor
    before: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Rule:
    """How one operation pushes tangents.

    Parameters
    ----------
    push
        The operation's derivative at the recorded point.
    view
        Whether an output may share memory with an input.
    fallback
        Whether the operation is evaluated again for every push, for want of a rule of its own.
    supplies
        How many of the differentiable outputs get a tangent, from the first; None for all.
    lowering
        What a replay with lowered convolutions does here.
    shift
        The cyclic shift that the operation is, if it is one.
    scale
        The product with a constant that the operation is, if it is one.
    sums
        Axes, counted from the end, over which it sums or averages, if that is what it does.
    """

    push: Push
    view: bool = False
    fallback: bool = False
    supplies: int | None = None
    lowering: Lowering = "exact"
    shift: Shift | None = None
    scale: Scale | None = None
    sums: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Dependent:
    """An argument that depends on the input: its name, its place in a list (None if it is no list), its value."""

    name: str
    index: int | None
    primal: Tensor


@dataclass(frozen=True, slots=True)
class Call:
    """An operation as it was called.

    Parameters
    ----------
    func
        The aten operation.
    arguments
        By name, defaults filled in.
    dependents
        The arguments that depend on the input.
    outputs
        All tensors that came out, in order.
    """

    func: Any
    arguments: dict[str, Any]
    dependents: tuple[Dependent, ...]
    outputs: tuple[Tensor, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the dependent arguments."""
        return tuple(dependent.name for dependent in self.dependents)

    def constant(self, name: str) -> Any:
        """An argument that must not depend on the input."""
        if name in self.names:
            raise NotImplementedError(f"{self.func}: argument '{name}' depends on the input")
        return self.arguments[name]

    def keep(self, name: str) -> Any:
        """An argument for a rule to keep: a dependent value is copied, for the caller may yet write into it."""
        value = self.arguments[name]
        return value.detach().clone() if name in self.names and isinstance(value, Tensor) else value

    def copied(self) -> "Call":
        """The same call, of copies of all its tensors."""
        arguments = {name: _copy(value) for name, value in self.arguments.items()}
        dependents = []
        for dependent in self.dependents:
            value = arguments[dependent.name]
            dependents.append(Dependent(dependent.name, dependent.index, _member(value, dependent.index)))
        return Call(self.func, arguments, tuple(dependents), tuple(_copy(list(self.outputs))))

    def run(self, values: Sequence[Any], **others: Any) -> Any:
        """Call the operation with other values for the dependent arguments (and for some others, by name)."""
        arguments = self.arguments | others
        for dependent, value in zip(self.dependents, values, strict=True):
            if dependent.index is None:
                arguments[dependent.name] = value
            else:
                items = list(arguments[dependent.name])
                items[dependent.index] = value
                arguments[dependent.name] = items
        return invoke(self.func, arguments)

    def without_primals(self) -> "Call":
        """The same call with the dependent values forgotten, so that they need not be kept."""
        arguments = dict(self.arguments)
        for dependent in self.dependents:
            if dependent.index is None:
                arguments[dependent.name] = None
            else:
                items = list(arguments[dependent.name])
                items[dependent.index] = None
                arguments[dependent.name] = items
        empty = torch.empty(0)
        dependents = tuple(Dependent(dependent.name, dependent.index, empty) for dependent in self.dependents)
        return Call(self.func, arguments, dependents, ())


def bind(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of an aten operation by name, defaults filled in."""
    bound: dict[str, Any] = {}
    for position, argument in enumerate(func._schema.arguments):
        if position < len(args):
            bound[argument.name] = args[position]
        elif argument.name in kwargs:
            bound[argument.name] = kwargs[argument.name]
        else:
            bound[argument.name] = argument.default_value
    return bound


def invoke(func: Any, arguments: dict[str, Any]) -> Any:
    """Call an aten operation with arguments by name."""
    schema = func._schema.arguments
    positional = [arguments[argument.name] for argument in schema if not argument.kwarg_only]
    named = {argument.name: arguments[argument.name] for argument in schema if argument.kwarg_only}
    return func(*positional, **named)


def tensors_of(outputs: Any) -> tuple[Tensor, ...]:
    """All tensors among the outputs of an operation, in order."""
    if isinstance(outputs, Tensor):
        return (outputs,)
    if isinstance(outputs, (list, tuple)):
        return tuple(tensor for item in outputs for tensor in tensors_of(item))
    return ()


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return [_copy(item) for item in value] if isinstance(value, (list, tuple)) else value


def _member(value: Any, index: int | None) -> Tensor:
    return value if index is None else value[index]


def differentiable(tensor: Tensor) -> bool:
    """Whether a tensor can carry a tangent."""
    return tensor.is_floating_point() or tensor.is_complex()


class Factor:
    """A constant tensor that multiplies tangents, kept in whatever memory order these turn out to have."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor.detach().resolve_conj().resolve_neg()
        self._lowered: Tensor | None = None

    @property
    def tensor(self) -> Tensor:
        """The constant."""
        return self._tensor

    def beside(self, tangent: Tensor) -> Tensor:
        """The constant, for a tangent `(probes, *shape)`, broadcastable to it."""
        kept = self._tensor
        if kept.shape == tangent.shape[1:] and kept.stride() != tangent.stride()[1:]:
            order = _order(tangent.stride()[1:], tangent.shape[1:])
            if order != _order(kept.stride(), kept.shape):
                kept = torch.empty_permuted(kept.shape, order, dtype=kept.dtype, device=kept.device).copy_(kept)
                self._tensor = kept
        if kept.dim() == 0 or kept.dtype != torch.float32 or not is_lowered(tangent):
            return kept
        # lest the product be widened again
        if self._lowered is None or self._lowered.stride() != kept.stride():
            self._lowered = kept.to(torch.bfloat16)
        return self._lowered


def _order(strides: Sequence[int], shape: Sequence[int]) -> list[int]:
    """Axes from the slowest in memory to the fastest; axes of length 1 stay in front."""
    return sorted(range(len(strides)), key=lambda axis: (shape[axis] != 1, -strides[axis], axis))


def lift(tangent: Tensor, ndim: int) -> Tensor:
    """Insert axes of length 1 after the probes, so that a tangent broadcasts like a value of `ndim` axes."""
    missing = ndim + 1 - tangent.dim()
    return tangent if missing <= 0 else tangent.reshape(tangent.shape[0], *(1,) * missing, *tangent.shape[1:])


def writable(tangent: Tensor, free: bool, shape: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether the result, of this shape without probes, may be written over a tangent."""
    return (
        free
        and (tangent.dtype == dtype or is_lowered(tangent))
        and tangent.shape[1:] == torch.Size(shape)
        and not tangent.is_conj()
        and not tangent.is_neg()
        and all(stride != 0 or size == 1 for stride, size in zip(tangent.stride(), tangent.shape, strict=True))
    )
