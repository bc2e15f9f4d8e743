"""The sketch against dense Jacobians, naive twins and its own rules for stopping."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from itertools import count as counting

import pytest
import torch
from torch import Tensor

from voxelsigma.models.network import NetworkReconstruction
from voxelsigma.models.problem import PlaneProblem
from voxelsigma.noise.linearize import Linearization, linearize
from voxelsigma.noise.probes import ProbeSource
from voxelsigma.noise.sigma import MapKind, SigmaMap, root_bias
from voxelsigma.noise.sketch import Covariate, Sketch, Stopping, sketch
from voxelsigma.noise.voxels import object_mask, phase_factor

KINDS: tuple[MapKind, ...] = ("magnitude", "complex")


def probes_of(problem: PlaneProblem, seed: int, dtype: torch.dtype = torch.complex128) -> ProbeSource:
    return ProbeSource(variance=problem.variance, coils=4, seed=seed, counters=(3, 1), dtype=dtype)


def rms_error(estimate: Tensor, truth: Tensor) -> float:
    return float((estimate / truth - 1).square().mean().sqrt())


# --- one map, however it is computed


@pytest.mark.parametrize("with_covariate", [False, True])
def test_chunk_size_does_not_change_the_map(
    linearization: Linearization, problem: PlaneProblem, with_covariate: bool
) -> None:
    covariate = problem.covariate() if with_covariate else None
    sketches = [
        sketch(linearization, probes_of(problem, 31), Stopping(probes=75), covariate=covariate, chunk=chunk)
        for chunk in (1, 7, 64, None)
    ]
    for kind in KINDS:
        first, *others = (result.map(kind) for result in sketches)
        assert first.probes == 75
        for other in others:
            torch.testing.assert_close(other.sigma, first.sigma, rtol=1e-10, atol=0)
            torch.testing.assert_close(other.degrees_of_freedom, first.degrees_of_freedom, rtol=1e-8, atol=0)


def test_chunk_size_does_not_change_the_map_in_single_precision(problem: PlaneProblem) -> None:
    maps = problem.sensitivities.to(torch.complex64)

    def reconstruct(samples: Tensor) -> Tensor:
        image = (maps.conj() * torch.fft.ifft2(samples, norm="ortho")).sum(dim=-3)
        return image + 0.1 * image.abs() * image

    linearization = linearize(reconstruct, probes_of(problem, 1, torch.complex64).block(0)[0])
    results = [
        sketch(linearization, probes_of(problem, 32, torch.complex64), Stopping(probes=75), chunk=chunk).map()
        for chunk in (1, 7, 64)
    ]
    for other in results[1:]:
        torch.testing.assert_close(other.sigma, results[0].sigma, rtol=1e-5, atol=0)


def test_sketch_and_naive_twin_share_a_seed(
    linearization: Linearization, network: NetworkReconstruction, kspace: Tensor, problem: PlaneProblem
) -> None:
    probes, number = probes_of(problem, 33), 20
    result = sketch(linearization, probes, Stopping(probes=number))
    phase = torch.angle(network(kspace))
    squares, in_phase_squares = torch.zeros(phase.shape), torch.zeros(phase.shape)
    for probe in torch.cat([probes.block(0), probes.block(1), probes.block(2)])[:number]:
        pushed = torch.func.jvp(network, (kspace,), (probe,))[1]
        squares = squares + pushed.abs() ** 2 / number
        in_phase_squares = in_phase_squares + (torch.exp(-1j * phase) * pushed).real ** 2 / number
    magnitude, whole = result.map("magnitude"), result.map("complex")
    correction = root_bias(torch.tensor(number - 1.0))
    torch.testing.assert_close(magnitude.sigma, in_phase_squares.sqrt() / correction, rtol=1e-9, atol=0)
    torch.testing.assert_close(whole.sigma, squares.sqrt() / root_bias(whole.degrees_of_freedom), rtol=1e-9, atol=0)


def test_seed_and_counters_choose_the_map(linearization: Linearization, problem: PlaneProblem) -> None:
    def sigma_of(probes: ProbeSource) -> Tensor:
        return sketch(linearization, probes, Stopping(probes=8)).map().sigma

    first = sigma_of(probes_of(problem, 34))
    assert torch.equal(first, sigma_of(probes_of(problem, 34)))
    assert not torch.allclose(first, sigma_of(probes_of(problem, 35)))
    assert not torch.allclose(first, sigma_of(dataclasses.replace(probes_of(problem, 34), counters=(3, 2))))


# --- the dense Jacobian


@pytest.fixture(scope="module")
def basis_variances(linearization: Linearization, problem: PlaneProblem) -> tuple[Tensor, Tensor]:
    """In-phase variance and E|u|² from every column of the Jacobian, one real unit of one sample at a time."""
    sampled = (problem.variance > 0).expand(4, -1, -1).nonzero().tolist()
    turn = linearization.value.conj() / linearization.value.abs()
    in_phase, whole = torch.zeros(turn.shape), torch.zeros(turn.shape)
    for start in range(0, len(sampled), 64):
        part = sampled[start : start + 64]
        for unit in (1, 1j):
            tangents = torch.zeros(len(part), 4, *turn.shape, dtype=torch.complex128)
            for tangent, (coil, row, column) in zip(tangents, part, strict=True):
                tangent[coil, row, column] = unit * (problem.variance[row, column] / 2).sqrt()
            columns = linearization.push(tangents)
            in_phase = in_phase + (turn * columns).real.square().sum(dim=0)
            whole = whole + columns.abs().square().sum(dim=0)
    return in_phase, whole


def test_rows_and_columns_of_the_jacobian_give_the_same_variance(
    basis_variances: tuple[Tensor, Tensor], exact_variances: tuple[Tensor, Tensor]
) -> None:
    for by_column, by_row in zip(basis_variances, exact_variances, strict=True):
        torch.testing.assert_close(by_row, by_column, rtol=1e-10, atol=1e-10)


def test_rows_equal_a_jacobian_that_torch_makes(
    network: NetworkReconstruction, kspace: Tensor, problem: PlaneProblem, exact_variances: tuple[Tensor, Tensor]
) -> None:
    chosen = [(3, 5), (12, 12), (20, 9)]

    def voxels(parts: Tensor) -> Tensor:
        image = network(torch.view_as_complex(parts))
        return torch.view_as_real(torch.stack([image[place] for place in chosen]))

    # (voxels, 2, coils, k1, k0, 2)
    dense = torch.func.jacrev(voxels)(torch.view_as_real(kspace))
    energy = dense.square().sum(dim=-1) * problem.variance / 2
    expected = energy.flatten(2).sum(dim=(1, 2))
    torch.testing.assert_close(torch.stack([exact_variances[1][place] for place in chosen]), expected)


def test_noise_of_the_network_is_far_from_circular(exact_variances: tuple[Tensor, Tensor]) -> None:
    # else the two maps, and the projection, would not be told apart by the tests below
    in_phase, whole = exact_variances
    assert float((2 * in_phase / whole - 1).abs().median()) > 0.1


@pytest.fixture(scope="module")
def large_sketch(linearization: Linearization, problem: PlaneProblem) -> Sketch:
    return sketch(linearization, probes_of(problem, 36), Stopping(probes=1024), covariate=problem.covariate())


def without_covariate(result: Sketch) -> Sketch:
    return dataclasses.replace(result, covariate_variance=None)


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "control variate"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_voxel_lies_in_the_chi_square_interval_of_the_exact_variance(
    large_sketch: Sketch, exact_variances: tuple[Tensor, Tensor], kind: MapKind, plain: bool
) -> None:
    result = (without_covariate(large_sketch) if plain else large_sketch).map(kind)
    exact = exact_variances[KINDS.index(kind)].sqrt()
    if plain or kind == "complex":
        # 576 voxels at level 1 - 1e-6: false alarm 6e-4, were voxels independent
        lower, upper = result.interval(1 - 1e-6)
        assert bool(((lower <= exact) & (exact <= upper)).all())
    else:
        # gains that lean on neighbours trade a bias of single voxels, beside edges, for less error: intervals
        # hold on average over voxels; 576 of them give that to 0.5 %
        lower, upper = result.interval(0.99)
        assert float(((lower <= exact) & (exact <= upper)).double().mean()) > 0.97
    # and the errors are as large as stated, no larger and no smaller
    measured = rms_error(result.sigma, exact)
    assert measured == pytest.approx(float(result.relative_error().square().mean().sqrt()), rel=0.25)


@pytest.mark.parametrize("kind", KINDS)
def test_control_variate_lowers_the_error(
    linearization: Linearization, problem: PlaneProblem, exact_variances: tuple[Tensor, Tensor], kind: MapKind
) -> None:
    exact = exact_variances[KINDS.index(kind)].sqrt()
    result = sketch(linearization, probes_of(problem, 37), Stopping(probes=64), covariate=problem.covariate())
    varied, plain = (rms_error(each.map(kind).sigma, exact) for each in (result, without_covariate(result)))
    assert varied < 0.85 * plain
    stated = result.map(kind).relative_error().median()
    assert float(stated) < float(without_covariate(result).map(kind).relative_error().median())


@pytest.mark.parametrize("kind", KINDS)
def test_control_variate_of_noise_that_has_nothing_to_do_with_the_image_costs_nothing(kind: MapKind) -> None:
    size = 80
    # two coils: the image comes of the first, the covariate of the second
    linearization = Linearization(
        value=torch.ones(size, size, dtype=torch.complex128),
        push=lambda batch: torch.fft.ifft2(batch[:, 0], norm="ortho"),
    )
    covariate = Covariate(
        push=lambda batch: torch.fft.ifft2(batch[:, 1], norm="ortho"),
        variance=torch.full((size, size), 2.0, dtype=torch.float64),
    )
    variance = torch.full((size, size), 2.0)
    probes = ProbeSource(variance=variance, coils=2, seed=38, dtype=torch.complex128)
    result = sketch(linearization, probes, Stopping(probes=16), covariate=covariate)
    truth = torch.tensor(1.0 if kind == "magnitude" else math.sqrt(2))
    varied, plain = (rms_error(each.map(kind).sigma, truth) for each in (result, without_covariate(result)))
    assert varied < 1.02 * plain


@pytest.mark.parametrize("probes", [2, 3, 8])
def test_map_is_positive_everywhere_at_few_probes(
    linearization: Linearization, problem: PlaneProblem, probes: int
) -> None:
    result = sketch(linearization, probes_of(problem, 39), Stopping(probes=probes), covariate=problem.covariate())
    for kind in KINDS:
        assert bool((result.map(kind).sigma > 0).all())


def test_magnitude_map_of_a_real_image_is_that_of_its_complex_image(
    linearization: Linearization, network: NetworkReconstruction, kspace: Tensor, problem: PlaneProblem
) -> None:
    magnitude = linearize(lambda samples: network(samples).abs(), kspace)
    assert not magnitude.value.is_complex()
    real, whole = (
        sketch(each, probes_of(problem, 40), Stopping(probes=24)).map() for each in (magnitude, linearization)
    )
    torch.testing.assert_close(real.sigma, whole.sigma, rtol=1e-8, atol=0)


def test_complex_linear_reconstructions_have_half_the_variance_in_any_component(problem: PlaneProblem) -> None:
    maps = problem.sensitivities
    linearization = Linearization(
        value=torch.ones(24, 24, dtype=torch.complex128),
        push=lambda batch: (maps.conj() * torch.fft.ifft2(batch, norm="ortho")).sum(dim=-3),
        complex_linear=True,
    )
    result = sketch(linearization, probes_of(problem, 41), Stopping(probes=16))
    magnitude, whole = result.map("magnitude"), result.map("complex")
    torch.testing.assert_close(magnitude.sigma * math.sqrt(2), whole.sigma, rtol=1e-12, atol=0)
    torch.testing.assert_close(magnitude.relative_error(), whole.relative_error())
    # ν is twice that of a projection
    torch.testing.assert_close(magnitude.degrees_of_freedom, torch.full((24, 24), 32.0, dtype=torch.float64))


# --- stopping


@pytest.fixture
def pushed() -> list[int]:
    return []


@pytest.fixture
def identity(pushed: list[int]) -> Linearization:
    """The first coil's k-space as the image, counting its probes."""

    def push(batch: Tensor) -> Tensor:
        pushed.append(len(batch))
        return batch[:, 0]

    return Linearization(value=torch.ones(6, 6, dtype=torch.complex128), push=push)


@pytest.fixture
def white() -> ProbeSource:
    # unit phasors have |u|² = 2 without any spread, but their components spread
    return ProbeSource(variance=torch.full((6, 6), 2.0), coils=1, seed=42, dtype=torch.complex128)


@pytest.mark.parametrize("probes", [2, 7, 8, 13, 64, 65])
@pytest.mark.parametrize("chunk", [1, 5, 16, 64])
def test_limit_of_probes_is_met_exactly(
    identity: Linearization, white: ProbeSource, pushed: list[int], probes: int, chunk: int
) -> None:
    result = sketch(identity, white, Stopping(probes=probes), chunk=chunk)
    assert result.sums.count == result.map().probes == sum(pushed) == probes
    assert max(pushed) <= chunk


@pytest.mark.parametrize("probes", [1, 0, -3])
def test_fewer_than_two_probes_are_refused(identity: Linearization, white: ProbeSource, probes: int) -> None:
    with pytest.raises(ValueError, match=f"sketch: {probes} probes; a variance needs at least 2"):
        sketch(identity, white, Stopping(probes=probes))


def test_target_error_stops_at_the_first_block_that_reaches_it(identity: Linearization, white: ProbeSource) -> None:
    stopping = Stopping(probes=1000, target_error=0.1)
    # 1/√(2 (S - 1)) ≤ 0.1 from 51 probes on
    assert sketch(identity, white, stopping, chunk=8).sums.count == 56
    # a complex-linear map has twice the degrees of freedom: 25 probes
    linear = dataclasses.replace(identity, complex_linear=True)
    assert sketch(linear, white, stopping, chunk=8).sums.count == 32
    # the error that decides is that of the wanted kind: a circular complex map is at 1/√(4 S), or near it
    complex_stop = sketch(identity, white, stopping, kind="complex", chunk=8).sums.count
    assert 24 < complex_stop < 56


def test_target_error_that_is_never_reached_ends_at_the_limit(identity: Linearization, white: ProbeSource) -> None:
    assert sketch(identity, white, Stopping(probes=20, target_error=1e-3), chunk=8).sums.count == 20


def fake_clock(step: float) -> Callable[[], float]:
    ticks: Iterator[int] = counting()
    return lambda: 100.0 + step * next(ticks)


@pytest.mark.parametrize(("budget", "expected"), [(0.0, 8), (1.0, 8), (2.5, 24), (3.0, 24), (1e9, 80)])
def test_time_budget_ends_at_a_block_boundary(
    identity: Linearization, white: ProbeSource, budget: float, expected: int
) -> None:
    # the clock is read once at the start and once after each block: one second a block
    result = sketch(identity, white, Stopping(probes=80, time_budget=budget), chunk=8, clock=fake_clock(1.0))
    assert result.sums.count == expected


def test_whatever_comes_first_stops(identity: Linearization, white: ProbeSource) -> None:
    def stopped_at(*, probes: int, target: float, budget: float) -> int:
        stopping = Stopping(probes=probes, target_error=target, time_budget=budget)
        return sketch(identity, white, stopping, chunk=8, clock=fake_clock(1.0)).sums.count

    assert stopped_at(probes=30, target=0.1, budget=10) == 30
    assert stopped_at(probes=300, target=0.1, budget=10) == 56
    assert stopped_at(probes=300, target=0.1, budget=3) == 24


def test_seeded_stopping_counts_only() -> None:
    assert Stopping(probes=100, target_error=0.1, time_budget=5).seeded() == Stopping(probes=51)
    assert Stopping(probes=40, target_error=0.1, time_budget=5).seeded() == Stopping(probes=40)
    assert Stopping(probes=40, time_budget=5).seeded() == Stopping(probes=40)
    assert Stopping(probes=40, target_error=10.0).seeded() == Stopping(probes=2)


def test_seeded_stopping_never_reads_the_clock(identity: Linearization, white: ProbeSource) -> None:
    stopping = Stopping(probes=40, target_error=0.2, time_budget=0.0).seeded()
    assert sketch(identity, white, stopping, chunk=8).sums.count == 14


def test_progress_is_told_after_every_step(identity: Linearization, white: ProbeSource) -> None:
    told: list[tuple[int, int]] = []
    sketch(identity, white, Stopping(probes=21), chunk=8, progress=lambda done, most: told.append((done, most)))
    assert told == [(8, 21), (16, 21), (21, 21)]


def test_sketch_remembers_sums_only(identity: Linearization, white: ProbeSource) -> None:
    few, many = (sketch(identity, white, Stopping(probes=probes)) for probes in (8, 200))
    for result in (few, many):
        tensors = [getattr(result.sums, field.name) for field in dataclasses.fields(result.sums)]
        assert all(tensor.shape == (6, 6) for tensor in tensors if isinstance(tensor, Tensor))


# --- its small parts


def test_phase_factor_is_a_unit_phase_and_one_where_there_is_none() -> None:
    image = torch.tensor([[3 + 4j, 0, -2], [1e-30j, 1e30 - 1e30j, 0.5]], dtype=torch.complex64)
    factor = phase_factor(image)
    assert factor.dtype == torch.complex128
    half = math.sqrt(0.5)
    expected = torch.tensor([[0.6 + 0.8j, 1, -1], [1j, half - half * 1j, 1]], dtype=torch.complex128)
    torch.testing.assert_close(factor, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(phase_factor(image.abs()), torch.ones(2, 3, dtype=torch.complex128))


def test_object_is_what_is_brighter_than_a_tenth() -> None:
    image = torch.zeros(20, 20, dtype=torch.complex64)
    image[5:15, 5:15] = 1
    for place, brightness in (((5, 5), 0.2), ((0, 0), 0.05), ((1, 1), 1000.0)):
        image[place] = brightness
    mask = object_mask(1j * image)
    # one wild voxel does not hide the object from the 99th percentile
    assert int(mask.sum()) == 101
    assert bool(mask[5, 5])
    assert not bool(mask[0, 0])
    assert bool(object_mask(torch.zeros(4, 4)).all())


def test_explained_part_is_reported(large_sketch: Sketch) -> None:
    result: SigmaMap = large_sketch.map()
    assert 0.5 < float(result.explained.median()) < 0.9
    assert not bool(without_covariate(large_sketch).map().explained.any())
