"""What a linearization refuses, and how it says so."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from tests.noise.tape_checks import check, draw, forward_mode
from torch import Tensor, nn

from voxelsigma.noise.linearize import linearize

POINT = draw(3, 6, 4)


class Layer(nn.Module):
    """A module that does one thing."""

    def __init__(self, action: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.action = action

    def forward(self, samples: Tensor) -> Tensor:
        return self.action(samples)


class Culprit(Layer):
    """The one to be named."""


def between(action: Callable[[Tensor], Tensor]) -> nn.Module:
    return nn.Sequential(Layer(lambda y: 2 * y), Culprit(action), Layer(lambda y: 3 * y))


@pytest.mark.parametrize(
    ("action", "operation"),
    [
        (lambda y: y.detach(), "Tensor.detach"),
        (lambda y: y.data, "Tensor.detach"),
        (lambda y: y.abs().argmax(dim=0).double(), "argmax"),
        (lambda y: (y.abs() > 0.5).double(), "gt"),
        (lambda y: y.real.round(), "round"),
        (lambda y: torch.tensor(y.abs().sum().item()), "_local_scalar_dense"),
        (lambda y: torch.from_numpy(y.numpy() * 2), "Tensor.numpy"),
        (lambda y: torch.from_numpy(np.asarray(y)), "Tensor.__array__"),
        (lambda y: torch.tensor(y.real.tolist()), "Tensor.tolist"),
        (lambda y: torch.from_numpy(y.detach().numpy()), "Tensor.detach"),
    ],
    ids=["detach", "data", "argmax", "threshold", "round", "item", "numpy", "array", "list", "detached numpy"],
)
def test_not_differentiable_names_operation_and_module(action: Callable[[Tensor], Tensor], operation: str) -> None:
    pattern = rf"linearize: the reconstruction is not differentiable: .*{operation}.* in module Culprit, .*errors"
    with pytest.raises(ValueError, match=pattern):
        linearize(between(action), POINT)


def test_operation_without_derivative_is_named() -> None:
    pattern = r"not differentiable: aten\._cdist_forward\S* in module Culprit, .* has no forward derivative"
    with pytest.raises(ValueError, match=pattern):
        linearize(between(lambda y: torch.cdist(y.real.float(), y.imag.float(), p=3)), POINT)


def test_a_constant_has_no_noise() -> None:
    found = linearize(lambda y: torch.ones(2, 2), POINT)
    assert torch.equal(found.push(draw(3, *POINT.shape)), torch.zeros(3, 2, 2))


@pytest.mark.parametrize("bad", [complex("nan"), complex("inf")])
def test_data_that_are_not_finite(bad: complex) -> None:
    data = POINT.clone()
    data[0, 0, 0] = torch.tensor(bad)
    with pytest.raises(ValueError, match="linearize: k-space has samples that are not finite"):
        linearize(lambda y: y, data)


def test_value_that_is_not_finite_names_the_first_operation() -> None:
    with pytest.raises(
        ValueError, match=r"values that are not finite, first from aten\.log\.default in module Culprit"
    ):
        linearize(between(lambda y: (y.abs() * 0).log()), POINT)


def test_derivative_that_is_not_finite_names_the_first_operation() -> None:
    found = linearize(between(lambda y: (y.real * 0).sqrt()), POINT)
    pattern = r"the derivative of the reconstruction is not finite, first after aten\.sqrt\.default in module Culprit"
    with pytest.raises(ValueError, match=pattern):
        found.push(draw(2, *POINT.shape))


def test_dropout_in_training_is_refused() -> None:
    pattern = r"two calls .* differ: aten\.bernoulli_\S* in module Dropout.*; fix its seed .*evaluation mode"
    with pytest.raises(ValueError, match=pattern):
        linearize(nn.Sequential(Layer(lambda y: y.real * 1), nn.Dropout(0.5)), POINT)


def test_random_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"two calls .* differ: aten\.randn_like\S* in .* is random; fix its seed"):
        linearize(lambda y: y + torch.randn_like(y), POINT)


def test_fixed_seed_is_accepted() -> None:
    def seeded(y: Tensor) -> Tensor:
        return y.abs() * torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    check(seeded, POINT, calls=3)


def test_randomness_outside_torch_shows_on_repetition() -> None:
    generator = np.random.default_rng(0)
    with pytest.raises(ValueError, match="two calls of the reconstruction differ; fix its seed"):
        linearize(lambda y: y * generator.standard_normal(), POINT, repeat=True)
    linearize(lambda y: y * 2, POINT, repeat=True)


def test_output_that_changes_its_shape() -> None:
    sizes = iter(range(1, 9))
    with pytest.raises(
        ValueError, match=r"two calls of the reconstruction differ in shape, \(2, 6, 4\) and \(3, 6, 4\)"
    ):
        linearize(lambda y: y[: next(sizes)], POINT, repeat=True)


def test_output_that_is_no_tensor() -> None:
    with pytest.raises(TypeError, match="linearize: the reconstruction must return one tensor, got tuple"):
        linearize(lambda y: (y, y), POINT)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    "tangents", [draw(3, 6, 4), draw(2, 3, 6, 5), draw(2, 3, 6, 4).real, draw(2, 3, 6, 4, dtype=torch.complex64)]
)
def test_tangents_that_do_not_fit(tangents: Tensor) -> None:
    pattern = r"linearize: tangents are torch\.\w+ of shape .*; expected torch.complex128 of shape \(probes, 3, 6, 4\)"
    with pytest.raises(ValueError, match=pattern):
        linearize(lambda y: y.abs(), POINT).push(tangents)


def test_errors_of_the_reconstruction_come_through() -> None:
    def broken(y: Tensor) -> Tensor:
        raise KeyError("weights")

    with pytest.raises(KeyError, match="weights"):
        linearize(broken, POINT)


def test_what_cannot_be_recorded_takes_the_general_road_and_says_so() -> None:
    def function(y: Tensor) -> Tensor:
        total, _ = torch.var_mean(y.real, dim=0)
        out = torch.empty(6, 4, dtype=torch.float64)
        torch.mul(total, 2, out=out)
        return out * y.abs().sum()

    def secondary(y: Tensor) -> Tensor:
        return torch.native_layer_norm(y.real, [4], None, None, 1e-5)[1] * y.imag

    found = linearize(secondary, POINT)
    assert found.fallbacks[0].startswith(
        "the whole reconstruction, because aten.mul.Tensor in secondary (test_tape_errors"
    )
    batch = draw(2, *POINT.shape)
    for tangent, pushed in zip(batch, found.push(batch), strict=True):
        torch.testing.assert_close(pushed, forward_mode(secondary, POINT, tangent), rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match=r"not differentiable: aten\.mul\.out in function .* writes into a tensor"):
        linearize(function, POINT)


def test_training_mode_of_batch_norm_is_not_silent() -> None:
    norm = nn.BatchNorm1d(6).double().requires_grad_(False)
    found = linearize(lambda y: norm(y.real), POINT)
    pushed = found.push(draw(1, *POINT.shape, seed=5))[0]

    def pure(y: Tensor) -> Tensor:
        return nn.functional.batch_norm(y.real, None, None, training=True)

    expected = forward_mode(pure, POINT, draw(1, *POINT.shape, seed=5)[0])
    torch.testing.assert_close(pushed, expected, rtol=1e-10, atol=1e-10)
