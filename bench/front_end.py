"""Readouts a second from the wire to whole k-space: `python -m bench.front_end`."""

import io
import statistics
import time
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from voxelsigma.formats.header import parse_header
from voxelsigma.formats.simulate import SimulatedScan, Simulation, simulate
from voxelsigma.gadgets.context import Context
from voxelsigma.gadgets.external import Incoming, items_of
from voxelsigma.gadgets.items import Stream
from voxelsigma.gadgets.registry import create
from voxelsigma.gadgets.wire import close_message, message

REPEATS = 7


def front_end_table() -> Table:
    """Each step of the front end alone and all of them, on 14 coils x 384 samples."""
    scan = simulate(
        Simulation(matrix=(1, 192, 192), coils=14, acceleration=1, mask="uniform_1d", repetitions=8, noise_samples=4096)
    )
    content = b"".join(map(message, scan.blocks)) + close_message()
    readouts = sum(map(len, scan.blocks))
    table = Table(title="Front end, 14 coils x 384 samples: readouts a second of one core's time (of the clock)")
    table.add_column("steps")
    table.add_column("CPU", justify="right")
    table.add_column("clock", justify="right")
    for name, run in _steps(scan, content).items():
        cpu, clock = _seconds(run)
        table.add_row(name, f"{readouts / cpu:,.0f}", f"{readouts / clock:,.0f}")
    return table


def _steps(scan: SimulatedScan, content: bytes) -> dict[str, Callable[[], object]]:
    context = Context(header=parse_header(scan.header_xml))

    def read() -> Stream:
        return items_of(Incoming(io.BytesIO(content).read).messages())

    def whitened(items: Stream) -> Stream:
        return create("prewhiten", {"forward": "covariance"}, context)(items)

    def accumulated(items: Stream) -> Stream:
        return create("accumulate", {}, context)(items)

    return {
        "read": lambda: list(read()),
        "prewhiten": lambda: list(whitened(iter(scan.blocks))),
        "prewhiten + accumulate": lambda: list(accumulated(whitened(iter(scan.blocks)))),
        "read + prewhiten + accumulate": lambda: list(accumulated(whitened(read()))),
    }


def _seconds(action: Callable[[], object]) -> tuple[float, float]:
    """Medians of the process's CPU time, all threads, and of the clock."""
    action()
    found = []
    for _ in range(REPEATS):
        cpu, clock = time.process_time(), time.perf_counter()
        action()
        found.append((time.process_time() - cpu, time.perf_counter() - clock))
    return statistics.median(cpu for cpu, _ in found), statistics.median(clock for _, clock in found)


if __name__ == "__main__":
    Console().print(front_end_table())
