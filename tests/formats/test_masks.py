"""Sampling masks."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voxelsigma.formats.masks import Kind, make_mask, poisson_disc, random_1d, random_2d, uniform_1d

KINDS: tuple[Kind, ...] = ("uniform_1d", "random_1d", "random_2d", "poisson_disc")
sizes = st.integers(16, 48)
seeds = st.integers(0, 2**32 - 1)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@given(lines=sizes, samples=sizes, acceleration=st.integers(1, 8))
def test_uniform_passes_through_the_centre_at_every_rth_line(lines: int, samples: int, acceleration: int) -> None:
    mask = uniform_1d((lines, samples), acceleration)
    rows = np.flatnonzero(mask[:, 0])
    assert mask.shape == (lines, samples)
    assert mask.dtype == bool
    assert mask[lines // 2].all()
    assert np.array_equal(mask, np.repeat(mask[:, :1], samples, axis=1))
    assert (np.diff(rows) == acceleration).all()
    assert rows[0] < acceleration
    assert lines - rows[-1] <= acceleration


def test_uniform_starts_at_a_given_offset() -> None:
    mask = uniform_1d((10, 4), 3, offset=1)
    assert np.flatnonzero(mask[:, 0]).tolist() == [1, 4, 7]


@given(lines=sizes, samples=sizes, acceleration=st.floats(1, 8), seed=seeds)
def test_random_lines_have_the_exact_number_and_a_full_centre(
    lines: int, samples: int, acceleration: float, seed: int
) -> None:
    budget = round(lines / acceleration)
    centre = budget // 2
    mask = random_1d((lines, samples), acceleration, centre_lines=centre, rng=rng(seed))
    start = lines // 2 - centre // 2
    assert mask[start : start + centre].all()
    assert mask[:, 0].sum() == budget
    assert np.array_equal(mask, np.repeat(mask[:, :1], samples, axis=1))


@pytest.mark.parametrize("kind", ["random_2d", "poisson_disc"])
@settings(deadline=None, max_examples=40)
@given(lines=sizes, samples=sizes, acceleration=st.floats(1, 8), seed=seeds)
def test_planar_masks_have_the_exact_number_and_a_full_centre(
    kind: Kind, lines: int, samples: int, acceleration: float, seed: int
) -> None:
    mask = make_mask(kind, (lines, samples), acceleration, centre=4, rng=rng(seed))
    assert mask.shape == (lines, samples)
    assert mask[lines // 2 - 2 : lines // 2 + 2, samples // 2 - 2 : samples // 2 + 2].all()
    assert mask.sum() == round(lines * samples / acceleration)


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_fixes_the_mask(kind: Kind) -> None:
    masks = [make_mask(kind, (32, 24), 4, centre=4, rng=rng(seed)) for seed in (7, 7, 8)]
    assert np.array_equal(masks[0], masks[1])
    assert np.array_equal(masks[0], masks[2]) == (kind == "uniform_1d")


def test_random_lines_are_denser_near_the_centre() -> None:
    draws = [random_1d((64, 1), 4, centre_lines=0, rng=rng(seed))[:, 0] for seed in range(200)]
    density = np.mean(draws, axis=0)
    assert density[24:40].mean() > 2 * density[[*range(8), *range(56, 64)]].mean()


@pytest.mark.parametrize("acceleration", [4, 6, 8])
def test_poisson_disc_keeps_distances_that_grow_with_the_radius(acceleration: float) -> None:
    shape, centre = (128, 96), 8
    mask = poisson_disc(shape, acceleration, centre=centre, rng=rng(3))
    mask[64 - 4 : 64 + 4, 48 - 4 : 48 + 4] = False
    points = np.argwhere(mask)
    radius = np.hypot((points[:, 0] - 64) / 64, (points[:, 1] - 48) / 48)
    gaps = np.linalg.norm(points[:, None] - points, axis=-1) + 1e9 * np.eye(len(points))
    # the same scale s must explain every pair: s <= distance / (1 + 2 min(radius))
    nearer = np.minimum.outer(radius, radius)
    scale = (gaps / (1 + 2 * nearer)).min()
    assert scale > 0.5
    assert gaps.min(axis=1)[radius > 0.9].min() >= 2 * gaps.min(axis=1)[radius < 0.3].min()
    # random positions come much closer than this
    uniform = np.argwhere(random_2d(shape, acceleration, centre=0, rng=rng(3)))
    radius = np.hypot((uniform[:, 0] - 64) / 64, (uniform[:, 1] - 48) / 48)
    gaps = np.linalg.norm(uniform[:, None] - uniform, axis=-1) + 1e9 * np.eye(len(uniform))
    assert (gaps / (1 + 2 * np.minimum.outer(radius, radius))).min() < 0.5 * scale


def test_poisson_disc_is_quick() -> None:
    start = time.process_time()
    for acceleration in (2, 4, 8):
        poisson_disc((256, 256), acceleration, centre=24, rng=rng())
    assert time.process_time() - start < 6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("acceleration", [0.5, 0, -2, float("nan"), 1e9])
def test_impossible_acceleration_is_refused(kind: Kind, acceleration: float) -> None:
    with pytest.raises(ValueError, match=r"acceleration must be from 1 to .*, got"):
        make_mask(kind, (16, 16), acceleration, centre=0, rng=rng())


def test_other_impossible_values_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be a whole number, got 2\.5"):
        uniform_1d((16, 16), 2.5)
    with pytest.raises(ValueError, match="offset must be from 0 to 2 at acceleration 3, got 3"):
        uniform_1d((16, 16), 3, offset=3)
    with pytest.raises(ValueError, match=r"two positive numbers \(ka, kb\), got \(0, 4\)"):
        uniform_1d((0, 4), 1)
    with pytest.raises(ValueError, match="centre must be from 0 to 16, got 17"):
        random_1d((16, 32), 1, centre_lines=17, rng=rng())
    with pytest.raises(ValueError, match="at most the 4 lines of acceleration 4 over 16, got 5"):
        random_1d((16, 32), 4, centre_lines=5, rng=rng())
    with pytest.raises(ValueError, match="centre must be from 0 to 16, got -1"):
        random_2d((16, 32), 4, centre=-1, rng=rng())
    with pytest.raises(ValueError, match=r"at most the 64 positions of acceleration 4 .* got 9 x 9"):
        poisson_disc((16, 16), 4, centre=9, rng=rng())
    with pytest.raises(ValueError, match=r"mask kind must be one of uniform_1d, .*, got 'spiral'"):
        make_mask("spiral", (16, 16), 4, centre=0, rng=rng())  # type: ignore[arg-type]
