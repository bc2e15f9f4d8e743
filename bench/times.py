"""Time to an error of σ: from what a probe costs and how exact so many probes are."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from rich.table import Table

TARGETS: Final = (0.05, 0.02)

ROWS: Final = (
    ("published: one vmap(jvp)", "published", "sketch, plain"),
    ("chunked vmap(jvp)", "chunked", "sketch, plain"),
    ("torch.func.linearize + vmap", "linearize_vmap", "sketch, plain"),
    ("Monte Carlo", "monte_carlo", "Monte Carlo, plain"),
    ("Monte Carlo, zero-filled", "monte_carlo_covariate", "Monte Carlo, zero-filled"),
    ("Monte Carlo, learned filter", "monte_carlo_covariate", "Monte Carlo, learned filter"),
    ("ours, plain", "ours", "sketch, plain"),
    ("ours, zero-filled", "ours", "sketch, zero-filled"),
    ("ours, learned filter", "ours", "sketch, learned filter"),
)
"""Name, whose cost, whose error. All with a covariate, and ours without, are charged the one with the filter."""


def times_to_error(probe: Sequence[Mapping[str, Any]], error: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    r"""Forward passes and seconds to every target, for each scan, kind of map and allocator.

    .. math:: N = \lceil (c/e)^2 \rceil, \qquad t = t_0 + N t_1

    with c from the measured errors, the set-up :math:`t_0` (which makes the image too) and the cost :math:`t_1` of a
    probe.
    """
    return [
        _entry(cost, scan, kind, target)
        for scan in error
        for cost in probe
        if (cost["network"], cost["matrix"]) == (scan["network"], scan["matrix"])
        for kind in ("magnitude", "complex")
        for target in TARGETS
    ]


def _entry(cost: Mapping[str, Any], scan: Mapping[str, Any], kind: str, target: float) -> dict[str, Any]:
    rows: dict[str, dict[str, float]] = {}
    for name, side, estimator in ROWS:
        constant = scan["constants"][estimator][kind]
        if side not in cost["sides"] or constant is None:
            continue
        probes = max(2, math.ceil((constant / target) ** 2))
        passes = cost["sides"][side]["setup_passes"] + probes * cost["sides"][side]["passes"]
        rows[name] = {"probes": probes, "passes": passes, "seconds": passes * cost["forward_ms"] / 1000}
    for key, name in (("against_published", ROWS[0][0]), ("against_monte_carlo", ROWS[3][0])):
        if name in rows:
            for row in rows.values():
                row[key] = rows[name]["seconds"] / row["seconds"]
    return {
        "network": scan["network"],
        "acceleration": scan["acceleration"],
        "allocator": cost["allocator"],
        "kind": kind,
        "target": target,
        "rows": rows,
    }


def tables(entries: Sequence[Mapping[str, Any]]) -> Iterator[Table]:
    """A table for each scan, allocator and kind of map, both targets beside one another; stock for one kind only."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for entry in entries:
        if entry["allocator"] == "stock" and entry["kind"] != "magnitude":
            continue
        key = tuple(entry[name] for name in ("network", "acceleration", "kind", "allocator"))
        groups.setdefault(key, []).append(entry)
    for (network, acceleration, kind, allocator), group in groups.items():
        table = Table(title=f"Time to σ error, {kind} map, {network}, R = {acceleration:g}, {allocator} allocator")
        table.add_column("estimator")
        for entry in group:
            goal = f"{100 * entry['target']:.0f} %"
            for column in (f"probes to {goal}", "seconds", "published / it", "Monte Carlo / it"):
                table.add_column(column, justify="right")
        for name in group[0]["rows"]:
            cells: list[str] = []
            for entry in group:
                row = entry["rows"][name]
                cells += [f"{row['probes']:.0f}", f"{row['seconds']:.1f}"]
                against = [row.get(key) for key in ("against_published", "against_monte_carlo")]
                cells += ["" if ratio is None else f"{ratio:.2f}" for ratio in against]
            table.add_row(name, *cells)
        yield table
