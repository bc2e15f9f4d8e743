"""Probes in less than float32: what is taken, what is refused, and that nothing else changes."""

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.noise.tape_checks import draw
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from voxelsigma.models.network import Network, NetworkReconstruction
from voxelsigma.models.problem import PlaneProblem
from voxelsigma.models.unrolled import Unrolled
from voxelsigma.noise.linearize import Linearization, linear, linearize
from voxelsigma.noise.precision import Precision, in_precision, reduced
from voxelsigma.noise.tape_lowering import is_lowered, lowered_convolutions
from voxelsigma.noise.tensor_cores import tensor_cores

CPU = torch.device("cpu")
POINT = draw(3, 12, 12, dtype=torch.complex64)
TANGENTS = draw(8, 3, 12, 12, seed=2, dtype=torch.complex64)

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def channels(samples: Tensor) -> Tensor:
    """Complex (coils, y, x) as one image of twice as many real channels."""
    return torch.view_as_real(samples).movedim(-1, 0).reshape(1, -1, *samples.shape[-2:])


def scaling(weight: float, factor: float = 1.0, less: float = 0.0) -> Callable[[Tensor], Tensor]:
    """Multiplication of every channel by `weight`, as a convolution; then `factor * (its result - less * input)`."""
    layer = nn.Conv2d(6, 6, 1, groups=6, bias=False).requires_grad_(False)
    layer.weight.fill_(weight)

    def function(samples: Tensor) -> Tensor:
        image = channels(samples)
        real, imaginary = (factor * (layer(image) - less * image))[0].split(3)
        return torch.complex(real, imaginary)

    return function


def in_single_precision(network: NetworkReconstruction, problem: PlaneProblem, device: torch.device) -> Network:
    """The unrolled network of the other tests, in float32."""
    assert isinstance(network.function, Unrolled)
    function = Unrolled(steps=3, blocks=1, channels=8)
    function.load_state_dict({name: value.float() for name, value in network.function.state_dict().items()})
    return Network(function=function.to(device).eval().requires_grad_(False))


def plane(problem: PlaneProblem, device: torch.device) -> PlaneProblem:
    return replace(
        problem,
        sensitivities=problem.sensitivities.to(device, torch.complex64),
        variance=problem.variance.to(device, torch.float32),
        weights=problem.weights.to(device, torch.float32),
    )


@pytest.fixture(scope="module")
def single(network: NetworkReconstruction, problem: PlaneProblem, kspace: Tensor) -> Linearization:
    bound = in_single_precision(network, problem, CPU).bind(plane(problem, CPU))
    return linearize(bound, kspace.to(torch.complex64))


@pytest.fixture(scope="module")
def block(problem: PlaneProblem) -> Tensor:
    """64 probes on the sampled positions."""
    return draw(64, 4, *problem.size, seed=5, dtype=torch.complex64) * problem.variance.float().sqrt()


def test_bfloat16_is_taken_where_sigma_stays(single: Linearization, block: Tensor) -> None:
    found, report = reduced(single, block[:8], candidates=("bf16", "float32"))
    assert report.name == "bf16"
    assert report.probes == 8
    assert not report.rejected
    assert 0 < report.deviation < 0.01
    assert abs(report.bias) < 0.001
    # the triangle inequality, up to the difference between means over voxels and of each map
    assert report.deviation < 2 * report.difference
    assert found.value is single.value
    pushed, exact = found.push(block), single.push(block)
    assert pushed.dtype == exact.dtype
    assert not torch.equal(pushed, exact)
    # what 8 probes promise holds on 64 others: the part that averages out is smaller there
    off = (pushed.abs().square().sum(0) / exact.abs().square().sum(0)).sqrt() - 1
    assert float(off.square().mean().sqrt()) < 0.01
    assert str(report).startswith("bf16 (sigma within ")
    assert "% rms of float32, median " in str(report)
    assert "on 8 probes)" in str(report)


def test_nothing_is_reduced_on_a_cpu_by_itself(single: Linearization, block: Tensor) -> None:
    found, report = reduced(single, block[:8])
    assert found is single
    assert report == Precision(name="float32")
    assert str(report) == "float32"


def test_double_precision_stays(linearization: Linearization, block: Tensor) -> None:
    found, report = reduced(linearization, block[:8].to(torch.complex128), candidates=("bf16",))
    assert found is linearization
    assert report.name == "float32"


def test_a_network_that_bfloat16_spoils_falls_back() -> None:
    # 1.003 x - x: the weight becomes 1 in bfloat16, and nothing is left
    exact = linearize(scaling(1.003, 1000, less=1.0), POINT)
    found, report = reduced(exact, TANGENTS, candidates=("bf16",))
    assert found is exact
    assert report.name == "float32"
    assert report.probes == 0
    (reason,) = report.rejected
    assert reason.startswith("bf16: sigma is off by ")
    assert reason.endswith("allowed are 1 % and 0.1 %")
    assert torch.equal(found.push(TANGENTS), exact.push(TANGENTS))


def test_an_error_that_does_not_average_out_is_refused_earlier() -> None:
    # every voxel is 0.3 % low: within 1 % in rms, but so is the map's mean
    exact = linearize(scaling(1.003), POINT)
    _, report = reduced(exact, TANGENTS, candidates=("bf16",))
    assert report.name == "float32"
    assert "median -0.3 %" in report.rejected[0]
    assert reduced(exact, TANGENTS, candidates=("bf16",), tolerance=0.05)[1].name == "bf16"
    # the same with a weight that bfloat16 has. Roundings of 2⁻⁹ at most leave a median of 432 voxels far below 0.1 %
    assert reduced(linearize(scaling(1.5), POINT), TANGENTS, candidates=("bf16",))[1].name == "bf16"


def test_a_reconstruction_without_convolutions_has_nothing_to_lower() -> None:
    exact = linear(lambda samples: 2 * samples.sum(-3), POINT)
    found, report = reduced(exact, TANGENTS, candidates=("bf16",))
    assert found is exact
    assert report.rejected == ("bf16: no convolution of the reconstruction is recorded in float32",)


def test_tf32_is_refused_off_cuda(single: Linearization, block: Tensor) -> None:
    found, report = reduced(single, block[:8], candidates=("tf32",))
    assert found is single
    assert report.rejected == ("tf32: only CUDA devices know it, the data are on 'cpu'",)


def test_candidates_after_float32_are_not_tried(single: Linearization, block: Tensor) -> None:
    assert reduced(single, block[:8], candidates=("float32", "bf16"))[1] == Precision(name="float32")


def test_a_later_candidate_names_what_came_before(single: Linearization, block: Tensor) -> None:
    _, report = reduced(single, block[:8], candidates=("tf32", "bf16"))
    assert report.name == "bf16"
    assert report.rejected[0].startswith("tf32: ")


def test_a_candidate_that_raises_is_refused_and_leaves_no_trace() -> None:
    def push(tangents: Tensor) -> Tensor:
        with lowered_convolutions():
            outside = is_lowered(torch.zeros(1, dtype=torch.bfloat16))
        assert outside
        if is_lowered(torch.zeros(1, dtype=torch.bfloat16)):
            raise RuntimeError("no engine for this convolution\nand a trace")
        return tangents

    exact = Linearization(POINT, push)
    found, report = reduced(exact, TANGENTS, candidates=("bf16",))
    assert found is exact
    assert report.rejected == ("bf16: no engine for this convolution",)
    assert not is_lowered(torch.zeros(1, dtype=torch.bfloat16))


def test_errors_of_float32_are_not_hidden() -> None:
    def push(tangents: Tensor) -> Tensor:
        raise ValueError("linearize: the derivative of the reconstruction is not finite")

    with pytest.raises(ValueError, match="is not finite"):
        reduced(Linearization(POINT, push), TANGENTS, candidates=("bf16",))


def test_the_choice_depends_on_the_tangents_alone(single: Linearization, block: Tensor) -> None:
    first, second = (reduced(single, block[:8], candidates=("bf16",), chunk=8) for _ in range(2))
    assert first[1] == second[1]
    assert torch.equal(first[0].push(block[:8]), second[0].push(block[:8]))


def test_probes_that_leave_no_noise_choose_float32() -> None:
    _, report = reduced(linearize(scaling(1.5), POINT), torch.zeros_like(TANGENTS), candidates=("bf16",))
    assert report.name == "float32"
    assert report.rejected == ("bf16: the probes compared leave no noise in the object",)


@pytest.mark.parametrize("tolerance", [0.0, -0.01, float("nan"), float("inf")])
def test_tolerance_must_be_positive(tolerance: float) -> None:
    with pytest.raises(ValueError, match=r"reduced: tolerance is .*; expected a positive number, as 0.01 for 1 %"):
        reduced(linearize(scaling(1.5), POINT), TANGENTS, tolerance=tolerance)


def test_bad_candidates_and_too_few_probes() -> None:
    exact = linearize(scaling(1.5), POINT)
    with pytest.raises(ValueError, match="candidate 'fp8' is unknown; known are bf16, tf32, float32"):
        reduced(exact, TANGENTS, candidates=("fp8",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reduced: 3 probes to compare; at least 4 are needed"):
        reduced(exact, TANGENTS[:3], candidates=("bf16",))


class Dtypes(TorchDispatchMode):
    """Notes the types of all floating tensors that operations take."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: dict[str, set[torch.dtype]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch would import its compiler, to keep it away from here
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [item for item in args if isinstance(item, Tensor)]
        self.seen.setdefault(func.overloadpacket.__name__, set()).update(tensor.dtype for tensor in tensors)
        return func(*args, **(kwargs or {}))


def test_convolutions_alone_are_lowered(single: Linearization, block: Tensor) -> None:
    lowered = in_precision(single, "bf16", CPU)
    lowered.push(block[:2])
    with Dtypes() as watched:
        lowered.push(block[:2])
    assert watched.seen["convolution"] == {torch.bfloat16}
    assert watched.seen["_fft_c2c"] == {torch.complex64}
    # the ReLUs' masks: no product is widened, and made narrow again for the next convolution
    masked = watched.seen["mul_"] | watched.seen["mul"]
    assert torch.bfloat16 in masked
    with Dtypes() as watched:
        single.push(block[:2])
    assert not any(torch.bfloat16 in types for types in watched.seen.values())


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        return 0.5 * (features + 1) - self.layer(torch.where(features > 0, features, 0.3 * features))


class Joined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(9, 8, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        return self.layer(torch.cat([features, torch.ones_like(features[:, :1])], dim=1))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 8)

    def forward(self, features: Tensor) -> Tensor:
        return features * self.gate(features.mean((-2, -1))).sigmoid()[..., None, None]


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky relu": lambda: nn.LeakyReLU(0.2),
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "batch norm": lambda: nn.BatchNorm2d(8),
    "instance norm": lambda: nn.InstanceNorm2d(8, affine=True),
    "group norm": lambda: nn.GroupNorm(2, 8),
    "average pooling": lambda: nn.AvgPool2d(2),
    "max pooling": lambda: nn.MaxPool2d(2),
    "upsampling": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
    "transposed": lambda: nn.ConvTranspose2d(8, 8, 2, stride=2),
    "strided": lambda: nn.Conv2d(8, 8, 3, stride=2, padding=1),
    "reflected": lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
    "attention of channels": Gated,
    "residual": Residual,
    "joined": Joined,
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_between_convolutions(name: str) -> None:
    """The error is that of a few roundings of 2⁻⁹, whatever stands between two convolutions."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        module = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), LAYERS[name](), nn.Conv2d(8, 6, 3, padding=1))
    module.eval().requires_grad_(False)
    exact = linearize(lambda samples: module(channels(samples)), POINT)
    assert not exact.fallbacks
    tangents = TANGENTS.clone()
    pushed, expected = in_precision(exact, "bf16", CPU).push(tangents), exact.push(tangents)
    assert torch.equal(tangents, TANGENTS)
    assert pushed.dtype == expected.dtype == torch.float32
    error = float((pushed - expected).norm() / expected.norm())
    assert 1e-5 < error < 0.02
    # and the exact road is what it was
    assert torch.equal(exact.push(tangents), expected)


def test_a_network_of_another_precision_keeps_it() -> None:
    layer = nn.Conv2d(6, 6, 3, padding=1).to(torch.bfloat16).requires_grad_(False)
    exact = linearize(lambda samples: layer(channels(samples).to(torch.bfloat16)).float(), POINT)
    assert exact.push(TANGENTS).dtype == torch.float32
    _, report = reduced(exact, TANGENTS, candidates=("bf16",))
    assert report.name == "float32"
    assert len(report.rejected) == 1


def test_an_empty_batch(single: Linearization, block: Tensor) -> None:
    assert in_precision(single, "bf16", CPU).push(block[:0]).shape == (0, *single.value.shape)


def test_lowering_is_of_one_thread() -> None:
    found = []
    with lowered_convolutions():
        thread = threading.Thread(target=lambda: found.append(is_lowered(torch.zeros(1, dtype=torch.bfloat16))))
        thread.start()
        thread.join(10)
    assert found == [False]


@gpu
@pytest.mark.parametrize("name", ["bf16", "tf32", "float32"])
def test_on_cuda(
    network: NetworkReconstruction, problem: PlaneProblem, kspace: Tensor, block: Tensor, name: Any
) -> None:
    device = torch.device("cuda")
    bound = in_single_precision(network, problem, device).bind(plane(problem, device))
    tangents = block.to(device)
    with tensor_cores(False):
        exact = linearize(bound, kspace.to(device, torch.complex64))
        expected = exact.push(tangents)
    found, report = reduced(exact, tangents[:8], candidates=(name, "float32"))
    assert report.name == name
    assert found.value is exact.value
    error = float((found.push(tangents) - expected).norm() / expected.norm())
    assert error < {"bf16": 0.03, "tf32": 5e-3, "float32": 1e-5}[name]
