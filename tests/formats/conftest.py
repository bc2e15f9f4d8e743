import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from voxelsigma.formats.raw_writer import write_raw
from voxelsigma.formats.simulate import SimulatedScan, Simulation, simulate


@pytest.fixture(scope="session")
def scan() -> SimulatedScan:
    """A small scan: 32 noise readouts, then 22 imaging and reference readouts of 4 coils."""
    return simulate(
        Simulation(
            matrix=(1, 32, 32),
            coils=4,
            acceleration=2,
            mask="uniform_1d",
            reference_lines=12,
            noise_samples=2048,
            seed=3,
        )
    )


@pytest.fixture
def raw(scan: SimulatedScan, tmp_path: Path) -> Callable[..., Path]:
    """Writes the small scan, with some of its fields changed, to a file."""

    def write(group: str = "dataset", **changes: Any) -> Path:
        path = tmp_path / "scan.h5"
        changed = dataclasses.replace(scan, **changes)
        write_raw(path, changed.header_xml, changed.blocks, group)
        return path

    return write
