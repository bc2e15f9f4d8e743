"""What is expected of a map, put together with what probes say."""

import numpy as np
import pytest
import torch
from torch import Tensor

from voxelsigma.noise.fusion import expected, fused, measured_variance
from voxelsigma.noise.prior import Prior
from voxelsigma.noise.sigma import MapKind, SigmaMap, root_bias

SIDE = 96


def plain(energy: Tensor, count: int, kind: MapKind = "magnitude") -> SigmaMap:
    """The map of a mean of `count` squares."""
    freedom = torch.full_like(energy, count)
    return SigmaMap(
        sigma=energy.sqrt() / root_bias(freedom),
        degrees_of_freedom=freedom,
        kind=kind,
        probes=count,
        explained=torch.zeros_like(energy),
    )


def drawn(worth: Tensor, count: int, seed: int) -> tuple[Tensor, SigmaMap, Prior]:
    """True variances that scatter around a guess as its worth says, a map of so many probes, and the guess."""
    generator = np.random.default_rng(seed)
    guess = torch.from_numpy(np.exp(generator.normal(size=(SIDE, SIDE))))
    truth = guess * worth / torch.from_numpy(generator.chisquare(worth.numpy()))
    energy = truth * torch.from_numpy(generator.chisquare(count, (SIDE, SIDE))) / count
    return truth, plain(energy, count), Prior(variance=guess, freedom=worth)


def even(worth: float) -> Tensor:
    return torch.full((SIDE, SIDE), worth, dtype=torch.float64)


def halves() -> Tensor:
    """Next to nothing is known of one half, very much of the other."""
    worth = even(6.0)
    worth[:, SIDE // 2 :] = 150.0
    return worth


def error(sigma: Tensor, truth: Tensor) -> float:
    return float((sigma / truth.sqrt() - 1).square().mean().sqrt())


def covered(found: SigmaMap, truth: Tensor, level: float) -> float:
    low, high = found.interval(level)
    return float(((low <= truth.sqrt()) & (truth.sqrt() <= high)).double().mean())


@pytest.mark.parametrize("worth", [even(6.0), even(40.0), even(400.0), halves()], ids=["6", "40", "400", "halves"])
@pytest.mark.parametrize("level", [0.5, 0.95])
def test_both_cover_what_they_say(worth: Tensor, level: float) -> None:
    truth, found, prior = drawn(worth, 8, 1)
    # 9216 voxels: a standard error of 0.52 % and 0.23 %, five of them: false alarm 1e-6
    tolerance = 5 * (level * (1 - level) / SIDE**2) ** 0.5
    for one in (expected(prior, "magnitude", 8), fused(found, prior)):
        assert covered(one, truth, level) == pytest.approx(level, abs=tolerance)


@pytest.mark.parametrize("worth", [even(15.0), even(40.0)], ids=["15", "40"])
def test_the_posterior_is_better_than_both(worth: Tensor) -> None:
    truth, found, prior = drawn(worth, 8, 1)
    together = fused(found, prior)
    alone = expected(prior, "magnitude", 8)
    assert error(together.sigma, truth) < 0.97 * min(error(alone.sigma, truth), error(found.sigma, truth))
    assert error(together.sigma, truth) == pytest.approx(float(together.relative_error().mean()), rel=0.05)


def test_it_is_the_mean_by_degrees_of_freedom() -> None:
    _, found, prior = drawn(halves(), 8, 2)
    together = fused(found, prior)
    torch.testing.assert_close(together.degrees_of_freedom, 8 + prior.freedom)
    variance = (8 * measured_variance(found) + prior.freedom * prior.variance) / (8 + prior.freedom)
    torch.testing.assert_close(measured_variance(together), variance)
    assert (together.kind, together.probes) == ("magnitude", 8)
    assert together.explained is found.explained


def test_probes_may_come_in_any_parts() -> None:
    _, first, prior = drawn(even(40.0), 8, 3)
    _, second, _ = drawn(even(40.0), 24, 4)
    both = plain((8 * measured_variance(first) + 24 * measured_variance(second)) / 32, 32)
    once = fused(both, prior)
    begun = fused(first, prior)
    twice = fused(second, Prior(variance=measured_variance(begun), freedom=begun.degrees_of_freedom))
    torch.testing.assert_close(twice.sigma, once.sigma)
    torch.testing.assert_close(twice.degrees_of_freedom, once.degrees_of_freedom)


def test_what_says_nothing_changes_nothing() -> None:
    _, found, prior = drawn(even(40.0), 8, 5)
    says = torch.ones(SIDE, SIDE, dtype=torch.bool)
    says[:30] = False
    together = fused(found, Prior(variance=torch.where(says, prior.variance, 0), freedom=prior.freedom))
    whole = fused(found, prior)
    for name in ("sigma", "degrees_of_freedom"):
        one = getattr(together, name)
        torch.testing.assert_close(one[:30], getattr(found, name)[:30])
        assert torch.equal(one[30:], getattr(whole, name)[30:])


@pytest.mark.parametrize("kind", ["magnitude", "complex"])
def test_what_is_expected_is_the_prior(kind: MapKind) -> None:
    prior = Prior(variance=torch.tensor([0.0, 1.0, 9.0]), freedom=torch.tensor([5.0, 50.0, 1000.0]))
    found = expected(prior, kind, 16)
    torch.testing.assert_close(measured_variance(found), prior.variance.double())
    torch.testing.assert_close(found.degrees_of_freedom, prior.freedom.double())
    assert found.sigma.dtype == torch.float64
    assert (found.kind, found.probes) == (kind, 16)
    assert not bool(found.explained.any())


def test_the_expected_sigma_has_no_bias() -> None:
    truth, _, prior = drawn(even(8.0), 8, 6)
    ratio = expected(prior, "magnitude", 8).sigma / truth.sqrt()
    # a relative deviation of 0.25: a standard error of 0.26 %, five of them
    assert float(ratio.mean()) == pytest.approx(1, abs=0.013)


def test_the_measured_variance_has_no_bias() -> None:
    truth, found, _ = drawn(even(1e6), 8, 8)
    # 9216 ratios of a standard deviation of 0.5: 0.5 %, four of them
    np.testing.assert_allclose(float((measured_variance(found) / truth).mean()), 1.0, atol=0.02)
