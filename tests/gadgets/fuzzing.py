"""Random corruption of streams: every one must end in items or in a clean error, soon, and in little memory.

A script of its own, since memory can only be limited for a whole process: it prints a summary as JSON and ends with
exit code 1 at the first finding, whose bytes it leaves in a file.
"""

import argparse
import collections
import io
import json
import random
import resource
import signal
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from gadgetron.types.image_array import ImageArray
from gadgetron.types.recon_data import SamplingDescription
from ismrmrd import Acquisition, AcquisitionHeader, Image, ImageHeader, Meta, Waveform

from voxelsigma.formats.readouts import HEADER_DTYPE, ReadoutBlock, block_of
from voxelsigma.gadgets import wire
from voxelsigma.gadgets.wire_reader import Reader

CASE_SECONDS = 20
ADDRESS_SPACE = 3 * 2**29
SIZES = (0, 1, 2, 3, 255, 2**16 - 1, 2**20, 2**24, 2**27, 2**31 - 1, 2**31, 2**32 - 1, 2**33, 2**40, 2**63, 2**64 - 1)


@dataclass(frozen=True)
class Finding(Exception):  # noqa: N818  # not an error of the program
    """A stream that ended in neither items nor a clean error."""

    case: str
    reason: str
    content: bytes


class HangError(BaseException):
    """A case takes too long; no handler of the code under test may catch it."""


def read_stream(content: bytes, chunk: int = 2**20) -> Iterator[Any]:
    """Items of a stream up to its CLOSE."""
    source = io.BytesIO(content)
    reader = Reader(lambda count: source.read(min(count, chunk)))
    while not isinstance(found := wire.read_message(reader), wire.Close):
        yield found


def cut_down(item: Any) -> Any:
    """The same message with small arrays."""
    if isinstance(item, ReadoutBlock):
        block = item.select(slice(0, 2))
        return ReadoutBlock(block.headers, block.samples[:, :2, :5], block.trajectory[:, :5])
    if isinstance(item, wire.ReconBuffer):
        return replace(item, data=item.data[..., :2, :, :3, :5], headers=item.headers[..., :3])
    if isinstance(item, wire.ReconData):
        bits = [
            wire.ReconBit(cut_down(bit.data), None if bit.reference is None else cut_down(bit.reference))
            for bit in item.bits
        ]
        return wire.ReconData(tuple(bits))
    if isinstance(item, wire.Bucket):
        return replace(
            item,
            data=tuple(map(cut_down, item.data)),
            reference=tuple(map(cut_down, item.reference)),
            waveforms=item.waveforms[:2],
            data_stats=tuple({name: found[:3] for name, found in entry.items()} for entry in item.data_stats),
        )
    if isinstance(item, ImageArray):
        headers = None if item.acq_headers is None else item.acq_headers[:3]
        return ImageArray(item.data[:4, :3], item.headers, item.meta, item.waveform, headers)
    return item


def small_items() -> list[Any]:
    """One of everything that has a message."""
    rng = np.random.default_rng(0)
    data = (rng.standard_normal((1, 1, 1, 2, 1, 3, 5)) * (1 + 1j)).astype(np.complex64)
    headers = np.zeros((1, 1, 1, 1, 3), dtype=HEADER_DTYPE)
    buffer = wire.ReconBuffer(data, headers, SamplingDescription())
    path = rng.standard_normal((3, 5, 2)).astype(np.float32)
    curved = wire.ReconBuffer(data, headers, SamplingDescription(), path, path[..., 0])
    acquisitions = [Acquisition.from_array(data[0, 0, 0, :, 0, 0], path[0], scan_counter=n) for n in range(3)]
    block = block_of(acquisitions)
    waveform = Waveform.from_array(np.arange(8, dtype=np.uint32).reshape(2, 4), waveform_id=1)
    values: dict[str, tuple[int, ...]] = dict.fromkeys(STATISTICS, (1, 2))
    statistics = (values,)
    images = []
    for dtype in (np.uint16, np.int16, np.uint32, np.int64, np.float32, np.float64, np.complex64, np.complex128):
        image = Image.from_array(np.arange(12).reshape(1, 2, 2, 3).astype(dtype), transpose=False)
        image.meta = Meta({"name": "σ", "list": ["1", "2"]})
        images.append(image)
    objects = np.empty((1, 1, 1), dtype=object)
    objects[0, 0, 0] = ImageHeader()
    lines = np.empty((2, 1, 1, 1, 1), dtype=object)
    for index in np.ndindex(lines.shape):
        lines[index] = AcquisitionHeader()
    return [
        wire.FileName("default.xml"),
        wire.Configuration(b"<configuration/>"),
        wire.ScanHeaderText(b"<ismrmrdHeader/>"),
        block,
        waveform,
        *images,
        wire.ReconData((wire.ReconBit(buffer, curved), wire.ReconBit(buffer, None))),
        wire.Bucket((block,), (block.select(slice(0, 1)),), (waveform, waveform), statistics, statistics),
        ImageArray(data[..., 0, 0, 0].T, objects, ["<ismrmrdMeta/>"], [waveform], lines),
        "text",
        wire.Query(1, "gadgetron::info"),
        wire.Response(1, "4.7"),
        wire.Failure("it broke"),
    ]


STATISTICS = (
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


def small_streams(recordings: Path | None) -> dict[str, bytes]:
    """Small streams of every kind of message, those of the recordings with their arrays cut down."""
    end = wire.close_message()
    found = {}
    for number, item in enumerate(small_items()):
        found[f"{number} {type(item).__name__}"] = wire.message(item) + wire.message("behind it") + end
    if recordings is not None:
        for path in sorted(recordings.glob("*.bin")):
            items = [cut_down(item) for item in read_stream(path.read_bytes())]
            # one block of readouts is enough, and the header's text is not read here
            kept = {type(item): item for item in reversed(items) if not isinstance(item, wire.ScanHeaderText)}
            found[path.stem] = b"".join(wire.message(kept[kind]) for kind in reversed(kept)) + end
    return found


def corrupted(rng: random.Random, content: bytes) -> bytes:
    """Some bytes flipped, inserted, removed, repeated, or overwritten with a size."""
    found = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        # sizes stand at the front of most messages
        at = rng.randrange(min(len(found), rng.choice((16, 128, 512, 2**30)))) if found else 0
        kind = rng.randrange(6)
        if kind == 0 and found:
            found[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            found[at:at] = rng.randbytes(rng.randrange(1, 33))
        elif kind == 2:
            del found[at : at + rng.randrange(1, 33)]
        elif kind == 3:
            layout = rng.choice(["<H", "<I", "<Q", "<Q"])
            size = rng.choice(SIZES) % 2 ** (8 * struct.calcsize(layout))
            found[at : at + struct.calcsize(layout)] = struct.pack(layout, size)
        elif kind == 4:
            found[at : at + 8] = rng.randbytes(8)
        else:
            found[at:at] = found[at : at + rng.randrange(1, 400)]
    return bytes(found)


def check(case: str, content: bytes, chunk: int = 2**20) -> str:
    """How reading a stream, and writing again what was read, ends.

    Returns
    -------
        `items`, or the name of the clean error.

    Raises
    ------
    Finding
        If it ends otherwise.
    """

    def ring(*_: object) -> None:
        raise HangError

    signal.signal(signal.SIGALRM, ring)
    signal.alarm(CASE_SECONDS)
    try:
        for item in read_stream(content, chunk):
            wire.message(item)
    except (ValueError, EOFError) as error:
        text = str(error)
        clean = type(error) in {ValueError, EOFError} and text.startswith(("wire: ", "stream ends after "))
        if not clean or "\n" in text or len(text) > 500:
            raise Finding(case, f"unreadable {type(error).__name__}: {text}", content) from None
        return type(error).__name__
    except HangError:
        raise Finding(case, f"more than {CASE_SECONDS} s", content) from None
    except BaseException as error:
        raise Finding(case, f"{type(error).__name__}: {error}", content) from error
    finally:
        signal.alarm(0)
    return "items"


def cases(seed: int, streams: dict[str, bytes]) -> Iterator[tuple[str, bytes, int]]:
    """Corrupted streams without end, each with a name that gives it again and the size of the chunks it comes in."""
    names = sorted(streams)
    number = 0
    while True:
        rng = random.Random(f"{seed} {number}")
        name = names[number % len(names)]
        yield f"seed {seed}, case {number} ({name})", corrupted(rng, streams[name]), rng.choice((7, 100, 2**20))
        number += 1


def most_kib() -> int:
    """Most memory that this process had; what `getrusage` tells includes that of the process which started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def run(seed: int, streams: dict[str, bytes], count: int | None, seconds: float | None) -> dict[str, Any]:
    """Corrupt and read until a count or a time is reached.

    Returns
    -------
        How the cases ended, and the memory and time that they took.
    """
    ends: collections.Counter[str] = collections.Counter()
    since = last = time.monotonic()
    for number, (case, content, chunk) in enumerate(cases(seed, streams)):
        now = time.monotonic()
        if number == count or (seconds is not None and now - since >= seconds):
            break
        if now - last >= 10:
            last = now
            print(f"{number} cases in {now - since:.0f} s: {dict(ends)}", file=sys.stderr, flush=True)
        ends[check(case, content, chunk)] += 1
    return {
        "streams": len(streams),
        "cases": sum(ends.values()),
        "ends": dict(ends),
        "seconds": round(time.monotonic() - since, 1),
        "most_mib": most_kib() // 1024,
    }


def main(arguments: list[str] | None = None) -> int:
    """Run it as a command."""
    parser = argparse.ArgumentParser(prog="fuzz", description="Corrupt streams and read them.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, help="how many cases")
    parser.add_argument("--seconds", type=float, help="for how long")
    parser.add_argument("--recordings", type=Path, help="folder of recorded streams, used beside made ones")
    parser.add_argument("--findings", type=Path, default=Path(), help="folder for the bytes of a finding")
    chosen = parser.parse_args(arguments)
    if chosen.count is None and chosen.seconds is None:
        chosen.seconds = 60.0
    if chosen.recordings is not None and not any(chosen.recordings.glob("*.bin")):
        parser.error(f"{chosen.recordings} holds no *.bin")
    streams = small_streams(chosen.recordings)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    try:
        summary = run(chosen.seed, streams, chosen.count, chosen.seconds)
    except Finding as finding:
        path = chosen.findings / f"fuzz-finding-{chosen.seed}.bin"
        path.write_bytes(finding.content)
        print(f"{finding.case}: {finding.reason}; its bytes are in {path}", file=sys.stderr)
        return 1
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
