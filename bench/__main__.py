"""Measured comparisons in one run: `make bench`, or `python -m bench --help`.

Tables go to standard output, the same figures under the keys of `bench/README.md` to a JSON file.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from bench import error, exact, instant, linear, machine, memory, probe_cost, times
from bench.front_end import front_end_table
from bench.networks import QUICK, SETTINGS, SHIPPED, Size, data_folder
from bench.processes import ROOT, Call, together
from bench.roads import TRIAL_SCALE

PARTS: Final = ("probe", "linear", "front_end", "exact", "instant", "memory", "error")
"""In the order in which they run: first what takes times, alone; then what another process may run beside."""

LATEST, PARTIAL = ROOT / "bench" / "latest.json", ROOT / "bench" / "results" / "partial.json"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run measures.

    Parameters
    ----------
    parts, settings
        Which of `PARTS`; networks and matrices of cost and memory.
    repeats, seconds
        Of the cost: repetitions, and the time of one.
    memory_seconds, most, tries
        Of the memory: time for a figure, most probes, processes of the fewest.
    accelerations, probes, reference, size, network
        Of the error: masks, probes of the run and of the reference, matrix, network.
    predictor, predicted
        Of predictions: the card, and masks.
    threads
        Of torch, where times are taken.
    """

    parts: Sequence[str] = PARTS
    settings: Sequence[tuple[str, Size]] = SETTINGS
    repeats: int = 5
    seconds: float = 10.0
    memory_seconds: float = 15.0
    most: int = 1024
    tries: int = 5
    accelerations: Sequence[float] = (4.0, 6.0)
    probes: int = 512
    reference: int = 2000
    size: int = 128
    network: str = SHIPPED
    predictor: str = "unrolled_small"
    predicted: Sequence[float] = instant.ACCELERATIONS
    threads: int = 1


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write."""
    options = _parser().parse_args(arguments)
    plan = _plan(options)
    target = Path(options.json) if options.json else (LATEST if plan == Plan() else PARTIAL)
    start = time.perf_counter()
    console = Console(width=max(200, Console().width))
    console.print(_words(plan))

    def say(text: str) -> None:
        console.print(f"[{time.perf_counter() - start:5.0f} s] {text}", markup=False, highlight=False)

    found = {**machine.record(), "quick": options.quick, "threads": plan.threads, "parts": list(plan.parts)}
    found |= measure(plan, options.data or data_folder(), say)
    found["seconds"] = round(time.perf_counter() - start)
    show(found, console)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    console.print(f"{found['seconds']} s; figures in {target}")


def measure(plan: Plan, data: str | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Figures of all parts of a plan."""
    found: dict[str, Any] = {}
    if "probe" in plan.parts:
        found["probe"] = []
        for call in probe_cost.calls(plan.settings, repeats=plan.repeats, seconds=plan.seconds, threads=plan.threads):
            say(f"cost: {_named(call)}")
            found["probe"].append(call())
    for part in ("linear", "exact"):
        if part in plan.parts:
            say(part)
            found[part] = Call(target=f"bench.{part}:figures", threads=plan.threads)()
    if "front_end" in plan.parts:
        say("front end")
        found["front_end"] = Call(target="bench.__main__:front_end_figures", threads=plan.threads)()
    if "instant" in plan.parts and data is None:
        say("predictions: left out, there are no held-out heads")
    elif "instant" in plan.parts:
        say(f"predictions: {plan.predictor}")
        given = {"name": plan.predictor, "data": data, "accelerations": plan.predicted}
        found["instant"] = Call(target="bench.instant:figures", arguments=given, threads=plan.threads)()
    _beside(plan, data, say, found)
    if "probe" in found and "error" in found:
        found["time_to_error"] = times.times_to_error(found["probe"], found["error"])
    return found


def _beside(plan: Plan, data: str | None, say: Callable[[str], None], found: dict[str, Any]) -> None:
    """Errors and memory, as many processes as there are cores."""
    errors = error.calls(
        accelerations=plan.accelerations,
        probes=plan.probes,
        reference=plan.reference,
        data=data,
        network=plan.network,
        size=plan.size,
    )
    peaks = memory.calls(
        plan.settings, seconds=plan.memory_seconds, most=plan.most, tries=plan.tries, threads=plan.threads
    )
    calls = {"error": errors if "error" in plan.parts else [], "memory": peaks if "memory" in plan.parts else []}
    wanted = [call for group in calls.values() for call in group]
    if not wanted:
        return
    say(f"errors ({len(calls['error'])} scans) and memory ({len(calls['memory'])} networks), side by side")
    results = iter(together(wanted, os.cpu_count() or 1))
    found |= {part: [next(results) for _ in group] for part, group in calls.items() if group}


def show(found: dict[str, Any], console: Console) -> None:
    """All tables."""

    def put(table: Table) -> None:
        # above the table a title is not broken to its width
        title, table.title = table.title, None
        console.print(title, style="bold", highlight=False)
        console.print(table)

    if "probe" in found:
        for table in probe_cost.tables(found["probe"]):
            put(table)
        for line in probe_cost.notes(found["probe"]):
            console.print(line)
    if "memory" in found:
        put(memory.table(found["memory"]))
        for line in memory.notes(found["memory"]):
            console.print(line)
    for table in error.tables(found.get("error", [])):
        put(table)
    for table in times.tables(found.get("time_to_error", [])):
        put(table)
    for table in instant.tables(found.get("instant", [])):
        put(table)
    if "linear" in found:
        put(linear.linear_table(found["linear"]))
    if "front_end" in found:
        for row in found["front_end"]:
            console.print(f"front end, {row['steps']}: {row['CPU']:,} readouts a second of one core ({row['clock']:,})")
    if "exact" in found:
        put(exact.exact_table(found["exact"]))


def front_end_figures() -> list[dict[str, Any]]:
    """The front end's table as figures: readouts a second of one core's time, and of the clock."""
    columns = {str(column.header): list(map(str, column.cells)) for column in front_end_table().columns}
    return [
        {"steps": steps, **{name: int(columns[name][row].replace(",", "")) for name in ("CPU", "clock")}}
        for row, steps in enumerate(columns["steps"])
    ]


def _plan(options: argparse.Namespace) -> Plan:
    chosen: dict[str, Any] = {}
    if options.quick:
        chosen |= {"settings": QUICK, "repeats": 3, "seconds": 5.0, "memory_seconds": 10.0, "most": 64, "tries": 2}
        chosen |= {"probes": 64, "reference": 512, "predicted": (6.0,)}
    for name in ("parts", "repeats", "seconds", "memory_seconds", "threads", "probes", "reference", "accelerations"):
        given = getattr(options, name)
        if given is not None:
            chosen[name] = tuple(given) if isinstance(given, list) else given
    if options.networks:
        settings = chosen.get("settings", SETTINGS)
        chosen["settings"] = tuple(setting for setting in settings if setting[0] in options.networks)
    return Plan(**chosen)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="what to measure; everything by default")
    parser.add_argument("--quick", action="store_true", help="two networks, 64 probes, 3 repetitions")
    parser.add_argument("--networks", nargs="+", choices=sorted({name for name, _ in SETTINGS}))
    parser.add_argument("--repeats", type=int, help="repetitions of the costs (5)")
    parser.add_argument("--seconds", type=float, help="of one repetition, about (10)")
    parser.add_argument("--memory-seconds", type=float, help="that a figure of the peak memory may take (15)")
    parser.add_argument("--accelerations", type=float, nargs="+", help="of the errors' masks (4 6)")
    parser.add_argument("--probes", type=int, help="of the errors, a multiple of 8 (512)")
    parser.add_argument("--reference", type=int, help="probes of the errors' reference (2000)")
    parser.add_argument("--threads", type=int, help="of torch (1)")
    parser.add_argument("--data", help="folder with the held-out head; the phantom stands in where there is none")
    parser.add_argument("--json", help=f"figures; {LATEST.name} for a whole run, results/{PARTIAL.name} for others")
    return parser


def _words(plan: Plan) -> str:
    """What is done, in words."""
    return (
        f"Parts: {', '.join(plan.parts)}. Costs: medians of {plan.repeats} interleaved repetitions of about "
        f"{plan.seconds:g} s after one to warm up, {plan.threads} thread(s), allocator tuned for all sides (and stock "
        f"for the first network). Errors: {plan.probes} probes in disjoint groups against {plan.reference} of ours, "
        f"whose own variance is taken off; Monte Carlo at α = {TRIAL_SCALE}. Memory: up to {plan.most} probes, as far "
        f"as {plan.memory_seconds:g} s a figure go (eight times that for the published algorithm and ours)."
    )


def _named(call: Call) -> str:
    rows, columns = call.arguments["size"]
    return f"{call.arguments['name']}, {rows} x {columns}, {'tuned' if call.tuned else 'stock'} allocator"


if __name__ == "__main__":
    main()
