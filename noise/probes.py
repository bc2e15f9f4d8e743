"""Random probes with the covariance of whitened k-space noise."""

import hashlib
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

BLOCK_SIZE = 8
"""Probes in a block: the unit of reproducibility and the grain at which a sketch may stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeSource:
    r"""Blocks of complex random-phase probes on the sampled positions of k-space.

    .. math:: v_k = \sqrt{\operatorname{Var}_k}\; e^{i\theta_k}, \qquad \theta_k \sim U[0, 2\pi)

    so that :math:`E[v v^H] = \operatorname{diag}(\operatorname{Var})` and :math:`E[v v^T] = 0`, with
    :math:`\operatorname{Var}_k = 2/n_k` for a whitened sample averaged from :math:`n_k` readouts and 0 where nothing
    was sampled. A block is a pure function of (seed, counters, block number): it is the same on every device,
    in every chunk size and in every process.

    Parameters
    ----------
    variance
        Complex noise variance of each sample, shape `(k1, k0)`, real, at least 0.
    coils
        Number of coils; each gets noise of its own.
    seed
        Seed of the whole scan.
    counters
        Every counter that names the image (slice, contrast, phase, repetition, set, plane, …).
    through
        A linear map that the noise passed before it became this k-space (a crop of an asymmetric
        readout): `variance` then belongs to its input. None for none.
    dtype
        complex64, or complex128 for tests.
    device
        Where the probes are wanted.
    """

    variance: Tensor
    coils: int
    seed: int
    counters: Sequence[int] = ()
    through: Callable[[Tensor], Tensor] | None = None
    dtype: torch.dtype = torch.complex64
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def block(self, number: int) -> Tensor:
        """Draw block `number`: `BLOCK_SIZE` probes, shape `(probes, coils, k1, k0)`."""
        generator = np.random.Generator(np.random.Philox(key=_key(self.seed, self.counters, number)))
        deviation = self.variance.detach().cpu().numpy() ** 0.5
        sampled = deviation > 0
        turns = generator.random((BLOCK_SIZE, self.coils, int(sampled.sum())), dtype=np.float32)
        angles = torch.from_numpy(turns).to(self.device, self.dtype.to_real()) * (2 * torch.pi)
        amplitude = torch.from_numpy(deviation[sampled]).to(self.device, self.dtype.to_real())
        probes = torch.zeros((BLOCK_SIZE, self.coils, *self.variance.shape), dtype=self.dtype, device=self.device)
        places = torch.from_numpy(sampled.ravel().nonzero()[0]).to(self.device)
        probes.flatten(2).index_copy_(2, places, torch.polar(amplitude.expand_as(angles), angles))
        return probes if self.through is None else self.through(probes)

    def blocks(self, start: int, stop: int) -> Iterator[Tensor]:
        """Blocks `start` to `stop` (exclusive), one after the other."""
        for number in range(start, stop):
            yield self.block(number)


def _key(seed: int, counters: Sequence[int], block: int) -> int:
    """A 128-bit key that no two (seed, counters, block) share but by accident."""
    packed = struct.pack(f"<{2 + len(counters)}q", seed, *counters, block)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=16).digest(), "little")
