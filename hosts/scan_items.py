"""A file of raw data as the stream that a scanner would send."""

from collections.abc import Callable, Iterator

import numpy as np

from voxelsigma.formats.raw_file import RawFile
from voxelsigma.gadgets.items import Item


def scan_items(raw: RawFile, report: Callable[[str, int, int], None]) -> Iterator[Item]:
    """Readouts and waveforms of a file, merged by their time stamps as a scanner would send them."""
    waveforms = raw.waveforms()
    waiting = next(waveforms, None)
    sent = 0
    for block in raw.blocks():
        first = 0
        while waiting is not None:
            before = int(np.searchsorted(block.headers["acquisition_time_stamp"][first:], waiting.time_stamp)) + first
            if before >= len(block):
                break
            if before > first:
                yield block.select(slice(first, before))
                first = before
            yield waiting
            waiting = next(waveforms, None)
        if first < len(block):
            yield block.select(slice(first, len(block)))
        sent += len(block)
        report("readouts", sent, len(raw))
    if waiting is not None:
        yield waiting
    yield from waveforms
