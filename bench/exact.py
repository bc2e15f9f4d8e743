"""Time of the exact σ map of SENSE: `python -m bench.exact`."""

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from voxelsigma.formats.coils import coil_sensitivities, unit_norm
from voxelsigma.models.problem import PlaneProblem
from voxelsigma.models.sense import Sense

SIZE, COILS, REPEATS = 256, 8, 5


def figures(size: int = SIZE) -> dict[str, Any]:
    """Median seconds for every second line of a square matrix."""
    maps = torch.from_numpy(unit_norm(coil_sensitivities(COILS, (size, size))))
    mask = torch.zeros(size, size)
    mask[::2] = 1
    edge = (0, size - 1)
    plane = PlaneProblem(sensitivities=maps, variance=2 * mask, weights=mask, limits=(edge, edge), size=(size, size))
    times = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        Sense().bind(plane).exact_variance()
        times.append(time.perf_counter() - start)
    # the first one warms up
    return {"matrix": [size, size], "coils": COILS, "acceleration": 2, "seconds": statistics.median(times[1:])}


def exact_table(found: Mapping[str, Any]) -> Table:
    table = Table(title=f"Exact σ of SENSE, {found['coils']} coils, {found['matrix'][0]}², R = {found['acceleration']}")
    table.add_column("seconds", justify="right")
    table.add_row(f"{found['seconds']:.2f}")
    return table


if __name__ == "__main__":
    Console().print(exact_table(figures()))
