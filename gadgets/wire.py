"""Gadgetron's wire format: bytes to items and back.

Own parsers, since those of the gadgetron package 1.4.1 spin for ever at the end of a stream, trust every size, end
silently at an unknown id, and cannot read waveforms inside buckets and image arrays, and since those of ismrmrd-python
take the standard's 32-bit integer voxels for 64-bit ones; the item types of both are kept where they can hold what is
read.
"""

import struct
from collections.abc import Callable
from ctypes import sizeof
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from gadgetron.external import constants
from gadgetron.types.image_array import ImageArray
from ismrmrd import Acquisition, Image, ImageHeader, Meta, Waveform
from ismrmrd.constants import DATATYPE_INT
from ismrmrd.image import get_dtype_from_data_type

from voxelsigma.formats.readouts import ReadoutBlock, block_of
from voxelsigma.gadgets.wire_arrays import (
    BUCKET,
    IMAGE_ARRAY,
    RECON_DATA,
    Bucket,
    ReconBit,
    ReconBuffer,
    ReconData,
    bucket_bytes,
    image_array_bytes,
    read_bucket,
    read_image_array,
    read_recon_data,
    recon_data_bytes,
)
from voxelsigma.gadgets.wire_reader import MAX_METADATA, Reader, bounded, memory_for, sized_text
from voxelsigma.gadgets.wire_readouts import (
    ACQUISITION,
    read_readouts,
    read_waveform,
    readouts_bytes,
    waveform_bytes,
)

__all__ = [
    "ACQUISITION",
    "BUCKET",
    "CLOSE",
    "CONFIG",
    "ERROR",
    "FILENAME",
    "HEADER",
    "IMAGE",
    "IMAGE_ARRAY",
    "QUERY",
    "RECON_DATA",
    "RESPONSE",
    "TEXT",
    "WAVEFORM",
    "Bucket",
    "Close",
    "Configuration",
    "Failure",
    "FileName",
    "Query",
    "Reader",
    "ReconBit",
    "ReconBuffer",
    "ReconData",
    "Response",
    "ScanHeaderText",
    "close_message",
    "error_message",
    "message",
    "read_message",
    "read_text",
    "text_message",
]

FILENAME: Final = constants.GADGET_MESSAGE_FILENAME
CONFIG: Final = constants.GADGET_MESSAGE_CONFIG
HEADER: Final = constants.GADGET_MESSAGE_HEADER
CLOSE: Final = constants.GADGET_MESSAGE_CLOSE
TEXT: Final = constants.GADGET_MESSAGE_TEXT
QUERY: Final = constants.GADGET_MESSAGE_QUERY
RESPONSE: Final = constants.GADGET_MESSAGE_RESPONSE
ERROR: Final = constants.GADGET_MESSAGE_ERROR
IMAGE: Final = constants.GADGET_MESSAGE_ISMRMRD_IMAGE
WAVEFORM: Final = constants.GADGET_MESSAGE_ISMRMRD_WAVEFORM

MAX_CONFIGURATION: Final = 2**20
MAX_HEADER: Final = 16 * 2**20
_FILENAME_BYTES: Final = 1024


@dataclass(frozen=True, slots=True)
class FileName:
    """A FILENAME message: a client names its pipeline."""

    name: str


@dataclass(frozen=True, slots=True)
class Configuration:
    """A CONFIG message: XML of a node, or of a client's pipeline."""

    xml: bytes


@dataclass(frozen=True, slots=True)
class ScanHeaderText:
    """A HEADER message: the ISMRMRD header's XML."""

    xml: bytes


@dataclass(frozen=True, slots=True)
class Query:
    """A QUERY message: a question to a server, by its number."""

    number: int
    question: str


@dataclass(frozen=True, slots=True)
class Response:
    """A RESPONSE message: the answer to a query."""

    number: int
    answer: str


@dataclass(frozen=True, slots=True)
class Close:
    """The end of a stream."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An ERROR message."""

    text: str


def read_message(reader: Reader) -> Any:
    """The next message as an object.

    Returns
    -------
        A `ReadoutBlock` (one readout, or the run of equal ones that has arrived), an ismrmrd or gadgetron item,
        `ReconData`, `Bucket`, text, or one of the messages of this module.

    Raises
    ------
    EOFError
        If the source ends before or inside the message.
    ValueError
        If the message id is unknown or a size is implausible.
    """
    (identifier,) = reader.unpack("<H", "a message id")
    if identifier not in _PARSERS:
        raise ValueError(
            f"wire: message id {identifier} after {reader.total - 2} bytes is unknown; known are {sorted(_PARSERS)} "
            "(or the item before it does not have the size that its header states)"
        )
    return _PARSERS[identifier](reader)


def read_text(reader: Reader, identifier: int, what: str) -> bytes:
    """A text message (CONFIG or HEADER) that must come next."""
    (found,) = reader.unpack("<H", "a message id")
    if found != identifier:
        raise ValueError(f"wire: expected {what} (message id {identifier}), got message id {found}")
    return sized_text(reader, "<I", what, MAX_CONFIGURATION if identifier == CONFIG else MAX_HEADER)


def text_message(identifier: int, content: bytes) -> bytes:
    """A CONFIG, HEADER or TEXT message."""
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
    for kind, write in _WRITERS.items():
        if isinstance(item, kind):
            return write(item)
    raise TypeError(f"wire: an item of type {type(item).__name__} has no message")


def _file_name(reader: Reader) -> FileName:
    content = reader.read(_FILENAME_BYTES, "a FILENAME")
    return FileName(content.split(b"\0", 1)[0].decode(errors="replace"))


def _file_name_bytes(item: FileName) -> bytes:
    content = item.name.encode()
    if len(content) >= _FILENAME_BYTES:
        raise ValueError(f"wire: a file name of {len(content)} bytes; at most {_FILENAME_BYTES - 1} can be sent")
    return struct.pack("<H", FILENAME) + content.ljust(_FILENAME_BYTES, b"\0")


def _query(reader: Reader) -> Query:
    _, number = reader.unpack("<2Q", "a QUERY")
    return Query(number, sized_text(reader, "<Q", "a QUERY", MAX_CONFIGURATION).decode(errors="replace"))


def _query_bytes(item: Query) -> bytes:
    content = item.question.encode()
    return struct.pack("<H3Q", QUERY, 0, item.number, len(content)) + content


def _response(reader: Reader) -> Response:
    (number,) = reader.unpack("<Q", "a RESPONSE")
    return Response(number, sized_text(reader, "<Q", "a RESPONSE", MAX_CONFIGURATION).decode(errors="replace"))


def _response_bytes(item: Response) -> bytes:
    content = item.answer.encode()
    return struct.pack("<H2Q", RESPONSE, item.number, len(content)) + content


def _image(reader: Reader) -> Image:
    content = reader.read(sizeof(ImageHeader), "an IMAGE header")
    header = ImageHeader.from_buffer_copy(content)
    try:
        dtype = get_dtype_from_data_type(header.data_type)
    except (TypeError, KeyError):
        raise ValueError(
            f"wire: IMAGE of series {header.image_series_index} has data type {header.data_type}; 1 to 8 are known"
        ) from None
    x, y, z = header.matrix_size
    what = f"an IMAGE of shape {(header.channels, z, y, x)}"
    size = bounded(header.channels * x * y * z * dtype.itemsize, what)
    meta = _metadata(sized_text(reader, "<Q", "an IMAGE's metadata", MAX_METADATA), header.image_series_index)
    with memory_for(what, size):
        image = Image(content, meta=meta)
    if header.data_type == DATATYPE_INT:
        image.data[:] = reader.array(image.data.shape, "<i4", what)
    else:
        reader.fill(image.data, what)
    return image


def _metadata(content: bytes, series: int) -> Meta:
    """An image's metadata, entities off: they can only be declared in a document type."""
    text = content.rstrip(b"\0").decode(errors="replace")
    if "<!DOCTYPE" in text:
        raise ValueError(f"wire: the metadata of an IMAGE of series {series} have a document type, which is refused")
    try:
        return Meta.deserialize(text)
    except (SyntaxError, AssertionError, AttributeError) as error:
        reason = str(error) or "not a list of names and values in <ismrmrdMeta>"
        raise ValueError(f"wire: the metadata of an IMAGE of series {series} cannot be read: {reason}") from None


def _image_bytes(image: Image) -> bytes:
    head, text = image.getHead(), image.attribute_string.encode()
    head.attribute_string_len = len(text)
    voxels = image.data
    if head.data_type == DATATYPE_INT:
        voxels = voxels.astype("<i4")
        if not np.array_equal(voxels, image.data):
            raise ValueError(f"wire: an IMAGE of series {head.image_series_index} has voxels beyond 32-bit integers")
    return b"".join((struct.pack("<H", IMAGE), bytes(head), struct.pack("<Q", len(text)), text, voxels.tobytes()))


def _waveform_message(item: Waveform) -> bytes:
    head, samples = waveform_bytes(item)
    return struct.pack("<H", WAVEFORM) + head + samples


_WRITERS: dict[type, Callable[[Any], bytes]] = {
    ReadoutBlock: readouts_bytes,
    Acquisition: lambda item: readouts_bytes(block_of([item])),
    Waveform: _waveform_message,
    Image: _image_bytes,
    ReconData: recon_data_bytes,
    ImageArray: image_array_bytes,
    Bucket: bucket_bytes,
    FileName: _file_name_bytes,
    Configuration: lambda item: text_message(CONFIG, item.xml),
    ScanHeaderText: lambda item: text_message(HEADER, item.xml),
    str: lambda item: text_message(TEXT, item.encode()),
    Query: _query_bytes,
    Response: _response_bytes,
    Failure: lambda item: error_message(item.text),
    Close: lambda item: close_message(),
}

_PARSERS: dict[int, Callable[[Reader], Any]] = {
    FILENAME: _file_name,
    CONFIG: lambda reader: Configuration(sized_text(reader, "<I", "a configuration", MAX_CONFIGURATION)),
    HEADER: lambda reader: ScanHeaderText(sized_text(reader, "<I", "a header", MAX_HEADER)),
    CLOSE: lambda reader: Close(),
    TEXT: lambda reader: sized_text(reader, "<I", "a TEXT").decode(errors="replace"),
    QUERY: _query,
    RESPONSE: _response,
    ERROR: lambda reader: Failure(sized_text(reader, "<Q", "an ERROR").decode(errors="replace")),
    ACQUISITION: read_readouts,
    WAVEFORM: read_waveform,
    IMAGE: _image,
    RECON_DATA: read_recon_data,
    IMAGE_ARRAY: read_image_array,
    BUCKET: read_bucket,
}
