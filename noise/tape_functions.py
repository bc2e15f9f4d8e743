"""Rules of elementwise functions: their derivatives, in closed form."""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from voxelsigma.noise.tape_call import Call, Factor, Rule
from voxelsigma.noise.tape_rules import RULES, scaled

aten = torch.ops.aten
Derivative: TypeAlias = Callable[[Tensor, Tensor, dict[str, Any]], Tensor]
"""From the argument, the value and all arguments to the derivative."""


def _backward(name: str, *options: str) -> Derivative:
    """What torch computes for its own backward pass, of a unit gradient."""
    function = getattr(aten, name)
    return lambda x, y, options_of: function(torch.ones_like(y), x, *(options_of[option] for option in options))


def _power(x: Tensor, y: Tensor, options: dict[str, Any]) -> Tensor:
    exponent = options["exponent"]
    if isinstance(exponent, Tensor):
        raise NotImplementedError
    if exponent == 0:
        return torch.zeros_like(y)
    return 2 * x if exponent == 2 else exponent * x.pow(exponent - 1)


def _clamp(x: Tensor, y: Tensor, options: dict[str, Any]) -> Tensor:
    low, high = options.get("min"), options.get("max")
    inside = torch.ones_like(x, dtype=torch.bool)
    if low is not None:
        inside &= x >= low
    if high is not None:
        inside &= x <= high
    return inside.to(y.dtype)


_DERIVATIVES: dict[str, Derivative] = {
    "pow": _power,
    "square": lambda x, y, options: 2 * x,
    "sqrt": lambda x, y, options: 0.5 / y,
    "rsqrt": lambda x, y, options: -0.5 * y / x,
    "reciprocal": lambda x, y, options: -y * y,
    "exp": lambda x, y, options: y.clone(),
    "expm1": lambda x, y, options: y + 1,
    "log": lambda x, y, options: 1 / x,
    "log1p": lambda x, y, options: 1 / (1 + x),
    "sin": lambda x, y, options: x.cos(),
    "cos": lambda x, y, options: -x.sin(),
    "tanh": lambda x, y, options: 1 - y * y,
    "sigmoid": lambda x, y, options: y * (1 - y),
    "erf": lambda x, y, options: 2 / math.sqrt(math.pi) * (-x * x).exp(),
    "clamp": _clamp,
    "clamp_min": _clamp,
    "clamp_max": _clamp,
    "leaky_relu": lambda x, y, options: aten.leaky_relu_backward(
        torch.ones_like(y), x, options["negative_slope"], False
    ),
    "gelu": lambda x, y, options: aten.gelu_backward(torch.ones_like(y), x, approximate=options["approximate"]),
    "elu": lambda x, y, options: aten.elu_backward(
        torch.ones_like(y), options["alpha"], options["scale"], options["input_scale"], False, x
    ),
    "_prelu_kernel": lambda x, y, options: torch.where(x > 0, 1, options["weight"]),
    "silu": _backward("silu_backward"),
    "mish": _backward("mish_backward"),
    "softplus": _backward("softplus_backward", "beta", "threshold"),
    "hardtanh": _backward("hardtanh_backward", "min_val", "max_val"),
    "hardswish": _backward("hardswish_backward"),
    "hardsigmoid": _backward("hardsigmoid_backward"),
}


def _function(call: Call) -> Rule:
    if len(call.dependents) != 1:
        raise NotImplementedError
    (dependent,) = call.dependents
    if dependent.name not in ("self", "input"):
        raise NotImplementedError
    primal, out = dependent.primal, call.outputs[0]
    name = call.func.overloadpacket.__name__
    factor, shape, dtype = Factor(_DERIVATIVES[name](primal, out, call.arguments)), out.shape, out.dtype
    return Rule(lambda tangents, free: scaled(tangents[0], factor, free[0], shape, dtype))


def _abs(call: Call) -> Rule:
    r""":math:`\operatorname{Re}(e^{-i\phi} t)`, and 0 where the value is 0."""
    primal, out = call.dependents[0].primal, call.outputs[0]
    factor, shape, dtype = Factor(primal.sgn().conj()), out.shape, out.dtype
    if not primal.is_complex():
        return Rule(lambda tangents, free: scaled(tangents[0], factor, free[0], shape, dtype))

    def push(tangents: Sequence[Tensor], free: Sequence[bool]) -> Tensor:
        return (tangents[0] * factor.beside(tangents[0])).real

    return Rule(push)


def _glu(call: Call) -> Rule:
    r""":math:`\dot a \, s(b) + a \, s'(b) \, \dot b` for the halves a and b of the argument."""
    first, second = call.dependents[0].primal.chunk(2, call.arguments["dim"])
    gate = second.sigmoid()
    shape, dtype = call.outputs[0].shape, call.outputs[0].dtype
    axis = call.arguments["dim"] % first.dim() + 1
    factors = Factor(gate), Factor(first * gate * (1 - gate))

    def push(tangents: Sequence[Tensor], free: Sequence[bool]) -> Tensor:
        left, right = tangents[0].chunk(2, axis)
        return scaled(left, factors[0], False, shape, dtype).add_(scaled(right, factors[1], False, shape, dtype))

    return Rule(push)


RULES.update({getattr(aten, name): _function for name in _DERIVATIVES})
RULES |= {aten.abs: _abs, aten.glu: _glu}
