"""Streams of simulated scans to train on: every example is drawn anew from a seed.

A slice of a head becomes an image of random contrast, texture, blur, size, place and phase; random coils with random
noise covariance see it; a random mask samples it; whitened noise is added. Nothing is stored.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from voxelsigma.formats.masks import Mask
from voxelsigma.models.encoding import SenseEncoding
from voxelsigma.training.example import Example, collate
from voxelsigma.training.head_slices import (
    dilated_support,
    draw_magnitude,
    draw_phase,
    object_voxels,
    scale_to_snr,
)
from voxelsigma.training.receive import draw_covariance, draw_sensitivities, whitened_coils
from voxelsigma.training.sampling import ExampleSettings, Sizes, draw_mask, draw_sizes, log_uniform
from voxelsigma.training.volumes import Volume

__all__ = [
    "Example",
    "ExampleSettings",
    "collate",
    "draw_example",
    "draw_sizes",
    "labelled_pools",
    "object_voxels",
    "scale_to_snr",
    "simulate",
    "stream",
]

Item = TypeVar("Item")


def draw_example(
    volumes: Sequence[Volume], settings: ExampleSettings, sizes: Sizes, rng: np.random.Generator
) -> Example:
    r"""Draw one example.

    .. math:: y = M (F S \rho + n), \qquad n \sim \mathcal{CN}(0, 2)

    S and :math:`\rho` are those after whitening: coils with correlated noise leave an image that is brighter where
    they see it with less noise (`whitened_coils`).

    Parameters
    ----------
    volumes
        Heads to cut slices from.
    settings
        Ranges to draw from.
    sizes
        Coils and matrix `(coils, y, x)`.
    rng
        Source of all randomness.

    Returns
    -------
        The example, without batch axis.

    Raises
    ------
    ValueError
        There are no volumes, or they are (nearly) empty.
    """
    coils, shape = sizes[0], sizes[1:]
    magnitude = draw_magnitude(volumes, shape, settings.intensity_share, rng)
    sensitivities = draw_sensitivities(coils, shape, rng)
    if settings.correlation > 0:
        covariance = draw_covariance(coils, settings.correlation, rng)
        sensitivities, brightness = whitened_coils(sensitivities, covariance)
        magnitude = magnitude * brightness
    if rng.random() < settings.support_share:
        sensitivities = sensitivities * dilated_support(magnitude, int(rng.integers(2, 7)))
    target = scale_to_snr(magnitude, log_uniform(settings.snr, rng)) * draw_phase(shape, rng)
    mask = draw_mask(shape, settings, rng)
    noise = rng.standard_normal((*sensitivities.shape, 2), dtype=np.float32)
    return simulate(target, sensitivities, mask, noise)


def stream(
    volumes: Sequence[Volume],
    settings: ExampleSettings,
    *,
    batch: int,
    seed: int,
    start: int = 0,
    labelled: Collection[str] | None = None,
) -> Iterator[Example]:
    """Yield batches without end; batch number i depends on the seed and i alone.

    The examples of a batch share their matrix and their number of coils.

    Parameters
    ----------
    volumes
        Heads to cut slices from.
    settings
        Ranges to draw from.
    batch
        Examples per batch.
    seed
        Seed of all randomness.
    start
        Number of the first batch: a training that stopped after n batches goes on with `start=n`.
    labelled
        Names of the volumes that have references. Even batches are then of these, odd ones of the others and without
        target; with no names every batch is without target; by default, or if all are named, none is.

    Raises
    ------
    ValueError
        `labelled` names a volume that is not there, or `volumes` is empty or holds (nearly) empty heads.
    """
    pools = labelled_pools(volumes, [volume.name for volume in volumes], labelled)
    # not a generator function itself: a wrong name is refused at the call
    return _batches(pools, settings, batch, seed, start)


def _batches(
    pools: Sequence[tuple[Sequence[Volume], bool]], settings: ExampleSettings, batch: int, seed: int, start: int
) -> Iterator[Example]:
    for number in count(start):
        rng = np.random.default_rng([seed, number])
        sizes = draw_sizes(settings, rng)
        volumes, has_target = pools[number % len(pools)]
        drawn = collate([draw_example(volumes, settings, sizes, rng) for _ in range(batch)])
        yield drawn if has_target else replace(drawn, target=None)


def labelled_pools(
    items: Sequence[Item], names: Sequence[str], labelled: Collection[str] | None
) -> tuple[tuple[Sequence[Item], bool], ...]:
    """What successive batches are drawn from in turn, and whether it has references.

    Parameters
    ----------
    items
        Volumes or files.
    names
        Their names.
    labelled
        Names of those with references; None for all.

    Raises
    ------
    ValueError
        A name in `labelled` is not in `names`.
    """
    if labelled is None:
        return ((items, True),)
    unknown = sorted(set(labelled) - set(names))
    if unknown:
        raise ValueError(
            f"examples: labelled names {', '.join(unknown)}, which {'is' if len(unknown) == 1 else 'are'} not there; "
            f"there are {', '.join(sorted(names))}"
        )
    known = [item for item, name in zip(items, names, strict=True) if name in labelled]
    others = [item for item, name in zip(items, names, strict=True) if name not in labelled]
    return tuple((pool, has_target) for pool, has_target in ((known, True), (others, False)) if pool)


def simulate(
    target: NDArray[np.complex64],
    sensitivities: NDArray[np.complex64],
    mask: Mask,
    noise: NDArray[np.float32],
) -> Example:
    """Encode an image `(y, x)` and add noise `(coils, k1, k0, 2)` of variance 1 per real component."""
    image = torch.from_numpy(target.astype(np.complex64))
    maps = torch.from_numpy(sensitivities)
    sampled = torch.from_numpy(mask[None].astype(np.float32))
    kspace = SenseEncoding(maps, sampled).forward(image)
    kspace = kspace + sampled * torch.view_as_complex(torch.from_numpy(noise))
    return Example(kspace=kspace, sensitivities=maps, mask=sampled, target=image)
