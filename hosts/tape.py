"""A scan as the messages that go to a server, made before the first is sent."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from ismrmrd import constants

from voxelsigma.formats.atomic import unwritable
from voxelsigma.formats.raw_file import open_raw
from voxelsigma.formats.readouts import NOT_IMAGING, ReadoutBlock
from voxelsigma.gadgets.items import VolumeKey, volume_key
from voxelsigma.gadgets.wire import message
from voxelsigma.hosts.scan_items import scan_items


@dataclass(slots=True)
class Tape:
    """A scan's messages behind each other: to pace them nothing must be left to do but to send.

    Parameters
    ----------
    header_xml
        The scan's header.
    file
        Holds the messages.
    lengths
        Their lengths in bytes.
    waveforms
        Which of them are waveforms.
    last
        Number of the last readout of each volume.
    """

    header_xml: bytes
    file: IO[bytes]
    lengths: list[int] = field(default_factory=list)
    waveforms: set[int] = field(default_factory=set)
    last: dict[VolumeKey, int] = field(default_factory=dict)

    @property
    def readouts(self) -> int:
        """How many readouts there are."""
        return len(self.lengths) - len(self.waveforms)

    def messages(self) -> Iterator[tuple[bytes, bool]]:
        """Each message, and whether it is a readout."""
        self.file.seek(0)
        for number, length in enumerate(self.lengths):
            yield self.file.read(length), number not in self.waveforms


@contextmanager
def recorded(scan: Path, group: str, report: Callable[[str, int, int], None]) -> Iterator[Tape]:
    """Record a scan on a tape in a temporary file.

    A file that cannot be read to its end fails here, before anything is sent. The last readout of a volume is the last
    that is flagged ACQ_LAST_IN_SLICE, be it a navigator; where none is flagged, the last imaging readout.

    Parameters
    ----------
    scan, group
        ISMRMRD raw data.
    report
        Told (stage, done, total).

    Raises
    ------
    FileNotFoundError, ValueError, OSError
        If the scan cannot be read, or the temporary file not be written.
    """
    # without a buffer, so that no write is left for the end, where its failure would hide another
    with open_raw(scan, group) as raw, tempfile.TemporaryFile(prefix="voxelsigma-", buffering=0) as file:
        tape = Tape(raw.header.xml, file)
        flagged: dict[VolumeKey, int] = {}
        for item in scan_items(raw, lambda stage, done, total: report("read", done, total)):
            if isinstance(item, ReadoutBlock):
                skipped = item.flagged(constants.ACQ_IS_NOISE_MEASUREMENT, *NOT_IMAGING)
                _note_last(item, ~skipped, tape.readouts, tape.last)
                _note_last(item, item.flagged(constants.ACQ_LAST_IN_SLICE), tape.readouts, flagged)
                _append(tape, message(item), len(item))
            else:
                tape.waveforms.add(len(tape.lengths))
                _append(tape, message(item), 1)
        tape.last |= flagged
        yield tape


def _note_last(block: ReadoutBlock, chosen: Any, first: int, last: dict[VolumeKey, int]) -> None:
    """Note the last chosen readout of each volume, in a block whose first readout has the number `first`."""
    numbers = np.flatnonzero(chosen)
    if not len(numbers):
        return
    counters = np.stack([block.headers["idx"][name][numbers] for name in VolumeKey.__dataclass_fields__], axis=1)
    changes = np.flatnonzero(np.any(counters[1:] != counters[:-1], axis=1))
    for position in (*changes.tolist(), len(numbers) - 1):
        number = int(numbers[position])
        last[volume_key(block.headers[number])] = first + number


def _append(tape: Tape, messages: bytes, count: int) -> None:
    """Write messages of one length."""
    content = memoryview(messages)
    try:
        while content:
            content = content[tape.file.write(content) :]
    except OSError as error:
        raise unwritable(Path(tempfile.gettempdir()) / "voxelsigma-*", error) from error
    tape.lengths.extend([len(messages) // count] * count)
