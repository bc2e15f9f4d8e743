"""Second-order sums of probes: they add up, whatever the batches."""

import dataclasses

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.noise.draws import complex_normal, phases

from voxelsigma.noise.moments import Moments, accumulate, moments, projected

seeds = st.integers(0, 2**32 - 1)

SUMS = tuple(field.name for field in dataclasses.fields(Moments) if field.name != "count")


@settings(deadline=None, max_examples=20)
@given(first=st.integers(1, 9), second=st.integers(1, 9), seed=seeds)
def test_moments_of_two_batches_add_up(first: int, second: int, seed: int) -> None:
    u, w = complex_normal((2, first + second, 3, 4), seed)
    together = moments(u, w)
    apart = moments(u[:first], w[:first]) + moments(u[first:], w[first:])
    assert together.count == apart.count == first + second
    for field in dataclasses.fields(Moments):
        torch.testing.assert_close(getattr(apart, field.name), getattr(together, field.name), rtol=1e-12, atol=1e-12)


def same(one: Moments, other: Moments) -> bool:
    return one.count == other.count and all(torch.equal(getattr(one, name), getattr(other, name)) for name in SUMS)


@settings(deadline=None, max_examples=20)
@given(parts=st.lists(st.integers(1, 5), min_size=1, max_size=4), covariate=st.booleans(), seed=seeds)
def test_sums_in_place_are_those_of_all_probes(parts: list[int], covariate: bool, seed: int) -> None:
    u, w = complex_normal((2, sum(parts), 3, 4), seed)
    total: Moments | None = None
    for u_part, w_part in zip(u.split(parts), w.split(parts), strict=True):
        given_w = w_part if covariate else None
        total = moments(u_part, given_w) if total is None else accumulate(total, u_part, given_w)
    assert total is not None
    # one by one in the same order: not even rounding differs
    assert same(total, moments(u, w if covariate else None))


@settings(deadline=None, max_examples=20)
@given(first=st.integers(1, 9), second=st.integers(1, 9), seed=seeds)
def test_the_difference_is_of_the_later_probes(first: int, second: int, seed: int) -> None:
    u, w = complex_normal((2, first + second, 3, 4), seed)
    later = moments(u, w) - moments(u[:first], w[:first])
    expected = moments(u[first:], w[first:])
    assert later.count == second
    for name in SUMS:
        torch.testing.assert_close(getattr(later, name), getattr(expected, name), rtol=1e-12, atol=1e-12)


def test_a_copy_stays_when_probes_are_added() -> None:
    u, w = complex_normal((2, 6, 3, 4), 3)
    total = moments(u[:4], w[:4])
    kept = total.copy()
    assert same(kept, total)
    more = accumulate(total, u[4:], w[4:])
    # the sums are written into, whatever the old ones say of their number
    assert more.u_abs is total.u_abs
    assert same(kept, moments(u[:4], w[:4]))
    assert same(more, moments(u, w))
    # a difference is no view either
    later = more - kept
    accumulate(more, u, w)
    torch.testing.assert_close(later.u_w, moments(u[4:], w[4:]).u_w)


@settings(deadline=None, max_examples=20)
@given(count=st.integers(1, 9), seed=seeds)
def test_projected_is_the_sum_of_products_of_in_phase_components(count: int, seed: int) -> None:
    (u, w), direction = complex_normal((2, count, 3, 4), seed), phases((3, 4), seed + 1)
    a, b = (direction.conj() * u).real, (direction.conj() * w).real
    sums = moments(u, w)
    torch.testing.assert_close(projected(sums.u_w, sums.u_wc, direction), (a * b).sum(dim=0))
    torch.testing.assert_close(projected(sums.u_u, sums.u_abs, direction), (a * a).sum(dim=0))
    torch.testing.assert_close(projected(sums.w_w, sums.w_abs, direction), (b * b).sum(dim=0))


def test_moments_are_double_and_without_a_covariate_zero() -> None:
    u = complex_normal((5, 2, 2), 0).to(torch.complex64)
    sums = moments(u, None)
    assert sums.u_abs.dtype == torch.float64
    assert sums.u_u.dtype == torch.complex128
    torch.testing.assert_close(sums.u_abs, u.to(torch.complex128).abs().square().sum(dim=0))
    for empty in (sums.w_abs, sums.w_w, sums.u_wc, sums.u_w):
        assert not bool(empty.any())
