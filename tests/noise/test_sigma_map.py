"""A σ map and its error: the bias of the square root, intervals, exact maps."""

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from tests.noise.draws import complex_normal

from voxelsigma.noise.moments import moments
from voxelsigma.noise.sigma import SigmaMap, exact_map, root_bias, sigma_map


def test_root_bias_is_the_mean_of_a_chi_distribution() -> None:
    freedom = np.array([0.5, 1, 2, 3, 7, 15.3, 100, 999, 9999.0, 10001.0, 1e6])
    expected = np.sqrt(2 / freedom) * np.exp(
        scipy.special.gammaln((freedom + 1) / 2) - scipy.special.gammaln(freedom / 2)
    )
    np.testing.assert_allclose(root_bias(torch.from_numpy(freedom)), expected, rtol=1e-8)
    # the mean of √(χ²/ν) itself, by quadrature
    for nu in (1.0, 4.0, 31.0):
        mean = scipy.stats.chi(nu).mean() / math.sqrt(nu)
        assert float(root_bias(torch.tensor(nu))) == pytest.approx(mean, rel=1e-6)
    assert float(root_bias(torch.tensor(torch.inf))) == 1.0


@pytest.mark.parametrize("count", [2, 4, 8, 32])
def test_sigma_is_unbiased_at_few_probes(count: int) -> None:
    u = complex_normal((count, 200, 200), 16)
    result = sigma_map(moments(u, None), "complex", direction=torch.ones(200, 200, dtype=torch.complex128))
    linear = sigma_map(
        moments(u, None), "magnitude", direction=torch.ones(200, 200, dtype=torch.complex128), complex_linear=True
    )
    # 40000 voxels of relative error 1/√(4 S), at most 0.35: 0.18 % of the mean; 5 of them: false alarm 1e-6
    assert float(linear.sigma.mean()) == pytest.approx(1, abs=0.009)
    # not knowing that it is circular, ν is judged by the sample: a little low at 2 probes
    assert float(result.sigma.mean()) == pytest.approx(math.sqrt(2), rel=0.06 if count < 8 else 0.01)


@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
@pytest.mark.parametrize("freedom", [3.0, 15.0, 200.0])
def test_intervals_cover_at_their_level(level: float, freedom: float) -> None:
    rng, voxels, truth = np.random.default_rng(17), 100_000, 1.7
    raw = truth * np.sqrt(rng.chisquare(freedom, voxels) / freedom)
    nu = torch.full((voxels,), freedom, dtype=torch.float64)
    estimate = SigmaMap(
        sigma=torch.from_numpy(raw) / root_bias(nu),
        degrees_of_freedom=nu,
        kind="magnitude",
        probes=16,
        explained=torch.zeros(voxels),
    )
    lower, upper = estimate.interval(level)
    # binomial: √(p(1-p)/n) is at most 0.16 %; 5 of them a side: false alarm 1e-6
    tolerance = 5 * math.sqrt(level * (1 - level) / voxels)
    assert float(((lower <= truth) & (truth <= upper)).double().mean()) == pytest.approx(level, abs=tolerance)
    # equal tails
    assert float((lower > truth).double().mean()) == pytest.approx((1 - level) / 2, abs=tolerance)
    assert bool((lower < upper).all())


def test_relative_error_is_that_of_chi_square() -> None:
    nu = torch.tensor([0.5, 8.0, 200.0, torch.inf])
    result = SigmaMap(sigma=torch.ones(4), degrees_of_freedom=nu, kind="complex", probes=9, explained=torch.zeros(4))
    torch.testing.assert_close(result.relative_error(), torch.tensor([1.0, 0.25, 0.05, 0.0]))


def test_exact_maps_have_no_error_and_intervals_of_no_width() -> None:
    variance = torch.tensor([[4.0, 0.0], [2.25, 1.0]], dtype=torch.float64)
    result = exact_map(variance, "magnitude")
    torch.testing.assert_close(result.sigma, variance.sqrt())
    assert result.probes == 0
    assert result.kind == "magnitude"
    assert not bool(result.relative_error().any())
    for bound in result.interval(0.99):
        torch.testing.assert_close(bound, result.sigma)
