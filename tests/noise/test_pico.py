"""Image-space probing of a random covariance: unbiased, repeatable, honest about its error, chosen where it pays."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count as counting

import pytest
import torch
from torch import Tensor

from voxelsigma.noise.linearize import Linearization
from voxelsigma.noise.pico import (
    ImageProbes,
    LinearEstimate,
    ProbeSums,
    Probing,
    estimate_linear,
    image_probes,
    probe_sums,
    sample_covariance,
    variance_map,
)
from voxelsigma.noise.probes import ProbeSource
from voxelsigma.noise.sigma import SigmaMap
from voxelsigma.noise.sketch import Covariate, Stopping, sketch

SIZE = 16


@dataclass(frozen=True)
class Toy:
    """A reconstruction x = G y of one coil on a grid; Σ = 2 G G^H."""

    matrix: Tensor
    probing: Probing
    linearization: Linearization
    variance: Tensor
    covariate: Covariate
    chunks: list[int]

    @property
    def source(self) -> ProbeSource:
        return ProbeSource(variance=self.variance, coils=1, seed=3, counters=(4,), dtype=torch.complex128)

    @property
    def exact(self) -> Tensor:
        """Magnitude σ."""
        return self.matrix.abs().square().sum(dim=1).reshape(SIZE, SIZE).sqrt()


def toy(coupling: float, *, controls: bool = True) -> Toy:
    """G = 1 + a smooth-random coupling of that relative energy, with the first-order term as a control."""
    generator = torch.Generator().manual_seed(7)
    number = SIZE * SIZE
    parts = torch.randn(2, number, number, generator=generator, dtype=torch.float64)
    couple = torch.complex(parts[0], parts[1])
    couple = (couple + couple.mH) * (coupling / (4 * number)) ** 0.5
    couple.fill_diagonal_(0)
    scale = torch.linspace(1, 2, number, dtype=torch.float64)
    matrix = scale.unsqueeze(1) * (torch.eye(number, dtype=torch.complex128) + couple)
    covariance = 2 * matrix @ matrix.mH
    first = 2 * scale.unsqueeze(1) * (couple + couple.mH) * scale
    chunks: list[int] = []

    def samples(probes: Tensor) -> Tensor:
        chunks.append(len(probes))
        flat = probes.flatten(1).mT
        found = [(flat.conj() * (one @ flat)).real.mT.reshape(probes.shape) for one in (covariance, first)]
        return torch.stack(found if controls else found[:1])

    means = torch.zeros(1 if controls else 0, SIZE, SIZE, dtype=torch.float64)
    push = lambda tangents: (tangents[:, 0].flatten(1) @ matrix.mT).reshape(-1, SIZE, SIZE)  # noqa: E731
    return Toy(
        matrix=matrix,
        probing=Probing(
            size=(SIZE, SIZE),
            samples=samples,
            means=means,
            uncoupled=2 * scale.square().reshape(SIZE, SIZE),
            solves=1,
        ),
        linearization=Linearization(value=torch.ones(SIZE, SIZE) + 0j, push=push, complex_linear=True),
        variance=torch.full((SIZE, SIZE), 2.0, dtype=torch.float64),
        covariate=Covariate(
            push=lambda tangents: tangents[:, 0], variance=torch.full((SIZE, SIZE), 2.0, dtype=torch.float64)
        ),
        chunks=chunks,
    )


def pieces(scan: Toy, probes: int, seed: int) -> SigmaMap:
    source = replace(image_probes(scan.probing, scan.source), seed=seed)
    drawn = torch.cat([source.block(number) for number in range(math.ceil(probes / 8))])[:probes]
    return variance_map(probe_sums(scan.probing.samples(drawn)), scan.probing)


def pico(scan: Toy, stopping: Stopping, **options: object) -> LinearEstimate:
    return estimate_linear(
        scan.linearization,
        scan.probing,
        scan.source,
        stopping,
        estimator="pico",
        **options,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("controls", [False, True])
@pytest.mark.parametrize("probes", [4, 16])
def test_it_is_unbiased(probes: int, controls: bool) -> None:
    scan = toy(0.5, controls=controls)
    repeats = 100
    squares = torch.stack([(pieces(scan, probes, seed).sigma / scan.exact).square() for seed in range(repeats)])
    # σ² of 256 voxels and 100 repetitions of relative variance v: known to sqrt(v / 25600); 5 of these and what the
    # correction of the root adds, v/4
    relative = float(squares.var(dim=0).mean())
    assert float(squares.mean()) - 1 - relative / 4 == pytest.approx(0, abs=5 * (relative / 25600) ** 0.5 + 2e-3)


@pytest.mark.parametrize(
    ("coupling", "controls"), [(0.02, False), (0.5, False), (0.5, True), (1.5, False), (1.5, True)]
)
@pytest.mark.parametrize("probes", [16, 64, 256])
def test_intervals_cover(probes: int, coupling: float, controls: bool) -> None:
    scan = toy(coupling, controls=controls)
    covered = []
    for seed in range(120 if probes < 256 else 40):
        lower, upper = pieces(scan, probes, seed).interval()
        covered.append(((lower <= scan.exact) & (scan.exact <= upper)).double().mean())
    # 10,240 voxels or more, weakly correlated: the average is known to 0.4 %
    assert float(torch.stack(covered).mean()) == pytest.approx(0.95, abs=0.02)


def test_the_stated_error_is_the_error() -> None:
    for controls in (False, True):
        scan = toy(0.5, controls=controls)
        maps = [pieces(scan, 32, seed) for seed in range(60)]
        errors = torch.stack([(found.sigma / scan.exact - 1).square().mean() for found in maps]).mean().sqrt()
        stated = torch.stack([found.relative_error().square().mean() for found in maps]).mean().sqrt()
        assert float(stated / errors) == pytest.approx(1, abs=0.05)


def test_a_control_pays_for_itself() -> None:
    plain, controlled = (pieces(toy(0.1, controls=controls), 16, 1) for controls in (False, True))
    assert float(controlled.relative_error().mean()) < 0.5 * float(plain.relative_error().mean())
    assert float(plain.explained.max()) == 0
    assert float(controlled.explained.min()) > 0.5


def test_a_negative_estimate_becomes_the_floor() -> None:
    scan = toy(0.5, controls=False)
    sums = ProbeSums(
        count=2,
        first=torch.full((1, SIZE, SIZE), -1.0, dtype=torch.float64),
        second=torch.full((1, 1, SIZE, SIZE), 9.0, dtype=torch.float64),
    )
    found = variance_map(sums, scan.probing)
    assert bool((found.sigma > 0).all())
    assert bool((found.degrees_of_freedom < 0.01).all())


def test_voxels_that_no_coil_sees_are_zero_and_exact() -> None:
    scan = toy(0.5)
    uncoupled = scan.probing.uncoupled.clone()
    uncoupled[:3] = 0
    probing = replace(scan.probing, uncoupled=uncoupled)
    found = variance_map(probe_sums(probing.samples(image_probes(probing, scan.source).block(0))), probing)
    assert not bool(found.sigma[:3].any())
    assert bool(found.degrees_of_freedom[:3].isinf().all())
    assert bool(found.degrees_of_freedom[3:].isfinite().all())


# --- one map, however it is computed


def test_chunk_size_does_not_change_the_map() -> None:
    scan = toy(0.5)
    found = [pico(scan, Stopping(probes=44), chunk=chunk) for chunk in (1, 3, 8, 64, None)]
    for other in found[1:]:
        torch.testing.assert_close(other.magnitude.sigma, found[0].magnitude.sigma, rtol=1e-10, atol=0)
        assert other.image_probes == other.magnitude.probes == 44
    assert max(scan.chunks) <= 64


def test_the_complex_map_is_larger_by_the_root_of_two() -> None:
    found = pico(toy(0.5), Stopping(probes=16))
    torch.testing.assert_close(found.complex.sigma, 2**0.5 * found.magnitude.sigma)
    assert (found.complex.kind, found.magnitude.kind) == ("complex", "magnitude")


def test_image_probes_are_random_phases_with_a_key_of_their_own() -> None:
    source = ImageProbes(size=(SIZE, SIZE), seed=1, counters=(2,), dtype=torch.complex128)
    block = source.block(3)
    torch.testing.assert_close(block.abs(), torch.ones_like(block.abs()))
    torch.testing.assert_close(source.block(3), block)
    kspace = ProbeSource(variance=torch.ones(SIZE, SIZE), coils=1, seed=1, counters=(2,), dtype=torch.complex128)
    others = [source.block(2), replace(source, seed=2).block(3), replace(source, counters=(3,)).block(3)]
    for other in [*others, kspace.block(3)[:, 0]]:
        # 2048 phases: independent ones correlate by 0.022
        assert float((other.conj() * block).mean().abs()) < 0.12


def test_covariance_of_probes_behind_a_linear_map() -> None:
    mix = torch.randn(5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0j
    variance = torch.linspace(0.5, 2, 14, dtype=torch.float64).reshape(2, 7)
    source = ProbeSource(variance=variance, coils=3, seed=1, through=lambda x: x @ mix.mT, dtype=torch.complex128)
    kspace = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(2), dtype=torch.complex128)
    expected = torch.stack([kspace[:, k] @ (mix @ torch.diag(variance[k] + 0j) @ mix.mH).mT for k in range(2)], dim=1)
    torch.testing.assert_close(sample_covariance(source)(kspace), expected)
    plain = replace(source, through=None)
    probes = torch.ones(3, 2, 7, dtype=torch.complex128)
    torch.testing.assert_close(sample_covariance(plain)(probes), variance * probes)


# --- when it stops, and what it chooses


def choose(scan: Toy, stopping: Stopping, **options: object) -> LinearEstimate:
    return estimate_linear(scan.linearization, scan.probing, scan.source, stopping, **options)  # type: ignore[arg-type]


def test_little_coupling_is_probed_in_image_space() -> None:
    scan = toy(0.02)
    found = choose(scan, Stopping(probes=24), covariate=scan.covariate)
    assert found.estimator == "pico"
    assert (found.image_probes, found.sketch_probes) == (24, 4)
    assert found.image_variance < found.sketch_variance < 0.3


@pytest.mark.parametrize("with_covariate", [False, True])
def test_what_is_dear_is_left_to_the_sketch(with_covariate: bool) -> None:
    scan = toy(8.0, controls=False)
    scan = replace(scan, probing=replace(scan.probing, solves=10))
    covariate = scan.covariate if with_covariate else None
    found = choose(scan, Stopping(probes=24), covariate=covariate)
    assert found.estimator == "sketch"
    expected = sketch(scan.linearization, scan.source, Stopping(probes=24), covariate=covariate)
    torch.testing.assert_close(found.magnitude.sigma, expected.map().sigma)
    torch.testing.assert_close(found.complex.sigma, expected.map("complex").sigma)
    assert (found.image_probes, found.magnitude.probes) == (8, 24)


def test_twice_the_solves_count_twice() -> None:
    scan = toy(0.5, controls=False)
    once = choose(scan, Stopping(probes=16))
    dear = choose(replace(scan, probing=replace(scan.probing, solves=100)), Stopping(probes=16))
    assert dear.image_variance == pytest.approx(100 * once.image_variance)
    assert (once.estimator, dear.estimator) == ("pico", "sketch")


def test_it_stops_at_the_target_and_asks_no_sketch_that_it_does_not_need() -> None:
    scan = toy(0.02)
    found = choose(scan, Stopping(probes=4096, target_error=0.02), covariate=scan.covariate)
    assert (found.estimator, found.image_probes, found.sketch_probes) == ("pico", 8, 0)
    assert math.isnan(found.sketch_variance)
    closer = pico(toy(0.5), Stopping(probes=4096, target_error=0.02))
    assert float(closer.magnitude.relative_error().median()) <= 0.02
    assert 16 <= closer.image_probes < 4096


def test_it_stops_at_the_time_budget() -> None:
    ticks: Iterator[int] = counting()
    found = pico(toy(0.5), Stopping(probes=4096, time_budget=2.5), chunk=8, clock=lambda: float(next(ticks)))
    assert 8 <= found.image_probes < 64


def test_progress_is_told() -> None:
    told: list[tuple[int, int]] = []
    pico(toy(0.5), Stopping(probes=20), chunk=8, progress=lambda done, limit: told.append((done, limit)))
    assert told == [(8, 20), (16, 20), (20, 20)]


def test_one_probe_is_refused() -> None:
    with pytest.raises(ValueError, match="pico: 1 probes; a variance needs at least 2"):
        pico(toy(0.5), Stopping(probes=1))
