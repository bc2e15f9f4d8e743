"""The Jacobian of a reconstruction at the measured data, ready to push noise through."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from voxelsigma.noise.tape import Tape, make_tape
from voxelsigma.noise.tape_entries import Record
from voxelsigma.noise.tape_places import first_non_finite

Push: TypeAlias = Callable[[Tensor], Tensor]


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
    fallbacks
        What has no fast rule: operations that are evaluated again for every push, or why the whole reconstruction
        went the general road. Empty where all of it is fast.
    cuts
        Where the reconstruction itself takes values out of the derivative (`detach`, `item`): what it makes of them
        counts as fixed.
    probe_bytes
        Memory that one tangent and all that comes of it need at a time, about; None where nobody knows.
    """

    value: Tensor
    push: Push
    complex_linear: bool = False
    fallbacks: tuple[str, ...] = ()
    cuts: tuple[str, ...] = ()
    probe_bytes: int | None = None


@runtime_checkable
class Linearizable(Protocol):
    """A reconstruction that brings a linearization of its own, cheaper than the general one."""

    def linearize(self, kspace: Tensor) -> Linearization:
        """Linearize at `kspace`."""
        ...


def linearize(reconstruction: Callable[[Tensor], Tensor], kspace: Tensor, *, repeat: bool = False) -> Linearization:
    r"""Linearize a reconstruction :math:`f` at measured data :math:`y`: :math:`f(y)` and :math:`v \mapsto J v`.

    A reconstruction with a `linearize` method of its own is asked first. Else :math:`f` is evaluated once and recorded,
    operation by operation (`noise/tape.py`): masks, factors and statistics of that evaluation are frozen, and whole
    batches of tangents are replayed through them, with no primal work. What cannot be recorded goes the general road,
    `torch.func.linearize` and `vmap`. Tangents are real-linear: complex probes give the exact derivative along
    them even where :math:`f` is not holomorphic (a holomorphic Jacobian would be biased low by 8-30 %).

    Parameters
    ----------
    reconstruction
        From k-space `(coils, k1, k0)` to an image `(...)`, differentiable by torch.
    kspace
        The measured data, shape `(coils, k1, k0)`.
    repeat
        Evaluate once more and compare, for a reconstruction by strangers: randomness that is not torch's own shows
        in no other way.

    Raises
    ------
    ValueError
        If the data or the reconstruction are not finite, if two calls of the reconstruction differ, or if it is not
        differentiable; the operation and the module are named.
    """
    if isinstance(reconstruction, Linearizable):
        return reconstruction.linearize(kspace)
    if not bool(kspace.isfinite().all()):
        raise ValueError("linearize: k-space has samples that are not finite")
    tape, record = make_tape(reconstruction, kspace)
    if record.random or repeat:
        _refuse_random(reconstruction, kspace, record)
    if tape is None:
        value, push = _general(reconstruction, kspace, record)
        fallbacks: tuple[str, ...] = (f"the whole reconstruction, because {record.failure}",)
    else:
        value, push, fallbacks = tape.value, _frozen(tape, record), tape.fallbacks
    if not bool(value.isfinite().all()):
        where = first_non_finite(reconstruction, kspace)
        raise ValueError(f"linearize: the reconstruction has values that are not finite, first from {where}")
    return Linearization(
        value,
        _guarded(push, kspace),
        fallbacks=fallbacks,
        cuts=tuple(dict.fromkeys(record.detached)),
        probe_bytes=None if tape is None else tape.probe_bytes,
    )


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


def _frozen(tape: Tape, record: Record) -> Push:
    """The recorded road."""
    if tape.result is None and record.cuts:
        raise ValueError(
            f"linearize: the reconstruction is not differentiable: its dependence on k-space ends at {record.cuts[-1]}"
        )
    return lambda tangents: _checked(tape.push(tangents), lambda: tape.trouble(tangents))


def _general(reconstruction: Callable[[Tensor], Tensor], kspace: Tensor, record: Record) -> tuple[Tensor, Push]:
    """The road through torch.func: two evaluations and a trace."""
    try:
        with _quiet(), torch.no_grad():
            if record.writes:
                # a trace of torch's is not to be trusted where a function writes into tensors
                return reconstruction(kspace), _one_by_one(reconstruction, kspace)
            value, push = torch.func.linearize(reconstruction, kspace)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise ValueError(f"linearize: the reconstruction is not differentiable: {record.failure}") from error
    batched = torch.func.vmap(push)

    def push_batch(tangents: Tensor) -> Tensor:
        with torch.no_grad():
            return _checked(batched(tangents), lambda: None)

    return value, push_batch


def _one_by_one(reconstruction: Callable[[Tensor], Tensor], kspace: Tensor) -> Push:
    """Forward mode, one tangent after the other, each with an evaluation."""

    def one(tangent: Tensor) -> Tensor:
        with _quiet(), torch.no_grad():
            return torch.func.jvp(reconstruction, (kspace,), (tangent,))[1]

    # says whether it can be done at all
    one(torch.zeros_like(kspace))
    return lambda tangents: _checked(torch.stack([one(tangent) for tangent in tangents]), lambda: None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warnings about its own graph nodes and its own use of torch.jit: no result depends on them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Attempted to insert a get_attr Node")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
        yield


def _guarded(push: Push, kspace: Tensor) -> Push:
    """A push that says what is wrong with its tangents."""
    shape, dtype = kspace.shape, kspace.dtype

    def guarded(tangents: Tensor) -> Tensor:
        if tangents.shape[1:] != shape or tangents.dtype != dtype:
            raise ValueError(
                f"linearize: tangents are {tangents.dtype} of shape {tuple(tangents.shape)}; expected {dtype} of shape "
                f"(probes, {', '.join(map(str, shape))})"
            )
        return push(tangents)

    return guarded


def _checked(pushed: Tensor, trouble: Callable[[], str | None]) -> Tensor:
    """Pushed tangents, if they are finite."""
    if bool(pushed.isfinite().all()):
        return pushed
    where = trouble()
    raise ValueError(
        "linearize: the derivative of the reconstruction is not finite"
        + ("" if where is None else f", first after {where}")
    )


def _refuse_random(reconstruction: Callable[[Tensor], Tensor], kspace: Tensor, record: Record) -> None:
    """Refuse a reconstruction of which two calls differ."""
    with torch.no_grad():
        first, second = reconstruction(kspace), reconstruction(kspace)
    if first.shape == second.shape and torch.equal(first, second):
        return
    shapes = "" if first.shape == second.shape else f" in shape, {tuple(first.shape)} and {tuple(second.shape)}"
    suspect = f": {record.random[0]} is random" if record.random else ""
    raise ValueError(
        f"linearize: two calls of the reconstruction differ{shapes}{suspect}; fix its seed inside the reconstruction "
        "(or put the network into evaluation mode)"
    )
