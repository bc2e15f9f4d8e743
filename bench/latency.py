"""Print how long images and σ maps take behind the last readout of their slice, at a scanner's pace.

`python -m bench.latency` starts `voxelsigma serve`; with `--to host:port` a server that runs already is measured. It
must know the shipped pipelines by their names.
"""

import argparse
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from voxelsigma.formats.raw_writer import write_raw
from voxelsigma.formats.simulate import Simulation, simulate
from voxelsigma.hosts.send import report_lines, send

PIPELINES = ("sense_sigma.xml", "unrolled_sigma.xml")
SIZES = (128, 192)
COILS = 8
# not any address: an error names one too
ADDRESS = re.compile(r"listening on (\S+:[1-9]\d*)")
START_SECONDS, LEAVE_SECONDS, TIMEOUT_SECONDS = 120.0, 10.0, 600.0


def server_command() -> list[str]:
    """What starts the server; it says where it listens, as host:port."""
    return [sys.executable, "-m", "voxelsigma", "serve", "--port", "0"]


@contextmanager
def started_server() -> Iterator[str]:
    """A server of our own: its address."""
    child = subprocess.Popen(
        server_command(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    # reads on for as long as the server lives: a full pipe would stop it
    threading.Thread(target=_read, args=(child, lines), daemon=True).start()
    try:
        yield _address(lines)
    finally:
        child.terminate()
        try:
            child.wait(LEAVE_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _read(child: "subprocess.Popen[str]", lines: "queue.SimpleQueue[str | None]") -> None:
    assert child.stdout is not None
    with child.stdout:
        for line in child.stdout:
            lines.put(line)
    lines.put(None)


def _address(lines: "queue.SimpleQueue[str | None]") -> str:
    """The first address that the server names."""
    seen = ""
    end = time.monotonic() + START_SECONDS
    while True:
        try:
            line = lines.get(timeout=max(0.0, end - time.monotonic()))
        except queue.Empty:
            raise TimeoutError(f"the server named no address within {START_SECONDS:g} s; it said: {seen}") from None
        if line is None:
            raise RuntimeError(f"{' '.join(server_command())} ended; it said: {seen}")
        found = ADDRESS.search(line)
        if found is not None:
            return found[1]
        seen += line


def scan_file(folder: Path, size: int, slices: int, seed: int = 0) -> Path:
    """A simulated scan, every 4th line and 24 reference lines."""
    path = folder / f"scan_{size}_{slices}.h5"
    scan = simulate(
        Simulation(matrix=(1, size, size), coils=COILS, acceleration=4, mask="uniform_1d", slices=slices, seed=seed)
    )
    write_raw(path, scan.header_xml, scan.blocks)
    return path


def measure(address: str, folder: Path, slices: int, tr: float) -> None:
    """Send each scan through each pipeline; each once before with a single slice, so that models are loaded."""
    for size in SIZES:
        scan, warm = scan_file(folder, size, slices), scan_file(folder, size, 1)
        for pipeline in PIPELINES:
            send(warm, address, pipeline=pipeline, timeout=TIMEOUT_SECONDS)
            report = send(scan, address, pipeline=pipeline, tr=tr, timeout=TIMEOUT_SECONDS)
            print(f"{pipeline}, {size}², {COILS} coils, {slices} slices, R = 4")
            print("\n".join(f"  {line}" for line in report_lines(report)), flush=True)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(prog="python -m bench.latency", description=main.__doc__)
    parser.add_argument("--to", help="a server that runs already, host:port")
    parser.add_argument("--slices", type=int, default=4, help="slices of each scan")
    parser.add_argument("--tr", type=float, default=0.004, help="seconds from one readout to the next")
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}")
    server = nullcontext(options.to) if options.to else started_server()
    with tempfile.TemporaryDirectory(prefix="voxelsigma-") as folder, server as address:
        measure(address, Path(folder), options.slices, options.tr)


if __name__ == "__main__":
    main()
