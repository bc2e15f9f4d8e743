"""What a tape keeps, and what it lets go."""

import gc
import weakref

import torch
from tests.noise.tape_checks import check, draw
from torch import Tensor

from voxelsigma.noise.linearize import linearize
from voxelsigma.noise.tape import make_tape

POINT = draw(3, 6, 4)


def names(function: object) -> list[str]:
    tape, _ = make_tape(function, POINT)  # type: ignore[arg-type]
    assert tape is not None
    return [step.name for step in tape.steps]


def test_what_the_result_does_not_need_is_dropped() -> None:
    def function(y: Tensor) -> Tensor:
        torch.fft.fft2(y).abs().sum()
        first, _, _ = y.unbind(0)
        return first.sin()

    assert names(function) == ["aten.unbind.int", "aten.sin.default"]


def test_values_that_no_derivative_needs_are_given_back() -> None:
    seen: list[weakref.ref[Tensor]] = []

    def function(y: Tensor) -> Tensor:
        curved, unused, straight = y.sin(), y.exp(), torch.fft.fft2(y)
        seen.extend(weakref.ref(value) for value in (curved, unused, straight))
        return (curved + 1) * 2 + straight

    found = linearize(function, POINT)
    gc.collect()
    assert [reference() for reference in seen] == [None, None, None]
    assert found.value.shape == POINT.shape


def test_a_long_chain_needs_no_more_than_a_short_one() -> None:
    def chain(length: int) -> int | None:
        def function(y: Tensor) -> Tensor:
            for _ in range(length):
                y = torch.fft.fft2(POINT * y, norm="ortho").conj() + 1
            return y

        return linearize(function, POINT).probe_bytes

    assert chain(20) == chain(3)


def test_tangents_that_others_still_need_are_not_overwritten() -> None:
    def function(y: Tensor) -> Tensor:
        x = y * 2
        view = x.transpose(1, 2)
        scaled = x * 3
        again = x * scaled.abs()
        return (scaled + again).transpose(1, 2) + view * 5 + x.transpose(1, 2)

    check(function, POINT)


def test_a_linearization_inside_a_reconstruction() -> None:
    def function(y: Tensor) -> Tensor:
        return y * linearize(lambda z: z.abs().square(), POINT).value

    pushed = linearize(function, POINT).push(POINT.unsqueeze(0))
    torch.testing.assert_close(pushed[0], POINT * POINT.abs().square(), rtol=1e-12, atol=1e-12)
