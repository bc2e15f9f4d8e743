"""The Jacobian of a reconstruction at the measured data, ready to push noise through."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Linearization:
    """A reconstruction at one point, and its real-linear Jacobian there.

    Parameters
    ----------
    value
        The reconstruction itself, shape `(...)`, what the image is made of.
    push
        From tangents `(probes, coils, k1, k0)` to `(probes, ...)`: the Jacobian applied to each, without
        another evaluation of the reconstruction.
    complex_linear
        Whether the map is complex-linear, so that pushed circular noise stays circular.
    """

    value: Tensor
    push: Callable[[Tensor], Tensor]
    complex_linear: bool = False


@runtime_checkable
class Linearizable(Protocol):
    """A reconstruction that brings a linearization of its own, cheaper than the general one."""

    def linearize(self, kspace: Tensor) -> Linearization:
        """Linearize at `kspace`."""
        ...


def linearize(reconstruction: Callable[[Tensor], Tensor], kspace: Tensor) -> Linearization:
    r"""Linearize a reconstruction :math:`f` at measured data :math:`y`: :math:`f(y)` and :math:`v \mapsto J v`.

    A reconstruction with a `linearize` method of its own is asked first. Else the general road:
    `torch.func.linearize` evaluates :math:`f` twice (the value and the trace), keeps what the tangent needs,
    and `vmap` pushes whole batches. Tangents are real-linear: complex probes give the exact derivative along them even
    where :math:`f` is not holomorphic (a holomorphic Jacobian would be biased low by 8-30 %).

    Parameters
    ----------
    reconstruction
        From k-space `(coils, k1, k0)` to an image `(...)`, differentiable by torch.
    kspace
        The measured data, shape `(coils, k1, k0)`.
    """
    if isinstance(reconstruction, Linearizable):
        return reconstruction.linearize(kspace)
    with warnings.catch_warnings(), torch.no_grad():
        # torch warns about its own graph nodes and its own use of torch.jit; the result depends on neither
        warnings.filterwarnings("ignore", message="Attempted to insert a get_attr Node")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
        value, push = torch.func.linearize(reconstruction, kspace)

    batched = torch.func.vmap(push)

    def push_batch(tangents: Tensor) -> Tensor:
        with torch.no_grad():
            return batched(tangents)

    return Linearization(value=value, push=push_batch)


def linear(reconstruction: Callable[[Tensor], Tensor], kspace: Tensor) -> Linearization:
    """Linearize a complex-linear reconstruction: its own Jacobian, on batches as on single k-spaces.

    Parameters
    ----------
    reconstruction
        Complex-linear, from `(..., coils, k1, k0)` to `(..., y, x)`.
    kspace
        The measured data, shape `(coils, k1, k0)`.
    """
    return Linearization(value=reconstruction(kspace), push=reconstruction, complex_linear=True)
