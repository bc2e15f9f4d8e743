"""Progress: a bar on a terminal, plain lines elsewhere."""

import io
import os
import pty
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from voxelsigma.hosts import progress
from voxelsigma.hosts.progress import progress_report


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=found))
    return found


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def console(stream: io.StringIO) -> Console:
    return Console(file=stream, force_terminal=False)


def test_the_end_of_a_stage_is_one_line(console: Console, stream: io.StringIO, clock: Clock) -> None:
    with progress_report(console) as report:
        for done in range(0, 101, 10):
            report("readouts", done, 100)
    assert stream.getvalue() == "readouts: 100 of 100\n"


def test_a_long_stage_says_every_few_seconds_how_far_it_is(console: Console, stream: io.StringIO, clock: Clock) -> None:
    with progress_report(console) as report:
        for done in range(1, 12):
            report("probes", done, 11)
            clock.now += 1
    assert stream.getvalue().splitlines() == ["probes: 6 of 11", "probes: 11 of 11"]


def test_a_stage_without_an_end_is_told_as_it_goes(console: Console, stream: io.StringIO, clock: Clock) -> None:
    with progress_report(console) as report:
        for done in range(1, 8):
            report("slices", done, 0)
            clock.now += 2
    assert stream.getvalue().splitlines() == ["slices: 4", "slices: 7"]


def test_stages_that_begin_again_do_not_flood(console: Console, stream: io.StringIO, clock: Clock) -> None:
    with progress_report(console) as report:
        for _ in range(20):
            report("probes", 8, 16)
            report("probes", 16, 16)
            clock.now += 1
    lines = stream.getvalue().splitlines()
    assert lines[0] == "probes: 16 of 16"
    assert 2 < len(lines) < 8


def test_stages_are_told_apart(console: Console, stream: io.StringIO, clock: Clock) -> None:
    with progress_report(console) as report:
        report("probes", 4, 4)
        report("readouts", 10, 10)
    assert stream.getvalue() == "probes: 4 of 4\nreadouts: 10 of 10\n"


def run_into_an_error(console: Console) -> None:
    with progress_report(console) as report:
        report("probes", 4, 4)
        report("readouts", 10, 10)
        raise KeyError("stop")


def test_where_it_fails_the_last_word_is_the_errors(console: Console, stream: io.StringIO, clock: Clock) -> None:
    with pytest.raises(KeyError, match="stop"):
        run_into_an_error(console)
    assert stream.getvalue() == "probes: 4 of 4\n"


def test_on_a_terminal_there_is_a_bar_a_stage(clock: Clock) -> None:
    stream = io.StringIO()
    with progress_report(Console(file=stream, force_terminal=True, width=100)) as report:
        report("readouts", 50, 100)
        report("slices", 1, 0)
        report("readouts", 100, 100)
    shown = stream.getvalue()
    assert "━" in shown
    assert "readouts" in shown
    assert "100/100" in shown
    assert "time left" in shown


def test_a_replay_on_a_terminal_shows_a_bar_and_takes_it_away(scan_file: Path, tmp_path: Path) -> None:
    terminal, side = pty.openpty()
    arguments = ["replay", str(scan_file), "-p", "sense_sigma.xml", "-o", "out.h5"]
    running = subprocess.Popen(
        [sys.executable, "-m", "voxelsigma", *arguments],
        cwd=tmp_path,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=side,
        text=True,
    )
    os.close(side)
    shown = b""
    while part := read(terminal):
        shown += part
    os.close(terminal)
    output = running.communicate(timeout=60)[0]
    assert running.returncode == 0
    assert output.startswith("out.h5:\n  series 1: 1 image")
    text = shown.decode()
    assert "━" in text
    assert "54/54" in text
    assert "readouts: 54 of 54" not in text
    # the last thing is that the bar's line is erased
    assert text.endswith("\x1b[2K")


def read(terminal: int) -> bytes:
    """What a terminal shows; nothing when its last writer has gone."""
    try:
        return os.read(terminal, 2**16)
    except OSError:
        return b""
