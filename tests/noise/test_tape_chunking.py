"""Chunk sizes from memory."""

import pytest
import torch
from tests.noise.tape_checks import draw

from voxelsigma.noise.chunking import default_chunk
from voxelsigma.noise.linearize import Linearization, linear, linearize


@pytest.mark.parametrize(
    ("needed", "free", "expected"), [(100, 1000, 5), (100, 0, 1), (100, 10**6, 8), (1000, 1000, 1), (100, 450, 2)]
)
def test_half_of_the_free_memory_at_most(needed: int, free: int, expected: int) -> None:
    assert default_chunk(needed, free_memory=free) == expected


def test_a_gpu_is_filled() -> None:
    assert default_chunk(100, free_memory=10**6, device=torch.device("cuda")) == 64


def test_the_tape_knows_what_a_tangent_needs() -> None:
    point = draw(3, 16, 16)
    small = linearize(lambda y: torch.fft.fft2(y).abs(), point).probe_bytes
    assert small is not None
    # complex in and its transform beside it
    size = 3 * 16 * 16 * 16
    assert 2 * size <= small <= 4 * size
    large = linearize(lambda y: torch.fft.fft2(y.repeat(10, 1, 1)).abs(), point)
    assert large.probe_bytes is not None
    assert large.probe_bytes > 5 * small
    assert default_chunk(large, free_memory=6 * large.probe_bytes) == 3


def test_an_unknown_size_is_taken_as_large() -> None:
    found: Linearization = linear(lambda y: y, draw(3, 4, 4))
    assert found.probe_bytes is None
    assert default_chunk(found, free_memory=2**30) == 2
    assert 1 <= default_chunk(found) <= 8


@pytest.mark.parametrize(("needed", "free", "message"), [(0, 5, "needs 0 bytes"), (5, -1, "free_memory is -1")])
def test_bad_sizes(needed: int, free: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        default_chunk(needed, free_memory=free)
