"""How many bytes a message has: enough of Gadgetron's wire format to forward messages, written apart from the package.

Nothing is shared with `voxelsigma.gadgets.wire`: what the two agree on is evidence.
"""

import math
import struct
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Final

FILENAME: Final = 1
CONFIG: Final = 2
HEADER: Final = 3
CLOSE: Final = 4
TEXT: Final = 5
QUERY: Final = 6
RESPONSE: Final = 7
ERROR: Final = 8
ACQUISITION: Final = 1008
IMAGE: Final = 1022
RECON_DATA: Final = 1023
IMAGE_ARRAY: Final = 1024
WAVEFORM: Final = 1026
BUCKET: Final = 1050

# what an external node reads and writes
NODE: Final = frozenset({ACQUISITION, IMAGE, RECON_DATA, IMAGE_ARRAY, WAVEFORM, BUCKET})

# ISMRMRD data types: uint16, int16, uint32, int32, float32, float64, complex64, complex128
IMAGE_BYTES: Final = {1: 2, 2: 2, 3: 4, 4: 4, 5: 4, 6: 8, 7: 8, 8: 16}
# of these the server reads from a node
NODE_IMAGES: Final = frozenset({1, 3, 5, 6, 7, 8})

ACQUISITION_HEADER: Final = 340
IMAGE_HEADER: Final = 198
WAVEFORM_HEADER: Final = 40
SAMPLING_DESCRIPTION: Final = 56
BUCKET_META: Final = struct.Struct("<13Q")
MOST_BYTES: Final = 2**34

Take = Callable[[int], bytes]


class UnreadableError(Exception):
    """A message that the server has no reader for; `identifier` is None where only its content is at fault."""

    def __init__(self, text: str, identifier: int | None = None) -> None:
        super().__init__(text)
        self.identifier = identifier


@dataclass(frozen=True, slots=True)
class Message:
    """One message: its id, and its bytes with those of the id."""

    identifier: int
    raw: bytes

    @property
    def text(self) -> str:
        """What a TEXT, ERROR, CONFIG, HEADER or FILENAME message says."""
        start = {FILENAME: 2, ERROR: 10}.get(self.identifier, 6)
        return self.raw[start:].rstrip(b"\0").decode()


def read_message(
    read: Callable[[int], bytes], known: Collection[int], images: Collection[int] = frozenset(IMAGE_BYTES)
) -> Message:
    """The next message of a blocking source.

    Parameters
    ----------
    read
        Returns n bytes, fewer only at the end of the source.
    known
        Ids that have a reader here.
    images
        Data types of images that have a reader here.

    Raises
    ------
    EOFError
        If the source ends before or inside the message.
    UnreadableError
        If there is no reader for the message.
    """
    parts: list[bytes] = []

    def take(count: int) -> bytes:
        if count > MOST_BYTES:
            raise UnreadableError("std::bad_alloc")
        part = read(count)
        if len(part) < count:
            raise EOFError(f"the connection ends after {len(part)} of {count} bytes")
        parts.append(part)
        return part

    identifier = _number(take, "<H")
    if identifier not in known:
        raise UnreadableError(f"Received illegal message id: {identifier}", identifier)
    if identifier == IMAGE:
        _image(take, images)
    else:
        _BODIES[identifier](take)
    return Message(identifier, b"".join(parts))


def messages_of(recording: bytes) -> Iterator[Message]:
    """All messages of a recording, configuration, header and CLOSE included."""
    position = 0

    def read(count: int) -> bytes:
        nonlocal position
        position += count
        return recording[position - count : position]

    while position < len(recording):
        yield read_message(read, _BODIES.keys() | {IMAGE})


def close() -> bytes:
    return struct.pack("<H", CLOSE)


def text_message(identifier: int, content: bytes) -> bytes:
    """A CONFIG, HEADER or TEXT message."""
    return struct.pack("<HI", identifier, len(content)) + content


def response(correlation: int, content: bytes) -> bytes:
    return struct.pack("<HQQQ", RESPONSE, 0, correlation, len(content)) + content


def _number(take: Take, form: str) -> int:
    return int(struct.unpack(form, take(struct.calcsize(form)))[0])


def _sized(take: Take, form: str) -> None:
    take(_number(take, form))


def _optional(take: Take, body: Callable[[Take], None]) -> None:
    if _number(take, "<B"):
        body(take)


def _array(take: Take, item: int) -> None:
    """Dimensions, then the items; without dimensions there are none."""
    dimensions = struct.unpack(f"<{(count := _number(take, '<Q'))}Q", take(8 * count))
    take(item * math.prod(dimensions) if dimensions else 0)


def _acquisition(take: Take) -> None:
    header = take(ACQUISITION_HEADER)
    samples, _, channels = struct.unpack_from("<3H", header, 34)
    (dimensions,) = struct.unpack_from("<H", header, 176)
    take(4 * samples * dimensions)
    take(8 * samples * channels)


def _waveform(take: Take) -> None:
    samples, channels = struct.unpack_from("<2H", take(WAVEFORM_HEADER), 28)
    take(4 * samples * channels)


def _image(take: Take, images: Collection[int]) -> None:
    header = take(IMAGE_HEADER)
    (kind,) = struct.unpack_from("<H", header, 2)
    if kind not in images:
        raise UnreadableError("map::at")
    _sized(take, "<Q")
    take(math.prod(struct.unpack_from("<3H", header, 16)) * struct.unpack_from("<H", header, 34)[0] * IMAGE_BYTES[kind])


def _recon_data(take: Take) -> None:
    for _ in range(_number(take, "<Q")):
        _recon_buffer(take)
        _optional(take, _recon_buffer)


def _recon_buffer(take: Take) -> None:
    _array(take, 8)
    # trajectory and density
    _optional(take, lambda take: _array(take, 4))
    _optional(take, lambda take: _array(take, 4))
    _array(take, ACQUISITION_HEADER)
    take(SAMPLING_DESCRIPTION)


def _image_array(take: Take) -> None:
    _array(take, 8)
    _array(take, IMAGE_HEADER)
    for _ in range(_number(take, "<Q")):
        _sized(take, "<Q")
    _optional(take, _waveforms)
    _optional(take, lambda take: _array(take, ACQUISITION_HEADER))


def _waveforms(take: Take) -> None:
    for _ in range(_number(take, "<Q")):
        _waveform(take)


def _bucket(take: Take) -> None:
    """Counts and sizes in bytes first, then data, statistics, reference, its statistics and waveforms."""
    sizes = BUCKET_META.unpack(take(BUCKET_META.size))
    data, reference, waveforms = sizes[1:4], sizes[5:8], sizes[11:13]
    for size in (*data, sizes[8], *reference, sizes[9], *waveforms):
        take(size)


def _query(take: Take) -> None:
    take(16)
    _sized(take, "<Q")


def _nothing(take: Take) -> None:
    del take


_BODIES: Final[dict[int, Callable[[Take], None]]] = {
    FILENAME: lambda take: void(take(1024)),
    CONFIG: lambda take: _sized(take, "<I"),
    HEADER: lambda take: _sized(take, "<I"),
    CLOSE: _nothing,
    TEXT: lambda take: _sized(take, "<I"),
    QUERY: _query,
    RESPONSE: _query,
    ERROR: lambda take: _sized(take, "<Q"),
    ACQUISITION: _acquisition,
    RECON_DATA: _recon_data,
    IMAGE_ARRAY: _image_array,
    WAVEFORM: _waveform,
    BUCKET: _bucket,
}


def void(value: object) -> None:
    del value
