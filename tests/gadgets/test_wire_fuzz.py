"""Truncated and corrupted streams end in a clean error or in items: soon, and in little memory."""

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from voxelsigma.formats.readouts import ReadoutBlock
from voxelsigma.gadgets import wire

RECORDINGS = (
    "snr_raw",
    "snr_whitened",
    "snr_bucket",
    "snr_imagearray",
    "snr_recondata",
    "snr_recondata_ref",
    "wav_raw",
    "wav_bucket",
)
ENGINE = Path(__file__).with_name("fuzzing.py")


def boundaries(content: bytes) -> list[int]:
    """Where each message of a recording ends; a readout is a message."""
    ends = []
    reader = wire.Reader(io.BytesIO(content).read)
    found = None
    while not isinstance(found, wire.Close):
        before = reader.total
        found = wire.read_message(reader)
        count = len(found) if isinstance(found, ReadoutBlock) else 1
        ends += [before + (reader.total - before) // count * (number + 1) for number in range(count)]
    return ends


def positions(ends: list[int]) -> list[int]:
    """Places to cut: 200 evenly spread, and those around the ends of messages."""
    near = [end + step for end in ends[:: max(1, len(ends) // 10)] for step in (-1, 0, 1, 2)]
    spread = np.linspace(0, ends[-1] - 1, 200, dtype=int).tolist()
    return [*spread, *(place for place in near if place < ends[-1])]


def pieces(content: memoryview) -> Iterator[bytes]:
    for start in range(0, len(content), 2**20):
        yield bytes(content[start : start + 2**20])


@pytest.mark.parametrize("name", RECORDINGS)
def test_a_truncated_recording_gives_whole_messages_then_the_byte_counts(shared_data: Path, name: str) -> None:
    content = (shared_data / "wire" / f"{name}.bin").read_bytes()
    ends = boundaries(content)
    assert ends[-1] == len(content)
    for place in positions(ends):
        source = pieces(memoryview(content)[:place])
        reader = wire.Reader(lambda count, source=source: next(source, b""))  # type: ignore[misc]
        whole = sum(end <= place for end in ends)
        while whole > 0:
            found = wire.read_message(reader)
            whole -= len(found) if isinstance(found, ReadoutBlock) else 1
        assert whole == 0
        with pytest.raises(EOFError) as caught:
            wire.read_message(reader)
        assert re.fullmatch(r"stream ends after \d+ of \d+ bytes of [\w ,'()]+", str(caught.value))


def fuzz(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", str(ENGINE), *arguments, "--findings", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )


def test_random_corruptions_of_the_recordings_and_of_every_message_end_clean(shared_data: Path, tmp_path: Path) -> None:
    found = fuzz(tmp_path, "--count", "20000", "--seed", "3", "--recordings", str(shared_data / "wire"))
    assert found.returncode == 0, found.stderr
    summary = json.loads(found.stdout)
    assert (summary["cases"], summary["streams"]) == (20000, 28)
    # the limit on the address space is no witness: memory that is never touched counts there
    assert summary["most_mib"] < 1024
    assert min(summary["ends"][end] for end in ("items", "ValueError", "EOFError")) > 500


def test_a_finding_is_told_with_what_makes_it_again(tmp_path: Path) -> None:
    script = (
        "import sys, runpy; from voxelsigma.gadgets import wire\n"
        "def broken(reader): raise KeyError('series')\n"
        "wire._PARSERS[wire.IMAGE] = broken\n"
        f"sys.argv = ['fuzz', '--count', '500', '--findings', {str(tmp_path)!r}]\n"
        f"runpy.run_path({str(ENGINE)!r}, run_name='__main__')"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200, check=False)
    assert found.returncode == 1
    assert re.search(r"seed 0, case \d+ \(\d+ Image\): KeyError: 'series'; its bytes are in ", found.stderr)
    assert (tmp_path / "fuzz-finding-0.bin").stat().st_size > 100
