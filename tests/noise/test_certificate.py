"""The test of a predicted map by probes."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from voxelsigma.noise.certificate import MOST_REGIONS, VOXELS_PER_REGION, Certificate, RegionEnergies, regions

SIDE = 72
DIRECTION = torch.ones(SIDE, SIDE, dtype=torch.complex128)


def disc(side: int = SIDE) -> Tensor:
    axis = torch.linspace(-1, 1, side)
    return axis[:, None].square() + 0.7 * axis.square() < 0.9


def noise(count: int, seed: int, width: int = 3) -> Tensor:
    """Real noise of variance 1 whose neighbours are correlated."""
    generator = torch.Generator().manual_seed(seed)
    white = torch.randn(count, 1, SIDE + width - 1, SIDE + width - 1, generator=generator, dtype=torch.float64)
    return (avg_pool2d(white, width, stride=1) * width)[:, 0]


def judged(predicted: Tensor, seed: int, count: int = 16, inside: Tensor | None = None) -> Certificate:
    """Certificate of a prediction of the standard deviation where the truth is 1."""
    seen = RegionEnergies(regions(disc() if inside is None else inside), predicted.square(), DIRECTION)
    for batch in noise(count, seed).split(5):
        seen.add(batch)
    return seen.certificate()


def test_regions_are_connected_parts_of_equal_size() -> None:
    labels = regions(disc())
    assert torch.equal(labels >= 0, disc())
    counts = torch.bincount(labels[labels >= 0])
    assert len(counts) == int(disc().sum()) // VOXELS_PER_REGION
    assert int(counts.max() - counts.min()) <= len(counts)


@pytest.mark.parametrize("voxels", [1, 7, VOXELS_PER_REGION, 2 * VOXELS_PER_REGION + 1, 60_000])
def test_regions_of_any_object(voxels: int) -> None:
    inside = torch.zeros(250, 250, dtype=torch.bool)
    inside.view(-1)[:voxels] = True
    labels = regions(inside)
    assert int(labels.max()) + 1 == max(1, min(MOST_REGIONS, voxels // VOXELS_PER_REGION))
    assert torch.equal(labels >= 0, inside)


def test_a_right_prediction_passes() -> None:
    # one-sided 99 % beyond the tolerance: a false alarm is far rarer than 1 %; 1e-6 for all of these
    assert all(judged(torch.ones(SIDE, SIDE), seed, count=8).passed for seed in range(40))


def test_a_region_that_is_off_by_a_third_is_found() -> None:
    predicted = torch.ones(SIDE, SIDE, dtype=torch.float64)
    predicted[:36] = 1 / 1.35
    # the power at 35 % is above 99 % with 16 probes: of 40 the chance of 3 misses is below 1 %
    assert sum(not judged(predicted, seed).passed for seed in range(40)) >= 38


def test_the_stated_error_is_that_of_repetitions() -> None:
    found = [judged(torch.ones(SIDE, SIDE), seed) for seed in range(200)]
    ratios = torch.stack([one.log_ratio for one in found])
    stated = torch.stack([one.error for one in found]).mean(dim=0)
    # 200 repetitions know a deviation to 5 %; all regions together to 2 %
    np.testing.assert_allclose(float((ratios.std(dim=0) / stated).mean()), 1.0, atol=0.08)
    assert float(ratios.mean().abs()) < 0.01


def test_the_phase_counts() -> None:
    phase = torch.polar(torch.ones(SIDE, SIDE, dtype=torch.float64), torch.full((SIDE, SIDE), 0.7, dtype=torch.float64))
    seen = RegionEnergies(regions(disc()), torch.ones(SIDE, SIDE), phase)
    seen.add(phase * noise(16, 1))
    plain = RegionEnergies(regions(disc()), torch.ones(SIDE, SIDE), DIRECTION)
    plain.add(noise(16, 1))
    torch.testing.assert_close(seen.certificate().log_ratio, plain.certificate().log_ratio)


def test_voxels_without_noise_are_left_out() -> None:
    predicted = torch.ones(SIDE, SIDE)
    predicted[30:40] = 0
    assert judged(predicted, 3).passed
    assert bool(judged(predicted, 3).log_ratio.isfinite().all())


def test_one_probe_is_no_test() -> None:
    seen = RegionEnergies(regions(disc()), torch.ones(SIDE, SIDE), DIRECTION)
    with pytest.raises(ValueError, match="certificate: 0 probes; a test needs at least 2"):
        seen.certificate()
    seen.add(noise(1, 1))
    with pytest.raises(ValueError, match="certificate: 1 probes; a test needs at least 2"):
        seen.certificate()
