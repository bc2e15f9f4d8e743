"""Readouts in blocks: how raw data travel inside a process."""

import ctypes
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from ismrmrd import Acquisition, AcquisitionHeader, constants
from ismrmrd.hdf5 import acquisition_header_dtype

HEADER_DTYPE: np.dtype[np.void] = acquisition_header_dtype
NOT_IMAGING: Final = (
    constants.ACQ_IS_NAVIGATION_DATA,
    constants.ACQ_IS_PHASECORR_DATA,
    constants.ACQ_IS_HPFEEDBACK_DATA,
    constants.ACQ_IS_DUMMYSCAN_DATA,
    constants.ACQ_IS_RTFEEDBACK_DATA,
    constants.ACQ_IS_SURFACECOILCORRECTIONSCAN_DATA,
    # phase stabilisation; ismrmrd 1.14 has no names for these two
    30,
    31,
)
"""Flags of readouts that are no lines of the image's k-space."""

Headers = npt.NDArray[np.void]
Samples = npt.NDArray[np.complex64]


@dataclass(frozen=True, slots=True, eq=False)
class ReadoutBlock:
    """Consecutive readouts of one shape.

    Parameters
    ----------
    headers
        ISMRMRD acquisition headers as a structured array, shape `(readouts,)`.
    samples
        Shape `(readouts, coils, k0)`, complex64.
    trajectory
        Shape `(readouts, k0, dimensions)`, float32; dimensions is 0 for Cartesian data.
    """

    headers: Headers
    samples: Samples
    trajectory: npt.NDArray[np.float32]

    def __len__(self) -> int:
        """Number of readouts."""
        return len(self.headers)

    def select(self, chosen: npt.NDArray[Any] | slice) -> "ReadoutBlock":
        """Some of the readouts, in order."""
        return ReadoutBlock(self.headers[chosen], self.samples[chosen], self.trajectory[chosen])

    def runs(self, mark: npt.NDArray[Any]) -> Iterator[tuple["ReadoutBlock", Any]]:
        """Split where a mark of the readouts, shape `(readouts,)`, changes; each part with its mark."""
        edges = [0, *(np.flatnonzero(mark[1:] != mark[:-1]) + 1).tolist(), len(self)]
        for start, stop in itertools.pairwise(edges):
            if stop > start:
                yield self.select(slice(start, stop)), mark[start]

    def with_samples(self, samples: Samples) -> "ReadoutBlock":
        """The same readouts with other samples."""
        return replace(self, samples=samples)

    def flagged(self, *flags: int) -> npt.NDArray[np.bool_]:
        """Which readouts carry any of some flags (numbers as in the ISMRMRD constants), shape `(readouts,)`."""
        mask = np.uint64(sum(1 << (flag - 1) for flag in flags))
        return (self.headers["flags"] & mask) != 0


def block_of(acquisitions: list[Acquisition]) -> ReadoutBlock:
    """One block of acquisitions that have one shape."""
    return ReadoutBlock(
        headers=np.concatenate([np.frombuffer(bytes(a.getHead()), dtype=HEADER_DTYPE) for a in acquisitions]),
        samples=np.stack([a.data for a in acquisitions]).astype(np.complex64, copy=False),
        trajectory=np.stack([a.traj for a in acquisitions]).astype(np.float32, copy=False),
    )


def joined(blocks: list[ReadoutBlock]) -> ReadoutBlock:
    """One block of several of one shape."""
    if len(blocks) == 1:
        return blocks[0]
    return ReadoutBlock(
        headers=np.concatenate([block.headers for block in blocks]),
        samples=np.concatenate([block.samples for block in blocks]),
        trajectory=np.concatenate([block.trajectory for block in blocks]),
    )


def acquisitions_of(block: ReadoutBlock) -> Iterator[Acquisition]:
    """The single acquisitions of a block, as they go onto the wire."""
    for header, samples, trajectory in zip(block.headers, block.samples, block.trajectory, strict=True):
        yield Acquisition(
            AcquisitionHeader.from_buffer_copy(header.tobytes()),
            data=np.ascontiguousarray(samples),
            trajectory=np.ascontiguousarray(trajectory),
        )


def shape_of(header: np.void) -> tuple[int, int, int]:
    """(coils, k0, trajectory dimensions) that a header states."""
    return int(header["active_channels"]), int(header["number_of_samples"]), int(header["trajectory_dimensions"])


assert HEADER_DTYPE.itemsize == ctypes.sizeof(AcquisitionHeader)
