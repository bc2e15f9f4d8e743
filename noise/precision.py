r"""Pushing noise in less than float32 where that leaves σ what it is.

Tensor cores multiply TF32 (10 bits of mantissa) and bfloat16 (7 bits) several times faster than float32. A probe needs
no more: rounding adds to a pushed probe u an error e, and whatever that is,

.. math:: \left| \frac{\sqrt{E|u + e|^2}}{\sqrt{E|u|^2}} - 1 \right| \le \sqrt{E|e|^2 / E|u|^2}.

The errors of different roundings mostly average out, so σ moves far less than this bound. But no network promises so:
the first probes are pushed both ways and compared, every time. The image itself stays float32 always.

`torch.compile` has no place here: it takes longer than a scan. Nor has a CUDA graph: it holds the constants of one
linearization, so it would serve one slice, that is one to four pushes of 64 probes, after a warm-up push and a capture;
it keeps the peak of a push allocated for itself; and solvers that look at their residual cannot be captured.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Final, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from voxelsigma.noise.chunking import default_chunk
from voxelsigma.noise.linearize import Linearization
from voxelsigma.noise.moments import moments, projected
from voxelsigma.noise.tape_lowering import lowered_convolutions
from voxelsigma.noise.tensor_cores import tensor_cores
from voxelsigma.noise.voxels import object_mask, phase_factor

PrecisionName: TypeAlias = Literal["bf16", "tf32", "float32"]

FEWEST_PROBES: Final = 4
"""Below, the quotient of two estimates of σ has no finite variance."""

BIAS_SHARE: Final = 0.1
"""Of the tolerance: what the median of σ may be off by. The rest averages out over voxels and probes; this does not."""

# the first generation of tensor cores that knows both
_AMPERE = (8, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """The precision of pushed probes, and what it was chosen on.

    Parameters
    ----------
    name
        `bf16`: convolutions of the network in bfloat16, all else in float32; `tf32`: convolutions and matrix products
        in TF32; `float32`: all in float32, or in double precision where the data are.
    deviation
        Relative rms of σ against float32, over the object's voxels, from the probes compared; 0 for float32.
    bias
        Median of the same.
    difference
        Rms of the pushed probes' error, relative to σ: no σ from however many probes is further off than that.
    probes
        Compared; 0 where nothing was.
    rejected
        Why nothing faster was taken: one line for each candidate.
    """

    name: PrecisionName
    deviation: float = 0.0
    bias: float = 0.0
    difference: float = 0.0
    probes: int = 0
    rejected: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line for metadata and logs."""
        if not self.probes:
            return self.name
        return (
            f"{self.name} (sigma within {100 * self.deviation:.2g} % rms of float32, median {100 * self.bias:+.2g} %, "
            f"on {self.probes} probes)"
        )


def reduced(
    linearization: Linearization,
    tangents: Tensor,
    *,
    tolerance: float = 0.01,
    candidates: Sequence[PrecisionName] | None = None,
    chunk: int | None = None,
) -> tuple[Linearization, Precision]:
    r"""Take the fastest precision that leaves σ within a tolerance, judged on some probes.

    The same probes are pushed in float32 and in each candidate. Both maps of σ (in-phase and complex) are
    estimated from both, as plain means. A candidate passes where, over the voxels of the object,

    .. math:: \operatorname{rms}(\sigma_c / \sigma - 1) \le t, \qquad |\operatorname{median}(\sigma_c / \sigma - 1)|
              \le t / 10.

    The rms is the sum of what stays and of what averages out with more probes, so that it is smaller for all of them.
    The choice depends on the tangents alone. Everything here is pushed at once in this thread: whoever shares a device
    holds it meanwhile.

    Parameters
    ----------
    linearization
        Of the reconstruction at the measured data.
    tangents
        The first block of probes, shape `(probes, coils, k1, k0)`; at least 4 probes.
    tolerance
        Largest relative deviation t of σ.
    candidates
        Tried in this order, and float32 in the end. None for what the device is fast at: `bf16` and `tf32` on a
        GPU with tensor cores for them, nothing but float32 elsewhere. Data in double precision are never reduced.
    chunk
        Probes pushed at a time; None chooses.

    Returns
    -------
        The linearization in that precision, its value untouched; and the report. On a CPU that is the
        linearization itself where no candidate is given.

    Raises
    ------
    ValueError
        If the tolerance is not positive, a candidate unknown, or the probes too few.
    """
    if not (0 < tolerance < math.inf):
        raise ValueError(f"reduced: tolerance is {tolerance}; expected a positive number, as 0.01 for 1 %")
    faster = _faster(_usual(tangents.device) if candidates is None else candidates)
    if tangents.dtype not in (torch.complex64, torch.float32):
        return linearization, Precision(name="float32")
    exact = in_precision(linearization, "float32", tangents.device)
    if not faster:
        return exact, Precision(name="float32")
    if len(tangents) < FEWEST_PROBES:
        raise ValueError(f"reduced: {len(tangents)} probes to compare; at least {FEWEST_PROBES} are needed")
    return _first_good(linearization, exact, tangents, tolerance, faster, chunk or default_chunk(linearization))


def _first_good(
    linearization: Linearization,
    exact: Linearization,
    tangents: Tensor,
    tolerance: float,
    faster: Sequence[PrecisionName],
    size: int,
) -> tuple[Linearization, Precision]:
    """The first candidate that leaves σ within the tolerance, else the exact one."""
    reference = _pushed(exact, tangents, size)
    rejected: list[str] = []
    for name in faster:
        try:
            candidate = in_precision(linearization, name, tangents.device)
            pushed = _pushed(candidate, tangents, size)
        except (RuntimeError, ValueError, TypeError) as error:
            rejected.append(f"{name}: {(str(error).splitlines() or [type(error).__name__])[0]}")
            continue
        found = _compared(name, reference, pushed, linearization.value, tuple(rejected))
        if found.deviation <= tolerance and abs(found.bias) <= BIAS_SHARE * tolerance:
            return candidate, found
        rejected.append(f"{name}: {_refusal(found, tolerance)}")
    return exact, Precision(name="float32", rejected=tuple(rejected))


def in_precision(linearization: Linearization, name: PrecisionName, device: torch.device) -> Linearization:
    """The same linearization, pushing in a precision that was found good before; nothing is compared.

    Parameters
    ----------
    linearization
        In float32.
    name
        Which precision.
    device
        Of the tangents.

    Raises
    ------
    ValueError
        If the device has no TF32; at the push if there is no convolution that could be lowered to bfloat16.
    """
    cuda = device.type == "cuda"
    if name == "float32" and not cuda:
        return linearization
    if name == "tf32" and not cuda:
        raise ValueError(f"only CUDA devices know it, the data are on {device.type!r}")
    push = linearization.push

    def scoped(tangents: Tensor) -> Tensor:
        with ExitStack() as stack:
            if cuda:
                stack.enter_context(tensor_cores(name == "tf32"))
            if name != "bf16":
                return push(tangents)
            seen = stack.enter_context(lowered_convolutions())
            pushed = push(tangents)
        if len(tangents) and not seen.convolutions:
            raise ValueError("no convolution of the reconstruction is recorded in float32")
        return pushed

    return replace(linearization, push=scoped)


def _usual(device: torch.device) -> tuple[PrecisionName, ...]:
    """Candidates, from the fastest to the exact one."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _AMPERE:
        return ("float32",)
    return "bf16", "tf32", "float32"


def _faster(candidates: Sequence[PrecisionName]) -> tuple[PrecisionName, ...]:
    """Candidates up to float32, known ones."""
    for name in candidates:
        if name not in get_args(PrecisionName):
            raise ValueError(f"reduced: candidate {name!r} is unknown; known are {', '.join(get_args(PrecisionName))}")
    return tuple(itertools.takewhile(lambda name: name != "float32", candidates))


def _pushed(linearization: Linearization, tangents: Tensor, size: int) -> Tensor:
    return torch.cat([linearization.push(part) for part in tangents.split(size)])


def _refusal(found: Precision, tolerance: float) -> str:
    if found.deviation == math.inf:
        return "the probes compared leave no noise in the object"
    return (
        f"sigma is off by {100 * found.deviation:.2g} % rms, median {100 * found.bias:+.2g} %; allowed are "
        f"{100 * tolerance:.2g} % and {100 * BIAS_SHARE * tolerance:.2g} %"
    )


def _compared(
    name: PrecisionName, reference: Tensor, pushed: Tensor, value: Tensor, rejected: tuple[str, ...]
) -> Precision:
    """How far σ of some probes is from that of the same probes in float32; the worse of the two maps counts."""
    direction, inside = phase_factor(value), object_mask(value)
    deviations, biases = [], []
    for kind in _KINDS if value.is_complex() else _KINDS[:1]:
        exact, other = (kind(probes, direction)[inside] for probes in (reference, pushed))
        noisy = exact > 0
        if not bool(noisy.any()):
            deviations.append(math.inf)
            biases.append(math.inf)
            continue
        off = (other[noisy] / exact[noisy]).sqrt() - 1
        deviations.append(float(off.square().mean().sqrt()))
        biases.append(float(off.median()))
    error = moments(pushed - reference, None).u_abs[inside]
    power = moments(reference, None).u_abs[inside]
    noisy = power > 0
    return Precision(
        name=name,
        deviation=max(deviations),
        bias=max(biases, key=abs),
        difference=float((error[noisy] / power[noisy]).mean().sqrt()) if bool(noisy.any()) else math.inf,
        probes=len(reference),
        rejected=rejected,
    )


def _in_phase(pushed: Tensor, direction: Tensor) -> Tensor:
    sums = moments(pushed, None)
    return projected(sums.u_u, sums.u_abs, direction).clamp_min(0)


def _total(pushed: Tensor, direction: Tensor) -> Tensor:
    del direction
    return moments(pushed, None).u_abs


_KINDS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (_in_phase, _total)
