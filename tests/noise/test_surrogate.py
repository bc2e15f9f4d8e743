"""The stand-in for a Jacobian: its sums, its variance from cheap probes, and a control variate that changes nothing."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from voxelsigma.models.problem import PlaneProblem
from voxelsigma.noise.linearize import Linearization
from voxelsigma.noise.probes import ProbeSource
from voxelsigma.noise.response import REACH, Response
from voxelsigma.noise.sketch import Stopping, sketch
from voxelsigma.noise.surrogate import SimulatedVariance, Surrogate, adapted
from voxelsigma.noise.voxels import phase_factor

SIZE, COILS = 40, 3
MapMaker = Callable[[int, int, int], Tensor]
OFFSETS = tuple((y, x) for y in range(-REACH, REACH + 1) for x in range(-REACH, REACH + 1))
IMAGE = torch.polar(10 * torch.ones(SIZE, SIZE).double(), torch.linspace(0, 2, SIZE).double().expand(SIZE, SIZE))


def problem_of(smooth_maps: MapMaker) -> PlaneProblem:
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(SIZE, SIZE, generator=generator, dtype=torch.float64) < 0.4
    return PlaneProblem(
        sensitivities=smooth_maps(COILS, SIZE, SIZE),
        variance=2.0 * mask,
        weights=mask.double(),
        limits=((0, SIZE - 1), (0, SIZE - 1)),
        size=(SIZE, SIZE),
    )


def filters(**weights: float) -> Response:
    """7 × 7 weights, the same everywhere; names are places in the middle row: `m` -1, `o` 0, `p` 1."""
    found = torch.zeros(len(OFFSETS), SIZE, SIZE, dtype=torch.float64)
    for name, value in weights.items():
        found[OFFSETS.index((0, "mop".index(name) - 1))] = value
    return Response(offsets=OFFSETS, weights=found)


TRUE = Surrogate(near=filters(o=0.5, p=0.2), again=filters(o=0.6, m=-0.3))
# each voxel has a factor of its own, that nothing in the image tells
ROUGH = torch.rand(SIZE, SIZE, generator=torch.Generator().manual_seed(12), dtype=torch.float64) + 0.5
UNEVEN = Surrogate(
    near=replace(TRUE.near, weights=ROUGH * TRUE.near.weights),
    again=replace(TRUE.again, weights=ROUGH * TRUE.again.weights),
)
WRONG = Surrogate(near=filters(m=1.0, p=-1.0), again=filters(p=2.0))


def pushing(problem: PlaneProblem, extra: float, truth: Surrogate = TRUE) -> Linearization:
    """A reconstruction that is a surrogate, and noise of its own beside."""
    covariate = problem.covariate()
    assert covariate.again is not None
    again = covariate.again
    generator = torch.Generator().manual_seed(2)
    angles = 2 * torch.pi * torch.rand(COILS, SIZE, SIZE, generator=generator, dtype=torch.float64)
    mixing = torch.polar(torch.ones_like(angles), angles)

    def push(batch: Tensor) -> Tensor:
        images = covariate.push(batch)
        other = (mixing * torch.fft.ifft2(batch, norm="ortho")).sum(dim=1)
        return truth(images, again(batch, images)) + extra * other

    return Linearization(value=IMAGE, push=push)


def source(problem: PlaneProblem, seed: int) -> ProbeSource:
    return ProbeSource(variance=problem.variance, coils=COILS, seed=seed, dtype=torch.complex128)


def test_it_is_the_sum_of_both_filters() -> None:
    images, second = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3), dtype=torch.complex128)
    found = TRUE(images, second)
    expected = 0.5 * images + 0.6 * second
    expected[..., :-1] += 0.2 * images[..., 1:]
    expected[..., 1:] += -0.3 * second[..., :-1]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("correlation", [0.0, 0.7, 0.95])
def test_variance_from_cheap_probes_and_its_worth(correlation: float) -> None:
    shape, deviation = (128, 128), 1.7
    generator = torch.Generator().manual_seed(4)

    def draw(number: int) -> tuple[Tensor, Tensor]:
        near, rest = torch.randn(2, 8, *shape, generator=generator, dtype=torch.complex128)
        c = deviation * (correlation * near + (1 - correlation**2) ** 0.5 * rest)
        return c, 0.5j * near

    simulated = SimulatedVariance(draw=draw, known=torch.full(shape, 0.25).double())
    simulated.until(61)
    assert simulated.count == 64
    variance, freedom = simulated.estimate()
    relative = variance / deviation**2 - 1
    # 16,384 voxels: the mean is known to 0.1 %, its spread to 0.6 %; with few probes ν is an estimate
    assert abs(float(relative.mean())) < 0.006
    assert float(freedom.median()) == pytest.approx(2 * 64 / (1 - correlation**4), rel=0.06)
    assert float(relative.square().mean()) == pytest.approx(float((2 / freedom).mean()), rel=0.06)


def test_variance_of_what_is_known_is_known() -> None:
    near = torch.randn(8, 4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.complex128)
    known = torch.rand(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(6)) + 1
    simulated = SimulatedVariance(draw=lambda number: (2j * near, near), known=known)
    simulated.until(8)
    variance, freedom = simulated.estimate()
    torch.testing.assert_close(variance, 4 * known)
    assert bool((freedom > 1e6).all())


def test_nothing_seen_has_the_variance_of_the_probes() -> None:
    c = torch.randn(8, 4, 4, generator=torch.Generator().manual_seed(7), dtype=torch.complex128)
    simulated = SimulatedVariance(draw=lambda number: (c, 0 * c), known=torch.zeros(4, 4).double())
    simulated.until(8)
    variance, freedom = simulated.estimate()
    torch.testing.assert_close(variance, c.abs().square().sum(dim=0) / 7)
    torch.testing.assert_close(freedom, torch.full_like(freedom, 16.0))


@pytest.mark.parametrize("given", [TRUE, WRONG], ids=["right", "wrong"])
def test_the_first_probes_mend_it(smooth_maps: MapMaker, given: Surrogate) -> None:
    problem = problem_of(smooth_maps)
    covariate, linearization = problem.covariate(), pushing(problem, 0.0)
    assert covariate.again is not None
    batch = torch.cat(list(source(problem, 8).blocks(0, 8)))
    images, direction = covariate.push(batch), phase_factor(IMAGE)
    second = covariate.again(batch, images)
    pushed = linearization.push(batch)
    found = adapted(given, pushed, images, second, IMAGE, direction)
    left = (pushed - found(images, second)).abs().square().mean() / pushed.abs().square().mean()
    # the ridge takes a little
    assert float(left) < (0.002 if given is TRUE else 0.02)


def test_few_probes_leave_it_as_it_is(smooth_maps: MapMaker) -> None:
    few = torch.randn(3, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(9), dtype=torch.complex128)
    small = IMAGE.clone()
    small[:, 8:] = 0
    assert adapted(TRUE, few[0], few[1], few[2], small, phase_factor(small)) is TRUE


def test_a_learned_surrogate_lowers_the_error_and_keeps_the_mean(smooth_maps: MapMaker) -> None:
    """Right or wrong: the expectation is that of the reconstruction."""
    problem = problem_of(smooth_maps)
    linearization, covariate = pushing(problem, 0.15, UNEVEN), problem.covariate()
    truth = sketch(linearization, source(problem, 10), Stopping(probes=8000)).map().sigma
    errors = []
    for learned in (None, UNEVEN, WRONG):
        chosen = replace(covariate, learned=learned)
        relative = []
        for seed in range(20, 32):
            state = sketch(linearization, source(problem, seed), Stopping(probes=32), covariate=chosen)
            relative.append(state.map().sigma / truth - 1)
            assert (state.covariate_freedom is None) == (learned is None)
        errors.append(torch.stack(relative))
    alone, right, wrong = (float(one.square().mean().sqrt()) for one in errors)
    assert right < 0.75 * alone
    assert wrong < 1.02 * alone
    for one in errors:
        # 12 maps of 1600 voxels at 10 %: the mean is known to 0.15 %, the reference to 0.05 %
        assert abs(float(one.mean())) < 0.01


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e200])
def test_a_surrogate_that_is_no_number_is_left_out(
    smooth_maps: MapMaker, value: float, caplog: pytest.LogCaptureFixture
) -> None:
    """One weight, of one voxel."""
    problem = problem_of(smooth_maps)
    weights = TRUE.near.weights.clone()
    weights[3, 20, 20] = value * (1e200 if value == 1e200 else 1)
    broken = Surrogate(near=replace(TRUE.near, weights=weights), again=TRUE.again)
    covariate = problem.covariate()
    states = [
        sketch(pushing(problem, 0.15), source(problem, 13), Stopping(probes=16), covariate=one)
        for one in (covariate, replace(covariate, learned=broken))
    ]
    assert torch.equal(states[1].map().sigma, states[0].map().sigma)
    assert "the learned surrogate is not finite" in caplog.text


def test_chunks_do_not_matter(smooth_maps: MapMaker) -> None:
    problem = problem_of(smooth_maps)
    covariate = replace(problem.covariate(), learned=TRUE)
    maps = [
        sketch(pushing(problem, 0.15), source(problem, 11), Stopping(probes=48), covariate=covariate, chunk=chunk).map()
        for chunk in (8, 16, 48)
    ]
    for one in maps[1:]:
        torch.testing.assert_close(one.sigma, maps[0].sigma, rtol=1e-9, atol=0)
