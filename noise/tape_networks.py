"""Rules of what networks are made of beside convolutions: matrix products, normalisations, attention."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from voxelsigma.noise.tape_call import Call, Factor, Rule, writable
from voxelsigma.noise.tape_lowering import Lowering
from voxelsigma.noise.tape_rules import bilinear_in, rule
from voxelsigma.noise.tape_shapes import chosen


@rule("mm", "bmm", "dot", "mv", "vdot", "linalg_vecdot", "_trilinear", "matmul")
def _product(call: Call) -> Rule:
    left, right = (name for name in call.arguments if isinstance(call.arguments[name], Tensor))
    packet = call.func.overloadpacket
    if packet not in (torch.ops.aten.mm, torch.ops.aten.bmm):
        return bilinear_in(call, (left, right))
    other = {left: right, right: left}
    kept = {name: call.keep(other[name]).detach() for name in call.names}

    def push(tangents: Sequence[Tensor], free: Sequence[bool]) -> Tensor:
        parts = [
            torch.matmul(tangent, matrix) if name == left else torch.matmul(matrix, tangent)
            for (name, matrix), tangent in zip(kept.items(), tangents, strict=True)
        ]
        return parts[0] if len(parts) == 1 else parts[0].add_(parts[1])

    return Rule(push)


@rule("addmm", "baddbmm", "addbmm", "addmv")
def _added_product(call: Call) -> Rule:
    if "self" in call.names:
        raise NotImplementedError
    factors = [name for name in call.arguments if name not in ("self", "alpha", "beta")]
    return bilinear_in(call, factors, beta=0)


@rule("linear")
def _linear(call: Call) -> Rule:
    return bilinear_in(call, ("input", "weight"), bias=None)


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")
@rule("_batch_norm_with_update", "_batch_norm_no_update", "miopen_batch_norm")
def _batch_norm(call: Call) -> Rule:
    source = call.dependents[0].primal
    if call.names != ("input",):
        raise NotImplementedError
    shape = (-1,) + (1,) * (source.dim() - 2)
    weight = call.arguments["weight"]
    gain = torch.ones(source.shape[1], dtype=source.dtype, device=source.device) if weight is None else weight.detach()
    eps = call.arguments["epsilon" if "epsilon" in call.arguments else "eps"]
    if not call.arguments.get("training", "no_training" not in str(call.func) and "no_update" not in str(call.func)):
        deviation = (call.arguments["running_var"] + eps).sqrt()
        factor = Factor((gain / deviation).reshape(shape))
        lowering: Lowering = "keeps" if source.dtype == torch.float32 else "exact"
        return Rule(lambda tangents, free: tangents[0] * factor.beside(tangents[0]), supplies=1, lowering=lowering)
    axes = [0, *range(2, source.dim())]
    return _normalised(source, axes, eps, gain.reshape(shape), source.shape)


@rule("native_group_norm")
def _group_norm(call: Call) -> Rule:
    source = call.dependents[0].primal
    if call.names != ("input",):
        raise NotImplementedError
    batch, channels, groups = source.shape[0], source.shape[1], call.arguments["group"]
    weight = call.arguments["weight"]
    # (batch, channels, ...) -> (batch, groups, channels of a group, ...)
    split = (batch, groups, channels // groups, *source.shape[2:])
    gain = None
    if weight is not None:
        gain = weight.detach().reshape(1, groups, channels // groups, *(1,) * (source.dim() - 2))
    return _normalised(source.reshape(split), list(range(2, len(split))), call.arguments["eps"], gain, source.shape)


@rule("native_layer_norm")
def _layer_norm(call: Call) -> Rule:
    source = call.dependents[0].primal
    if call.names != ("input",):
        raise NotImplementedError
    weight = call.arguments["weight"]
    axes = list(range(source.dim() - len(call.arguments["normalized_shape"]), source.dim()))
    return _normalised(source, axes, call.arguments["eps"], None if weight is None else weight.detach(), source.shape)


def _normalised(source: Tensor, axes: Sequence[int], eps: float, gain: Tensor | None, shape: Sequence[int]) -> Rule:
    r"""Normalisation to mean 0 and variance 1 over some axes, then a gain.

    .. math:: \dot y = \frac{\gamma}{s} \left( t - \overline{t} - \hat x \, \overline{\hat x t} \right), \qquad
              \hat x = (x - \overline{x}) / s, \quad s = \sqrt{\operatorname{Var} x + \epsilon}
    """
    variance, mean = torch.var_mean(source, list(axes), correction=0, keepdim=True)
    inverse = (variance + eps).rsqrt()
    normal = Factor((source - mean) * inverse)
    scale = inverse if gain is None else inverse * gain
    inner, shape, dtype = tuple(source.shape), tuple(shape), source.dtype
    shifted = [axis + 1 for axis in axes]

    def push(tangents: Sequence[Tensor], free: Sequence[bool]) -> Tensor:
        count = tangents[0].shape[0]
        tangent = tangents[0].reshape(count, *inner)
        direction = normal.beside(tangent)
        along = (tangent * direction).mean(shifted, keepdim=True)
        level = tangent.mean(shifted, keepdim=True)
        rest = tangent.sub_(level) if writable(tangent, free[0], inner, dtype) else tangent - level
        rest = rest.addcmul_(direction.expand_as(rest), along, value=-1).mul_(scale)
        return rest.reshape(count, *shape)

    # nobody but its own backward pass uses the statistics, the other outputs
    return Rule(push, supplies=1)


@rule("_softmax", "_log_softmax", "_safe_softmax")
def _softmax(call: Call) -> Rule:
    out, axis = call.outputs[0], call.arguments["dim"]
    axis = axis if axis < 0 else axis - out.dim()
    logarithm = "log" in str(call.func)
    weights = Factor(out.exp() if logarithm else out.clone())

    def push(tangents: Sequence[Tensor], free: Sequence[bool]) -> Tensor:
        (tangent,) = tangents
        constant = weights.beside(tangent)
        weighted = tangent * constant
        total = weighted.sum(axis, keepdim=True)
        return tangent - total if logarithm else weighted.sub_(constant * total)

    return Rule(push)


@rule("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention")
@rule("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention")
def _attention(call: Call) -> Rule:
    r"""Attention :math:`P V`, :math:`P = \operatorname{softmax}(s Q K^T + M)`: :math:`\dot P V + P \dot V`."""
    names = ("query", "key", "value")
    if not set(call.names) <= set(names) or call.arguments.get("dropout_p"):
        raise NotImplementedError
    query, key, value = (call.keep(name).detach() for name in names)
    scale = call.arguments.get("scale") or query.shape[-1] ** -0.5
    scores, mask = scale * query @ key.mT, call.arguments.get("attn_mask", call.arguments.get("attn_bias"))
    if mask is not None:
        scores = scores + mask
    if call.arguments["is_causal"]:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).tril().logical_not(), -torch.inf)
    weights = scores.softmax(-1)
    dependent = call.names

    def push(tangents: Sequence[Tensor], free: Sequence[bool]) -> Tensor:
        along = dict(zip(dependent, tangents, strict=True))
        terms = [scale * along["query"] @ key.mT] if "query" in along else []
        if "key" in along:
            terms.append(scale * query @ along["key"].mT)
        result = [weights @ along["value"]] if "value" in along else []
        if terms:
            weighted = weights * (terms[0] if len(terms) == 1 else terms[0].add_(terms[1]))
            result.append(weighted.sub_(weights * weighted.sum(-1, keepdim=True)) @ value)
        return result[0] if len(result) == 1 else result[0].add_(result[1])

    return Rule(push, supplies=1)


@rule("linalg_vector_norm")
def _vector_norm(call: Call) -> Rule:
    r""":math:`\operatorname{Re} \langle x, t \rangle / \|x\|`, and 0 where the norm is 0."""
    source, axes = call.dependents[0].primal, call.arguments["dim"]
    if call.arguments["ord"] != 2 or source.dim() == 0 or call.arguments["dtype"] is not None:
        raise NotImplementedError
    axes = [axis % source.dim() for axis in axes] if axes else list(range(source.dim()))
    keep = call.arguments["keepdim"]
    length = torch.linalg.vector_norm(source, dim=axes, keepdim=True)
    direction = source / torch.where(length > 0, length, 1)
    shifted = [axis + 1 for axis in axes]
    return _projection(direction, shifted, keep)


@rule("std", "var")
def _spread(call: Call) -> Rule:
    r"""Standard deviation and variance: :math:`\operatorname{Re} \langle x - \overline{x}, t \rangle`, scaled."""
    source, axes = call.dependents[0].primal, call.arguments.get("dim")
    if call.func._overloadname != "correction" or source.dim() == 0:
        raise NotImplementedError
    axes = [axis % source.dim() for axis in axes] if axes else list(range(source.dim()))
    centred = source - source.mean(axes, keepdim=True)
    correction = 1 if call.arguments["correction"] is None else call.arguments["correction"]
    freedom = math.prod(source.shape[axis] for axis in axes) - correction
    variance = centred.abs().square().sum(axes, keepdim=True) / freedom
    scale = 1 / variance.sqrt() if call.func.overloadpacket is torch.ops.aten.std else 2
    return _projection(centred * scale / freedom, [axis + 1 for axis in axes], call.arguments["keepdim"])


@rule("amax", "amin", "max", "min", "logsumexp")
def _extreme(call: Call) -> Rule:
    """The largest or smallest, tangents of equal ones averaged as torch does; and the soft maximum."""
    if len(call.outputs) == 2:
        return chosen(call)
    if call.names != ("self",):
        raise NotImplementedError
    source, axes = call.dependents[0].primal, call.arguments.get("dim")
    axes = [axis % source.dim() for axis in axes] if axes else list(range(source.dim()))
    keep = bool(call.arguments.get("keepdim"))
    out = call.outputs[0]
    if not keep:
        for axis in sorted(axes):
            out = out.unsqueeze(axis)
    if call.func.overloadpacket is torch.ops.aten.logsumexp:
        weights = (source - out).exp()
    else:
        weights = (source == out).to(source.dtype)
        weights /= weights.sum(axes, keepdim=True)
    return _projection(weights, [axis + 1 for axis in axes], keep)


def _projection(direction: Tensor, axes: Sequence[int], keep: bool) -> Rule:
    """Real inner product with a constant over some axes."""
    factor = Factor(direction.conj() if direction.is_complex() else direction)

    def push(tangents: Sequence[Tensor], free: Sequence[bool]) -> Any:
        product = tangents[0] * factor.beside(tangents[0])
        return (product.real if product.is_complex() else product).sum(list(axes), keepdim=keep)

    return Rule(push)
