"""The oracle of the tape: forward mode, one tangent at a time."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from voxelsigma.noise.linearize import Linearization, linearize

Function = Callable[[Tensor], Tensor]


def draw(*shape: int, seed: int = 1, dtype: torch.dtype = torch.complex128) -> Tensor:
    """Standard normal numbers of their own generator."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def forward_mode(function: Function, point: Tensor, tangent: Tensor) -> Tensor:
    """What torch says."""
    with warnings.catch_warnings():
        # torch's own, when forward mode is first used
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
        return torch.func.jvp(function, (point,), (tangent,))[1].detach()


def check(
    function: Function,
    point: Tensor,
    *,
    fallback: str | None = None,
    tolerance: float = 1e-10,
    calls: int = 1,
) -> Linearization:
    """A linearization is exact for every chunk size, needs no further calls, and takes the fast road.

    Parameters
    ----------
    function, point
        What to linearize, and where.
    fallback
        The operation that has no fast rule, None where all have one.
    calls
        Evaluations that it takes at most.
    """
    counted = 0

    def reconstruction(given: Tensor) -> Tensor:
        nonlocal counted
        counted += 1
        return function(given)

    before = point.clone()
    linearization = linearize(reconstruction, point)
    tangents = draw(5, *point.shape, seed=77, dtype=point.dtype)
    kept = tangents.clone()
    pushed = linearization.push(tangents)
    assert counted <= calls
    torch.testing.assert_close(tangents, kept, rtol=0, atol=0)
    torch.testing.assert_close(point, before, rtol=0, atol=0)
    with torch.no_grad():
        assert torch.equal(linearization.value, function(point))
    assert pushed.shape == (5, *linearization.value.shape)
    assert pushed.dtype == linearization.value.dtype
    scale = float(pushed.abs().max()) if pushed.numel() else 1.0
    for tangent, image in zip(tangents, pushed, strict=True):
        expected = forward_mode(function, point, tangent)
        torch.testing.assert_close(image, expected, rtol=tolerance, atol=tolerance * max(1.0, scale))
    for size in (1, 2):
        parts = torch.cat([linearization.push(part) for part in tangents.split(size)])
        torch.testing.assert_close(parts, pushed, rtol=1e-12, atol=1e-12 * max(1.0, scale))
    names = " ".join(linearization.fallbacks)
    assert fallback in names if fallback is not None else not linearization.fallbacks, names
    return linearization
