"""Rules of convolutions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from voxelsigma.noise.tape_call import Call, Rule
from voxelsigma.noise.tape_lowering import Lowering, is_lowered
from voxelsigma.noise.tape_rules import rule

_CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
# measured: below these the library's kernels run nearly empty
_FEW_OUTPUTS, _MANY_INPUTS = 4, 16


@rule("convolution")
def _convolution(call: Call) -> Rule:
    """The convolution without its bias, probes in its batch; in single precision in channels_last."""
    if call.names != ("input",):
        raise NotImplementedError
    weight = call.arguments["weight"].detach()
    if _is_narrow(call, weight):
        return _narrow(call, weight)
    axes = weight.dim() - 2
    if axes in _CHANNELS_LAST and weight.dtype not in (torch.float64, torch.complex64, torch.complex128):
        memory_format = _CHANNELS_LAST[axes]
    else:
        memory_format = torch.contiguous_format
    weight = weight.contiguous(memory_format=memory_format)
    # float32 alone: what a network itself has in another precision stays there
    lowering: Lowering = "lowers" if weight.dtype == torch.float32 else "exact"
    lowered: list[Tensor] = []
    bare = call.without_primals()

    def push(tangents: Sequence[Tensor], free: Sequence[bool]) -> Tensor:
        (tangent,) = tangents
        images = tangent.flatten(0, 1).contiguous(memory_format=memory_format)
        kernel = weight
        if is_lowered(images) and lowering == "lowers":
            if not lowered:
                lowered.append(weight.to(torch.bfloat16))
            (kernel,) = lowered
        return bare.run([images], weight=kernel, bias=None).unflatten(0, tangent.shape[:2])

    return Rule(push, lowering=lowering)


def _is_narrow(call: Call, weight: Tensor) -> bool:
    """Whether a convolution of images has many channels in and few out, on a CPU."""
    arguments = call.arguments
    return (
        weight.dim() == 4
        and weight.device.type == "cpu"
        and weight.shape[0] <= _FEW_OUTPUTS
        and weight.shape[1] >= _MANY_INPUTS
        and arguments["groups"] == 1
        and not arguments["transposed"]
        and all(step == 1 for step in arguments["stride"])
    )


def _narrow(call: Call, weight: Tensor) -> Rule:
    r"""First one matrix product over the channels, for all taps at once, then the sum of the shifted products.

    .. math:: o_p = \sum_k (W_k x)_{p + d k - m}, \qquad d \text{ the dilation}, m \text{ the margin}
    """
    outputs, channels, rows, columns = weight.shape
    # (outputs, channels, rows, columns) -> (taps * outputs, channels)
    matrix = weight.permute(2, 3, 0, 1).reshape(rows * columns * outputs, channels).contiguous()
    size = tuple(call.outputs[0].shape[2:])
    height, width = call.dependents[0].primal.shape[2:]
    margins, dilation = call.arguments["padding"], call.arguments["dilation"]
    # where each tap's product goes, and from where
    down = [_overlap(size[0], height, margins[0] - dilation[0] * tap) for tap in range(rows)]
    right = [_overlap(size[1], width, margins[1] - dilation[1] * tap) for tap in range(columns)]

    def push(tangents: Sequence[Tensor], free: Sequence[bool]) -> Tensor:
        (tangent,) = tangents
        # (probes * batch, channels, y, x) -> (probes * batch, taps * outputs, y * x)
        pixels = tangent.flatten(0, 1).permute(0, 2, 3, 1).reshape(-1, height * width, channels)
        products = torch.matmul(matrix, pixels.mT).view(-1, rows, columns, outputs, height, width)
        total = products.new_zeros(products.shape[0], outputs, *size)
        for row, (to_row, from_row) in enumerate(down):
            for column, (to_column, from_column) in enumerate(right):
                total[..., to_row, to_column] += products[:, row, column, :, from_row, from_column]
        return total.unflatten(0, tangent.shape[:2])

    return Rule(push)


def _overlap(size: int, source: int, shift: int) -> tuple[slice, slice]:
    """Where in an axis of some size a shifted one falls: there, and in the source."""
    first, last = max(0, shift), max(0, min(size, source + shift), shift)
    return slice(first, last), slice(first - shift, last - shift)
