"""Rules of elementwise arithmetic."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from voxelsigma.noise.tape_call import Call, Factor, Rule, Scale, lift, writable
from voxelsigma.noise.tape_lowering import is_lowered
from voxelsigma.noise.tape_rules import rule, scaled


@rule("add", "sub")
def _add(call: Call) -> Rule:
    out = call.outputs[0]
    shape, dtype = out.shape, out.dtype
    alpha = call.arguments["alpha"]
    sign = -alpha if call.func.overloadpacket is torch.ops.aten.sub else alpha
    if len(call.dependents) == 2:
        return Rule(lambda tangents, free: _sum(tangents, free, sign, shape, dtype))
    if call.names == ("other",) and sign != 1:
        return Rule(lambda tangents, free: _cast(lift(tangents[0], len(shape)), shape, dtype) * sign)
    return Rule(lambda tangents, free: _cast(lift(tangents[0], len(shape)), shape, dtype), view=True)


@rule("rsub")
def _rsub(call: Call) -> Rule:
    if call.names != ("self",) or call.arguments["alpha"] != 1:
        raise NotImplementedError
    shape, dtype = call.outputs[0].shape, call.outputs[0].dtype
    return Rule(lambda tangents, free: -_cast(lift(tangents[0], len(shape)), shape, dtype))


@rule("neg")
def _neg(call: Call) -> Rule:
    return Rule(lambda tangents, free: -tangents[0])


@rule("mul")
def _mul(call: Call) -> Rule:
    out = call.outputs[0]
    shape, dtype = out.shape, out.dtype
    other = {"self": "other", "other": "self"}
    factors = [_factor(call.keep(other[dependent.name]), dependent.primal) for dependent in call.dependents]

    def push(tangents: Sequence[Tensor], free: Sequence[bool]) -> Tensor:
        first = scaled(tangents[0], factors[0], free[0], shape, dtype)
        if len(tangents) == 2:
            first = first.add_(scaled(tangents[1], factors[1], free[1], shape, dtype))
        return first

    if len(factors) > 1:
        return Rule(push)
    before = tuple(call.dependents[0].primal.shape)
    return Rule(push, scale=Scale(factors[0].tensor, before, tuple(shape), dtype))


@rule("div")
def _div(call: Call) -> Rule:
    if call.arguments.get("rounding_mode") is not None:
        raise NotImplementedError
    out, divisor = call.outputs[0], call.arguments["other"]
    shape, dtype = out.shape, out.dtype
    numerator = "self" in call.names
    inverse = Factor(torch.as_tensor(divisor, device=out.device, dtype=_type_of(divisor, dtype)).reciprocal().to(dtype))
    slope = Factor(-out / divisor) if "other" in call.names else None

    def push(tangents: Sequence[Tensor], free: Sequence[bool]) -> Tensor:
        parts = [scaled(tangents[0], inverse, free[0], shape, dtype)] if numerator else []
        if slope is not None:
            parts.append(scaled(tangents[-1], slope, free[-1], shape, dtype))
        return parts[0] if len(parts) == 1 else parts[0].add_(parts[1])

    return Rule(push)


@rule("relu")
def _relu(call: Call) -> Rule:
    out = call.outputs[0]
    # floating point, because multiplying by booleans converts them each time
    mask, shape, dtype = Factor((out > 0).to(out.dtype)), out.shape, out.dtype
    return Rule(lambda tangents, free: scaled(tangents[0], mask, free[0], shape, dtype))


@rule("where")
def _where(call: Call) -> Rule:
    out = call.outputs[0]
    shape, dtype = out.shape, out.dtype
    chosen = Factor(call.constant("condition"))
    zero = torch.zeros((), dtype=dtype, device=out.device)
    names = call.names

    def push(tangents: Sequence[Tensor], free: Sequence[bool]) -> Tensor:
        lifted = {name: lift(tangent, len(shape)) for name, tangent in zip(names, tangents, strict=True)}
        some = next(iter(lifted.values()))
        # selected, not multiplied: the branch not taken may have an infinite derivative
        result = torch.where(chosen.beside(some), lifted.get("self", zero), lifted.get("other", zero))
        return _cast(result, shape, dtype)

    return Rule(push)


@rule("complex")
def _complex(call: Call) -> Rule:
    shape = call.outputs[0].shape
    names = call.names

    def push(tangents: Sequence[Tensor], free: Sequence[bool]) -> Tensor:
        parts = {name: lift(tangent, len(shape)) for name, tangent in zip(names, tangents, strict=True)}
        some = next(iter(parts.values()))
        zero = torch.zeros((), dtype=some.dtype, device=some.device)
        real, imaginary = torch.broadcast_tensors(parts.get("real", zero), parts.get("imag", zero))
        result = torch.empty((some.shape[0], *shape), dtype=some.dtype.to_complex(), device=some.device)
        halves = torch.view_as_real(result)
        halves[..., 0] = real
        halves[..., 1] = imaginary
        return result

    return Rule(push)


@rule("_to_copy")
def _to_copy(call: Call) -> Rule:
    out, complex_input = call.outputs[0], call.dependents[0].primal.is_complex()
    dtype, device = out.dtype, out.device

    def push(tangents: Sequence[Tensor], free: Sequence[bool]) -> Tensor:
        tangent = tangents[0].real if complex_input and not dtype.is_complex else tangents[0]
        return tangent.to(device=device, dtype=dtype)

    return Rule(push, view=True)


@rule("clone", "contiguous", "alias", "detach", "lift_fresh", "lift_fresh_copy", "lift", "resolve_conj", "resolve_neg")
def _identity(call: Call) -> Rule:
    # where a detach cuts the derivative the recorder has seen it: what is left are torch's own, of views
    return Rule(lambda tangents, free: tangents[0].resolve_conj().resolve_neg(), view=True)


@rule("copy")
def _copy(call: Call) -> Rule:
    if call.names != ("src",):
        raise NotImplementedError
    shape, dtype = call.outputs[0].shape, call.outputs[0].dtype
    return Rule(lambda tangents, free: _cast(lift(tangents[0], len(shape)), shape, dtype), view=True)


def _factor(value: Any, primal: Tensor) -> Factor:
    """The other operand of a product; real values beside complex ones are widened once, not at every product."""
    tensor = torch.as_tensor(value, device=primal.device, dtype=_type_of(value, torch.result_type(primal, value)))
    if primal.is_complex() and not tensor.is_complex():
        tensor = tensor.to(torch.result_type(primal, tensor))
    return Factor(tensor)


def _type_of(value: Any, wanted: torch.dtype) -> torch.dtype:
    """A tensor's own type; for a number that of the result, lest it be rounded to single precision."""
    return value.dtype if isinstance(value, Tensor) else wanted


def _cast(tangent: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tangent as one of a wider type and of the shape of the result."""
    tangent = tangent if is_lowered(tangent) else tangent.to(dtype)
    return tangent if tangent.shape[1:] == torch.Size(shape) else tangent.expand(tangent.shape[0], *shape)


def _sum(tangents: Sequence[Tensor], free: Sequence[bool], alpha: Any, shape: Sequence[int], dtype: Any) -> Tensor:
    """The first tangent plus alpha times the second, in place where it may be."""
    first, second = (lift(tangent, len(shape)) for tangent in tangents)
    if writable(first, free[0], shape, dtype):
        return first.add_(second, alpha=alpha)
    if alpha == 1 and writable(second, free[1], shape, dtype):
        return second.add_(first)
    return torch.add(first, second, alpha=alpha)
