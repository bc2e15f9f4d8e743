"""Filters whose weights differ from voxel to voxel, and their derivatives."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

Offsets = tuple[tuple[int, int], ...]


def square(reach: int) -> Offsets:
    """Offsets `(y, x)` of all voxels that are at most so far away along both axes."""
    return tuple((y, x) for y in range(-reach, reach + 1) for x in range(-reach, reach + 1))


def shifted(images: Tensor, offsets: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Images `(..., y, x)` at i + δ for every δ, 0 beyond the border."""
    reach = max(max(map(abs, offset)) for offset in offsets)
    padded = pad(images, (reach, reach, reach, reach))
    rows, columns = images.shape[-2:]
    return [padded[..., reach + y : reach + y + rows, reach + x : reach + x + columns] for y, x in offsets]


def filtered(images: Tensor, weights: Tensor, offsets: Offsets) -> Tensor:
    r"""Filter images, :math:`c_i = \sum_\delta h_i(\delta)\, w_{i+\delta}`, differentiable in both.

    Parameters
    ----------
    images
        w, shape `(probes, y, x)`, complex.
    weights
        h, shape `(offsets, y, x)`, of the real type that belongs to the images'.
    offsets
        δ, `(y, x)` each.
    """
    found: Tensor = _Filter.apply(images, weights, offsets)  # type: ignore[no-untyped-call]
    return found


class _Filter(torch.autograd.Function):
    """Autograd's own graph of it would keep every shifted copy."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, weights: Tensor, offsets: Offsets) -> Tensor:
        ctx.save_for_backward(images, weights)
        ctx.offsets = offsets
        return torch.cat([_filtered(part, weights, offsets) for part in _alone(images)])

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        images, weights = ctx.saved_tensors
        of_images = of_weights = None
        if ctx.needs_input_grad[0]:
            of_images = torch.cat([_transposed(part, weights, ctx.offsets) for part in _alone(given[0])])
        if ctx.needs_input_grad[1]:
            of_weights = torch.zeros_like(weights)
            for part, gradient in zip(_alone(images), _alone(given[0]), strict=True):
                for total, seen in zip(of_weights, shifted(_parts(part), ctx.offsets), strict=True):
                    total.add_((seen * _parts(gradient)).sum(dim=(0, 1)))
        return of_images, of_weights, None


def _alone(images: Tensor) -> Sequence[Tensor]:
    # one probe at a time stays in a CPU's cache
    return images.split(len(images) if images.is_cuda else 1)


def _parts(images: Tensor) -> Tensor:
    # they lie apart, so that rows are contiguous
    return torch.stack([images.real, images.imag])


def _filtered(images: Tensor, weights: Tensor, offsets: Offsets) -> Tensor:
    parts = _parts(images)
    total = torch.zeros_like(parts)
    for weight, seen in zip(weights, shifted(parts, offsets), strict=True):
        total.addcmul_(seen, weight)
    return torch.complex(total[0], total[1])


def _transposed(images: Tensor, weights: Tensor, offsets: Offsets) -> Tensor:
    """What goes to i + δ from i."""
    parts = _parts(images)
    reach = max(max(map(abs, offset)) for offset in offsets)
    rows, columns = images.shape[-2:]
    total = pad(torch.zeros_like(parts), (reach, reach, reach, reach))
    for weight, (y, x) in zip(weights, offsets, strict=True):
        total[..., reach + y : reach + y + rows, reach + x : reach + x + columns].addcmul_(parts, weight)
    kept = total[..., reach : reach + rows, reach : reach + columns]
    return torch.complex(kept[0], kept[1])
