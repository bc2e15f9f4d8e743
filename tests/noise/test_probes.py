"""Random probes."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from voxelsigma.noise.probes import BLOCK_SIZE, ProbeSource

VARIANCE = torch.tensor([[2.0, 0.0, 1.0, 0.5], [0.0, 2.0, 2.0 / 3, 0.0], [0.25, 1.7, 0.0, 2.0]])

seeds = st.integers(-(2**63), 2**63 - 1)


def source(
    seed: int = 0, counters: Sequence[int] = (), *, variance: Tensor = VARIANCE, dtype: torch.dtype = torch.complex64
) -> ProbeSource:
    return ProbeSource(variance=variance, coils=3, seed=seed, counters=counters, dtype=dtype)


@settings(deadline=None, max_examples=25)
@given(seed=seeds, counters=st.lists(st.integers(0, 2**31), max_size=4), number=st.integers(0, 2**40))
def test_magnitude_is_exact_and_zero_where_nothing_was_sampled(seed: int, counters: list[int], number: int) -> None:
    probes = source(seed, counters, dtype=torch.complex128).block(number)
    assert probes.shape == (BLOCK_SIZE, 3, 3, 4)
    torch.testing.assert_close(
        probes.abs().square(), VARIANCE.double().expand(BLOCK_SIZE, 3, -1, -1), rtol=1e-6, atol=0
    )
    assert bool((probes[..., VARIANCE == 0] == 0).all())


@settings(deadline=None, max_examples=25)
@given(seed=seeds, counters=st.lists(st.integers(0, 2**31), max_size=4), number=st.integers(0, 2**40))
def test_block_is_a_function_of_seed_counters_and_number(seed: int, counters: list[int], number: int) -> None:
    first = source(seed, counters).block(number)
    assert torch.equal(first, source(seed, tuple(counters)).block(number))
    others = [
        source(seed ^ 1, counters).block(number),
        source(seed, [*counters, 0]).block(number),
        source(seed, counters).block(number + 1),
    ]
    if counters:
        others.append(source(seed, [counters[0] + 1, *counters[1:]]).block(number))
    for other in others:
        assert not torch.equal(first, other)


def test_order_of_counters_counts() -> None:
    assert not torch.equal(source(0, (1, 2)).block(0), source(0, (2, 1)).block(0))
    # neither can a counter pass for the seed or for the block
    assert not torch.equal(source(1, (2,)).block(3), source(1, ()).block(3))
    assert not torch.equal(source(1, (2,)).block(3), source(2, (1,)).block(3))
    assert not torch.equal(source(1, (2,)).block(3), source(1, (3,)).block(2))


def test_blocks_are_the_blocks_one_after_the_other() -> None:
    drawn = list(source(5).blocks(2, 5))
    assert len(drawn) == 3
    for number, block in zip(range(2, 5), drawn, strict=True):
        assert torch.equal(block, source(5).block(number))
    assert list(source(5).blocks(4, 4)) == []


def test_precisions_agree_and_the_global_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    single, double = source(3).block(1), source(3, dtype=torch.complex128).block(1)
    assert single.dtype == torch.complex64
    assert double.dtype == torch.complex128
    torch.testing.assert_close(single.to(torch.complex128), double, rtol=1e-5, atol=1e-6)
    assert torch.equal(before, torch.random.get_rng_state())


def test_first_draws_of_a_seed_are_what_they_always_were() -> None:
    # maps of a seed must not change from one version to the next
    probes = ProbeSource(variance=torch.full((1, 2), 2.0), coils=1, seed=7, counters=(1, 2)).block(3)
    turns = torch.angle(probes[:2].flatten()) / (2 * torch.pi) % 1
    expected = torch.tensor([0.593250, 0.113823, 0.802728, 0.715676])
    torch.testing.assert_close(turns, expected, rtol=0, atol=1e-5)


def test_covariance_is_the_diagonal_of_the_variances() -> None:
    blocks = 1000
    probes = torch.cat(list(source(1, dtype=torch.complex128).blocks(0, blocks))).flatten(1)
    variance = VARIANCE.double().expand(3, -1, -1).flatten()
    covariance = probes.mT @ probes.conj() / len(probes)
    pseudo = probes.mT @ probes / len(probes)
    scale = torch.outer(variance, variance).sqrt()
    # E|mean of 8000 unit phasors|² = 1/8000. |.| exceeds 5.5 of these with probability e^-30 an entry, 1e-10 in all
    limit = 5.5 / (BLOCK_SIZE * blocks) ** 0.5 * scale + 1e-12
    assert bool(((covariance - torch.diag(variance)).abs() <= limit + 1e-6 * torch.diag(variance)).all())
    assert bool((pseudo.abs() <= limit).all())


def test_first_moments_vanish_and_phases_fill_the_circle() -> None:
    probes = torch.cat(list(source(2, dtype=torch.complex128).blocks(0, 500)))[..., VARIANCE > 0]
    phasors = probes / probes.abs()
    count = phasors.numel()
    for power in (1, 2, 3, 4):
        # each mean of `count` phasors exceeds 5/√count with probability e^-25
        assert float(phasors.pow(power).mean().abs()) < 5 / count**0.5


def test_probes_pass_through_the_map_that_the_noise_passed() -> None:
    def crop(probes: Tensor) -> Tensor:
        return torch.fft.fft(probes, dim=-1)[..., 1:3]

    plain = source(4, (1,))
    through = ProbeSource(variance=VARIANCE, coils=3, seed=4, counters=(1,), through=crop)
    assert torch.equal(through.block(2), crop(plain.block(2)))
    assert through.block(2).shape == (BLOCK_SIZE, 3, 3, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_variance_may_be_of_either_precision(dtype: torch.dtype) -> None:
    probes = source(6, variance=VARIANCE.to(dtype)).block(0)
    torch.testing.assert_close(probes, source(6).block(0))
