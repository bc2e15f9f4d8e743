"""The roads to a σ map, each from drawing its noise to its sums."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.networks import Case
from voxelsigma.noise.linearize import Linearization, linearize
from voxelsigma.noise.probes import BLOCK_SIZE, ProbeSource
from voxelsigma.noise.response import Response
from voxelsigma.noise.sketch import Covariate, Stopping, sketch
from voxelsigma.noise.voxels import phase_factor

TITLES: Mapping[str, str] = {
    "monte_carlo": "Monte Carlo trial",
    "monte_carlo_covariate": "Monte Carlo trial, covariate",
    "published": "published: one vmap(jvp)",
    "chunked": "chunked vmap(jvp)",
    "linearize_vmap": "torch.func.linearize + vmap",
    "ours": "ours, covariate",
    "ours_push": "ours, push alone",
}

TRIAL_SCALE = 0.05
"""α of Monte Carlo's noise: so small that its spread is the Jacobian's, and not also the network's curvature."""


@dataclass(frozen=True, slots=True)
class Spent:
    """Seconds of a run that are to be told apart: of the pushes alone, and of what a map needs once."""

    push: float = 0.0
    once: float = 0.0


Run = Callable[[int, int], Spent]
"""Make a map from a count of probes, so many at a time."""


@dataclass(frozen=True, kw_only=True)
class Road:
    """One way to a σ map.

    Parameters
    ----------
    prepare
        Makes it ready for an image: everything that is paid once, the reconstruction itself included.
    chunks
        Probes at a time worth trying; empty where all go at once, or the road chooses itself.
    """

    prepare: Callable[[], Run]
    chunks: tuple[int, ...] = ()


def roads(case: Case, covariate: Callable[[], Covariate] | None = None) -> dict[str, Road]:
    """All roads of a case, by their keys in `TITLES`.

    Parameters
    ----------
    case
        What is reconstructed.
    covariate
        Makes the control variate; None for the plane's own.
    """
    controlled = covariate or case.plane.covariate
    return {
        "monte_carlo": Road(prepare=lambda: _monte_carlo(case)),
        "monte_carlo_covariate": Road(prepare=lambda: _monte_carlo_covariate(case, controlled())),
        "published": Road(prepare=lambda: _pushed(case, _vmapped_jvp(case))),
        "chunked": Road(prepare=lambda: _pushed(case, _vmapped_jvp(case)), chunks=(4, 1, 8)),
        "linearize_vmap": Road(prepare=lambda: _linearized(case), chunks=(4, 1)),
        "ours": Road(prepare=lambda: _ours(case, controlled())),
    }


def trials(case: Case, count: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Reconstructions `(y, x)` of the data with noise added at `TRIAL_SCALE`, and the noise `(coils, k1, k0)`."""
    deviation = (case.plane.variance / 2).sqrt()
    for _ in range(count):
        parts = torch.randn((2, *case.kspace.shape), generator=generator)
        noise = torch.complex(parts[0], parts[1]) * deviation
        yield case.reconstruction(case.kspace + TRIAL_SCALE * noise), noise


def _monte_carlo(case: Case) -> Run:
    value = case.reconstruction(case.kspace)
    direction = phase_factor(value).to(torch.complex64)
    generator = torch.Generator().manual_seed(1)

    def run(count: int, chunk: int) -> Spent:
        total = torch.zeros(value.shape, dtype=torch.float64)
        square = torch.zeros_like(total)
        for image, _ in trials(case, count, generator):
            along = (direction.conj() * (image - value)).real / TRIAL_SCALE
            total += along
            square += along.square()
        (square / (count - 1) - total.square() / count / (count - 1)).sqrt()
        return Spent()

    return run


def _monte_carlo_covariate(case: Case, covariate: Covariate) -> Run:
    value = case.reconstruction(case.kspace)

    def push(noise: Tensor) -> Tensor:
        moved = [case.reconstruction(case.kspace + TRIAL_SCALE * one) - value for one in noise]
        return torch.stack(moved) / TRIAL_SCALE

    return lambda count, chunk: _sketched(Linearization(value, push), case, count, covariate)


def _vmapped_jvp(case: Case) -> Callable[[Tensor], Tensor]:
    def one(tangent: Tensor) -> Tensor:
        return torch.func.jvp(case.reconstruction, (case.kspace,), (tangent,))[1]

    return torch.func.vmap(one)


def _linearized(case: Case) -> Run:
    value, traced = torch.func.linearize(case.reconstruction, case.kspace)
    return _pushed(case, torch.func.vmap(traced), value)


def _pushed(case: Case, push: Callable[[Tensor], Tensor], value: Tensor | None = None) -> Run:
    """The plain mean of squares of the in-phase component, all probes at once or in chunks."""
    direction = phase_factor(case.reconstruction(case.kspace) if value is None else value).to(torch.complex64)

    def run(count: int, chunk: int) -> Spent:
        total = torch.zeros(direction.shape, dtype=torch.float64)
        for batch in _batches(case.source(1), count, chunk or count):
            total += (direction.conj() * push(batch)).real.square().sum(dim=0)
        (total / count).sqrt()
        return Spent()

    return run


def _ours(case: Case, covariate: Covariate) -> Run:
    linearization = linearize(case.reconstruction, case.kspace)
    return lambda count, chunk: _sketched(linearization, case, count, covariate)


def _sketched(linearization: Linearization, case: Case, count: int, covariate: Covariate) -> Spent:
    """A map by `sketch`, which learns the covariate's filter once, behind the covariate's first push."""
    pushing, first, learned = 0.0, 0.0, 0.0

    def push(tangents: Tensor) -> Tensor:
        nonlocal pushing
        start = time.perf_counter()
        pushed = linearization.push(tangents)
        pushing += time.perf_counter() - start
        return pushed

    def zero_filled(tangents: Tensor) -> Tensor:
        nonlocal first
        images = covariate.push(tangents)
        first = first or time.perf_counter()
        return images

    def variance(response: Response) -> Tensor:
        nonlocal learned
        assert covariate.filtered_variance is not None
        found = covariate.filtered_variance(response)
        learned = time.perf_counter()
        return found

    sketch(
        replace(linearization, push=push),
        case.source(1),
        Stopping(probes=count),
        covariate=replace(covariate, push=zero_filled, filtered_variance=covariate.filtered_variance and variance),
    ).map()
    return Spent(push=pushing, once=learned - first if learned else 0.0)


def _batches(source: ProbeSource, count: int, chunk: int) -> Iterator[Tensor]:
    """Batches of probes, `count` in all."""
    at_once = max(1, chunk // BLOCK_SIZE)
    done, block = 0, 0
    while done < count:
        drawn = torch.cat(list(source.blocks(block, block + at_once)))[: count - done]
        yield from drawn.split(chunk)
        done += len(drawn)
        block += at_once
