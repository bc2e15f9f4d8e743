"""Where a readout belongs in the encoded matrix, and the readout without its oversampling."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.fft
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

    def cropped(self) -> "ReadoutGeometry":
        """The same readout where something upstream removed its oversampling."""
        return ReadoutGeometry(oversampled=self.size, size=self.size)

    def remove(self, samples: Samples) -> Samples:
        """Crop the field of view along the last axis, `(..., oversampled)` to `(..., size)`; noise stays white."""
        if self.size == self.oversampled:
            return samples
        if self.size % 2 == self.oversampled % 2 == 0:
            return self._remove_even(samples)
        first = self.oversampled // 2 - self.size // 2
        return fft_centred(ifft_centred(samples)[..., first : first + self.size])

    def _remove_even(self, samples: Samples) -> Samples:
        """The same between even sizes, where the shifts to the centre and back cancel: both turn odd voxels' sign."""
        half = self.size // 2
        image = scipy.fft.ifft(samples, axis=-1, norm="ortho")
        kept = np.concatenate([image[..., :half], image[..., -half:]], axis=-1)
        found: Samples = scipy.fft.fft(kept, axis=-1, norm="ortho", overwrite_x=True)
        return found

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


def removed_upstream(block: ReadoutBlock, geometry: ReadoutGeometry) -> bool:
    """Whether something upstream removed the oversampling of a block, which no flag tells.

    A readout of the whole field of view reaches at least one end of the oversampled k-space; a cropped one reaches
    an end of the smaller k-space instead: both, or one with an asymmetric echo.
    """
    length = block.samples.shape[2]
    centre = _echo(block)
    if geometry.size == geometry.oversampled or length > geometry.size:
        return False

    def ends(size: int) -> tuple[int, int]:
        start = size // 2 - centre
        return start, size - start - length

    return 0 not in ends(geometry.oversampled) and 0 in ends(geometry.size) and min(ends(geometry.size)) >= 0


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
    before, after, centre = int(head["discard_pre"]), int(head["discard_post"]), _echo(block)
    samples = block.samples
    if block.flagged(constants.ACQ_IS_REVERSE)[0]:
        samples = samples[..., ::-1]
        before, after = after, before
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


def moved_line(
    samples: Samples, line: tuple[int, int], source: Encoding, target: Encoding
) -> tuple[Samples, tuple[int, int]]:
    """A reference readout of an encoding space of its own, on the matrix of the imaging one.

    Raises
    ------
    ValueError
        If the fields of view differ, or the line lies outside the imaging matrix.
    """
    fields = [
        (*encoding.encoded_fov_mm[:2], encoding.encoded_fov_mm[2] * geometry.size / geometry.oversampled)
        for encoding in (source, target)
        for geometry in (ReadoutGeometry.of(encoding),)
    ]
    if not np.allclose(fields[0], fields[1], rtol=0.01):
        raise ValueError(
            f"accumulate: reference lines have a field of view of {fields[0][::-1]} mm, imaging lines "
            f"{fields[1][::-1]} mm; they must agree"
        )
    moved = [
        index - before // 2 + after // 2
        for index, before, after in zip(line, source.encoded_matrix, target.encoded_matrix, strict=False)
    ]
    if any(not 0 <= index < size for index, size in zip(moved, target.encoded_matrix, strict=False)):
        raise ValueError(f"accumulate: reference line {line} lies outside the imaging matrix {target.encoded_matrix}")
    size, length = ReadoutGeometry.of(target).size, samples.shape[1]
    placed = np.zeros((len(samples), size), dtype=np.complex64)
    first = size // 2 - length // 2
    lower, upper = max(0, first), min(size, first + length)
    placed[:, lower:upper] = samples[:, lower - first : upper - first]
    return placed, (moved[0], moved[1])


def _echo(block: ReadoutBlock) -> int:
    """Sample at the centre of k-space, of a reverse readout after it was turned round."""
    length, centre = block.samples.shape[2], int(block.headers["center_sample"][0])
    # converters give the middle of a symmetric readout for both directions; elsewhere the echo is mirrored
    if block.flagged(constants.ACQ_IS_REVERSE)[0] and 2 * centre != length:
        return length - 1 - centre
    return centre
