r"""Whether whitened data are white with the right scale, judged on the data themselves."""

import math
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from voxelsigma.noise.covariance import ComplexArray
from voxelsigma.noise.edge import EDGE_FRACTION, empty_positions
from voxelsigma.noise.fourier import ifft_centred

MOST_BYTES: Final = 2**24
"""Memory that is kept of the outermost lines, and as much again of the central ones."""

LARGEST_ERROR: Final = 0.03
"""Relative standard error of a variance above which nothing is said: a deviation of 20 % is then 6 of them."""

OBJECT_RATIO: Final = 1.35
"""Central lines above this times the outermost ones show object where there should be none."""


@dataclass(frozen=True, slots=True)
class WhitenedVariance:
    """The variance of whitened data where they show no object.

    Parameters
    ----------
    value
        Complex variance, 2 if the scale is right; None if it cannot be told.
    samples
        Samples it is the mean of.
    reason
        Why it cannot be told; empty if it can.
    """

    value: float | None
    samples: int
    reason: str = ""


def whitened_variance(outer: ComplexArray, central: ComplexArray, *, oversampled: bool) -> WhitenedVariance:
    r"""Variance of whitened lines in hybrid space, at readout positions without object.

    After an inverse FFT along the readout the noise is still white, so that the mean of :math:`|y|^2` over
    n samples without object is the variance, with a relative standard error :math:`1/\sqrt n`. Positions
    without object are those of `edge_covariance`. Nothing is said from fewer than 1,112 samples (an error above 3 %),
    nor where the central lines show a third more power at these positions than the outermost ones: noise is the
    same in all lines, an object that fills the readout is not.

    Parameters
    ----------
    outer
        The outermost lines, shape `(lines, coils, k0)`, complex, whitened.
    central
        The central lines, shape `(lines, coils, k0)`.
    oversampled
        Whether the readout is oversampled, so that its outer field of view meets the receiver's filter.
    """
    if not len(outer) or not len(central):
        return WhitenedVariance(None, 0, "no lines")
    hybrid = ifft_centred(central)
    empty = empty_positions(hybrid, oversampled=oversampled)
    found = ifft_centred(outer)[..., empty]
    least = math.ceil(LARGEST_ERROR**-2)
    if found.size < least:
        return WhitenedVariance(
            None, found.size, f"{found.size} samples without object in the outermost lines; {least} are needed"
        )
    value = _power(found)
    ratio = _power(hybrid[..., empty]) / value if value else math.inf
    if ratio > OBJECT_RATIO:
        return WhitenedVariance(
            None,
            found.size,
            f"central lines have {ratio:.2g} times the power of the outermost ones even at the emptiest positions: "
            "no part of the readout is free of object",
        )
    return WhitenedVariance(value, found.size)


@dataclass(slots=True)
class OuterLines:
    """Keeps the outermost and the central ones of lines that come by, in bounded memory.

    Parameters
    ----------
    most_bytes
        Memory of each of the two.
    """

    most_bytes: int = MOST_BYTES
    lines: int = 0
    _samples: list[ComplexArray] = field(default_factory=list)
    _distances: list[npt.NDArray[np.floating[Any]]] = field(default_factory=list)

    def add(self, samples: ComplexArray, distances: npt.NDArray[np.floating[Any]]) -> None:
        """Take lines, shape `(lines, coils, k0)`, all of one shape, and their distances from the centre `(lines,)`."""
        self.lines += len(samples)
        self._samples.append(samples)
        self._distances.append(distances)
        most = self._most()
        # pruning copies: now and then is enough
        if sum(map(len, self._distances)) > 4 * most:
            joined, ordered = self._sorted()
            kept = np.concatenate([ordered[:most], ordered[-most:]])
            self._distances = [np.concatenate(self._distances)[kept]]
            self._samples = [joined[kept]]

    def split(self) -> tuple[ComplexArray, ComplexArray]:
        """The outermost 5 % and the central quarter of all lines that came by, or as many as memory allows."""
        if not self.lines:
            nothing = np.zeros((0, 1, 1), dtype=np.complex64)
            return nothing, nothing
        joined, ordered = self._sorted()
        outer = min(self._most(), math.ceil(EDGE_FRACTION * self.lines))
        central = min(self._most(), max(1, self.lines // 4))
        return joined[ordered[::-1][:outer]], joined[ordered[:central]]

    def _most(self) -> int:
        """Lines that fit into the memory of one kind."""
        return max(16, self.most_bytes // max(1, self._samples[0][:1].nbytes))

    def _sorted(self) -> tuple[ComplexArray, npt.NDArray[np.intp]]:
        """All lines, and their order from the centre outwards."""
        return np.concatenate(self._samples), np.argsort(np.concatenate(self._distances), kind="stable")


def _power(samples: ComplexArray) -> float:
    return float(np.mean(samples.real.astype(np.float64) ** 2 + samples.imag.astype(np.float64) ** 2))
