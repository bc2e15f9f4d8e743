"""Readouts and waveforms on the wire: runs of equal readouts become one block, without a Python object for each."""

import itertools
import struct
from collections.abc import Iterator
from ctypes import sizeof
from functools import lru_cache
from typing import Any, Final

import numpy as np
from ismrmrd import Waveform, WaveformHeader, constants

from voxelsigma.formats.readouts import HEADER_DTYPE, Headers, ReadoutBlock, shape_of
from voxelsigma.gadgets.wire_reader import Reader, bounded, memory_for

ACQUISITION: Final = 1008
MOST_READOUTS: Final = 1024
"""In one block, so that no step downstream takes long."""
MAX_READOUT: Final = 2**30
"""Bytes: 1,024 channels of 65,535 samples take half of it."""

_HEAD_BYTES: Final = HEADER_DTYPE.itemsize


def read_readouts(reader: Reader) -> ReadoutBlock:
    """A readout, and those behind it that were received already and have its shape; the first one's id was read.

    Raises
    ------
    ValueError
        If a header claims more than a readout can hold.
    EOFError
        If the stream ends inside a readout.
    """
    what = "an ACQUISITION"
    first = np.frombuffer(reader.ready(_HEAD_BYTES, f"{what} header"), dtype=HEADER_DTYPE, count=1)[0]
    shape = shape_of(first)
    coils, length, axes = shape
    bounded(_HEAD_BYTES + length * (8 * coils + 4 * axes), what, MAX_READOUT)
    body = _body(*shape)
    message = np.dtype([("id", "<u2"), ("body", body)])
    whole = len(reader.buffered) - body.itemsize
    if whole < message.itemsize:
        return _block(reader.array((1,), body, what))
    # the id of the first readout is gone: its body comes first, then whole messages
    count = min(whole // message.itemsize, MOST_READOUTS - 1)
    rest = np.frombuffer(reader.buffered, dtype=message, count=count, offset=body.itemsize)
    rest = rest[: _equal(rest, shape)]
    found = _block(np.frombuffer(reader.buffered, dtype=body, count=1), rest["body"])
    reader.skip(body.itemsize + rest.nbytes)
    return found


def readouts_bytes(block: ReadoutBlock) -> bytes:
    """The ACQUISITION messages of a block."""
    readouts, coils, length = block.samples.shape
    shape = (coils, length, block.trajectory.shape[2])
    found = np.zeros(readouts, dtype=np.dtype([("id", "<u2"), ("body", _body(*shape))]))
    found["id"] = ACQUISITION
    body = found["body"]
    body["header"] = stated_headers(block)
    body["trajectory"] = block.trajectory
    body["samples"] = block.samples
    return found.tobytes()


def stated_headers(block: ReadoutBlock) -> Headers:
    """Headers of a block that state the shape which its readouts have, whatever they stated before."""
    headers = block.headers.copy()
    _, coils, length = block.samples.shape
    for name, value in zip(_SHAPE_FIELDS, (coils, length, block.trajectory.shape[2]), strict=True):
        headers[name] = value
    return headers


def read_waveform(reader: Reader) -> Waveform:
    """A waveform: its header, then its samples."""
    head = reader.read(sizeof(WaveformHeader), "a WAVEFORM header")
    return waveform_of(head, reader)


def waveform_of(head: bytes, reader: Reader) -> Waveform:
    """A waveform of which the header is known already."""
    header = WaveformHeader.from_buffer_copy(head)
    size = bounded(4 * header.channels * header.number_of_samples, "a WAVEFORM", MAX_READOUT)
    with memory_for("a WAVEFORM", size):
        waveform = Waveform(head)
    reader.fill(waveform.data, "a WAVEFORM's samples")
    return waveform


def waveform_bytes(waveform: Waveform) -> tuple[bytes, bytes]:
    """Header and samples of a waveform."""
    return bytes(waveform.getHead()), np.ascontiguousarray(waveform.data, dtype=np.uint32).tobytes()


def blocks_of(headers: Headers, trajectories: bytes, samples: bytes) -> Iterator[ReadoutBlock]:
    """Blocks of readouts that lie as in a bucket: all headers, all trajectories, all samples.

    Raises
    ------
    ValueError
        If the headers claim other sizes than there are bytes.
    """
    shapes = np.stack([headers[name].astype(np.int64) for name in _SHAPE_FIELDS], axis=1).reshape(-1, 3)
    sizes = 8 * int((shapes[:, 0] * shapes[:, 1]).sum()), 4 * int((shapes[:, 1] * shapes[:, 2]).sum())
    for what, claimed, given in (("samples", sizes[0], len(samples)), ("trajectories", sizes[1], len(trajectories))):
        if claimed != given:
            raise ValueError(f"wire: BUCKET headers claim {claimed} bytes of {what}; {given} are given")
    edges = [0, *(np.flatnonzero(np.any(np.diff(shapes, axis=0) != 0, axis=1)) + 1).tolist(), len(headers)]
    at, along = 0, 0
    for start, stop in itertools.pairwise(edges):
        count = stop - start
        if not count:
            continue
        coils, length, axes = (int(size) for size in shapes[start])
        data = np.frombuffer(samples, np.complex64, count * coils * length, at).reshape(count, coils, length)
        path = np.frombuffer(trajectories, np.float32, count * length * axes, along).reshape(count, length, axes)
        at, along = at + data.nbytes, along + path.nbytes
        yield ReadoutBlock(headers[start:stop].copy(), data.copy(), path.copy())


_SHAPE_FIELDS = ("active_channels", "number_of_samples", "trajectory_dimensions")

CUTTING: Final = np.uint64(
    sum(
        1 << (flag - 1)
        for flag in (
            constants.ACQ_LAST_IN_SLICE,
            constants.ACQ_LAST_IN_REPETITION,
            constants.ACQ_LAST_IN_MEASUREMENT,
            constants.ACQ_LAST_IN_AVERAGE,
        )
    )
)
"""Flags behind which a block ends, so that what they complete does not wait."""


@lru_cache(maxsize=64)
def _body(coils: int, length: int, axes: int) -> np.dtype[np.void]:
    """Layout of one readout behind its message id."""
    return np.dtype(
        [
            ("header", HEADER_DTYPE),
            ("trajectory", "<f4", (length, axes)),
            ("samples", "<c8", (coils, length)),
        ]
    )


def _equal(messages: Any, shape: tuple[int, int, int]) -> int:
    """How many messages from the first on are readouts of a shape: each one tells where the next begins."""
    header = messages["body"]["header"]
    good = messages["id"] == ACQUISITION
    for name, value in zip(_SHAPE_FIELDS, shape, strict=True):
        good &= header[name] == value
    return int(good.argmin()) if not good.all() else len(good)


def _block(*bodies: Any) -> ReadoutBlock:
    """Bodies behind each other, copied once."""
    return ReadoutBlock(
        headers=np.concatenate([body["header"] for body in bodies]),
        samples=np.concatenate([body["samples"] for body in bodies]),
        trajectory=np.concatenate([body["trajectory"] for body in bodies]),
    )


assert struct.calcsize("<H") + _HEAD_BYTES == 342
