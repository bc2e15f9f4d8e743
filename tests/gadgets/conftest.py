from collections.abc import Callable, Iterable
from typing import Any

import pytest

from voxelsigma.formats.header import parse_header
from voxelsigma.formats.simulate import SimulatedScan, Simulation, simulate
from voxelsigma.gadgets.chaining import GadgetSpec, chain
from voxelsigma.gadgets.context import Context

Run = Callable[..., list[Any]]


@pytest.fixture(scope="session")
def scan() -> SimulatedScan:
    """A small scan: 4 coils, 32 lines, R = 2 with 12 reference lines."""
    return simulate(
        Simulation(
            matrix=(1, 32, 32),
            coils=4,
            acceleration=2,
            mask="uniform_1d",
            reference_lines=12,
            snr=50,
            noise_samples=4096,
            seed=3,
        )
    )


@pytest.fixture
def run() -> Run:
    """Run items through gadgets given as (name, properties)."""

    def runner(header_xml: bytes, items: Iterable[Any], *gadgets: tuple[str, dict[str, str]]) -> list[Any]:
        context = Context(header=parse_header(header_xml))
        specs = [GadgetSpec(name, properties) for name, properties in gadgets]
        return list(chain(specs, context)(iter(items)))

    return runner
