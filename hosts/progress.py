"""Progress of a pipeline: a bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

Report = Callable[[str, int, int], None]

LINE_SECONDS = 5.0


@contextmanager
def progress_report(console: Console) -> Iterator[Report]:
    """A function that is told (stage, done, total) and shows it.

    On a terminal one bar a stage (readouts, slices, probes) with the time left; elsewhere a line a stage every few
    seconds and one when it is done. That a stage is done is said when something else happens or the block ends well:
    where it fails, the last word is the error's.
    """
    if not console.is_terminal:
        lines = _Lines(console.file)
        yield lines
        lines.flush()
        return
    columns = (
        TextColumn("{task.description:>9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("time left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total or None)
            bars.update(tasks[stage], completed=done, total=total or None)

        yield report


class _Lines:
    """Progress as plain lines."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._last: dict[str, float] = {}
        self._ended: set[tuple[str, int]] = set()
        self._held: str | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Say how far a stage is, if it is time to."""
        self.flush()
        now = time.monotonic()
        whole = total > 0 and done >= total
        due = now - self._last.setdefault(stage, now) >= LINE_SECONDS
        if not due and (not whole or (stage, total) in self._ended):
            return
        self._last[stage] = now
        self._held = f"{stage}: {done}" + (f" of {total}" if total else "")
        if whole:
            self._ended.add((stage, total))
        else:
            self.flush()

    def flush(self) -> None:
        """Print the line that is held back."""
        if self._held is not None:
            print(self._held, file=self._stream, flush=True)
        self._held = None
