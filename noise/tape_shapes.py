"""Rules of views, reductions, transforms and other operations along axes: the same operation, one axis further."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from voxelsigma.noise.tape_call import Call, Rule, Shift, invoke, lift
from voxelsigma.noise.tape_lowering import is_lowered
from voxelsigma.noise.tape_rules import linear_in, rule

_AXES = ("dim", "dims", "dim0", "dim1", "dim2", "dimension")


@rule(
    "select", "slice", "unsqueeze", "squeeze", "transpose", "permute", "unbind", "split", "split_with_sizes", "diagonal"
)
@rule("narrow", "unfold", "flip", "roll", "cumsum", "_fft_c2c", "_fft_r2c", "_fft_c2r", "_conj", "_neg_view")
@rule("view_as_real", "_conj_physical", "real", "imag", "tensor_split")
def _along_axes(call: Call) -> Rule:
    """The operation itself with its axes shifted: linear in its only tensor."""
    (dependent,) = call.dependents
    if dependent.primal.dim() == 0:
        return linear_in(call, call.names)
    changed = {name: _shifted(call.arguments[name]) for name in _AXES if name in call.arguments}
    if call.func.overloadpacket is torch.ops.aten.permute:
        changed["dims"] = [0, *(1 + axis % dependent.primal.dim() for axis in call.arguments["dims"])]
    if call.func.overloadpacket is torch.ops.aten.roll and not call.arguments["dims"]:
        return linear_in(call, call.names)
    if call.func is torch.ops.aten.squeeze.default:
        # without axes it would take the probes where there is one
        size = tuple(call.outputs[0].shape)
        return Rule(lambda tangents, free: tangents[0].reshape(tangents[0].shape[0], *size), view=True)
    bare = call.without_primals()
    shift = _shift(call) if call.func.overloadpacket is torch.ops.aten.roll else None
    return Rule(lambda tangents, free: bare.run(tangents, **changed), view=True, shift=shift)


@rule("sum", "mean")
def _reduction(call: Call) -> Rule:
    (dependent,) = call.dependents
    ndim = dependent.primal.dim()
    if ndim == 0:
        return linear_in(call, call.names)
    axes = call.arguments.get("dim")
    changed: dict[str, Any] = {"dim": _shifted(list(axes) if axes else list(range(ndim)))}
    function = torch.ops.aten.sum.dim_IntList if "sum" in str(call.func) else torch.ops.aten.mean.dim
    arguments = {"keepdim": False, "dtype": call.arguments.get("dtype")} | call.without_primals().arguments | changed
    sums = tuple(axis - 1 - ndim if axis > 0 else axis for axis in changed["dim"])
    return Rule(lambda tangents, free: invoke(function, arguments | {"self": tangents[0]}), sums=sums)


@rule("view", "_unsafe_view", "reshape", "expand", "view_copy", "_reshape_alias")
def _reshape(call: Call) -> Rule:
    size = tuple(call.outputs[0].shape)
    if call.func is torch.ops.aten.view.dtype:
        raise NotImplementedError
    if call.func.overloadpacket is torch.ops.aten.expand:
        return Rule(lambda tangents, free: lift(tangents[0], len(size)).expand(tangents[0].shape[0], *size), view=True)
    return Rule(lambda tangents, free: tangents[0].reshape(tangents[0].shape[0], *size), view=True)


@rule("view_as_complex")
def _view_as_complex(call: Call) -> Rule:
    def push(tangents: Sequence[Tensor], free: Sequence[bool]) -> Tensor:
        (tangent,) = tangents
        strides = tangent.stride()
        # a tangent need not lie in memory as its value does
        paired = strides[-1] == 1 and all(stride % 2 == 0 for stride in strides[:-1])
        return torch.view_as_complex(tangent if paired else tangent.contiguous())

    return Rule(push, view=True)


@rule("cat", "stack")
def _join(call: Call) -> Rule:
    tensors, axis = call.arguments["tensors"], call.arguments["dim"]
    # torch joins empty vectors with anything
    if any(tensor.dim() != call.outputs[0].dim() for tensor in tensors) and "cat" in str(call.func):
        raise NotImplementedError
    dtype = call.outputs[0].dtype
    places = [dependent.index for dependent in call.dependents]
    zeros = [torch.zeros((), dtype=dtype, device=tensor.device) for tensor in tensors]
    shapes = [tensor.shape for tensor in tensors]
    function, axis = call.func.overloadpacket, _shifted(axis)

    def push(tangents: Sequence[Tensor], free: Sequence[bool]) -> Tensor:
        lowered = is_lowered(tangents[0])
        wanted = tangents[0].dtype if lowered else dtype
        parts = [
            zero.to(wanted).expand(tangents[0].shape[0], *shape) for zero, shape in zip(zeros, shapes, strict=True)
        ]
        for place, tangent in zip(places, tangents, strict=True):
            assert place is not None
            parts[place] = tangent if lowered else tangent.to(dtype)
        return function(parts, axis)

    return Rule(push)


@rule("constant_pad_nd")
def _pad(call: Call) -> Rule:
    widths = list(call.arguments["pad"])
    return Rule(lambda tangents, free: functional.pad(tangents[0], widths), view=True)


@rule("gather", "index_select", "index", "take_along_dim", "cumsum", "tril", "triu", "trace", "repeat", "pixel_shuffle")
@rule("masked_fill", "im2col", "col2im", "grid_sampler_2d", "grid_sampler_3d", "_trilinear", "rot90")
@rule("pixel_unshuffle", "channel_shuffle", "slice_copy", "select_copy", "expand_copy", "permute_copy", "unfold_copy")
def _linear_in_self(call: Call) -> Rule:
    name = next(iter(call.arguments))
    if "value" in call.names:
        raise NotImplementedError
    if call.func.overloadpacket is torch.ops.aten.masked_fill:
        return _filled(call)
    return linear_in(call, [name])


def _filled(call: Call) -> Rule:
    bare = call.without_primals()
    zero = 0 if not isinstance(call.arguments["value"], Tensor) else torch.zeros_like(call.arguments["value"])
    batched = torch.vmap(lambda tangent: bare.run([tangent], value=zero))
    return Rule(lambda tangents, free: batched(tangents[0]))


def _jointly(*names: str) -> Callable[[Call], Rule]:
    return lambda call: linear_in(call, names)


rule("slice_scatter", "select_scatter", "diagonal_scatter", "as_strided_scatter", "scatter", "scatter_add")(
    _jointly("self", "src")
)
rule("index_put", "_unsafe_index_put")(_jointly("self", "values"))
rule("index_add", "index_copy")(_jointly("self", "source"))
rule("masked_scatter")(_jointly("self", "source"))


@rule("avg_pool1d", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "upsample_nearest1d")
@rule("upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_linear1d")
@rule("upsample_trilinear3d", "_upsample_nearest_exact2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa")
@rule("reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad2d", "replication_pad3d")
def _images(call: Call) -> Rule:
    """Linear operations on batches of images: the probes join the batch."""
    (dependent,) = call.dependents
    name = str(call.func.overloadpacket)
    if dependent.primal.dim() != 2 + int(next(digit for digit in name if digit.isdigit())):
        return linear_in(call, call.names)
    bare = call.without_primals()

    def push(tangents: Sequence[Tensor], free: Sequence[bool]) -> Tensor:
        (tangent,) = tangents
        return bare.run([tangent.flatten(0, 1)]).unflatten(0, tangent.shape[:2])

    return Rule(push, view=True)


@rule("max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d", "adaptive_max_pool3d")
def _max_pool(call: Call) -> Rule:
    axes = 3 if "3d" in str(call.func) else 2
    shape = tuple(call.outputs[0].shape)
    places = call.outputs[1].flatten(-axes)

    def push(tangents: Sequence[Tensor], free: Sequence[bool]) -> Tensor:
        flat = tangents[0].flatten(-axes)
        chosen = flat.gather(-1, places.expand(flat.shape[0], *places.shape))
        return chosen.reshape(flat.shape[0], *shape)

    return Rule(push)


@rule("sort", "topk", "kthvalue", "median", "mode")
def chosen(call: Call) -> Rule:
    """Order statistics along an axis: where they were found, there is the tangent."""
    if len(call.outputs) != 2 or call.outputs[0].dim() == 0 or "dim" not in call.arguments:
        raise NotImplementedError
    places, axis = call.outputs[1], _shifted(call.arguments["dim"])
    reduced = places.dim() < call.dependents[0].primal.dim()
    places = places.unsqueeze(call.arguments["dim"]) if reduced else places

    def push(tangents: Sequence[Tensor], free: Sequence[bool]) -> Tensor:
        chosen = tangents[0].gather(axis, places.expand(tangents[0].shape[0], *places.shape))
        return chosen.squeeze(axis) if reduced else chosen

    return Rule(push)


def _shift(call: Call) -> Shift:
    """The cyclic shift that a call of `roll` along some axes makes."""
    shape = call.dependents[0].primal.shape
    axes = [axis if axis < 0 else axis - len(shape) for axis in call.arguments["dims"]]
    return tuple((axis, places, shape[axis]) for axis, places in zip(axes, call.arguments["shifts"], strict=True))


def _shifted(axes: Any) -> Any:
    """Axes beside the probes in front: those counted from the end stay."""
    if isinstance(axes, int):
        return axes + 1 if axes >= 0 else axes
    return [axis + 1 if axis >= 0 else axis for axis in axes]
