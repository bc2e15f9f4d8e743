"""Messages that hold whole arrays: RECON_DATA, IMAGE_ARRAY and BUCKET."""

import ctypes
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from gadgetron.types.image_array import ImageArray
from gadgetron.types.recon_data import SamplingDescription
from ismrmrd import AcquisitionHeader, ImageHeader, Waveform, WaveformHeader

from voxelsigma.formats.readouts import HEADER_DTYPE, Headers, ReadoutBlock
from voxelsigma.gadgets.wire_reader import (
    MAX_ITEM,
    MAX_METADATA,
    Reader,
    array,
    array_bytes,
    bounded,
    dimensions,
    sized_text,
)
from voxelsigma.gadgets.wire_readouts import blocks_of, stated_headers, waveform_bytes, waveform_of

RECON_DATA: Final = 1023
IMAGE_ARRAY: Final = 1024
BUCKET: Final = 1050

_MOST_OBJECTS: Final = 2**20
_MOST_SPACES: Final = 64
_STATISTICS: Final = (
    "kspace_encode_step_1",
    "kspace_encode_step_2",
    "slice",
    "phase",
    "contrast",
    "repetition",
    "set",
    "segment",
    "average",
)


@dataclass(frozen=True, slots=True, eq=False)
class ReconBuffer:
    """One buffer of RECON_DATA.

    Parameters
    ----------
    data
        Shape `(slices, sets, repetitions, coils, k2, k1, k0)`, complex64: Gadgetron's `[RO, E1, E2, CHA, N, S, SLC]`.
    headers
        Shape `(slices, sets, repetitions, k2, k1)`; `number_of_samples` is 0 where no line was sampled.
    sampling
        Fields of view, matrices and limits, x first.
    trajectory, density
        Of non-Cartesian data, as they came; None for Cartesian ones.
    """

    data: npt.NDArray[np.complex64]
    headers: Headers
    sampling: SamplingDescription
    trajectory: npt.NDArray[np.float32] | None = None
    density: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class ReconBit:
    """Imaging data and reference lines of one encoding space."""

    data: ReconBuffer
    reference: ReconBuffer | None


@dataclass(frozen=True, slots=True, eq=False)
class ReconData:
    """A RECON_DATA message."""

    bits: tuple[ReconBit, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Bucket:
    """A BUCKET message: what Gadgetron's trigger collected.

    Parameters
    ----------
    data, reference
        Imaging and reference readouts, in blocks of one shape.
    waveforms
        Waveforms that came between them.
    data_stats, reference_stats
        For each encoding space the values that occur, by counter.
    """

    data: tuple[ReadoutBlock, ...]
    reference: tuple[ReadoutBlock, ...]
    waveforms: tuple[Waveform, ...] = ()
    data_stats: tuple[dict[str, tuple[int, ...]], ...] = ()
    reference_stats: tuple[dict[str, tuple[int, ...]], ...] = ()


def read_recon_data(reader: Reader) -> ReconData:
    """A RECON_DATA message behind its id."""
    (count,) = reader.unpack("<Q", "RECON_DATA")
    bounded(count, "RECON_DATA", _MOST_SPACES, "encoding spaces")
    return ReconData(tuple(_recon_bit(reader) for _ in range(count)))


def recon_data_bytes(item: ReconData) -> bytes:
    """A RECON_DATA message."""
    parts = [struct.pack("<HQ", RECON_DATA, len(item.bits))]
    for bit in item.bits:
        parts.append(_recon_buffer_bytes(bit.data))
        parts.append(b"\0" if bit.reference is None else b"\1" + _recon_buffer_bytes(bit.reference))
    return b"".join(parts)


def read_image_array(reader: Reader) -> ImageArray:
    """An IMAGE_ARRAY message behind its id, as the gadgetron package's object; axes as the package has them.

    The package's own reader cannot tell where a waveform ends: the server writes the sizes of its samples in front
    of them.
    """
    data = array(reader, np.complex64, "IMAGE_ARRAY", None)
    headers = _objects(reader, ImageHeader, "IMAGE_ARRAY headers")
    (count,) = reader.unpack("<Q", "IMAGE_ARRAY metadata")
    bounded(count, "IMAGE_ARRAY metadata", _MOST_OBJECTS, "texts")
    texts = [sized_text(reader, "<Q", "IMAGE_ARRAY metadata", MAX_METADATA) for _ in range(count)]
    return ImageArray(
        data=data.T,
        headers=headers,
        meta=[text.rstrip(b"\0").decode(errors="replace") for text in texts],
        waveform=_optional(reader, _array_waveforms),
        acq_headers=_optional(reader, lambda source: _objects(source, AcquisitionHeader, "IMAGE_ARRAY readouts")),
    )


def image_array_bytes(item: ImageArray) -> bytes:
    """An IMAGE_ARRAY message; metadata beyond ASCII goes as character references, which is all the server can read.

    Raises
    ------
    ValueError
        If it has no data.
    """
    if item.data is None:
        raise ValueError("wire: an image array without data cannot be sent")
    parts = [struct.pack("<H", IMAGE_ARRAY), array_bytes(np.asarray(item.data, dtype=np.complex64).T)]
    parts += [_object_bytes(item.headers), struct.pack("<Q", len(item.meta))]
    for text in item.meta:
        content = text.encode("ascii", errors="xmlcharrefreplace")
        parts += [struct.pack("<Q", len(content)), content]
    parts.append(b"\0" if item.waveform is None else b"\1" + struct.pack("<Q", len(item.waveform)))
    for waveform in item.waveform or ():
        head, samples = waveform_bytes(waveform)
        channels, length = waveform.data.shape
        parts += [head, struct.pack("<3Q", 2, length, channels), samples]
    parts.append(b"\0" if item.acq_headers is None else b"\1" + _object_bytes(item.acq_headers))
    return b"".join(parts)


def read_bucket(reader: Reader) -> Bucket:
    """A BUCKET message behind its id.

    Raises
    ------
    ValueError
        If its counts and byte counts contradict each other.
    """
    sizes = reader.unpack("<13Q", "a BUCKET")
    bounded(sum(sizes), "a BUCKET")
    data = _bundle(reader, sizes[0:4])
    data_stats = _statistics(reader.read(sizes[8], "BUCKET statistics"))
    reference = _bundle(reader, sizes[4:8])
    reference_stats = _statistics(reader.read(sizes[9], "BUCKET statistics"))
    count, head_bytes, sample_bytes = sizes[10:13]
    size = ctypes.sizeof(WaveformHeader)
    if head_bytes != count * size:
        raise ValueError(f"wire: a BUCKET claims {count} waveforms and {head_bytes} bytes of headers of {size}")
    heads = reader.read(head_bytes, "BUCKET waveforms")
    source = _part(reader.read(sample_bytes, "BUCKET waveforms"), "BUCKET waveforms")
    waveforms = tuple(waveform_of(heads[at : at + size], source) for at in range(0, head_bytes, size))
    if source.total != sample_bytes:
        raise ValueError(f"wire: BUCKET waveforms claim {source.total} bytes of samples; {sample_bytes} are given")
    return Bucket(data, reference, waveforms, data_stats, reference_stats)


def bucket_bytes(item: Bucket) -> bytes:
    """A BUCKET message, as the server writes it; the gadgetron package has no writer."""
    bundles = [_bundle_bytes(item.data), _bundle_bytes(item.reference)]
    statistics = [_statistics_bytes(item.data_stats), _statistics_bytes(item.reference_stats)]
    waves = [waveform_bytes(waveform) for waveform in item.waveforms]
    heads, samples = b"".join(head for head, _ in waves), b"".join(data for _, data in waves)
    counts = [sum(map(len, blocks)) for blocks in (item.data, item.reference)]
    sizes: list[int] = []
    for count, (head, path, data) in zip(counts, bundles, strict=True):
        sizes += [count, len(head), len(data), len(path)]
    sizes += [len(statistics[0]), len(statistics[1]), len(waves), len(heads), len(samples)]
    body = [*bundles[0], statistics[0], *bundles[1], statistics[1], heads, samples]
    return struct.pack("<H13Q", BUCKET, *sizes) + b"".join(body)


def _optional(reader: Reader, read: Any) -> Any:
    (present,) = reader.unpack("<B", "an optional part")
    if present > 1:
        raise ValueError(f"wire: an optional part is marked {present}; expected 0 or 1")
    return read(reader) if present else None


def _recon_bit(reader: Reader) -> ReconBit:
    found = _recon_buffer(reader)
    shape = found.data.shape
    # prepared reference lines have headers of the whole matrix; imaging data must have their own
    if found.trajectory is None and found.headers.shape != (*shape[:3], *shape[4:6]):
        raise ValueError(f"wire: RECON_DATA of shape {shape} has headers of shape {found.headers.shape}")
    return ReconBit(found, _optional(reader, _recon_buffer))


def _recon_buffer(reader: Reader) -> ReconBuffer:
    data = array(reader, np.complex64, "RECON_DATA", 7)
    trajectory = _optional(reader, lambda source: array(source, np.float32, "a trajectory"))
    density = _optional(reader, lambda source: array(source, np.float32, "a density"))
    headers = array(reader, HEADER_DTYPE, "RECON_DATA headers", 5)
    sampling = reader.read(ctypes.sizeof(SamplingDescription), "a sampling description")
    return ReconBuffer(data, headers, SamplingDescription.from_buffer_copy(sampling), trajectory, density)


def _recon_buffer_bytes(buffer: ReconBuffer) -> bytes:
    paths = [
        b"\0" if found is None else b"\1" + array_bytes(np.asarray(found, dtype=np.float32))
        for found in (buffer.trajectory, buffer.density)
    ]
    data = array_bytes(np.asarray(buffer.data, dtype=np.complex64))
    return b"".join((data, *paths, array_bytes(buffer.headers), bytes(buffer.sampling)))


def _objects(reader: Reader, kind: Any, what: str) -> npt.NDArray[Any]:
    """An array of headers as objects, axes in the message's order."""
    sizes = dimensions(reader, what)
    count = math.prod(sizes) if sizes else 0
    bounded(count, what, _MOST_OBJECTS, "objects")
    # the objects share one memory
    content = bytearray(reader.read(bounded(count * ctypes.sizeof(kind), what, MAX_ITEM), what))
    found = np.empty(count, dtype=object)
    for number in range(count):
        found[number] = kind.from_buffer(content, number * ctypes.sizeof(kind))
    return found.reshape(sizes or (0,), order="F")


def _object_bytes(found: Any) -> bytes:
    if isinstance(found, np.ndarray):
        objects = found
    else:
        # numpy takes headers in a list for arrays of bytes
        objects = np.empty(len(found), dtype=object)
        for number, entry in enumerate(found):
            objects[number] = entry
    sizes = objects.shape
    content = b"".join(bytes(entry) for entry in objects.reshape(-1, order="F"))
    return struct.pack(f"<Q{len(sizes)}Q", len(sizes), *sizes) + content


def _array_waveforms(reader: Reader) -> list[Waveform]:
    (count,) = reader.unpack("<Q", "IMAGE_ARRAY waveforms")
    bounded(count, "IMAGE_ARRAY waveforms", _MOST_OBJECTS, "waveforms")
    found = []
    for _ in range(count):
        head = reader.read(ctypes.sizeof(WaveformHeader), "a WAVEFORM header")
        header = WaveformHeader.from_buffer_copy(head)
        sizes = dimensions(reader, "a WAVEFORM's samples")
        if sizes != (header.number_of_samples, header.channels):
            raise ValueError(
                f"wire: a WAVEFORM of {header.channels} channels and {header.number_of_samples} samples comes with "
                f"samples of shape {sizes}"
            )
        found.append(waveform_of(head, reader))
    return found


def _bundle(reader: Reader, sizes: tuple[int, ...]) -> tuple[ReadoutBlock, ...]:
    count, head_bytes, sample_bytes, path_bytes = sizes
    if head_bytes != count * HEADER_DTYPE.itemsize:
        raise ValueError(
            f"wire: a BUCKET claims {count} readouts and {head_bytes} bytes of headers of {HEADER_DTYPE.itemsize}"
        )
    headers = reader.array((count,), HEADER_DTYPE, "BUCKET headers")
    paths = reader.read(path_bytes, "BUCKET trajectories")
    return tuple(blocks_of(headers, paths, reader.read(sample_bytes, "BUCKET samples")))


def _bundle_bytes(blocks: Iterable[ReadoutBlock]) -> tuple[bytes, bytes, bytes]:
    """Headers, trajectories and samples."""
    found = list(blocks)
    return (
        b"".join(stated_headers(block).tobytes() for block in found),
        b"".join(block.trajectory.astype(np.float32, copy=False).tobytes() for block in found),
        b"".join(block.samples.astype(np.complex64, copy=False).tobytes() for block in found),
    )


def _statistics(content: bytes) -> tuple[dict[str, tuple[int, ...]], ...]:
    if not content:
        return ()
    reader = _part(content, "BUCKET statistics")
    (count,) = reader.unpack("<Q", "BUCKET statistics")
    # each takes nine counts at least
    bounded(count * 8 * len(_STATISTICS), "BUCKET statistics", len(content))
    found = []
    for _ in range(count):
        values = {}
        for name in _STATISTICS:
            (number,) = reader.unpack("<Q", "BUCKET statistics")
            bounded(2 * number, "BUCKET statistics", len(content))
            values[name] = reader.unpack(f"<{number}H", "BUCKET statistics")
        found.append(values)
    if reader.total != len(content):
        raise ValueError(f"wire: BUCKET statistics take {reader.total} bytes; {len(content)} are given")
    return tuple(found)


def _statistics_bytes(found: Iterable[dict[str, tuple[int, ...]]]) -> bytes:
    entries = list(found)
    parts = [struct.pack("<Q", len(entries))]
    for values in entries:
        parts += [struct.pack(f"<Q{len(values[name])}H", len(values[name]), *values[name]) for name in _STATISTICS]
    return b"".join(parts)


def _part(content: bytes, what: str) -> Reader:
    """A reader of bytes that are here already: if they are too few, then the message contradicts itself."""
    rest = [content] if content else []

    def receive(count: int) -> bytes:
        if not rest:
            raise ValueError(f"wire: {what} claim more than the {len(content)} bytes that are given")
        return rest.pop()

    return Reader(receive)
