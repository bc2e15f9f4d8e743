"""The way in for people without Gadgetron."""

import doctest
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import voxelsigma
import voxelsigma.noise.noise_map

SHAPE = (3, 12, 10)


def data(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 20 * torch.randn(SHAPE, generator=generator, dtype=torch.complex128)


def covariance() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(3, 3, generator=generator, dtype=torch.complex128)
    return root @ root.mH + torch.eye(3)


def combined(kspace: Tensor) -> Tensor:
    return (torch.tensor([0.5, 0.5j, -0.7]).to(kspace)[:, None, None] * torch.fft.ifft2(kspace, norm="ortho")).sum(
        dim=0
    )


def test_the_example_of_the_docstring_runs() -> None:
    assert doctest.testmod(voxelsigma.noise.noise_map).failed == 0


def test_a_linear_reconstruction_with_correlated_coils_has_its_closed_form() -> None:
    mask = torch.ones(SHAPE[1:])
    mask[::2] = 0
    mask[1] = 4
    psi = covariance()
    found = voxelsigma.noise_map(
        combined, data() * (mask > 0), covariance=psi, mask=mask, probes=4096, kind="complex", seed=3
    )
    weights = torch.tensor([0.5, 0.5j, -0.7], dtype=torch.complex128)
    inverse = torch.where(mask > 0, 1 / mask.clamp_min(1), 0).double()
    expected = math.sqrt(float((weights @ psi @ weights.conj()).real) * float(inverse.mean()))
    # 4096 probes: relative error 0.8 % a voxel; 120 voxels, false alarm beyond 6 standard errors below 1e-6
    np.testing.assert_allclose(found.sigma.numpy(), expected, rtol=0.05)
    assert found.error == pytest.approx(1 / math.sqrt(4 * 4096), rel=0.2)


def test_whitened_data_have_unit_deviation() -> None:
    found = voxelsigma.noise_map(lambda y: torch.fft.ifft2(y[0], norm="ortho"), data(), probes=2048, seed=0)
    np.testing.assert_allclose(found.sigma.numpy(), 1, rtol=0.1)
    assert found.image.shape == SHAPE[1:]


def test_a_seed_repeats_and_none_draws_one() -> None:
    first = voxelsigma.noise_map(combined, data(), probes=16)
    again = voxelsigma.noise_map(combined, data(), probes=16, seed=first.seed, chunk=3)
    other = voxelsigma.noise_map(combined, data(), probes=16)
    torch.testing.assert_close(first.sigma, again.sigma, rtol=1e-12, atol=0)
    assert not torch.equal(first.sigma, other.sigma)


def test_a_target_error_stops_early() -> None:
    found = voxelsigma.noise_map(combined, data(), probes=4096, target_error=0.1)
    assert found.estimate.probes < 400
    assert found.error <= 0.1


def test_a_time_budget_that_is_too_short_gives_the_map_with_its_error() -> None:
    found = voxelsigma.noise_map(combined, data(), probes=4096, time_budget=0)
    assert 2 <= found.estimate.probes < 4096
    assert found.error == pytest.approx(1 / math.sqrt(2 * (found.estimate.probes - 1)), rel=0.01)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"kspace": torch.zeros(3, 4)}, r"kspace is torch.float32 of shape \(3, 4\); expected complex of shape"),
        ({"kspace": torch.full((2, 4, 4), complex("nan"))}, "kspace holds NaN or Inf"),
        ({"kspace": torch.zeros(2, 4, 4, dtype=torch.complex64)}, "no k-space position is sampled"),
        ({"probes": 1}, "probes is 1; a variance needs at least 2"),
        ({"mask": torch.zeros(12, 10)}, "no k-space position is sampled"),
        ({"mask": torch.ones(5, 5)}, r"mask has shape \(5, 5\); expected one that fits \(12, 10\)"),
        ({"mask": -torch.eye(12, 10) + 0.5}, "mask holds negative or infinite numbers"),
        ({"covariance": torch.eye(2)}, r"covariance has shape \(2, 2\); expected \(3, 3\) for 3 coils"),
        ({"covariance": torch.ones(3, 3).tril()}, "covariance is not Hermitian"),
        ({"covariance": -torch.eye(3)}, r"covariance is not positive definite \(smallest eigenvalue -1\)"),
        ({"covariance": torch.zeros(3, 3)}, "covariance is zero, NaN or Inf"),
        ({"seed": 1, "time_budget": 2.0}, "time_budget cannot go with seed"),
        ({"reconstruct": lambda y: y[0] / 0}, "NaN or Inf|not finite"),
    ],
)
def test_bad_input_is_one_clear_line(changes: dict[str, Any], text: str) -> None:
    arguments: dict[str, Any] = {"reconstruct": combined, "kspace": data(), **changes}
    with pytest.raises(ValueError, match=text):
        voxelsigma.noise_map(**arguments)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'noise_maps'"):
        _ = voxelsigma.noise_maps
