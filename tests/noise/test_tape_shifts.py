"""Shifts that a tape does not need are not on it, and nothing changes by that."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from voxelsigma.models.encoding import SenseEncoding
from voxelsigma.models.fourier import fft_centred, ifft_centred
from voxelsigma.models.unrolled import Unrolled
from voxelsigma.noise.tape import Tape, make_tape

sizes = st.integers(1, 7)


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.complex128, generator=torch.Generator().manual_seed(seed))


def tape_of(function: Callable[[Tensor], Tensor], point: Tensor) -> Tape:
    tape, record = make_tape(function, point)
    assert tape is not None, record.failure
    return tape


def check(function: Callable[[Tensor], Tensor], point: Tensor) -> Tape:
    tape = tape_of(function, point)
    tangents = noise(3, *point.shape, seed=5)
    expected = torch.stack([torch.func.jvp(function, (point,), (one,))[1] for one in tangents])
    torch.testing.assert_close(tape.push(tangents.clone()), expected, rtol=1e-12, atol=1e-12)
    # nothing was written over
    torch.testing.assert_close(tape.push(tangents), expected, rtol=1e-12, atol=1e-12)
    return tape


def rolled(tape: Tape) -> list[str]:
    return [step.name for step in tape.steps if "roll" in step.name]


@settings(deadline=None, max_examples=40)
@given(rows=sizes, columns=sizes, coils=st.integers(1, 3), seed=st.integers(0, 1000))
def test_data_consistency_is_the_same_without_shifts(rows: int, columns: int, coils: int, seed: int) -> None:
    maps = noise(coils, rows, columns, seed=seed)
    mask = (torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5).double()
    encoding = SenseEncoding(maps, mask)

    def function(kspace: Tensor) -> Tensor:
        image = encoding.adjoint(kspace)
        image = image / (1 + image.abs().square().mean())
        return image - encoding.adjoint(encoding.forward(image) - kspace) + 0.5 * torch.fft.fftshift(image)

    check(function, noise(coils, rows, columns, seed=seed + 1))


@pytest.mark.parametrize("size", [(8, 8), (7, 9)])
def test_shifts_of_coil_images_leave_the_tape(size: tuple[int, int]) -> None:
    maps, mask = noise(4, *size, seed=0), (torch.rand(size) < 0.6).double()
    network = Unrolled(steps=3, blocks=1, channels=4).double()
    tape = check(lambda kspace: network(kspace, maps, mask), noise(4, *size, seed=1))
    # one of k-space before the first step; two of single images a step
    assert len(rolled(tape)) <= 2 * 3 + 2
    # without the pass there would be four for each pair of transforms, two for the first
    assert len(rolled(tape)) < 4 * 3 + 2


def test_a_shift_and_its_inverse_vanish() -> None:
    factor = noise(5, 6, seed=3)

    def function(kspace: Tensor) -> Tensor:
        return torch.fft.ifftshift(factor * torch.fft.fftshift(kspace, dim=(-2, -1)), dim=(-2, -1))

    assert rolled(check(function, noise(2, 5, 6, seed=4))) == []


def test_products_with_constants_are_one_product() -> None:
    one, two, three = noise(5, 6, seed=3), noise(5, 6, seed=4), noise(2, 1, 1, seed=6)
    tape = check(lambda kspace: two * (one * kspace), noise(2, 5, 6, seed=4))
    assert len(tape.steps) == 1
    # not where the joint constant would be larger than both
    assert len(check(lambda kspace: three * (one * kspace), noise(2, 5, 6, seed=4)).steps) == 2


def cases() -> dict[str, Callable[[Tensor], Tensor]]:
    factor = noise(5, 6, seed=8)
    small = noise(1, 6, seed=9)
    return {
        "the result itself is shifted": lambda y: torch.roll(factor * y, (1, 2), (-2, -1)),
        "the shifted value is used twice": lambda y: torch.roll(y, 1, -1) * factor + torch.roll(y, 1, -1).abs() * 1j,
        "the unshifted value is used too": lambda y: (s := small * y) + torch.roll(s, 2, -1),
        "a shift along coils": lambda y: ifft_centred(torch.roll(fft_centred(y), 1, 0)),
        "sums over a shifted axis": lambda y: torch.roll(small * y, 1, -1).sum(dim=-1),
        "sums that bring axes nearer": lambda y: torch.roll(factor * y, 1, 0).sum(dim=-1),
        "sums over coils": lambda y: torch.roll(factor * y, (1, 3), (-2, -1)).sum(dim=0).abs(),
        "sums that keep axes": lambda y: torch.roll(factor * y, (1, 3), (-2, -1)).mean(dim=0, keepdim=True).abs(),
        "shifts around products of two values": lambda y: torch.roll(y, 1, -1) * torch.roll(y, 2, -1),
        "a constant that is broadcast": lambda y: torch.roll(small * torch.roll(y, 1, -2), 2, -1),
        "a value that is broadcast": lambda y: torch.fft.fft(torch.roll(factor * y[:1, :1].sum(dim=0), (1, 2), (0, 1))),
        "axes that only the product has": lambda y: torch.fft.fft(torch.roll(factor * y[0, 0], (1, 2), (-2, -1))),
        "all axes as one": lambda y: torch.roll(factor * y, 7),
        "a shift by nothing": lambda y: torch.roll(factor * y, 6, -1),
        "written into": lambda y: torch.roll(y.clone().mul_(factor), 1, -1).mul_(small),
    }


@pytest.mark.parametrize("name", cases())
def test_every_use_of_shifts_is_the_same(name: str) -> None:
    check(cases()[name], noise(2, 5, 6, seed=10))
