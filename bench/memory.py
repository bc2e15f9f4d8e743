"""Peak memory of every road against the number of probes.

Each figure is the peak of a process forked from one that holds nothing but the imported modules, the network and the
data; what that one needs is given beside. Counts that would take too long or too much memory, by what fewer probes
took, are left out, and it is said why. The luck of the allocator moves a peak by about one batch of features, up or
down, and many batches meet every luck: the fewest probes get several processes, of which the largest and the least
figure are given.
"""

import json
import os
import resource
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.table import Table

from bench.networks import Size, make_case
from bench.processes import Call
from bench.roads import TITLES, Road, roads

COUNTS: dict[str, tuple[int, ...]] = {
    "monte_carlo": (16, 64, 256),
    "published": (16, 64, 256),
    "chunked": (16, 64, 256),
    "linearize_vmap": (16, 64, 256),
    "ours": (16, 64, 256, 1024),
}
MOST_OF_MEMORY = 0.6
PATIENT = ("published", "ours")
FEWEST = 16


def calls(settings: Sequence[tuple[str, Size]], *, seconds: float, most: int, tries: int, threads: int) -> list[Call]:
    """One process a network."""
    return [
        Call(
            target="bench.memory:measure",
            arguments={
                "name": name,
                "size": size,
                "seconds": seconds,
                "most": most,
                "tries": tries,
                "threads": threads,
            },
        )
        for name, size in settings
    ]


def measure(
    name: str, size: Sequence[int], seconds: float, most: int, tries: int = 5, threads: int = 1
) -> dict[str, Any]:
    """Peak memory in MB of all sides of a network.

    Parameters
    ----------
    name, size
        The network and the matrix.
    seconds
        Time for a figure; eight times that for the published algorithm and for ours.
    most, tries
        Most probes; processes of the fewest.
    threads
        Of the measured processes. The one they are forked from has one: threads do not survive a fork.
    """
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    case = make_case(name, (size[0], size[1]))
    peaks: dict[str, dict[str, float]] = {}
    least: dict[str, float] = {}
    left_out: dict[str, str] = {}
    known = roads(case)
    for side, counts in COUNTS.items():
        found: dict[int, tuple[float, float]] = {}
        for count in (count for count in counts if count <= most):
            reason = _too_much(found, count, 8 * seconds if side in PATIENT else seconds, growing=side == "published")
            answers: list[dict[str, Any]] = (
                [{"reason": reason}] if reason else _tried(known[side], count, tries if count == FEWEST else 1, threads)
            )
            if "reason" in answers[-1]:
                left_out[side] = answers[-1]["reason"]
                break
            found[count] = (max(answer["peak"] for answer in answers), min(answer["seconds"] for answer in answers))
            least.setdefault(side, min(answer["peak"] for answer in answers))
        peaks[side] = {str(count): peak for count, (peak, _) in found.items()}
    return {
        "network": name,
        "matrix": list(size),
        "threads": threads,
        "base_mb": _forked(lambda: {"peak": _peak()})["peak"],
        "sides": peaks,
        "least": least,
        "left_out": left_out,
        "growth": _growth(peaks["ours"], least.get("ours", 0.0)),
    }


def _growth(peaks: dict[str, float], least: float) -> dict[str, float]:
    """Growth from the fewest to the most probes, as part of the peak: from the largest and the least of the fewest."""
    if not peaks:
        return {}
    counts = sorted(map(int, peaks))
    last = peaks[str(counts[-1])]
    largest = peaks[str(counts[0])]
    return {
        "from": counts[0],
        "to": counts[-1],
        "part": (last - largest) / last,
        "part_of_least": (last - least) / last,
    }


def _tried(road: Road, count: int, tries: int, threads: int) -> list[dict[str, Any]]:
    """Some runs, or those before the first that failed, and it."""
    answers: list[dict[str, Any]] = []
    for _ in range(tries):
        answers.append(_forked(lambda: _run(road, count, threads)))
        if "reason" in answers[-1]:
            break
    return answers


def _run(road: Road, count: int, threads: int) -> dict[str, float]:
    """Peak and seconds of one run."""
    torch.set_num_threads(threads)
    with torch.no_grad():
        run = road.prepare()
        start = time.perf_counter()
        run(count, road.chunks[0] if road.chunks else 0)
    return {"peak": _peak(), "seconds": time.perf_counter() - start}


def _too_much(found: dict[int, tuple[float, float]], count: int, budget: float, *, growing: bool) -> str:
    """Why a count is left out, by the one before it; empty if it is not."""
    if not found:
        return ""
    last = max(found)
    peak, seconds = found[last]
    longer = seconds * count / last
    if longer > budget:
        return f"{count} probes would take {longer:.0f} s"
    needed, free = peak * count / last, _available()
    if growing and needed > MOST_OF_MEMORY * free:
        return f"{count} probes would need up to {needed / 1024:.0f} GB"
    return ""


def _peak() -> float:
    """Peak memory of this process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _available() -> float:
    """Memory in MB that processes may still take."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20


def _forked(action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Result of an action in a process of its own, which has all that this one has."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            answer = action()
        except Exception as error:
            answer = {"reason": f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"}
        os.write(writer, json.dumps(answer).encode())
        # no exit handlers: they belong to the other process
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        content = stream.read()
    _, status = os.waitpid(child, 0)
    if status or not content:
        return {"reason": f"the process ended with status {status}"}
    return json.loads(content)


def table(entries: Sequence[dict[str, Any]]) -> Table:
    """A row for each network and side."""
    table = Table(title="Peak memory [MB] of a process; what it has before the first probe in brackets")
    counts = sorted({int(count) for entry in entries for peaks in entry["sides"].values() for count in peaks})
    for column in ("network", "road", *(f"S = {count}" for count in counts), "left out"):
        table.add_column(column, justify="right" if column.startswith("S =") else "left")
    for entry in entries:
        named = f"{entry['network']}, {entry['matrix'][0]} x {entry['matrix'][1]} ({entry['base_mb']:.0f})"
        for side, peaks in entry["sides"].items():
            cells = [f"{peaks[str(count)]:.0f}" if str(count) in peaks else "" for count in counts]
            table.add_row(named, TITLES[side], *cells, entry["left_out"].get(side, ""))
            named = ""
    return table


def notes(entries: Sequence[dict[str, Any]]) -> list[str]:
    """Growth of ours, in words."""
    return [
        f"{entry['network']}, {entry['matrix'][0]} x {entry['matrix'][1]}: from S = {growth['from']} to {growth['to']} "
        f"ours grows by {100 * growth['part']:.1f} % of the peak "
        f"({100 * growth['part_of_least']:.1f} % from the least of the processes with S = {growth['from']})"
        for entry in entries
        if (growth := entry["growth"])
    ]
