"""Rules that push tangents through operations: the table, and how a rule is found.

A rule is a function of a recorded `Call`; it keeps what the derivative needs and returns a `Rule`. An operation
without an entry of its own that acts on each element alone gets its derivative from forward mode, once; any other is
evaluated again, with forward mode, for every push.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from voxelsigma.noise.tape_call import Call, Factor, Rule, differentiable, lift, tensors_of, writable

Builder = Callable[[Call], Rule]
RULES: dict[Any, Builder] = {}


# what stands between the convolutions of a network; not normalisations, whose means would be rounded
_KEEPING = {
    getattr(torch.ops.aten, name, None)
    for names in (
        "add sub neg mul relu leaky_relu gelu elu silu mish softplus hardtanh hardswish tanh sigmoid _prelu_kernel",
        "clamp clamp_min clamp_max where cat clone alias detach select slice unsqueeze squeeze transpose permute split",
        "narrow split_with_sizes unbind view _unsafe_view reshape expand constant_pad_nd reflection_pad2d",
        "replication_pad2d avg_pool2d avg_pool3d max_pool2d_with_indices max_pool3d_with_indices upsample_nearest2d",
        "upsample_bilinear2d pixel_shuffle pixel_unshuffle",
    )
    for name in names.split()
} - {None}


def rule(*names: str) -> Callable[[Builder], Builder]:
    """Register a rule for aten operations by name; names this version of torch does not know are skipped."""

    def register(builder: Builder) -> Builder:
        for name in names:
            packet = getattr(torch.ops.aten, name, None)
            if packet is not None:
                RULES[packet] = builder
        return builder

    return register


def at_once(call: Call) -> Rule | None:
    """The rule of a call from the table, None where it has no such rule."""
    builder = RULES.get(call.func.overloadpacket)
    if builder is None:
        return None
    try:
        found = builder(call)
    except (NotImplementedError, ValueError):
        # an unusual form of the operation
        return None
    return replace(found, lowering="keeps") if found.lowering == "exact" and _keeps(call) else found


def _keeps(call: Call) -> bool:
    """Whether an operation may work on lowered tangents: one of a network, on single precision."""
    tensors = [dependent.primal for dependent in call.dependents] + list(call.outputs[:1])
    return call.func.overloadpacket in _KEEPING and all(tensor.dtype == torch.float32 for tensor in tensors)


def by_forward_mode(call: Call) -> Rule:
    """The rule of a call that the table does not know; not to be asked for while operations are being watched.

    Raises
    ------
    NotImplementedError
        If torch knows no forward derivative of the operation.
    """
    if torch.Tag.pointwise in call.func.tags and len(call.outputs) == 1:
        return pointwise(call)
    return again(call)


def linear_in(call: Call, names: Sequence[str]) -> Rule:
    """Operations that are jointly linear in some arguments: the operation itself, with zeros for constants there."""
    if not set(call.names) <= set(names):
        raise NotImplementedError(f"{call.func} is not linear in {call.names}")
    others: dict[str, Any] = {}
    for name in names:
        value = call.arguments[name]
        if isinstance(value, Tensor):
            others[name] = torch.zeros_like(value)
        elif isinstance(value, (list, tuple)):
            others[name] = [torch.zeros_like(item) if isinstance(item, Tensor) else item for item in value]
        elif isinstance(value, (int, float, complex)):
            others[name] = 0
    bare = Call(call.func, call.arguments | others, call.dependents, ()).without_primals()
    batched = torch.vmap(lambda *tangents: bare.run(tangents))
    return Rule(lambda tangents, free: batched(*tangents), view=True)


def bilinear_in(call: Call, names: Sequence[str], **others: Any) -> Rule:
    """Operations linear in each of some arguments: the sum over these of the operation on its tangent."""
    if not set(call.names) <= set(names):
        raise NotImplementedError(f"{call.func} is not linear in {call.names}")
    alone = []
    kept = {name: call.keep(name) for name in call.names}
    for dependent in call.dependents:
        single = Call(call.func, call.arguments | kept | others, (dependent,), ()).without_primals()
        alone.append(torch.vmap(lambda tangent, single=single: single.run([tangent])))

    def push(tangents: Sequence[Tensor], free: Sequence[bool]) -> Tensor:
        total = alone[0](tangents[0])
        for part, tangent in zip(alone[1:], tangents[1:], strict=True):
            total = total + part(tangent)
        return total

    # a linear operation may be a view of its input
    return Rule(push, view=True)


def pointwise(call: Call) -> Rule:
    r"""Operations on each element alone: :math:`\sum_i (\partial f/\partial x_i) \, t_i`.

    A complex argument has two derivatives, along 1 and along i; where the second is i times the first, one factor
    serves.
    """
    out = call.outputs[0]
    parts = []
    for position, dependent in enumerate(call.dependents):
        along_one = _derivative(call, position, 1.0)
        turned = None
        if dependent.primal.is_complex():
            along_i = _derivative(call, position, 1j)
            if not (along_one.is_complex() and torch.equal(along_i, 1j * along_one)):
                turned = Factor(along_i)
        parts.append((Factor(along_one), turned))
    shape, dtype = out.shape, out.dtype

    def push(tangents: Sequence[Tensor], free: Sequence[bool]) -> Tensor:
        total: Tensor | None = None
        for tangent, spare, (first, second) in zip(tangents, free, parts, strict=True):
            if second is not None:
                lifted = lift(tangent, len(shape)).resolve_conj()
                real, imaginary = lifted.real, lifted.imag
                term = real * first.beside(real) + imaginary * second.beside(imaginary)
            else:
                term = scaled(tangent, first, spare, shape, dtype)
            total = term if total is None else total.add_(term)
        assert total is not None
        return total

    return Rule(push)


def scaled(tangent: Tensor, factor: Factor, free: bool, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tangent times a constant, in place where it may be; the result has `shape` after the probes."""
    tangent = lift(tangent, len(shape))
    constant = factor.beside(tangent)
    if writable(tangent, free, shape, dtype):
        return tangent.mul_(constant)
    result = tangent * constant
    if result.shape[1:] != torch.Size(shape):
        result = result.expand(tangent.shape[0], *shape).contiguous()
    return result


def again(call: Call) -> Rule:
    """Any operation: forward mode at the recorded values, for every push."""
    function, primals = _of_dependents(call), tuple(dependent.primal.detach() for dependent in call.dependents)
    # torch says here whether it knows the derivative at all
    _forward_mode(function, primals, tuple(torch.zeros_like(primal) for primal in primals))
    batched = torch.vmap(lambda *tangents: _forward_mode(function, primals, tangents))
    # an operation may hand on its input
    return Rule(lambda tangents, free: batched(*tangents), view=True, fallback=True)


def _derivative(call: Call, position: int, direction: complex) -> Tensor:
    """Derivative of an elementwise operation along one dependent argument, of the shape of its output."""
    dependent = call.dependents[position]
    alone = Call(call.func, call.arguments, (dependent,), call.outputs)
    value = direction if dependent.primal.is_complex() else float(direction.real)
    tangent = torch.full_like(dependent.primal, value)
    (derivative,) = _forward_mode(_of_dependents(alone), (dependent.primal.detach(),), (tangent,))
    return derivative


def _of_dependents(call: Call) -> Callable[..., tuple[Tensor, ...]]:
    """The operation as a function of its dependent arguments alone, differentiable outputs only."""
    bare = call.without_primals()

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor for tensor in tensors_of(bare.run(values)) if differentiable(tensor))

    return function


def _forward_mode(function: Callable[..., Any], primals: Any, tangents: Any) -> tuple[Tensor, ...]:
    with warnings.catch_warnings():
        # torch warns about its own use of torch.jit when it first needs forward mode
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
        try:
            return tuple(torch.func.jvp(function, primals, tangents)[1])
        except RuntimeError as error:
            raise NotImplementedError(str(error)) from error
