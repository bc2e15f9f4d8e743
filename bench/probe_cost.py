"""Print what a probe costs, in forward passes, on every road through a reconstruction's Jacobian.

`python -m bench.probe_cost` measures each network in a process of its own, for one and for two threads, all sides
with the allocator settings of a fair comparison (the stock allocator gives memory back and fetches it again with every
batch). The sides take turns, so that a busy machine is busy for all of them; only the ratios mean something.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from voxelsigma.models.unrolled import Unrolled
from voxelsigma.noise.chunking import default_chunk
from voxelsigma.noise.linearize import linearize

ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "20000000000", "MALLOC_TOP_PAD_": "67108864"}
SIZE, COILS = 128, 8
CHUNKS = {"tape": (1, 2, 4, 8), "torch.func.linearize + vmap": (1, 4), "vmap(jvp)": (1, 4, 8)}
NETWORKS = ("unrolled 32", "unrolled 64", "U-Net")
TIMEOUT_SECONDS = 1800

Push = Callable[[Tensor], Tensor]


class Block(nn.Sequential):
    """Two convolutions, each with instance normalisation and a leaky ReLU."""

    def __init__(self, source: int, target: int) -> None:
        layers: list[nn.Module] = []
        for channels in (source, target):
            layers += [
                nn.Conv2d(channels, target, 3, padding=1, bias=False),
                nn.InstanceNorm2d(target),
                nn.LeakyReLU(0.2, inplace=True),
            ]
        super().__init__(*layers)


class UNet(nn.Module):
    """Concatenated paths over two poolings, of the coil-combined image."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        widths = (channels, 2 * channels, 4 * channels)
        self.down = nn.ModuleList(Block(*pair) for pair in zip((2, *widths), widths, strict=False))
        self.rise = nn.ModuleList(nn.ConvTranspose2d(2 * width, width, 2, stride=2) for width in widths[1::-1])
        self.up = nn.ModuleList(Block(2 * width, width) for width in widths[1::-1])
        self.out = nn.Conv2d(channels, 2, 1)

    def forward(self, kspace: Tensor, sensitivities: Tensor, mask: Tensor) -> Tensor:
        """K-space `(coils, k1, k0)` to an image `(y, x)`."""
        image = (sensitivities.conj() * torch.fft.ifft2(mask * kspace, norm="ortho")).sum(dim=0)
        features = torch.view_as_real(image).movedim(-1, 0).unsqueeze(0)
        kept = []
        for block in self.down:
            features = block(features)
            kept.append(features)
            features = nn.functional.avg_pool2d(features, 2)
        features = kept.pop()
        for rise, block in zip(self.rise, self.up, strict=True):
            features = block(torch.cat([kept.pop(), rise(features)], dim=1))
        return image + torch.view_as_complex(self.out(features)[0].movedim(0, -1).contiguous())


def problem(name: str) -> tuple[Push, Tensor]:
    """A reconstruction with random weights, and data."""
    torch.manual_seed(0)
    kind, _, channels = name.partition(" ")
    network = Unrolled(steps=4, blocks=2, channels=int(channels)) if kind == "unrolled" else UNet()
    network.eval().requires_grad_(False)
    maps = torch.randn(COILS, SIZE, SIZE, dtype=torch.complex64)
    maps /= maps.abs().square().sum(dim=0).sqrt()
    mask = (torch.rand(SIZE, SIZE) < 0.25).float()
    return lambda kspace: network(kspace, maps, mask), mask * torch.randn(COILS, SIZE, SIZE, dtype=torch.complex64)


def seconds(action: Callable[[], object]) -> float:
    """Wall-clock time of one run."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure(name: str, repeats: int) -> dict[str, object]:
    """All sides in turn: set-up in seconds, a probe in forward passes, memory."""
    warnings.filterwarnings("ignore")
    reconstruction, kspace = problem(name)
    sides: dict[str, tuple[Callable[[], object], int]] = {"forward": (lambda: reconstruction(kspace), 1)}
    start = time.perf_counter()
    tape = linearize(reconstruction, kspace)
    setup = {"tape": time.perf_counter() - start}
    start = time.perf_counter()
    _, traced = torch.func.linearize(reconstruction, kspace)
    setup["torch.func.linearize + vmap"] = time.perf_counter() - start
    roads: dict[str, Push] = {
        "tape": tape.push,
        "torch.func.linearize + vmap": torch.func.vmap(traced),
        "vmap(jvp)": torch.func.vmap(lambda tangent: torch.func.jvp(reconstruction, (kspace,), (tangent,))[1]),
    }
    tangents = torch.randn(max(max(chunks) for chunks in CHUNKS.values()), *kspace.shape, dtype=kspace.dtype)
    for road, chunks in CHUNKS.items():
        for chunk in chunks:
            sides[f"{road}, {chunk}"] = (partial(roads[road], tangents[:chunk]), chunk)
    times: dict[str, list[float]] = {side: [] for side in sides}
    with torch.no_grad():
        for repeat in range(repeats + 1):
            for side, (action, count) in sides.items():
                elapsed = seconds(action) / count
                # the first one warms up
                if repeat:
                    times[side].append(elapsed)
    forward = statistics.median(times.pop("forward"))
    return {
        "forward_ms": 1000 * forward,
        "setup_s": setup,
        "passes_per_probe": {side: statistics.median(found) / forward for side, found in times.items()},
        "default_chunk": default_chunk(tape),
        "fallbacks": tape.fallbacks,
    }


def memory(name: str, probes: int, chunk: int) -> float:
    """Peak memory of a process that pushes some probes on the tape, in MB."""
    reconstruction, kspace = problem(name)
    push = linearize(reconstruction, kspace).push
    for _ in range(probes // chunk):
        push(torch.randn(chunk, *kspace.shape, dtype=kspace.dtype))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_a_process(threads: int, *options: str) -> str:
    """Run this module with some options, on so many threads."""
    environment = os.environ | ALLOCATOR | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "bench.probe_cost", *options]
    return subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True, timeout=TIMEOUT_SECONDS
    ).stdout


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(prog="python -m bench.probe_cost", description=main.__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--networks", nargs="*", default=NETWORKS)
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    parser.add_argument("--probes", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        found = (
            memory(options.inside, options.probes, 4) if options.probes else measure(options.inside, options.repeats)
        )
        print(json.dumps(found))
        return
    console = Console()
    for threads in options.threads:
        for name in options.networks:
            report(console, name, threads, options.repeats)


def report(console: Console, name: str, threads: int, repeats: int) -> None:
    """The table of one network."""
    found = json.loads(in_a_process(threads, "--inside", name, "--repeats", str(repeats)))
    table = Table(title=f"{name}, {COILS} coils, {SIZE}², {threads} threads: forward {found['forward_ms']:.0f} ms")
    for column in ("road, chunk", "forward passes a probe", "set-up [s]"):
        table.add_column(column, justify="right")
    for side, passes in found["passes_per_probe"].items():
        table.add_row(side, f"{passes:.2f}", f"{found['setup_s'].get(side.rsplit(',', 1)[0], 0):.1f}")
    console.print(table)
    peaks = [float(in_a_process(threads, "--inside", name, "--probes", str(count))) for count in (16, 64)]
    console.print(f"  tape: peak memory {peaks[0]:.0f} MB at 16 probes, {peaks[1]:.0f} MB at 64, 4 at a time")
    console.print(f"  default chunk {found['default_chunk']}, fallbacks {found['fallbacks'] or 'none'}")


if __name__ == "__main__":
    main()
