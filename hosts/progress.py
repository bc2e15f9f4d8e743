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
    seconds and one when it is done.
    """
    if not console.is_terminal:
        yield _lines(console.file)
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


def _lines(stream: IO[str]) -> Report:
    last: dict[str, float] = {}
    ended: set[tuple[str, int]] = set()

    def report(stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        whole = total > 0 and done >= total
        begun = last.setdefault(stage, now)
        if whole and (stage, total) in ended and now - begun < LINE_SECONDS:
            return
        if whole or now - begun >= LINE_SECONDS:
            last[stage] = now
            if whole:
                ended.add((stage, total))
            print(f"{stage}: {done}" + (f" of {total}" if total else ""), file=stream, flush=True)

    return report
