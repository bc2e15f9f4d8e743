"""Replaying a tape with the convolutions of its networks in bfloat16.

Not by autocast: that casts at every operation of its own list, also inside data consistency, and turns back to
float32 at the first constant. Here a convolution takes and gives bfloat16, what stands between convolutions hands on
what it gets, and all else (transforms, complex numbers, sums, solvers) gets float32.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Lowering: TypeAlias = Literal["exact", "keeps", "lowers"]
"""What an operation does to the precision of tangents: `lowers` takes and gives bfloat16; `keeps` takes either; `exact`
takes none but float32."""


@dataclass(slots=True)
class Lowered:
    """What was lowered: the number of convolutions, counted at every push."""

    convolutions: int = 0


_state = threading.local()


@contextmanager
def lowered_convolutions() -> Iterator[Lowered]:
    """Let tapes of this thread push through convolutions in bfloat16; float32 tangents in, float32 tangents out."""
    before = _active()
    _state.lowered = seen = Lowered()
    try:
        yield seen
    finally:
        _state.lowered = before


def is_lowered(tangent: Tensor) -> bool:
    """Whether a tangent has less precision than its value on account of a lowered replay."""
    return tangent.dtype == torch.bfloat16 and _active() is not None


def prepared(tangents: Sequence[Tensor], lowering: Lowering) -> list[Tensor]:
    """Tangents in the precision in which an operation wants them; as they are where nothing is lowered."""
    seen = _active()
    if seen is None:
        return list(tangents)
    if lowering == "lowers":
        seen.convolutions += 1
        return [tangent.to(torch.bfloat16) for tangent in tangents]
    if lowering == "keeps" and all(tangent.dtype == torch.bfloat16 for tangent in tangents):
        return list(tangents)
    return [raised(tangent) for tangent in tangents]


def raised(tangent: Tensor) -> Tensor:
    """A tangent in float32 again, where a replay lowered it."""
    return tangent.float() if is_lowered(tangent) else tangent


def _active() -> Lowered | None:
    return getattr(_state, "lowered", None)
