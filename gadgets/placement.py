"""Where a readout belongs in the encoded matrix, and the readout without its oversampling."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from ismrmrd import constants

from voxelsigma.formats.header import Encoding
from voxelsigma.formats.readouts import ReadoutBlock, Samples
from voxelsigma.noise.fourier import fft_centred, ifft_centred


@dataclass(frozen=True, slots=True)
class ReadoutGeometry:
    """The readout axis before and after its oversampling is removed.

    Parameters
    ----------
    oversampled
        Encoded samples, as acquired.
    size
        Samples of the same resolution over the reconstructed field of view.
    """

    oversampled: int
    size: int

    @classmethod
    def of(cls, encoding: Encoding) -> "ReadoutGeometry":
        """From an encoding: the encoded field of view is cropped to the reconstructed one where it is larger."""
        encoded = encoding.encoded_matrix[2]
        part = min(1.0, encoding.recon_fov_mm[2] / encoding.encoded_fov_mm[2])
        return cls(oversampled=encoded, size=max(1, round(encoded * part)))

    def remove(self, samples: Samples) -> Samples:
        """Crop the field of view along the last axis, `(..., oversampled)` to `(..., size)`; noise stays white."""
        if self.size == self.oversampled:
            return samples
        first = self.oversampled // 2 - self.size // 2
        return fft_centred(ifft_centred(samples)[..., first : first + self.size])

    def matrix(self) -> npt.NDArray[np.complex64]:
        """The same as a matrix, shape `(size, oversampled)`."""
        return self.remove(np.eye(self.oversampled, dtype=np.complex64)).T

    def limits(self, start: int, stop: int) -> tuple[int, int]:
        """First and last sample after removal, of the samples `start` to `stop` (exclusive) before it."""
        ratio = self.size / self.oversampled
        centre, origin = self.oversampled // 2, self.size // 2
        first = origin + int(np.ceil((start - centre) * ratio - 1e-6))
        last = origin + int(np.floor((stop - 1 - centre) * ratio + 1e-6))
        return max(0, first), min(self.size - 1, last)


def placed_samples(block: ReadoutBlock, oversampled: int) -> tuple[Samples, tuple[int, int]]:
    """Readouts on the whole oversampled readout axis, zeros where nothing was acquired.

    Reverse readouts are turned round; `discard_pre` and `discard_post` samples are dropped; an asymmetric echo
    is placed by its `center_sample`.

    Returns
    -------
        Shape `(readouts, coils, oversampled)`, and the first and last (exclusive) position that was acquired.

    Raises
    ------
    ValueError
        If the samples do not fit, or the readouts of the block were not acquired alike.
    """
    head = block.headers[0]
    length = block.samples.shape[2]
    before, after, centre = int(head["discard_pre"]), int(head["discard_post"]), int(head["center_sample"])
    samples = block.samples
    if block.flagged(constants.ACQ_IS_REVERSE)[0]:
        samples = samples[..., ::-1]
        before, after = after, before
        # converters give the middle of a symmetric readout for both directions; elsewhere the echo is mirrored
        if 2 * centre != length:
            centre = length - 1 - centre
    kept = samples[..., before : length - after]
    start = oversampled // 2 - centre + before
    stop = start + kept.shape[2]
    if kept.shape[2] < 1 or start < 0 or stop > oversampled:
        raise ValueError(
            f"accumulate: readout {int(head['scan_counter'])} of {length} samples (discard {before} and {after}, "
            f"centre {centre}) does not fit the encoded readout of {oversampled} samples"
        )
    if (start, stop) == (0, oversampled):
        return kept, (start, stop)
    placed = np.zeros((*kept.shape[:2], oversampled), dtype=np.complex64)
    placed[..., start:stop] = kept
    return placed, (start, stop)


def line_position(block: ReadoutBlock, encoding: Encoding, axis: int) -> npt.NDArray[np.int64]:
    """Index in the encoded matrix of each readout's line along k1 (axis 1) or k2 (axis 2).

    The line at encodingLimits' centre goes to the middle of the matrix.

    Raises
    ------
    ValueError
        If a line lies outside the matrix.
    """
    name = f"kspace_encode_step_{axis}"
    size = encoding.encoded_matrix[2 - axis]
    lines = block.headers["idx"][name].astype(np.int64)
    position: npt.NDArray[np.int64] = lines - encoding.line_limit(axis).center + size // 2
    outside = (position < 0) | (position >= size)
    if outside.any():
        bad = int(np.flatnonzero(outside)[0])
        raise ValueError(
            f"accumulate: readout {int(block.headers['scan_counter'][bad])} has {name} {int(lines[bad])}; with the "
            f"centre at {encoding.line_limit(axis).center} only {encoding.line_limit(axis).center - size // 2} to "
            f"{encoding.line_limit(axis).center - size // 2 + size - 1} fit the encoded matrix of {size}"
        )
    return position
