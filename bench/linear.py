"""Time to 1 % error of the σ map of a linear reconstruction with a 2D mask: `python -m bench.linear`."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from voxelsigma.formats.coils import coil_sensitivities, unit_norm
from voxelsigma.formats.phantom import head_phantom
from voxelsigma.models.fourier import fft_centred
from voxelsigma.models.problem import PlaneProblem
from voxelsigma.models.sense import Sense, SenseReconstruction
from voxelsigma.noise.linearize import Linearization, linearize
from voxelsigma.noise.montecarlo import monte_carlo
from voxelsigma.noise.pico import Probing, estimate_linear, image_probes, probe_sums, variance_map
from voxelsigma.noise.probes import ProbeSource
from voxelsigma.noise.sigma import SigmaMap
from voxelsigma.noise.sketch import Stopping, sketch
from voxelsigma.noise.voxels import object_mask

SIZE, COILS, REPEATS = 128, 8, 5
TARGET: Final = 0.01
REFERENCE_PROBES, COUNT, PLAIN_COUNT = 64, 8, 32


@dataclass(frozen=True)
class Scan:
    """A plane to reconstruct and how: sheared regular sampling, R = 2, with a fully sampled centre."""

    plane: PlaneProblem
    kspace: Tensor
    reconstruction: SenseReconstruction
    linearization: Linearization
    probing: Probing
    inside: Tensor

    def source(self, seed: int) -> ProbeSource:
        return ProbeSource(variance=self.plane.variance, coils=COILS, seed=seed)


def make_scan(size: int = SIZE, centre: int = 16) -> Scan:
    """The head phantom at SNR 20; every other sample of each line, lines in turn shifted by one."""
    maps = torch.from_numpy(unit_norm(coil_sensitivities(COILS, (size, size)))).to(torch.complex64)
    axis = (np.arange(size) - size // 2) * 2 / size
    image = torch.from_numpy(head_phantom(0.0, axis[:, None], axis)).to(torch.complex64)
    image *= 20 / image.abs()[image.abs() > 0].mean()
    place = torch.arange(size)
    mask = ((place.unsqueeze(1) + place) % 2 == 0).float()
    middle = slice(size // 2 - centre // 2, size // 2 + centre // 2)
    mask[middle, middle] = 1
    edge = (0, size - 1)
    plane = PlaneProblem(sensitivities=maps, variance=2 * mask, weights=mask, limits=(edge, edge), size=(size, size))
    generator = torch.Generator().manual_seed(1)
    noise = torch.complex(*torch.randn(2, COILS, size, size, generator=generator))
    kspace = mask * (fft_centred(maps * image) + noise)
    reconstruction = Sense().bind(plane)
    return Scan(
        plane=plane,
        kspace=kspace,
        reconstruction=reconstruction,
        linearization=linearize(reconstruction, kspace),
        probing=reconstruction.probing(),
        inside=object_mask(image),
    )


def time_to_target(scan: Scan, repeats: int = REPEATS) -> dict[str, dict[str, float]]:
    """Seconds to `TARGET` of each estimator, and their ratios.

    Rms relative error of the magnitude map over the object is measured against image-space probing with
    `REFERENCE_PROBES` probes of other seeds, whose own stated variance is taken off; the time of other counts follows
    from the measured error by 1/√N and the measured time a probe. `auto` is run outright, choice and set-up included.

    Returns
    -------
        For every method: `error` at `count` probes, `seconds_per_probe`, `probes` and `seconds` to the target, and
        `shorter`, pseudo-replica's seconds over its own.
    """
    reference = _probed(scan, REFERENCE_PROBES, 10**6, controlled=True)
    own = float(reference.relative_error()[scan.inside].square().mean())

    def error(found: SigmaMap) -> float:
        return float((found.sigma / reference.sigma - 1)[scan.inside].square().mean()) - own

    def replica(seed: int) -> SigmaMap:
        generator = torch.Generator().manual_seed(seed)
        deviation = monte_carlo(
            scan.reconstruction, scan.kspace, scan.plane.variance, PLAIN_COUNT, generator=generator, kind="complex"
        )
        # a linear reconstruction keeps noise circular: half the variance of the real part's own estimate
        return SigmaMap(
            sigma=deviation.sigma / 2**0.5,
            degrees_of_freedom=deviation.degrees_of_freedom,
            kind="magnitude",
            probes=PLAIN_COUNT,
            explained=deviation.explained,
        )

    def sketched(seed: int, *, controlled: bool) -> SigmaMap:
        covariate = scan.plane.covariate() if controlled else None
        return sketch(scan.linearization, scan.source(seed), Stopping(probes=PLAIN_COUNT), covariate=covariate).map()

    methods: dict[str, tuple[int, Callable[[int], SigmaMap]]] = {
        "pseudo-replica": (PLAIN_COUNT, replica),
        "sketch": (PLAIN_COUNT, lambda seed: sketched(seed, controlled=False)),
        "sketch, control variate": (PLAIN_COUNT, lambda seed: sketched(seed, controlled=True)),
        "image-space probing, published": (COUNT, lambda seed: _probed(scan, COUNT, seed, controlled=False)),
        "image-space probing, ours": (COUNT, lambda seed: _probed(scan, COUNT, seed, controlled=True)),
    }
    rows = {}
    for name, (count, run) in methods.items():
        times, errors = [], []
        for seed in range(repeats):
            start = time.perf_counter()
            found = run(seed)
            times.append(time.perf_counter() - start)
            errors.append(error(found))
        measured = math.sqrt(max(statistics.mean(errors), 0.0))
        probes = max(2, math.ceil(count * (measured / TARGET) ** 2))
        each = statistics.median(times) / count
        rows[name] = {
            "error": measured,
            "count": count,
            "seconds_per_probe": each,
            "probes": probes,
            "seconds": probes * each,
        }
    rows["auto"] = _outright(scan, error, repeats)
    for row in rows.values():
        row["shorter"] = rows["pseudo-replica"]["seconds"] / row["seconds"]
    return rows


def _probed(scan: Scan, count: int, seed: int, *, controlled: bool) -> SigmaMap:
    """Image-space probing with a count of probes; without controls as published."""
    probing = scan.probing
    source = image_probes(probing, scan.source(seed))

    def samples(probes: Tensor) -> Tensor:
        if controlled:
            return probing.samples(probes)
        return (probes.conj() * scan.reconstruction.covariance_push(probes)).real.unsqueeze(0)

    sums = None
    for number in range(count // 8):
        block = source.block(number)
        step = probe_sums(torch.cat([samples(part) for part in block.split(2)], dim=1))
        sums = step if sums is None else sums + step
    assert sums is not None
    if controlled:
        return variance_map(sums, probing)
    bare = Probing(size=probing.size, samples=samples, means=probing.means[:0], uncoupled=probing.uncoupled, solves=1)
    return variance_map(sums, bare)


def _outright(scan: Scan, error: Callable[[SigmaMap], float], repeats: int) -> dict[str, float]:
    """The automatic choice from nothing to its own stated target."""
    times, errors, counts = [], [], []
    for seed in range(repeats):
        start = time.perf_counter()
        found = estimate_linear(
            scan.linearization,
            scan.reconstruction.probing(),
            scan.source(seed),
            Stopping(probes=65536, target_error=TARGET),
            covariate=scan.plane.covariate(),
        )
        times.append(time.perf_counter() - start)
        errors.append(error(found.magnitude))
        counts.append(found.image_probes + found.sketch_probes)
    seconds, count = statistics.median(times), statistics.median(counts)
    return {
        "error": math.sqrt(max(statistics.mean(errors), 0.0)),
        "count": count,
        "seconds_per_probe": seconds / count,
        "probes": count,
        "seconds": seconds,
    }


def noise_amplification(scan: Scan) -> float:
    """Mean g over the object."""
    sigma = _probed(scan, REFERENCE_PROBES, 10**6, controlled=True).sigma
    return float((sigma / scan.plane.acceleration() ** 0.5)[scan.inside].mean())


def figures() -> dict[str, Any]:
    """R, mean g and the rows of `time_to_target`."""
    scan = make_scan()
    return {
        "matrix": [SIZE, SIZE],
        "coils": COILS,
        "target": TARGET,
        "acceleration": scan.plane.acceleration(),
        "mean_g": noise_amplification(scan),
        "rows": time_to_target(scan),
    }


def linear_table(found: Mapping[str, Any]) -> Table:
    table = Table(
        title=f"SENSE, {COILS} coils, {SIZE}², sheared 2D sampling with a full centre, "
        f"R = {found['acceleration']:.2f}, mean g {found['mean_g']:.3f}: {TARGET:.0%} error of σ"
    )
    for name in ("estimator", "probes", "error", "ms a probe", "probes to 1 %", "seconds to 1 %", "shorter"):
        table.add_column(name, justify="left" if name == "estimator" else "right")
    for name, row in found["rows"].items():
        table.add_row(
            name,
            f"{row['count']:.0f}",
            f"{100 * row['error']:.2f} %",
            f"{1000 * row['seconds_per_probe']:.1f}",
            f"{row['probes']:.0f}",
            f"{row['seconds']:.2f}",
            f"{row['shorter']:.1f} x",
        )
    return table


def main() -> None:
    Console(width=120).print(linear_table(figures()))


if __name__ == "__main__":
    main()
