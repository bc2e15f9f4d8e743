"""The stand-in for a Jacobian: its variance from cheap probes, what the first ones add, that no expectation changes."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from voxelsigma.models.problem import PlaneProblem
from voxelsigma.noise.inverse import Operator
from voxelsigma.noise.linearize import Linearization
from voxelsigma.noise.local_filter import square
from voxelsigma.noise.probes import ProbeSource
from voxelsigma.noise.response import Response
from voxelsigma.noise.sigma import MapKind
from voxelsigma.noise.sketch import Stopping, sketch
from voxelsigma.noise.surrogate import SimulatedVariance, Stage, Surrogate, adapted
from voxelsigma.noise.voxels import object_mask, phase_factor

SIZE, COILS = 26, 2
MapMaker = Callable[[int, int, int], Tensor]
KINDS: tuple[MapKind, ...] = ("magnitude", "complex")
IMAGE = torch.polar(10 * torch.ones(SIZE, SIZE).double(), torch.linspace(0, 2, SIZE).double().expand(SIZE, SIZE))
# each voxel has a factor of its own, that nothing in the image tells
ROUGH = torch.rand(SIZE, SIZE, generator=torch.Generator().manual_seed(12), dtype=torch.float64) + 0.5


def complex_normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.complex128)


@pytest.fixture(scope="module")
def problem(smooth_maps: MapMaker) -> PlaneProblem:
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(SIZE, SIZE, generator=generator, dtype=torch.float64) < 0.4
    return PlaneProblem(
        sensitivities=smooth_maps(COILS, SIZE, SIZE),
        variance=2.0 * mask,
        weights=mask.double(),
        limits=((0, SIZE - 1), (0, SIZE - 1)),
        size=(SIZE, SIZE),
    )


def normal_of(problem: PlaneProblem) -> Operator:
    normal = problem.covariate().normal
    assert normal is not None
    return normal


def filters(reach: int, **weights: float) -> Response:
    """Weights, the same everywhere; names are places in the middle row: `m` -1, `o` 0, `p` 1."""
    offsets = square(reach)
    found = torch.zeros(len(offsets), SIZE, SIZE, dtype=torch.float64)
    for name, value in weights.items():
        found[offsets.index((0, "mop".index(name) - 1))] = value
    return Response(offsets=offsets, weights=found)


def uneven(response: Response) -> Response:
    return replace(response, weights=ROUGH * response.weights)


def one_stage(problem: PlaneProblem) -> Surrogate:
    stage = Stage(operator=normal_of(problem), kept=filters(1, o=0.5, p=0.2), passed=filters(1, o=0.6, m=-0.3))
    return Surrogate(stages=(stage,))


def two_stages(problem: PlaneProblem) -> Surrogate:
    stage = Stage(
        operator=normal_of(problem), kept=filters(0, o=1.0), passed=filters(0, o=-0.4), first=filters(0, o=0.1)
    )
    begun = one_stage(problem)
    return replace(begun, stages=(*begun.stages, stage))


def wrong(problem: PlaneProblem, reach: int = 3) -> Surrogate:
    stage = Stage(operator=normal_of(problem), kept=filters(reach, m=1.0, p=-1.0), passed=filters(reach, p=2.0))
    return Surrogate(stages=(stage,))


def wrong_twice(problem: PlaneProblem) -> Surrogate:
    begun = wrong(problem)
    return replace(begun, stages=(*begun.stages, *begun.stages))


def with_uneven_end(given: Surrogate) -> Surrogate:
    *before, last = given.stages
    first = None if last.first is None else uneven(last.first)
    last = replace(last, kept=uneven(last.kept), passed=uneven(last.passed), first=first)
    return replace(given, stages=(*before, last))


def pushing(problem: PlaneProblem, extra: float, truth: Surrogate) -> Linearization:
    """A reconstruction that is a surrogate, and noise of its own beside."""
    covariate = problem.covariate()
    generator = torch.Generator().manual_seed(2)
    angles = 2 * torch.pi * torch.rand(COILS, SIZE, SIZE, generator=generator, dtype=torch.float64)
    mixing = torch.polar(torch.ones_like(angles), angles)

    def push(batch: Tensor) -> Tensor:
        other = (mixing * torch.fft.ifft2(batch, norm="ortho")).sum(dim=1)
        return truth(covariate.push(batch)) + extra * other

    return Linearization(value=IMAGE, push=push)


def exact_sigma(problem: PlaneProblem, linearization: Linearization) -> dict[MapKind, Tensor]:
    """Every sample alone, at its deviation; half of what comes of it is in phase, for all is complex-linear."""
    places = (problem.variance > 0).expand(COILS, -1, -1).nonzero()
    total = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    for some in places.split(64):
        unit = torch.zeros(len(some), COILS, SIZE, SIZE, dtype=torch.complex128)
        unit[torch.arange(len(some)), some[:, 0], some[:, 1], some[:, 2]] = 2**0.5
        total += linearization.push(unit).abs().square().sum(dim=0)
    return {"magnitude": (total / 2).sqrt(), "complex": total.sqrt()}


def source(problem: PlaneProblem, seed: int) -> ProbeSource:
    return ProbeSource(variance=problem.variance, coils=COILS, seed=seed, dtype=torch.complex128)


# --- its variance


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


# --- what the first probes add


@pytest.mark.parametrize(
    ("given", "most"),
    [(one_stage, 0.002), (two_stages, 0.1), (wrong, 0.02), (wrong_twice, 0.02)],
    ids=["right", "right twice", "wrong", "wrong twice"],
)
def test_the_first_probes_mend_it(
    problem: PlaneProblem, given: Callable[[PlaneProblem], Surrogate], most: float
) -> None:
    """A reconstruction of one stage; the ridge takes a little."""
    covariate, linearization = problem.covariate(), pushing(problem, 0.0, one_stage(problem))
    batch = torch.cat(list(source(problem, 8).blocks(0, 16)))
    images, pushed = covariate.push(batch), linearization.push(batch)
    learned = given(problem)
    second = learned.second(images)
    found = adapted(learned, pushed, images, second, learned(images, second), IMAGE, phase_factor(IMAGE))
    assert len(found.stages) == len(learned.stages)
    assert found.stages[:-1] == learned.stages[:-1]
    left = (pushed - found(images, second)).abs().square().mean() / pushed.abs().square().mean()
    assert float(left) < most


def test_the_first_probes_leave_what_fits(problem: PlaneProblem) -> None:
    """To what the ridge takes."""
    learned = two_stages(problem)
    batch = torch.cat(list(source(problem, 8).blocks(0, 16)))
    images = problem.covariate().push(batch)
    pushed, second = learned(images), learned.second(images)
    found = adapted(learned, pushed, images, second, pushed, IMAGE, phase_factor(IMAGE))(images, second)
    assert float((pushed - found).abs().square().mean() / pushed.abs().square().mean()) < 0.002


def test_few_probes_leave_it_as_it_is(problem: PlaneProblem) -> None:
    few = complex_normal(4, 1, SIZE, SIZE, seed=9)
    small = IMAGE.clone()
    small[:, 8:] = 0
    learned = two_stages(problem)
    assert adapted(learned, few[0], few[1], few[2], few[3], small, phase_factor(small)) is learned


@pytest.mark.parametrize("given", [one_stage, two_stages, wrong_twice], ids=["one", "two", "wrong"])
def test_beside_the_object_it_is_the_zero_filled_image(
    problem: PlaneProblem, given: Callable[[PlaneProblem], Surrogate]
) -> None:
    image = IMAGE.clone()
    image[:, :6] = 0
    batch = torch.cat(list(source(problem, 8).blocks(0, 4)))
    images, learned = problem.covariate().push(batch), given(problem)
    second = learned.second(images)
    own = learned(images, second)
    found = adapted(learned, 3 * images, images, second, own, image, phase_factor(image))(images, second)
    outside = ~object_mask(image)
    assert 0 < int(outside.sum()) == 6 * SIZE
    torch.testing.assert_close(found[:, outside], images[:, outside])


# --- as a control variate


@pytest.mark.parametrize("truth", [one_stage, two_stages])
def test_a_learned_surrogate_lowers_the_error_and_keeps_the_mean(
    problem: PlaneProblem, truth: Callable[[PlaneProblem], Surrogate]
) -> None:
    """Right or wrong: the expectation is that of the reconstruction."""
    right = with_uneven_end(truth(problem))
    linearization, covariate = pushing(problem, 0.15, right), problem.covariate()
    sigma = exact_sigma(problem, linearization)
    errors: dict[tuple[MapKind, str], Tensor] = {}
    for name, learned in (("alone", None), ("right", right), ("wrong", wrong(problem, 1))):
        chosen = replace(covariate, learned=learned)
        states = [
            sketch(linearization, source(problem, seed), Stopping(probes=32), covariate=chosen)
            for seed in range(20, 25)
        ]
        if name != "wrong":
            assert all((state.covariate_freedom is None) == (learned is None) for state in states)
        for kind in KINDS:
            errors[kind, name] = torch.stack([state.map(kind).sigma / sigma[kind] - 1 for state in states])
    for kind in KINDS:
        alone, good, bad = (float(errors[kind, name].square().mean().sqrt()) for name in ("alone", "right", "wrong"))
        assert good < 0.75 * alone
        assert bad < 1.03 * alone
        for name in ("alone", "right", "wrong"):
            # 5 maps of 676 voxels at 5 %, of which some 5 are alike: the mean is known to 0.2 %
            assert abs(float(errors[kind, name].mean())) < 0.012


@pytest.mark.parametrize("size", [8, 16])
def test_one_that_explains_no_more_than_the_filter_is_left_out(problem: PlaneProblem, size: int) -> None:
    covariate = problem.covariate()
    linearization = Linearization(value=IMAGE, push=lambda batch: 0.7 * covariate.push(batch))
    own, stopping = source(problem, 12), Stopping(probes=24)
    alone, given = (
        sketch(linearization, own, stopping, covariate=replace(covariate, learned=learned), chunk=size)
        for learned in (None, wrong(problem))
    )
    # whose variance is known without probes
    assert given.covariate_freedom is None
    assert torch.equal(given.map().sigma, alone.map().sigma)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["begun", "last"])
def test_a_surrogate_that_is_no_number_is_left_out(
    problem: PlaneProblem, value: float, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One weight, of one voxel."""
    right = two_stages(problem)
    begun, last = right.stages
    chosen = begun.kept if place == "begun" else last.passed
    weights = chosen.weights.clone()
    weights[0, 20, 20] = value
    changed = replace(chosen, weights=weights)
    stages = (replace(begun, kept=changed), last) if place == "begun" else (begun, replace(last, passed=changed))
    covariate, linearization = problem.covariate(), pushing(problem, 0.15, right)
    states = [
        sketch(linearization, source(problem, 13), Stopping(probes=16), covariate=one)
        for one in (covariate, replace(covariate, learned=replace(right, stages=stages)))
    ]
    assert torch.equal(states[1].map().sigma, states[0].map().sigma)
    assert "the learned surrogate is not finite" in caplog.text


@pytest.mark.parametrize("gain", [1.0, 1e-3])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e12, 1e30])
def test_a_surrogate_of_any_size_leaves_the_map_finite(problem: PlaneProblem, size: float, gain: float) -> None:
    """In single precision, as pipelines have it."""
    right = one_stage(problem)
    (stage,) = right.stages
    huge = replace(
        stage,
        kept=replace(stage.kept, weights=size * stage.kept.weights),
        passed=replace(stage.passed, weights=0 * stage.passed.weights),
    )
    single = replace(
        problem,
        sensitivities=problem.sensitivities.to(torch.complex64),
        variance=problem.variance.float(),
        weights=problem.weights.float(),
    )
    covariate = single.covariate()
    assert covariate.normal is not None
    own = ProbeSource(variance=single.variance, coils=COILS, seed=14)
    linearization = Linearization(value=IMAGE.to(torch.complex64), push=lambda batch: gain * covariate.push(batch))
    learned = replace(right, stages=(replace(huge, operator=covariate.normal),))
    found = sketch(linearization, own, Stopping(probes=24), covariate=replace(covariate, learned=learned)).map()
    # w itself is all there is
    torch.testing.assert_close(found.sigma, gain * (covariate.variance / 2).sqrt(), rtol=0.1, atol=0)


def test_chunks_do_not_matter(problem: PlaneProblem) -> None:
    right = two_stages(problem)
    covariate, linearization = replace(problem.covariate(), learned=right), pushing(problem, 0.15, right)
    maps = [
        sketch(linearization, source(problem, 11), Stopping(probes=32), covariate=covariate, chunk=chunk).map()
        for chunk in (8, 16, 32)
    ]
    for one in maps[1:]:
        torch.testing.assert_close(one.sigma, maps[0].sigma, rtol=1e-9, atol=0)
