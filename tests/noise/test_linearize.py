"""Linearization of reconstructions."""

from collections.abc import Callable

import pytest
import torch
from tests.noise.tape_checks import forward_mode
from torch import Tensor

from voxelsigma.models.network import NetworkReconstruction
from voxelsigma.models.problem import PlaneProblem
from voxelsigma.models.unrolled import Unrolled
from voxelsigma.noise.linearize import Linearizable, Linearization, linear, linearize
from voxelsigma.noise.probes import ProbeSource


def tangents(problem: PlaneProblem, dtype: torch.dtype = torch.complex128) -> Tensor:
    return ProbeSource(variance=problem.variance, coils=4, seed=21, dtype=dtype).block(0)[:5]


def test_value_is_the_reconstruction(
    linearization: Linearization, network: NetworkReconstruction, kspace: Tensor
) -> None:
    torch.testing.assert_close(linearization.value, network(kspace), rtol=1e-12, atol=1e-12)
    assert not linearization.complex_linear
    assert not linearization.value.requires_grad


def test_push_is_the_directional_derivative(
    linearization: Linearization, network: NetworkReconstruction, kspace: Tensor, problem: PlaneProblem
) -> None:
    batch = tangents(problem)
    pushed = linearization.push(batch)
    for tangent, image in zip(batch, pushed, strict=True):
        expected = forward_mode(network, kspace, tangent)
        torch.testing.assert_close(image, expected, rtol=1e-10, atol=1e-10)


def test_push_is_the_limit_of_differences(
    linearization: Linearization, network: NetworkReconstruction, kspace: Tensor, problem: PlaneProblem
) -> None:
    batch, step = tangents(problem), 1e-6
    for tangent, image in zip(batch, linearization.push(batch), strict=True):
        difference = (network(kspace + step * tangent) - network(kspace - step * tangent)) / (2 * step)
        torch.testing.assert_close(image, difference, rtol=1e-6, atol=1e-6)


def test_push_is_real_linear_and_for_a_network_not_complex_linear(
    linearization: Linearization, problem: PlaneProblem
) -> None:
    push, (first, second, *_) = linearization.push, tangents(problem)
    pushed = push(torch.stack([first, second, 2.5 * first - 0.5 * second, 1j * first]))
    torch.testing.assert_close(pushed[2], 2.5 * pushed[0] - 0.5 * pushed[1], rtol=1e-10, atol=1e-10)
    # a holomorphic derivative would turn with its argument
    assert float((pushed[3] - 1j * pushed[0]).norm()) > 0.05 * float(pushed[0].norm())


def test_push_of_a_batch_is_the_push_of_each(linearization: Linearization, problem: PlaneProblem) -> None:
    batch = tangents(problem)
    alone = torch.cat([linearization.push(part) for part in batch.split(1)])
    torch.testing.assert_close(linearization.push(batch), alone, rtol=1e-12, atol=1e-12)


def test_reconstruction_is_not_called_again_for_any_probe(
    network: NetworkReconstruction, kspace: Tensor, problem: PlaneProblem
) -> None:
    calls = []

    def counted(samples: Tensor) -> Tensor:
        calls.append(1)
        return network(samples)

    linearization = linearize(counted, kspace)
    after_setup = len(calls)
    assert after_setup == 1
    for _ in range(3):
        linearization.push(tangents(problem))
    assert len(calls) == after_setup


def test_a_network_has_nothing_but_fast_rules(linearization: Linearization) -> None:
    assert linearization.fallbacks == ()
    assert linearization.cuts == ()
    assert linearization.probe_bytes is not None


def test_single_precision_is_close_and_stays_single(
    linearization: Linearization, network: NetworkReconstruction, kspace: Tensor, problem: PlaneProblem
) -> None:
    assert isinstance(network.function, Unrolled)
    weights = network.function.state_dict()
    function = Unrolled(steps=3, blocks=1, channels=8)
    function.load_state_dict({key: value.float() for key, value in weights.items()})
    function.eval().requires_grad_(False)
    maps, mask = network.sensitivities.to(torch.complex64), network.mask.float()
    single = linearize(lambda samples: function(samples, maps, mask), kspace.to(torch.complex64))
    assert single.value.dtype == torch.complex64
    expected = linearization.push(tangents(problem))
    pushed = single.push(tangents(problem).to(torch.complex64))
    assert pushed.dtype == torch.complex64
    # ReLUs may flip where the rounding of the primal differs: compare in norm
    assert float((pushed - expected).norm()) < 1e-3 * float(expected.norm())


def test_parameters_that_want_gradients_do_not_make_images_want_them(problem: PlaneProblem) -> None:
    weight = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    linearization = linearize(lambda samples: weight * samples[0], tangents(problem)[0])
    assert not linearization.value.requires_grad
    assert not linearization.push(tangents(problem)).requires_grad


def test_real_outputs_have_real_pushes(
    linearization: Linearization, network: NetworkReconstruction, kspace: Tensor, problem: PlaneProblem
) -> None:
    batch = tangents(problem)
    magnitude = linearize(lambda samples: network(samples).abs(), kspace)
    assert not magnitude.value.is_complex()
    turned = linearization.value.conj() / linearization.value.abs() * linearization.push(batch)
    torch.testing.assert_close(magnitude.push(batch), turned.real, rtol=1e-9, atol=1e-9)


def test_linear_pushes_the_reconstruction_itself(problem: PlaneProblem, kspace: Tensor) -> None:
    maps = problem.sensitivities

    def combine(samples: Tensor) -> Tensor:
        return (maps.conj() * torch.fft.ifft2(samples, norm="ortho")).sum(dim=-3)

    own, general = linear(combine, kspace), linearize(combine, kspace)
    assert own.complex_linear
    assert not general.complex_linear
    torch.testing.assert_close(own.value, general.value, rtol=1e-12, atol=1e-12)
    batch = tangents(problem)
    torch.testing.assert_close(own.push(batch), general.push(batch), rtol=1e-10, atol=1e-10)
    expected = forward_mode(combine, kspace, batch[0])
    torch.testing.assert_close(own.push(batch)[0], expected, rtol=1e-10, atol=1e-10)


class OwnRoad:
    """A reconstruction that knows its own derivative."""

    def __call__(self, kspace: Tensor) -> Tensor:
        raise AssertionError("the general road was taken")

    def linearize(self, kspace: Tensor) -> Linearization:
        return Linearization(value=kspace[0] + 1, push=lambda batch: batch[:, 0])


def test_own_linearization_is_preferred(kspace: Tensor) -> None:
    reconstruction = OwnRoad()
    assert isinstance(reconstruction, Linearizable)
    linearization = linearize(reconstruction, kspace)
    torch.testing.assert_close(linearization.value, kspace[0] + 1)
    torch.testing.assert_close(linearization.push(kspace.unsqueeze(0)), kspace[:1])


@pytest.mark.parametrize(
    "reconstruction",
    [
        lambda y: 2 * y[0] + 0.5j * y[0].conj(),
        lambda y: y.abs().square().sum(dim=0).sqrt(),
        lambda y: torch.view_as_complex(torch.relu(torch.view_as_real(y[0]))),
    ],
    ids=["conjugate", "root sum of squares", "relu"],
)
def test_maps_that_are_not_holomorphic(reconstruction: Callable[[Tensor], Tensor], problem: PlaneProblem) -> None:
    point, *batch = tangents(problem).add(0.3)
    pushed = linearize(reconstruction, point).push(torch.stack(batch))
    for tangent, image in zip(batch, pushed, strict=True):
        expected = forward_mode(reconstruction, point, tangent)
        torch.testing.assert_close(image, expected, rtol=1e-10, atol=1e-10)
