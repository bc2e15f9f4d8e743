"""What a probe costs on every road, in forward passes.

Each network is measured in a process of its own. The sides take turns, each run between two forward passes, and a
repetition's figure is the run over the mean of these two: a machine that is busy for a while is busy for both. Every
side pays for drawing its noise and for its sums; the push alone of ours stands beside. What is paid once for a map, as
learning the covariate's filter is, counts as set-up.
"""

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.table import Table

from bench.networks import COILS, Size, make_case
from bench.processes import Call
from bench.roads import TITLES, Road, Run, Spent, roads

MOST_AT_ONCE = (64, 32, 16, 8, 4)
SLOW_PASSES = 40


def calls(settings: Sequence[tuple[str, Size]], *, repeats: int, seconds: float, threads: int) -> list[Call]:
    """One process a network; the first network again with the stock allocator."""

    def call(name: str, size: Size, tuned: bool) -> Call:
        arguments = {"name": name, "size": size, "repeats": repeats, "seconds": seconds, "tuned": tuned}
        return Call(target="bench.probe_cost:measure", arguments=arguments, threads=threads, tuned=tuned)

    return [call(*setting, True) for setting in settings] + [call(*setting, False) for setting in settings[:1]]


def measure(name: str, size: Sequence[int], repeats: int, seconds: float, tuned: bool = True) -> dict[str, Any]:
    """Cost of all sides of a network.

    Parameters
    ----------
    name, size
        The network and the matrix.
    repeats
        Repetitions, beside one that warms up.
    seconds
        Time that one repetition of all sides may take, about: it decides how many probes each pushes.
    tuned
        Whether the process was started with the tuned allocator; for the record.
    """
    # torch.func.linearize warns of its own graph, forward mode of torch's own jit
    warnings.filterwarnings("ignore")
    case = make_case(name, (size[0], size[1]))
    with torch.no_grad():
        first = statistics.median(_seconds(lambda: case.reconstruction(case.kspace)) for _ in range(3))
        passes = seconds / first
        sides, failed = {}, {}
        for side, road in roads(case).items():
            count = _count(side, passes)
            try:
                sides[side] = _prepared(road, count, quick=passes < SLOW_PASSES)
            except Exception as error:
                failed[side] = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
        forward, ratios, once = _in_turn(lambda: case.reconstruction(case.kspace), sides, repeats)
    found = {side: {**about, **_summary(ratios[side])} for side, (_, about) in sides.items()}
    for side, about in found.items():
        about["setup_passes"] = (about.pop("setup_seconds") + once[side]) / forward
    if "ours" in found:
        found["ours_push"] = found["ours"] | _summary(ratios["ours_push"])
    return {
        "network": name,
        "matrix": list(size),
        "coils": COILS,
        "scan": case.scan,
        "allocator": "tuned" if tuned else "stock",
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "forward_ms": 1000 * forward,
        "sides": found,
        "failed": failed,
    }


def _count(side: str, passes: float) -> int:
    """Probes of a run: as many as the time of a repetition allows."""
    slow = passes < SLOW_PASSES
    if side == "published":
        # it is to show what many probes at once cost
        return next((count for count in MOST_AT_ONCE if 1.3 * count <= 0.8 * passes), MOST_AT_ONCE[-1])
    if side == "ours":
        return 8 if slow else 16
    if side == "monte_carlo_covariate":
        # fewer would learn no filter
        return 8
    if side == "monte_carlo":
        return 2 if slow else 4
    return 4 if slow else 8


def _prepared(road: Road, count: int, *, quick: bool) -> tuple[Callable[[], Spent], dict[str, Any]]:
    """A warm run, and what is known of it: the set-up, and the chunk that is fastest."""
    start = time.perf_counter()
    run = road.prepare()
    setup = time.perf_counter() - start
    chunk = _fastest(run, road.chunks[:1] if quick else road.chunks)
    run(count, chunk)
    return lambda: run(count, chunk), {"count": count, "chunk": chunk, "setup_seconds": setup}


def _fastest(run: Run, chunks: Sequence[int]) -> int:
    """The chunk with the least time a probe, each tried twice; 0 where there is no choice."""
    if len(chunks) < 2:
        return chunks[0] if chunks else 0
    return min(chunks, key=lambda chunk: min(_seconds(lambda: run(chunk, chunk)) for _ in range(2)) / chunk)


def _in_turn(
    forward: Callable[[], object], sides: dict[str, tuple[Callable[[], Spent], dict[str, Any]]], repeats: int
) -> tuple[float, dict[str, list[float]], dict[str, float]]:
    """Median seconds of a forward pass; for each side the passes a probe of every repetition, and seconds once."""
    times: list[float] = []
    ratios: dict[str, list[float]] = {side: [] for side in (*sides, "ours_push")}
    once: dict[str, list[float]] = {side: [] for side in sides}
    forward()
    for _ in range(repeats):
        before = _seconds(forward)
        for side, (run, about) in sides.items():
            start = time.perf_counter()
            spent = run()
            elapsed = time.perf_counter() - start - spent.once
            after = _seconds(forward)
            unit = about["count"] * (before + after) / 2
            ratios[side].append(elapsed / unit)
            if side == "ours":
                ratios["ours_push"].append(spent.push / unit)
            once[side].append(spent.once)
            times.append(after)
            before = after
    return statistics.median(times), ratios, {side: statistics.median(seconds) for side, seconds in once.items()}


def _summary(values: list[float]) -> dict[str, float]:
    return {"passes": statistics.median(values), "least": min(values), "most": max(values)}


def _seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def tables(entries: Sequence[dict[str, Any]]) -> list[Table]:
    """A row for each network, a column for each side: forward passes a probe."""
    table = Table(title=f"A probe in forward passes, drawing and sums included: {COILS} coils, medians")
    for column in ("network", "allocator", "forward [ms]", *TITLES.values()):
        table.add_column(column, justify="left" if column == "network" else "right")
    for entry in entries:
        cells = [_cell(entry["sides"].get(side)) for side in TITLES]
        named = f"{entry['network']}, {entry['matrix'][0]} x {entry['matrix'][1]}"
        table.add_row(named, entry["allocator"], f"{entry['forward_ms']:.0f}", *cells)
    setup = Table(title="Set-up for an image, the reconstruction itself included, in forward passes; probes at a time")
    for column in ("network", "allocator", *(f"{TITLES[side]}" for side in ("published", "linearize_vmap", "ours"))):
        setup.add_column(column, justify="left" if column == "network" else "right")
    for entry in entries:
        named = f"{entry['network']}, {entry['matrix'][0]} x {entry['matrix'][1]}"
        setups = [_setup(entry["sides"].get(side)) for side in ("published", "linearize_vmap", "ours")]
        setup.add_row(named, entry["allocator"], *setups)
    return [table, setup]


def notes(entries: Sequence[dict[str, Any]]) -> list[str]:
    """What failed, in words."""
    return [
        f"{entry['network']}: {TITLES[side]} failed: {text}"
        for entry in entries
        for side, text in entry["failed"].items()
    ]


def _cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return "failed"
    return f"{found['passes']:.2f} ({found['least']:.2f}-{found['most']:.2f})"


def _setup(found: dict[str, Any] | None) -> str:
    if found is None:
        return "failed"
    at_once = found["chunk"] or found["count"]
    return f"{found['setup_passes']:.1f}; {at_once}"
