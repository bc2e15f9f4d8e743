"""MoDL: dense oracle, derivatives in every transform, gradients, scale, zero input."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from voxelsigma.models import normal_equations
from voxelsigma.models.modl import INITIAL_WEIGHT, Modl
from voxelsigma.models.normal_equations import least_squares_solver
from voxelsigma.noise.linearize import linearize

MapMaker = Callable[[int, int, int], Tensor]
Normal = Callable[..., Tensor]

# torch.func.jvp uses what torch itself has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

COILS, ROWS, COLUMNS = 4, 9, 8
TIGHT = 1e-13


def seeded(*, double: bool = True, shared: bool = False, steps: int = 2, tolerance: float = TIGHT) -> Modl:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        network = Modl(steps=steps, blocks=1, channels=3, shared=shared, tolerance=tolerance)
        with torch.no_grad():
            network.raw_weights.add_(0.3 * torch.arange(len(network.raw_weights)))
    return (network.double() if double else network).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def maps(smooth_maps: MapMaker) -> Tensor:
    return smooth_maps(COILS, ROWS, COLUMNS)


def mask_of(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    if kind == "2D":
        return (torch.rand(ROWS, COLUMNS, generator=generator) < 0.5).double()
    if kind == "rows":
        return (torch.arange(ROWS) % 2 == 0).double().unsqueeze(1).expand(ROWS, COLUMNS)
    if kind == "columns":
        return (torch.arange(COLUMNS) % 2 == 0).double().expand(ROWS, COLUMNS)
    return torch.ones(ROWS, COLUMNS, dtype=torch.float64)


@pytest.fixture(params=["2D", "rows", "columns", "full"])
def mask(request: pytest.FixtureRequest) -> Tensor:
    return mask_of(request.param)


@pytest.fixture
def plain_mask() -> Tensor:
    return mask_of("2D")


@pytest.fixture(scope="module")
def kspace(complex_normal: Normal) -> Tensor:
    return 5 * complex_normal(COILS, ROWS, COLUMNS, seed=3)


# --- the same network with dense matrices and torch's own solver, which autograd knows all about


class Dense:
    def __init__(self, network: Modl, encoding: Tensor, mask: Tensor) -> None:
        self.network = network
        self.encoding = mask.flatten().repeat(COILS).unsqueeze(1) * encoding
        self.normal = self.encoding.mH @ self.encoding

    def __call__(self, kspace: Tensor) -> Tensor:
        start = self.encoding.mH @ kspace.flatten()
        scale = start.abs().square().mean().sqrt()
        target = images = start / scale
        for step in range(self.network.steps):
            own = min(step, len(self.network.networks) - 1)
            weight = functional.softplus(self.network.raw_weights[own])
            correction = self.network.networks[own](images.reshape(1, ROWS, COLUMNS)).flatten()
            system = self.normal + weight * torch.eye(len(images), dtype=images.dtype)
            images = torch.linalg.solve(system, target + weight * (images + correction))
        return (images * scale).reshape(ROWS, COLUMNS)


@pytest.fixture
def dense(maps: Tensor, mask: Tensor, dense_encoding: Callable[[Tensor], Tensor]) -> Dense:
    return Dense(seeded(), dense_encoding(maps), mask)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_image_is_that_of_dense_matrices(dense: Dense, maps: Tensor, mask: Tensor, kspace: Tensor) -> None:
    assert error(seeded()(kspace, maps, mask), dense(kspace)) < 1e-10


def test_derivative_is_that_of_dense_matrices(
    dense: Dense, maps: Tensor, mask: Tensor, kspace: Tensor, complex_normal: Normal
) -> None:
    network = seeded()
    tangents = complex_normal(3, COILS, ROWS, COLUMNS, seed=4)
    expected = torch.stack([torch.func.jvp(dense, (kspace,), (tangent,))[1] for tangent in tangents])

    def image(samples: Tensor) -> Tensor:
        return network(samples, maps, mask)

    one_by_one = torch.stack([torch.func.jvp(image, (kspace,), (tangent,))[1] for tangent in tangents])
    together = torch.func.vmap(lambda tangent: torch.func.jvp(image, (kspace,), (tangent,))[1])(tangents)
    linearization = linearize(image, kspace)
    for found in (one_by_one, together, linearization.push(tangents)):
        assert error(found, expected) < 1e-9
    assert linearization.fallbacks == ()


def test_derivative_in_single_precision(
    dense: Dense, maps: Tensor, mask: Tensor, kspace: Tensor, complex_normal: Normal
) -> None:
    network = seeded(double=False, tolerance=1e-6)
    tangents = complex_normal(3, COILS, ROWS, COLUMNS, seed=4)
    expected = torch.stack([torch.func.jvp(dense, (kspace,), (tangent,))[1] for tangent in tangents])
    single, mask = maps.to(torch.complex64), mask.float()
    linearization = linearize(lambda samples: network(samples, single, mask), kspace.to(torch.complex64))
    assert linearization.value.dtype == torch.complex64
    assert error(linearization.value, dense(kspace)) < 1e-5
    assert error(linearization.push(tangents.to(torch.complex64)), expected) < 1e-5


# --- the solver alone


def test_solver_s_gradients(maps: Tensor, plain_mask: Tensor, complex_normal: Normal) -> None:
    solve = least_squares_solver(tolerance=TIGHT, iterations=None, method="test")
    mask = plain_mask.bool().reshape(1, 1, ROWS, COLUMNS)[..., :4, :3]
    right_side = complex_normal(2, 4, 3, seed=5).requires_grad_()
    weight = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    sensitivities = maps[:2, :4, :3].unsqueeze(0).clone().requires_grad_()

    def solution(right_side: Tensor, weight: Tensor, sensitivities: Tensor) -> Tensor:
        return solve(right_side, weight, sensitivities, mask)

    assert torch.autograd.gradcheck(solution, (right_side, weight, sensitivities), check_forward_ad=True)


def test_solver_s_batched_tangents_of_everything(maps: Tensor, plain_mask: Tensor, complex_normal: Normal) -> None:
    solve = least_squares_solver(tolerance=TIGHT, iterations=None, method="test")
    mask = plain_mask.bool().reshape(1, 1, ROWS, COLUMNS)
    point = (complex_normal(2, ROWS, COLUMNS, seed=6), torch.tensor(0.2, dtype=torch.float64), maps.unsqueeze(0))
    tangents = (
        complex_normal(3, 2, ROWS, COLUMNS, seed=7),
        torch.tensor([1.0, -0.5, 0.2], dtype=torch.float64),
        complex_normal(3, 1, COILS, ROWS, COLUMNS, seed=8),
    )

    def solution(right_side: Tensor, weight: Tensor, sensitivities: Tensor) -> Tensor:
        return solve(right_side, weight, sensitivities, mask)

    def pushed(*along: Tensor) -> Tensor:
        return torch.func.jvp(solution, point, along)[1]

    found = torch.func.vmap(pushed)(*tangents)
    step = 1e-6
    for index in range(3):
        ahead, behind = (
            solution(*(value + sign * step * tangent[index] for value, tangent in zip(point, tangents, strict=True)))
            for sign in (1, -1)
        )
        assert error(found[index], (ahead - behind) / (2 * step)) < 1e-7


# --- training


@pytest.mark.parametrize("shared", [False, True])
def test_gradients_of_all_parameters(
    maps: Tensor, plain_mask: Tensor, kspace: Tensor, dense_encoding: Callable[[Tensor], Tensor], shared: bool
) -> None:
    network = seeded(shared=shared).requires_grad_(True)
    assert len(network.networks) == len(network.weights) == (1 if shared else 2)
    reference = Dense(network, dense_encoding(maps), plain_mask)
    network(kspace, maps, plain_mask).abs().square().sum().backward()
    found = {name: parameter.grad for name, parameter in network.named_parameters()}
    network.zero_grad()
    reference(kspace).abs().square().sum().backward()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-7, atol=1e-7, msg=name)


def test_training_stops_after_its_iterations(
    maps: Tensor, plain_mask: Tensor, kspace: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []
    operator = normal_equations.normal_operator

    def counting(*arguments: Tensor) -> Callable[[Tensor], Tensor]:
        inner = operator(*arguments)
        counted.append(0)

        def apply(images: Tensor) -> Tensor:
            counted[-1] += 1
            return inner(images)

        return apply

    monkeypatch.setattr(normal_equations, "normal_operator", counting)
    network = seeded().requires_grad_(True).train()
    network.iterations = 4
    network(kspace, maps, plain_mask).abs().sum().backward()
    # two steps forward, two backward
    assert counted == [4] * 4
    assert all(parameter.grad is not None for parameter in network.parameters())
    counted.clear()
    with torch.no_grad():
        network.eval()(kspace, maps, plain_mask)
    assert min(counted) > 10


def test_weights_are_positive_and_start_as_the_paper_s() -> None:
    network = Modl(steps=3, blocks=1, channels=2)
    torch.testing.assert_close(network.weights, torch.full((3,), INITIAL_WEIGHT))
    assert set(dict(network.named_parameters())) >= {"raw_weights", "networks.2.enter.weight"}
    with torch.no_grad():
        network.raw_weights.fill_(-20)
    assert bool((network.weights > 0).all())


# --- properties


@pytest.mark.parametrize("factor", [1e-6, 0.5, 1e6])
def test_scale_of_the_data_is_the_scale_of_the_image(
    kspace: Tensor, maps: Tensor, plain_mask: Tensor, factor: float
) -> None:
    network = seeded()
    assert error(network(factor * kspace, maps, plain_mask) / factor, network(kspace, maps, plain_mask)) < 1e-9
    linearization = linearize(lambda samples: network(samples, maps, plain_mask), kspace)
    # Euler: the derivative of a homogeneous map along its own argument is its value
    torch.testing.assert_close(linearization.push(kspace.unsqueeze(0))[0], linearization.value)


def test_zero_input_is_a_zero_image_and_finite_throughout(maps: Tensor, plain_mask: Tensor) -> None:
    network = seeded()
    nothing = torch.zeros(COILS, ROWS, COLUMNS, dtype=torch.complex128, requires_grad=True)
    image = network(nothing, maps, plain_mask)
    assert not bool(image.any())
    (gradient,) = torch.autograd.grad((image * (1 + 2j)).real.sum(), nothing)
    assert bool(gradient.isfinite().all())
    pushed = linearize(lambda samples: network(samples, maps, plain_mask), nothing.detach()).push(
        torch.ones(2, COILS, ROWS, COLUMNS, dtype=torch.complex128)
    )
    assert bool(pushed.isfinite().all())


def test_batch_equals_single(maps: Tensor, complex_normal: Normal) -> None:
    network = seeded()
    masks = torch.stack([mask_of("2D"), mask_of("full"), mask_of("rows")]).unsqueeze(1)
    sizes = torch.tensor([1.0, 0.0, 1e4], dtype=torch.float64).reshape(3, 1, 1, 1)
    scans = sizes * complex_normal(3, COILS, ROWS, COLUMNS, seed=6)
    turned = torch.stack([maps, 1j * maps, maps.flip(-1)])
    before = scans.clone()
    together = network(scans, turned, masks)
    assert together.shape == (3, ROWS, COLUMNS)
    assert not bool(together[1].any())
    for index in range(3):
        alone = network(scans[index], turned[index], masks[index, 0])
        torch.testing.assert_close(together[index], alone, rtol=1e-9, atol=1e-9)
    assert torch.equal(scans, before)


def test_many_scans_through_vmap(maps: Tensor, plain_mask: Tensor, complex_normal: Normal) -> None:
    network, scans = seeded(), complex_normal(3, COILS, ROWS, COLUMNS, seed=9)
    together = torch.func.vmap(lambda samples: network(samples, maps, plain_mask))(scans)
    for scan, image in zip(scans, together, strict=True):
        torch.testing.assert_close(image, network(scan, maps, plain_mask))


# --- bad input


def test_singular_problem_names_modl(
    smooth_maps: MapMaker, complex_normal: Normal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(normal_equations, "_MAX_ITERATIONS", 200)
    rows, columns = 32, 32
    mask = (torch.arange(rows) % 6 == 0).double().unsqueeze(1).expand(rows, columns).clone()
    mask[:, ::3] = 0
    network = seeded(tolerance=1e-10)
    network.raw_weights.fill_(-60)
    with pytest.raises(ValueError, match=r"^modl: conjugate gradients stopped at .*the step's lambda is too small"):
        network(complex_normal(4, rows, columns, seed=1), smooth_maps(4, rows, columns), mask)


def test_values_that_are_not_finite_name_modl(kspace: Tensor, maps: Tensor, plain_mask: Tensor) -> None:
    network = seeded()
    next(network.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match=r"^modl: conjugate gradients met values that are not finite"):
        network(kspace, maps, plain_mask)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tolerance": 0.0}, "modl: tolerance must be above 0 and below 1, got 0.0"),
        ({"steps": 0}, "modl: steps and iterations must be at least 1, got 0 and 10"),
        ({"iterations": 0}, "modl: steps and iterations must be at least 1, got 4 and 0"),
    ],
)
def test_bad_hyperparameters(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Modl(**arguments)  # type: ignore[arg-type]
