import dataclasses
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from voxelsigma.formats.raw_writer import write_raw
from voxelsigma.formats.simulate import SimulatedScan, Simulation, simulate

Outcome = subprocess.CompletedProcess[str]
External = tuple[str, str, dict[str, str] | list[tuple[str, dict[str, str]]]]

# a process whose files cannot grow beyond some size: a disk that is full
LIMITED = (
    "import resource, runpy, sys; size = int(sys.argv.pop(1)); "
    "resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)); runpy.run_module('voxelsigma', run_name='__main__')"
)


def simulated(**changes: Any) -> SimulatedScan:
    values = {"matrix": (1, 32, 32), "coils": 4, "acceleration": 2, "mask": "uniform_1d", "reference_lines": 12}
    return simulate(Simulation(**{**values, "snr": 50, "noise_samples": 2048, "seed": 3, **changes}))


@pytest.fixture(scope="session")
def scan() -> SimulatedScan:
    """A small scan: 32 noise readouts, then 22 imaging and reference readouts of 4 coils, R = 2."""
    return simulated()


@pytest.fixture(scope="session")
def scan_file(scan: SimulatedScan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small scan in a file."""
    path = tmp_path_factory.mktemp("scan") / "scan.h5"
    write_raw(path, scan.header_xml, scan.blocks)
    return path


@pytest.fixture
def raw(scan: SimulatedScan, tmp_path: Path) -> Callable[..., Path]:
    """Writes a scan, the small one or one simulated otherwise, with some fields changed, into the test's folder."""

    def write(changes: Mapping[str, Any] | None = None, **simulation: Any) -> Path:
        found = dataclasses.replace(simulated(**simulation) if simulation else scan, **(changes or {}))
        path = tmp_path / "scan.h5"
        write_raw(path, found.header_xml, found.blocks)
        return path

    return write


@pytest.fixture(scope="session")
def command() -> Callable[..., Outcome]:
    """Runs `python -m voxelsigma` in a folder."""

    def run(folder: Path, *arguments: object, file_size: int | None = None, **environment: str) -> Outcome:
        start = ["-m", "voxelsigma"] if file_size is None else ["-c", LIMITED, str(file_size)]
        return subprocess.run(
            [sys.executable, *start, *map(str, arguments)],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


@pytest.fixture
def cli(command: Callable[..., Outcome], tmp_path: Path) -> Callable[..., Outcome]:
    """Runs `python -m voxelsigma` in the test's folder."""
    return functools.partial(command, tmp_path)


@pytest.fixture
def pipeline(tmp_path: Path) -> Callable[..., Path]:
    """Writes a pipeline of externals (module, target, what is in its configuration).

    That is a list of gadgets (name, properties) for a chain, or the properties of a gadget.
    """

    def write(*externals: External) -> Path:
        nodes = ""
        for module, target, content in externals:
            listed = (
                properties_xml(content)
                if isinstance(content, dict)
                else "".join(f'<gadget name="{name}">{properties_xml(given)}</gadget>' for name, given in content)
            )
            nodes += (
                f'<external><execute name="{module}" target="{target}" type="python"/>'
                f"<configuration>{listed}</configuration></external>"
            )
        path = tmp_path / "pipeline.xml"
        path.write_text(f"<configuration><version>2</version><stream>{nodes}</stream></configuration>")
        return path

    return write


def properties_xml(properties: Mapping[str, str]) -> str:
    return "".join(f'<property name="{name}" value="{value}"/>' for name, value in properties.items())
