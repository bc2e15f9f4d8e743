"""Print what this machine does in one run: medians of several, ratios side by side."""

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bench.front_end import front_end_table
from voxelsigma.formats.coils import coil_sensitivities, unit_norm
from voxelsigma.formats.masks import random_2d
from voxelsigma.formats.phantom import head_phantom
from voxelsigma.models.cards import load_card, load_model
from voxelsigma.models.network import NetworkReconstruction
from voxelsigma.models.problem import PlaneProblem
from voxelsigma.models.sense import Sense
from voxelsigma.noise.linearize import Linearization, linearize
from voxelsigma.noise.probes import ProbeSource
from voxelsigma.noise.sketch import Stopping, object_mask, sketch

SIZE, COILS, REPEATS = 96, 8, 5


def median_seconds(action: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median wall-clock time of several runs, after one to warm up."""
    action()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def problem() -> tuple[PlaneProblem, torch.Tensor]:
    """The head phantom, 8 coils, 96², 2D random R = 6, SNR 20."""
    rng = np.random.default_rng(0)
    maps = torch.from_numpy(unit_norm(coil_sensitivities(COILS, (SIZE, SIZE))))
    axis = (np.arange(SIZE) - SIZE // 2) * 2 / SIZE
    image = torch.from_numpy(head_phantom(0.0, axis[:, None], axis)).to(torch.complex64)
    image *= 20 / image.abs()[image.abs() > 0].mean()
    mask = torch.from_numpy(random_2d((SIZE, SIZE), 6, centre=16, rng=rng)).float()
    plane = PlaneProblem(
        sensitivities=maps,
        variance=2 * mask,
        weights=mask,
        limits=((0, SIZE - 1), (0, SIZE - 1)),
        size=(SIZE, SIZE),
    )
    noise = torch.from_numpy(rng.standard_normal((2, COILS, SIZE, SIZE), dtype=np.float32))
    kspace = torch.fft.fftshift(
        torch.fft.fft2(torch.fft.ifftshift(maps * image, dim=(-2, -1)), norm="ortho"), dim=(-2, -1)
    )
    return plane, mask * (kspace + torch.complex(noise[0], noise[1]))


def probe_table(reconstruction: NetworkReconstruction, kspace: torch.Tensor, probes: ProbeSource) -> Table:
    """Cost of a pushed probe in forward passes."""
    table = Table(title=f"Cost of a probe, unrolled_small, {COILS} coils, {SIZE}²")
    for name in ("road", "chunk", "set-up [s]", "forward passes a probe"):
        table.add_column(name, justify="right")
    with torch.no_grad():
        forward = median_seconds(lambda: reconstruction(kspace), 10)
    table.add_row("forward pass", "1", "", f"1.00 ({1000 * forward:.1f} ms)")
    start = time.perf_counter()
    general = linearize(reconstruction, kspace)
    setup = time.perf_counter() - start
    tangents = torch.cat(list(probes.blocks(0, 2)))

    def jvp(tangent: torch.Tensor) -> torch.Tensor:
        return torch.func.jvp(reconstruction, (kspace,), (tangent,))[1]

    for chunk in (1, 4, 16):
        for name, push, seconds in (
            ("linearize + vmap", general.push, setup),
            ("vmap(jvp)", torch.func.vmap(jvp), 0.0),
        ):
            with torch.no_grad():
                cost = median_seconds(lambda: [push(part) for part in tangents.split(chunk)])  # noqa: B023
            table.add_row(name, str(chunk), f"{seconds:.1f}", f"{cost / len(tangents) / forward:.2f}")
    return table


def accuracy_table(plane: PlaneProblem, linearization: Linearization, kspace: torch.Tensor) -> Table:
    """Relative error of the magnitude map against a converged reference, plain and with control variate."""
    table = Table(title="Error of the magnitude map inside the object, 2D random R = 6")
    for name in ("probes", "plain", "control variate", "stated (control variate)"):
        table.add_column(name, justify="right")

    def source(seed: int) -> ProbeSource:
        return ProbeSource(variance=plane.variance, coils=COILS, seed=seed)

    reference = sketch(linearization, source(10**6), Stopping(probes=2000), covariate=plane.covariate()).map()
    inside = object_mask(linearization.value)
    own = float(reference.relative_error()[inside].square().mean())
    for count in (4, 8, 16, 64):
        errors: dict[bool, list[float]] = {False: [], True: []}
        stated = []
        for seed in range(6):
            for controlled, found_errors in errors.items():
                covariate = plane.covariate() if controlled else None
                found = sketch(linearization, source(seed), Stopping(probes=count), covariate=covariate).map()
                relative = (found.sigma / reference.sigma - 1)[inside]
                found_errors.append(float(relative.square().mean()) - own)
                if controlled:
                    stated.append(float(found.relative_error()[inside].square().mean().sqrt()))
        plain, controlled_error = (np.sqrt(max(0.0, statistics.mean(errors[kind]))) for kind in (False, True))
        table.add_row(
            str(count),
            f"{100 * plain:.1f} %",
            f"{100 * controlled_error:.1f} %",
            f"{100 * statistics.mean(stated):.1f} %",
        )
    return table


def exact_table() -> Table:
    """The exact SENSE map."""
    maps = torch.from_numpy(unit_norm(coil_sensitivities(COILS, (256, 256))))
    mask = torch.zeros(256, 256)
    mask[::2] = 1
    plane = PlaneProblem(
        sensitivities=maps, variance=2 * mask, weights=mask, limits=((0, 255), (0, 255)), size=(256, 256)
    )
    seconds = median_seconds(lambda: Sense().bind(plane).exact_variance(), 3)
    table = Table(title="Exact σ of SENSE, 8 coils, 256², R = 2")
    table.add_column("seconds", justify="right")
    table.add_row(f"{seconds:.2f}")
    return table


def main() -> None:
    """Run all comparisons."""
    console = Console()
    plane, kspace = problem()
    method = load_model(load_card("unrolled_small"), torch.device("cpu"))
    reconstruction = method.bind(plane)
    assert isinstance(reconstruction, NetworkReconstruction)
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    console.print(probe_table(reconstruction, kspace, ProbeSource(variance=plane.variance, coils=COILS, seed=1)))
    console.print(accuracy_table(plane, linearize(reconstruction, kspace), kspace))
    console.print(front_end_table())
    console.print(exact_table())


if __name__ == "__main__":
    main()
