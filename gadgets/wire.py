"""Gadgetron's wire format as pure functions on bytes: parsers that check sizes before they allocate."""

import ctypes
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from gadgetron.external import constants
from gadgetron.types.acquisition_bucket import read_acquisition_bucket
from gadgetron.types.image_array import ImageArray, read_image_array, write_image_array
from gadgetron.types.recon_data import SamplingDescription
from ismrmrd import Acquisition, AcquisitionHeader, Image, ImageHeader, Waveform, WaveformHeader
from ismrmrd.image import get_dtype_from_data_type

from voxelsigma.formats.readouts import HEADER_DTYPE, Headers

CONFIG: Final = constants.GADGET_MESSAGE_CONFIG
HEADER: Final = constants.GADGET_MESSAGE_HEADER
CLOSE: Final = constants.GADGET_MESSAGE_CLOSE
TEXT: Final = constants.GADGET_MESSAGE_TEXT
ERROR: Final = constants.GADGET_MESSAGE_ERROR
ACQUISITION: Final = constants.GADGET_MESSAGE_ISMRMRD_ACQUISITION
IMAGE: Final = constants.GADGET_MESSAGE_ISMRMRD_IMAGE
RECON_DATA: Final = constants.GADGET_MESSAGE_RECON_DATA
IMAGE_ARRAY: Final = constants.GADGET_MESSAGE_IMAGE_ARRAY
WAVEFORM: Final = constants.GADGET_MESSAGE_ISMRMRD_WAVEFORM
BUCKET: Final = constants.GADGET_MESSAGE_BUCKET

MAX_TEXT: Final = 64 * 2**20
MAX_ARRAY: Final = 16 * 2**30
MAX_ITEM: Final = 4 * 2**30
MAX_DIMENSIONS: Final = 10


class Reader:
    """Exact reads from a byte source.

    Parameters
    ----------
    receive
        Returns up to n bytes, none at the end of the source.
    """

    def __init__(self, receive: Callable[[int], bytes]) -> None:
        self._receive = receive

    def read(self, count: int, what: str = "a message") -> bytes:
        """Exactly `count` bytes.

        Raises
        ------
        ValueError
            If `count` is beyond what any message can hold.
        EOFError
            If the source ends first; the text has the byte counts.
        """
        if not 0 <= count <= MAX_ARRAY:
            raise ValueError(f"wire: {what} claims {count} bytes; at most {MAX_ARRAY} are accepted")
        parts, missing = [], count
        while missing:
            part = self._receive(min(missing, 2**20))
            if not part:
                raise EOFError(f"stream ends after {count - missing} of {count} bytes of {what}")
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)


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
    """

    data: npt.NDArray[np.complex64]
    headers: Headers
    sampling: SamplingDescription


@dataclass(frozen=True, slots=True, eq=False)
class ReconBit:
    """Imaging data and reference lines of one encoding space."""

    data: ReconBuffer
    reference: ReconBuffer | None


@dataclass(frozen=True, slots=True, eq=False)
class ReconData:
    """A RECON_DATA message."""

    bits: tuple[ReconBit, ...]


@dataclass(frozen=True, slots=True)
class Close:
    """The end of a stream."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An ERROR message."""

    text: str


def read_message(reader: Reader) -> Any:
    """The next message as an object: an ismrmrd or gadgetron item, `ReconData`, `Failure` or `Close`.

    Raises
    ------
    EOFError
        If the source ends before or inside the message.
    ValueError
        If the message id is unknown or a size is implausible.
    """
    identifier = struct.unpack("<H", reader.read(2, "a message id"))[0]
    if identifier == CLOSE:
        return Close()
    if identifier not in _PARSERS:
        raise ValueError(f"wire: message id {identifier} is unknown; known are {sorted(_PARSERS)} and {CLOSE}")
    return _PARSERS[identifier](reader)


def read_text(reader: Reader, identifier: int, what: str) -> bytes:
    """A text message (CONFIG or HEADER) that must come next."""
    found = struct.unpack("<H", reader.read(2, "a message id"))[0]
    if found != identifier:
        raise ValueError(f"wire: expected {what} (message id {identifier}), got message id {found}")
    return _sized_text(reader, "<I", what)


def text_message(identifier: int, content: bytes) -> bytes:
    """A CONFIG or HEADER message."""
    return struct.pack("<HI", identifier, len(content)) + content


def error_message(text: str) -> bytes:
    """An ERROR message."""
    content = text.encode()
    return struct.pack("<HQ", ERROR, len(content)) + content


def close_message() -> bytes:
    """A CLOSE message."""
    return struct.pack("<H", CLOSE)


def message(item: Any) -> bytes:
    """An item of the wire as bytes.

    Raises
    ------
    TypeError
        If the item has no message.
    """
    for kind, identifier in ((Acquisition, ACQUISITION), (Waveform, WAVEFORM), (Image, IMAGE)):
        if isinstance(item, kind):
            return struct.pack("<H", identifier) + item.to_bytes()
    if isinstance(item, ReconData):
        return _recon_data_bytes(item)
    if isinstance(item, ImageArray):
        parts: list[bytes] = []
        write_image_array(_Sink(parts.append), item)
        return b"".join(parts)
    raise TypeError(f"wire: an item of type {type(item).__name__} has no message")


class _Sink:
    """What the gadgetron package writes to."""

    def __init__(self, write: Callable[[bytes], None]) -> None:
        self.write = lambda part: write(bytes(part))


def _sized_text(reader: Reader, length_format: str, what: str) -> bytes:
    length = struct.unpack(length_format, reader.read(struct.calcsize(length_format), f"the length of {what}"))[0]
    if length > MAX_TEXT:
        raise ValueError(f"wire: {what} claims {length} bytes; at most {MAX_TEXT} are accepted")
    return reader.read(length, what)


def _bounded(count: int, what: str) -> int:
    if count > MAX_ITEM:
        raise ValueError(f"wire: {what} claims {count} bytes; at most {MAX_ITEM} are accepted")
    return count


def _acquisition(reader: Reader) -> Acquisition:
    content = reader.read(ctypes.sizeof(AcquisitionHeader), "an ACQUISITION header")
    header = AcquisitionHeader.from_buffer_copy(content)
    samples, coils = header.number_of_samples, header.active_channels
    trajectory = reader.read(
        _bounded(4 * samples * header.trajectory_dimensions, "a trajectory"), "an ACQUISITION's trajectory"
    )
    data = reader.read(_bounded(8 * samples * coils, "an ACQUISITION"), "an ACQUISITION's samples")
    return Acquisition(
        header,
        data=np.frombuffer(data, dtype=np.complex64).reshape(coils, samples).copy(),
        trajectory=np.frombuffer(trajectory, dtype=np.float32).reshape(samples, header.trajectory_dimensions).copy(),
    )


def _waveform(reader: Reader) -> Waveform:
    content = reader.read(ctypes.sizeof(WaveformHeader), "a WAVEFORM header")
    header = WaveformHeader.from_buffer_copy(content)
    size = _bounded(4 * header.channels * header.number_of_samples, "a WAVEFORM")
    data = reader.read(size, "a WAVEFORM's samples")
    waveform = Waveform(content)
    waveform.data[:] = np.frombuffer(data, dtype=np.uint32).reshape(waveform.data.shape)
    return waveform


def _image(reader: Reader) -> Image:
    content = reader.read(ctypes.sizeof(ImageHeader), "an IMAGE header")
    header = ImageHeader.from_buffer_copy(content)
    try:
        dtype = get_dtype_from_data_type(header.data_type)
    except TypeError:
        raise ValueError(f"wire: IMAGE data type {header.data_type} is unknown; 1 to 8 are known") from None
    attributes = _sized_text(reader, "<Q", "an IMAGE's metadata").rstrip(b"\0").decode()
    x, y, z = header.matrix_size
    size = _bounded(header.channels * x * y * z * dtype.itemsize, "an IMAGE")
    data = np.frombuffer(reader.read(size, "an IMAGE's voxels"), dtype=dtype)
    image = Image(content, attributes)
    image.data[:] = data.reshape(header.channels, z, y, x)
    return image


def _dimensions(reader: Reader, itemsize: int, what: str) -> tuple[int, ...]:
    """Dimensions of an array message, checked before anything is allocated for it."""
    count = struct.unpack("<Q", reader.read(8, f"the dimensions of {what}"))[0]
    if count > MAX_DIMENSIONS:
        raise ValueError(f"wire: {what} claims {count} dimensions; at most {MAX_DIMENSIONS} are accepted")
    sizes = struct.unpack(f"<{count}Q", reader.read(8 * count, f"the dimensions of {what}"))
    total = itemsize
    for size in sizes:
        total *= size
    if total > MAX_ARRAY:
        raise ValueError(f"wire: {what} claims shape {sizes}, {total} bytes; at most {MAX_ARRAY} are accepted")
    return sizes


def _array(reader: Reader, dtype: npt.DTypeLike, what: str, dimensions: int) -> npt.NDArray[Any]:
    """An array in C order: its axes are the message's, last one first."""
    kind = np.dtype(dtype)
    sizes = _dimensions(reader, kind.itemsize, what)
    if len(sizes) != dimensions:
        raise ValueError(f"wire: {what} has {len(sizes)} dimensions; expected {dimensions}")
    content = reader.read(kind.itemsize * int(np.prod(sizes, dtype=np.int64)), what)
    return np.frombuffer(content, dtype=kind).reshape(sizes[::-1]).copy()


def _recon_buffer(reader: Reader) -> ReconBuffer:
    data = _array(reader, np.complex64, "RECON_DATA", 7)
    for what in ("a trajectory", "a density"):
        if reader.read(1, "RECON_DATA") != b"\0":
            sizes = _dimensions(reader, 4, what)
            reader.read(4 * int(np.prod(sizes, dtype=np.int64)), what)
    headers = _array(reader, HEADER_DTYPE, "RECON_DATA headers", 5)
    sampling = reader.read(ctypes.sizeof(SamplingDescription), "a sampling description")
    return ReconBuffer(data, headers, SamplingDescription.from_buffer_copy(sampling))


def _recon_data(reader: Reader) -> ReconData:
    count = struct.unpack("<Q", reader.read(8, "RECON_DATA"))[0]
    if count > 64:
        raise ValueError(f"wire: RECON_DATA claims {count} encoding spaces; at most 64 are accepted")
    bits = []
    for _ in range(count):
        data = _recon_buffer(reader)
        present = reader.read(1, "RECON_DATA") != b"\0"
        bits.append(ReconBit(data, _recon_buffer(reader) if present else None))
    return ReconData(tuple(bits))


def _recon_data_bytes(item: ReconData) -> bytes:
    parts = [struct.pack("<HQ", RECON_DATA, len(item.bits))]
    for bit in item.bits:
        parts.append(_recon_buffer_bytes(bit.data))
        parts.append(b"\0" if bit.reference is None else b"\1" + _recon_buffer_bytes(bit.reference))
    return b"".join(parts)


def _recon_buffer_bytes(buffer: ReconBuffer) -> bytes:
    arrays = []
    for array in (buffer.data, buffer.headers):
        sizes = array.shape[::-1]
        arrays.append(struct.pack(f"<Q{len(sizes)}Q", len(sizes), *sizes) + np.ascontiguousarray(array).tobytes())
    return arrays[0] + b"\0\0" + arrays[1] + bytes(buffer.sampling)


_PARSERS: dict[int, Callable[[Reader], Any]] = {
    TEXT: lambda reader: _sized_text(reader, "<I", "a TEXT").decode(errors="replace"),
    ERROR: lambda reader: Failure(_sized_text(reader, "<Q", "an ERROR").decode(errors="replace")),
    ACQUISITION: _acquisition,
    WAVEFORM: _waveform,
    IMAGE: _image,
    RECON_DATA: _recon_data,
    IMAGE_ARRAY: read_image_array,
    BUCKET: read_acquisition_bucket,
}
