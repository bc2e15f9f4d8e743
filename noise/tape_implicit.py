"""Functions that are defined by what they solve: one entry on a tape, one rule for their derivative."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from voxelsigma.noise.tape_record import active_recorder

Solve: TypeAlias = Callable[..., Tensor]
ImplicitPush: TypeAlias = Callable[[tuple[Tensor | None, ...]], Tensor]
Pull: TypeAlias = Callable[[Tensor], tuple[Tensor | None, ...]]


def implicit(
    solve: Solve,
    rule: Callable[[Sequence[Tensor], Tensor], ImplicitPush],
    pull: Callable[[Sequence[Tensor], Tensor], Pull] | None = None,
    name: str = "implicit",
) -> Callable[..., Tensor]:
    r"""Make a function whose derivative is a rule of its own, not that of the steps by which it is computed.

    A solution :math:`x` of :math:`H x = b` has the derivative :math:`\dot x = H^{-1}(\dot b - \dot H x)`: one more
    solve, whatever the number of iterations was. The function works in eager mode, under
    `torch.func.jvp` and `torch.func.vmap`, under autograd where `pull` is given, and is one entry of a recorded tape.

    Parameters
    ----------
    solve
        From tensors to one tensor. It may branch on values.
    rule
        From the inputs and the output to the push: from the inputs' tangents, each `(probes, *shape)` or None where an
        input has none, to the output's, `(probes, *shape)`. It may branch on values.
    pull
        From the inputs and the output to the transpose: from the output's cotangent, of its shape, to the
        inputs' (for a complex input the conjugate transpose, as torch has it). None where no gradient is wanted.
    name
        What messages call it.

    Returns
    -------
        A function of the same arguments as `solve`, positional tensors only.
    """

    def function(*inputs: Tensor) -> Tensor:
        recorder = active_recorder()
        if recorder is not None:
            return recorder.implicit(name, inputs, solve, rule)
        return _apply(_Solve, solve, rule, pull, name, *inputs)

    return function


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(solve: Solve, rule: Any, pull: Any, name: str, *inputs: Tensor) -> Tensor:
        return solve(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.rule, ctx.pull, ctx.name, *tensors = inputs
        ctx.save_for_backward(*tensors, output)
        ctx.save_for_forward(*tensors, output)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        *inputs, output = ctx.saved_tensors
        given = tangents[4:]
        places = [place for place, tangent in enumerate(given) if tangent is not None]
        return _apply(_Push, ctx.rule, len(inputs), places, *inputs, output, *(given[place] for place in places))

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
        *inputs, output = ctx.saved_tensors
        if ctx.pull is None:
            raise NotImplementedError(f"{ctx.name}: no gradient, only a forward derivative, was given")
        return None, None, None, None, *ctx.pull(inputs, output)(cotangents[0])

    @staticmethod
    def vmap(info: Any, in_dims: Any, solve: Solve, rule: Any, pull: Any, name: str, *inputs: Tensor) -> Any:
        each = [_members(value, axis, info.batch_size) for value, axis in zip(inputs, in_dims[4:], strict=True)]
        solved = [_apply(_Solve, solve, rule, pull, name, *values) for values in zip(*each, strict=True)]
        return torch.stack(solved), 0


class _Push(torch.autograd.Function):
    """The rule on one tangent; a batch of tangents goes through it at once."""

    @staticmethod
    def forward(rule: Any, count: int, places: list[int], *tensors: Tensor) -> Tensor:
        return _pushed(rule, count, places, tensors[: count + 1], [t.unsqueeze(0) for t in tensors[count + 1 :]])[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, rule: Any, count: int, places: list[int], *tensors: Tensor) -> Any:
        axes = in_dims[3:]
        if any(axis is not None for axis in axes[: count + 1]):
            each = [_members(value, axis, info.batch_size) for value, axis in zip(tensors, axes, strict=True)]
            pushed = [_apply(_Push, rule, count, places, *values) for values in zip(*each, strict=True)]
            return torch.stack(pushed), 0
        tangents = [
            tangent.expand(info.batch_size, *tangent.shape) if axis is None else tangent.movedim(axis, 0)
            for tangent, axis in zip(tensors[count + 1 :], axes[count + 1 :], strict=True)
        ]
        return _pushed(rule, count, places, tensors[: count + 1], tangents), 0


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    return function.apply(*arguments)


def _pushed(
    rule: Any, count: int, places: Sequence[int], primals: Sequence[Tensor], tangents: Sequence[Tensor]
) -> Tensor:
    given: list[Tensor | None] = [None] * count
    for place, tangent in zip(places, tangents, strict=True):
        given[place] = tangent
    return rule(list(primals[:count]), primals[count])(tuple(given))


def _members(value: Tensor, axis: int | None, count: int) -> Sequence[Tensor]:
    """The members of a batch, the same one again and again where it is none."""
    return [value] * count if axis is None else value.unbind(axis)
