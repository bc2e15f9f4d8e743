"""RECON_DATA of Gadgetron's own gadgets, taken apart into the readouts that it was put together from."""

import itertools
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from voxelsigma.formats.header import Encoding
from voxelsigma.formats.readouts import HEADER_DTYPE, Headers, ReadoutBlock, Samples
from voxelsigma.gadgets.wire import Bucket, ReconBuffer, ReconData

_LINE_AXES: Final = ("kspace_encode_step_2", "kspace_encode_step_1")


def recon_readouts(
    found: ReconData, encodings: tuple[Encoding, ...]
) -> tuple[tuple[ReadoutBlock, ...], tuple[ReadoutBlock, ...]]:
    """Reference and imaging readouts of a RECON_DATA that no gadget of ours made.

    Where a line belongs is told by the counters of its own header, whatever the axes N and S stand for. Reference
    lines that were cut out as a block are found by the headers, which the cut leaves as they were.

    Parameters
    ----------
    found
        Buffers of shape `(slices, sets, repetitions, coils, k2, k1, k0)`, one pair an encoding space.
    encodings
        Of the scan's header, to check the matrix against.

    Returns
    -------
        Blocks of readouts in the order of their `scan_counter`; first the reference lines, then the imaging lines.

    Raises
    ------
    ValueError
        If the data are not Cartesian, do not fit the encoded matrix, or contradict their headers.
    """
    reference: list[ReadoutBlock] = []
    imaging: list[ReadoutBlock] = []
    for space, bit in enumerate(found.bits):
        if space >= len(encodings):
            raise ValueError(
                f"accumulate: RECON_DATA has {len(found.bits)} encoding spaces; the header has {len(encodings)}"
            )
        if bit.reference is not None:
            reference += _readouts(bit.reference, encodings[space], "RECON_DATA's reference", stored=False)
        imaging += _readouts(bit.data, encodings[space], "RECON_DATA", stored=True)
    return tuple(reference), tuple(imaging)


def refuse_collected(gadget: str, item: Any) -> None:
    """Refuse what Gadgetron's own gadgets collected, where a `KSpace` is needed.

    Raises
    ------
    ValueError
        If the item is a bucket or a RECON_DATA.
    """
    if isinstance(item, ReconData | Bucket):
        name = "RECON_DATA" if isinstance(item, ReconData) else "a BUCKET"
        raise ValueError(
            f"{gadget}: got {name} of Gadgetron's own gadgets; put 'accumulate' (with prewhitened='true' where "
            "NoiseAdjust ran) before"
        )


def _readouts(buffer: ReconBuffer, encoding: Encoding, what: str, *, stored: bool) -> list[ReadoutBlock]:
    """Sampled lines of one buffer; `stored` says that each must lie where its counters put it."""
    _check_kind(buffer, what)
    data, headers = buffer.data, buffer.headers
    if not data.size:
        return []
    if headers.shape != _line_shape(data):
        headers = _headers_of_block(data, headers, what)
    rows = np.argwhere(headers["number_of_samples"] > 0)
    rows = rows[np.argsort(headers[tuple(rows.T)]["scan_counter"], kind="stable")]
    heads = headers[tuple(rows.T)]
    if not len(heads):
        return []
    _check_matrix(data.shape, encoding, what)
    if stored:
        _check_places(rows, heads, data.shape, encoding, what)
    # advanced indices on both sides of the coils: (lines, coils, k0)
    samples = data[rows[:, 0], rows[:, 1], rows[:, 2], :, rows[:, 3], rows[:, 4], :]
    centre = int(buffer.sampling.sampling_limits[0].center)
    names = ("number_of_samples", "center_sample", "discard_pre", "discard_post")
    alike = np.stack([heads[name].astype(np.int64) for name in names], axis=1)
    changed = np.any(np.diff(alike, axis=0) != 0, axis=1)
    edges = [0, *(np.flatnonzero(changed) + 1).tolist(), len(heads)]
    return [
        _block(samples[start:stop], heads[start:stop].copy(), centre, what) for start, stop in itertools.pairwise(edges)
    ]


def _block(samples: Samples, heads: Headers, centre: int, what: str) -> ReadoutBlock:
    """Readouts as they were before BucketToBuffer put them into its buffer: it drops discarded samples, or moves them.

    Parameters
    ----------
    samples
        Lines of the buffer, shape `(lines, coils, k0)`.
    heads
        Their headers, alike in number, centre and discarded samples.
    centre
        The buffer's centre of k-space along k0.
    """
    names = ("number_of_samples", "center_sample", "discard_pre", "discard_post")
    length, echo, before, after = (int(heads[0][name]) for name in names)
    if echo >= length:
        # upstream gadgets write this for readouts that they made symmetric
        echo = length // 2
        heads["center_sample"] = echo
    kept = length - before - after
    size = samples.shape[2]
    if size == length and echo == length // 2:
        first = before
    elif size == kept:
        first = 0
    else:
        first = centre - echo
    if kept < 1 or first < 0 or first + kept > size:
        raise ValueError(
            f"accumulate: a line of {what} has {size} samples; its header states {length} (discard {before} and "
            f"{after}, centre {echo})"
        )
    # coil compression upstream leaves the headers as they were
    heads["active_channels"] = samples.shape[1]
    if kept == length == size:
        whole = samples
    else:
        whole = np.zeros((*samples.shape[:2], length), dtype=np.complex64)
        whole[..., before : length - after] = samples[..., first : first + kept]
    return ReadoutBlock(heads, whole, np.zeros((len(heads), length, 0), dtype=np.float32))


def _headers_of_block(data: npt.NDArray[np.complex64], headers: Headers, what: str) -> Headers:
    """Headers for reference lines that were cut out as a block, shape as the lines of `data`.

    The cut runs from the first sampled line to the last. Axes over which the block was averaged take the header of the
    first that has the line.
    """
    axes = _line_shape(data)
    sampled = headers["number_of_samples"] > 0
    if not sampled.any():
        raise ValueError(f"accumulate: {what} lines of shape {data.shape} come without a header")
    cut = [slice(0, size) for size in headers.shape[3:]]
    if headers.shape[3:] != axes[3:]:
        cut = [_extent(np.asarray(sampled.any(axis=tuple({0, 1, 2, 3, 4} - {axis})))) for axis in (3, 4)]
    sizes = [part.stop - part.start for part in cut]
    if sizes != list(axes[3:]):
        raise ValueError(
            f"accumulate: {what} lines have shape (k2, k1) {axes[3:]}, but their headers mark lines over {tuple(sizes)}"
        )
    found = headers[:, :, :, cut[0], cut[1]]
    for axis in range(3):
        if axes[axis] == found.shape[axis]:
            continue
        if axes[axis] != 1:
            raise ValueError(f"accumulate: {what} lines have shape {data.shape}, their headers {headers.shape}")
        first = (found["number_of_samples"] > 0).argmax(axis=axis)
        found = np.take_along_axis(found, np.expand_dims(first, axis), axis=axis)
    return np.ascontiguousarray(found, dtype=HEADER_DTYPE)


def _extent(mask: npt.NDArray[np.bool_]) -> slice:
    marked = np.flatnonzero(mask)
    return slice(int(marked[0]), int(marked[-1]) + 1)


def _line_shape(data: npt.NDArray[np.complex64]) -> tuple[int, ...]:
    """Shape of the headers that belong to data: all axes but coils and k0."""
    return (*data.shape[:3], *data.shape[4:6])


def _check_kind(buffer: ReconBuffer, what: str) -> None:
    headers = buffer.headers
    dimensions = int(headers["trajectory_dimensions"].max(initial=0))
    if buffer.trajectory is not None or buffer.density is not None or dimensions:
        raise ValueError(
            f"accumulate: {what} brings a trajectory or density weights; only Cartesian data without them can be placed"
        )


def _check_matrix(shape: tuple[int, ...], encoding: Encoding, what: str) -> None:
    """Refuse a buffer that is larger than the header's encoded matrix."""
    found = shape[4:]
    if any(size > limit for size, limit in zip(found, encoding.encoded_matrix, strict=True)):
        raise ValueError(
            f"accumulate: {what} has a matrix (z, y, x) of {found}; the header's encoded matrix is "
            f"{encoding.encoded_matrix}"
        )


def _check_places(
    rows: npt.NDArray[np.int64], heads: Headers, shape: tuple[int, ...], encoding: Encoding, what: str
) -> None:
    """Refuse imaging lines that do not lie where the header's encoding limits put their counters."""
    for column, (axis, name) in enumerate(zip((2, 1), _LINE_AXES, strict=True)):
        size = encoding.encoded_matrix[2 - axis]
        if shape[4 + column] != size:
            continue
        expected = heads["idx"][name].astype(np.int64) + size // 2 - encoding.line_limit(axis).center
        wrong = np.flatnonzero(expected != rows[:, 3 + column])
        if len(wrong):
            number = int(wrong[0])
            raise ValueError(
                f"accumulate: {what} holds the line of {name} {int(heads['idx'][name][number])} at "
                f"{int(rows[number, 3 + column])}; the header's encoding limits put it at {int(expected[number])}"
            )
