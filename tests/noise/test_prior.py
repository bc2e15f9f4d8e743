"""A prior on a variance: its likelihood, and its mean."""

import numpy as np
import pytest
import scipy.stats
import torch

from voxelsigma.noise.prior import FEWEST_FREEDOM, Prior, marginal_loss


def loss(variance: float, freedom: float, measured: torch.Tensor, count: float) -> torch.Tensor:
    like = torch.ones_like(measured)
    return marginal_loss(like * np.log(variance), like * np.log(freedom), measured, count)


@pytest.mark.parametrize("count", [1.0, 8.0, 33.5])
def test_the_loss_is_the_f_distribution(count: float) -> None:
    measured = torch.tensor([0.02, 0.3, 1.0, 2.7, 40.0], dtype=torch.float64)

    def density(variance: float, freedom: float) -> np.ndarray:
        return scipy.stats.f.logpdf(measured.numpy() / variance, count, freedom) - np.log(variance)

    # a constant of both is left out
    found = loss(1.3, 20.0, measured, count) - loss(0.7, 5.0, measured, count)
    np.testing.assert_allclose(found.numpy(), density(0.7, 5.0) - density(1.3, 20.0), rtol=1e-9)


def test_a_certain_prior_has_the_gamma_likelihood() -> None:
    measured = torch.tensor([0.3, 1.0, 2.7], dtype=torch.float64)

    def gamma(variance: float) -> torch.Tensor:
        return 4.0 * (np.log(variance) + measured / variance)

    found = loss(1.3, 1e9, measured, 8.0) - loss(0.7, 1e9, measured, 8.0)
    torch.testing.assert_close(found, gamma(1.3) - gamma(0.7), rtol=1e-6, atol=1e-5)


def test_large_freedoms_cost_no_precision() -> None:
    measured = torch.tensor([0.3, 1.0, 2.7], dtype=torch.float64)
    single = loss(1.3, 1000.0, measured.float(), 8.0) - loss(0.9, 1000.0, measured.float(), 8.0)
    double = loss(1.3, 1000.0, measured, 8.0) - loss(0.9, 1000.0, measured, 8.0)
    torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-3)


@pytest.mark.parametrize("freedom", [2.5, 5.0, 40.0, 1e9])
def test_the_mean_is_that_of_the_distribution(freedom: float) -> None:
    prior = Prior(variance=torch.tensor([1.7], dtype=torch.float64), freedom=torch.tensor([freedom]))
    wanted = scipy.stats.invgamma.mean(freedom / 2, scale=freedom * 1.7 / 2)
    np.testing.assert_allclose(prior.mean().numpy(), wanted, rtol=1e-6)


def test_a_prior_of_next_to_no_worth_has_no_mean() -> None:
    freedom = torch.tensor([0.1, 1.0, 2.0, 2.1, FEWEST_FREEDOM, 4.1, 100.0])
    prior = Prior(variance=torch.full_like(freedom, 3.0), freedom=freedom)
    assert prior.mean().isinf().tolist() == [True, True, True, False, False, False, False]
    assert prior.vague().tolist() == [True, True, True, True, True, False, False]


def test_of_what_is_not_predicted_the_mean_is_not_either() -> None:
    prior = Prior(variance=torch.tensor([0.0, 0.0, torch.nan]), freedom=torch.tensor([1.0, 50.0, 50.0]))
    mean = prior.mean()
    assert mean[:2].tolist() == [0.0, 0.0]
    assert bool(mean[2].isnan())
    assert not bool(prior.vague().any())
