"""A prediction corrected by probes and put together with them."""

import numpy as np
import pytest
import torch
from torch import Tensor

from voxelsigma.noise.fusion import corrected, fused, measured_variance
from voxelsigma.noise.prior import Prior
from voxelsigma.noise.sigma import SigmaMap, root_bias

SIDE = 96
INSIDE = torch.zeros(SIDE, SIDE, dtype=torch.bool)
INSIDE[8:88, 12:80] = True
ROWS = torch.linspace(-1, 1, SIDE, dtype=torch.float64)[:, None].expand(SIDE, SIDE)


def plain(energy: Tensor, count: int) -> SigmaMap:
    """The map of a mean of `count` squares."""
    freedom = torch.full_like(energy, count)
    return SigmaMap(
        sigma=energy.sqrt() / root_bias(freedom),
        degrees_of_freedom=freedom,
        kind="magnitude",
        probes=count,
        explained=torch.zeros_like(energy),
    )


def drawn(worth: float, count: int, seed: int, factor: Tensor | float = 1.0) -> tuple[Tensor, SigmaMap, Prior]:
    """True variances, a map of so many probes, and a prior of its worth whose guess is off by a factor."""
    generator = np.random.default_rng(seed)
    guess = torch.from_numpy(np.exp(generator.normal(size=(SIDE, SIDE))))
    truth = guess * worth / torch.from_numpy(generator.chisquare(worth, (SIDE, SIDE)))
    energy = truth * torch.from_numpy(generator.chisquare(count, (SIDE, SIDE))) / count
    return truth, plain(energy, count), Prior(variance=guess * factor, freedom=torch.full_like(guess, worth))


def test_the_posterior_covers_and_is_better_than_both() -> None:
    truth, found, prior = drawn(40.0, 8, 1)
    together = fused(found, prior)
    low, high = together.interval()
    covered = ((low <= truth.sqrt()) & (truth.sqrt() <= high)).double().mean()
    # 9216 voxels: a standard error of 0.23 %, five of them
    assert abs(float(covered) - 0.95) < 0.0115

    def error(sigma: Tensor) -> float:
        return float((sigma / truth.sqrt() - 1).square().mean().sqrt())

    assert error(together.sigma) < 0.97 * min(error(prior.variance.sqrt()), error(found.sigma))
    np.testing.assert_allclose(error(together.sigma), float(together.relative_error().mean()), rtol=0.05)


def test_what_says_nothing_changes_nothing() -> None:
    _, found, prior = drawn(40.0, 8, 2)
    alone = fused(found, Prior(variance=torch.zeros_like(prior.variance), freedom=prior.freedom))
    torch.testing.assert_close(alone.sigma, found.sigma)
    torch.testing.assert_close(alone.degrees_of_freedom, found.degrees_of_freedom)


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_a_factor_is_taken_out(factor: float) -> None:
    truth, found, prior = drawn(60.0, 8, 3, factor)
    right = corrected(prior, found, INSIDE, 1.0).variance
    ratio = (truth / right)[INSIDE]
    # the mean of 60/chi^2 is 60/58; 5440 voxels with 8 squares each: 1 %, three of them
    np.testing.assert_allclose(float(ratio.mean()), 60 / 58, rtol=0.03)


def test_a_slow_variation_is_taken_out() -> None:
    truth, found, prior = drawn(60.0, 8, 4, (0.5 * ROWS).exp())
    before = (truth / prior.variance).log()
    after = (truth / corrected(prior, found, INSIDE, 1.0).variance).log()
    slope_before, slope_after = (
        float((ROWS * one)[INSIDE].sum() / ROWS[INSIDE].square().sum()) for one in (before, after)
    )
    assert abs(slope_before + 0.5) < 0.05
    # what is left of the slope: shrinkage, and squares that end at the border
    assert abs(slope_after) < 0.1


def test_a_right_prediction_is_hardly_changed() -> None:
    _, found, prior = drawn(1e4, 8, 5)
    change = (corrected(prior, found, INSIDE, 1.0).variance / prior.variance).log()[INSIDE]
    # the global factor's own error is 1 %; squares of 17 would each have 3 % without shrinkage
    assert float(change.square().mean().sqrt()) < 0.02


def test_the_worth_stays() -> None:
    _, found, prior = drawn(40.0, 8, 6)
    assert corrected(prior, found, INSIDE, 1.0).freedom is prior.freedom


def test_an_empty_object_is_left_alone() -> None:
    _, found, prior = drawn(40.0, 8, 7)
    assert corrected(prior, found, torch.zeros_like(INSIDE), 1.0) is prior


def test_the_measured_variance_has_no_bias() -> None:
    truth, found, _ = drawn(1e6, 8, 8)
    # 9216 ratios of a standard deviation of 0.5: 0.5 %, four of them
    np.testing.assert_allclose(float((measured_variance(found) / truth).mean()), 1.0, atol=0.02)
