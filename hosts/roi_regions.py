"""Noise of regions, from kept probes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from voxelsigma.formats.probe_file import KeptVolume
from voxelsigma.hosts.roi import Stack
from voxelsigma.noise.functionals import (
    FunctionalNoise,
    Functionals,
    effective_voxels,
    functional_noise,
    independent_sum,
    voxel_sigma,
)
from voxelsigma.noise.sigma import root_bias
from voxelsigma.noise.voxels import phase_factor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Regions:
    """Functionals of a stack: means of regions, or weighted sums.

    Parameters
    ----------
    names, quantities
        Of each; `mean` or `sum`.
    rows
        Which region an entry belongs to, shape `(entries,)`.
    places
        Its voxel, shape `(entries, 3)` as z, y, x.
    weights
        Its weight, shape `(entries,)`.
    """

    names: tuple[str, ...]
    quantities: tuple[str, ...]
    rows: npt.NDArray[np.int64]
    places: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float64]

    @classmethod
    def of_labels(cls, name: str, labels: npt.NDArray[np.int64]) -> "Regions":
        """Means over the voxels of each label above 0 of an array `(z, y, x)`."""
        places = np.argwhere(labels > 0)
        found, rows, counts = np.unique(labels[labels > 0], return_inverse=True, return_counts=True)
        # a mask has one region, named as it is
        single = len(found) == 1 and found[0] == 1
        names = (name,) if single else tuple(f"{name}:{label}" for label in found)
        return cls(names=names, quantities=("mean",) * len(found), rows=rows, places=places, weights=1.0 / counts[rows])

    @classmethod
    def of_weights(cls, name: str, weights: npt.NDArray[np.float64]) -> "Regions":
        """One weighted sum over an array `(z, y, x)`."""
        places = np.argwhere(weights)
        rows = np.zeros(len(places), dtype=np.int64)
        return cls(names=(name,), quantities=("sum",), rows=rows, places=places, weights=weights[weights != 0])

    @classmethod
    def of_box(cls, name: str, box: tuple[slice, slice], shape: tuple[int, int, int]) -> "Regions":
        """The mean over a box `(y, x)`, in all slices."""
        labels = np.zeros(shape, dtype=np.int64)
        labels[:, box[0], box[1]] = 1
        return cls.of_labels(name, labels)

    @classmethod
    def joined(cls, parts: "Sequence[Regions]") -> "Regions":
        """Several, one after the other; their voxels may overlap."""
        firsts = np.cumsum([0, *(len(part.names) for part in parts)])
        return cls(
            names=tuple(name for part in parts for name in part.names),
            quantities=tuple(quantity for part in parts for quantity in part.quantities),
            rows=np.concatenate([part.rows + first for part, first in zip(parts, firsts, strict=False)]),
            places=np.concatenate([part.places for part in parts]),
            weights=np.concatenate([part.weights for part in parts]),
        )

    def select(self, chosen: npt.NDArray[np.intp]) -> "Regions":
        """Some of the entries, of the same regions."""
        return Regions(
            names=self.names,
            quantities=self.quantities,
            rows=self.rows[chosen],
            places=self.places[chosen],
            weights=self.weights[chosen],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionNoise:
    """What is known about a region.

    Parameters
    ----------
    name, quantity
        Its name; `mean` or `sum`: what `value` and `sigma` are of.
    voxels
        Voxels with a weight.
    value
        Mean, or weighted sum, of the image's magnitude.
    sigma, lower, upper
        Its noise standard deviation, and the 95 % interval of that (the sketch's part).
    snr
        `value / sigma`; None without noise.
    independent_sigma
        What `sigma` would be if the noise of the voxels were independent.
    ratio
        `sigma / independent_sigma`; None without noise.
    effective_voxels
        Independent voxels whose mean would be as noisy; None for sums, and without noise.
    median_sigma
        Median over its voxels' own σ.
    probes
        Fewest probes of a plane.
    """

    name: str
    quantity: str
    voxels: int
    value: float
    sigma: float
    lower: float
    upper: float
    snr: float | None
    independent_sigma: float
    ratio: float | None
    effective_voxels: float | None
    median_sigma: float
    probes: int


@dataclass(frozen=True, slots=True)
class _Plane:
    """What the entries of a plane have found; shape `(entries,)` each."""

    rows: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float64]
    magnitude: npt.NDArray[np.float64]
    variance: npt.NDArray[np.float64]
    sigma: npt.NDArray[np.float64]


def region_noise(stack: Stack, regions: Regions) -> tuple[list[RegionNoise], FunctionalNoise]:
    """Noise of regions, and their covariance.

    Planes of probes are independent of each other, as the noise of slices is: their variances add, whatever number of
    probes each had. Only the tiles that a region touches are read.
    """
    noises, planes = [], []
    for volume, number, local in _by_plane(stack, regions):
        noise, plane = _plane_noise(volume, number, local)
        noises.append(noise)
        planes.append(plane)
    whole = _Plane(
        *(np.concatenate([getattr(plane, name) for plane in planes]) for name in _Plane.__dataclass_fields__)
    )
    noise = independent_sum(noises)
    return _summaries(regions, noise, whole), noise


def _by_plane(stack: Stack, regions: Regions) -> Iterator[tuple[KeptVolume, int, Regions]]:
    """Entries of each plane of probes that has any, their places counted in the volume."""
    for volume, inner, outer in stack.parts():
        inside = np.flatnonzero((regions.places[:, 0] >= outer.start) & (regions.places[:, 0] < outer.stop))
        if not len(inside):
            continue
        part = regions.select(inside)
        shifted = part.places + np.array([inner.start - outer.start, 0, 0])
        along = shifted[:, volume.plane_axis]
        order = np.argsort(along, kind="stable")
        numbers, starts = np.unique(along[order], return_index=True)
        for number, chosen in zip(numbers, np.split(order, starts[1:]), strict=True):
            found = part.select(chosen)
            yield (
                volume,
                int(number),
                Regions(
                    names=found.names,
                    quantities=found.quantities,
                    rows=found.rows,
                    places=shifted[chosen],
                    weights=found.weights,
                ),
            )


def _plane_noise(volume: KeptVolume, number: int, regions: Regions) -> tuple[FunctionalNoise, _Plane]:
    places = np.delete(regions.places, volume.plane_axis, axis=1)
    low, high = places.min(axis=0), places.max(axis=0) + 1
    box = (slice(int(low[0]), int(high[0])), slice(int(low[1]), int(high[1])))
    image = volume.plane_image(number)[box]
    direction = phase_factor(torch.from_numpy(image))
    flat = np.ravel_multi_index(tuple((places - low).T), image.shape)
    functionals = Functionals(
        rows=torch.from_numpy(regions.rows),
        places=torch.from_numpy(flat),
        weights=torch.from_numpy(regions.weights),
        count=len(regions.names),
    )
    linear = volume.complex_linear[number]
    noise = functional_noise(volume.batches(number, *box), functionals, direction, complex_linear=linear)
    voxels = voxel_sigma(volume.batches(number, *box), direction, complex_linear=linear)
    sigma = voxels.sigma.flatten()[functionals.places].numpy()
    # the variance is unbiased as it is: only its root was corrected
    bias = root_bias(voxels.degrees_of_freedom).flatten()[functionals.places].numpy()
    magnitude = np.abs(image).astype(np.float64).ravel()[flat]
    return noise, _Plane(regions.rows, regions.weights, magnitude, (sigma * bias) ** 2, sigma)


def _summaries(regions: Regions, noise: FunctionalNoise, found: _Plane) -> list[RegionNoise]:
    count = len(regions.names)
    voxels = np.bincount(found.rows, minlength=count)
    values = np.bincount(found.rows, found.weights * found.magnitude, minlength=count)
    independent = np.bincount(found.rows, found.weights**2 * found.variance, minlength=count)
    order = np.argsort(found.rows, kind="stable")
    medians = [float(np.median(part)) for part in np.split(found.sigma[order], np.cumsum(voxels)[:-1])]
    lower, upper = noise.sigma.interval()
    summaries = []
    for row in range(count):
        sigma, variance = float(noise.sigma.sigma[row]), float(noise.covariance[row, row])
        mean = regions.quantities[row] == "mean"
        summaries.append(
            RegionNoise(
                name=regions.names[row],
                quantity=regions.quantities[row],
                voxels=int(voxels[row]),
                value=float(values[row]),
                sigma=sigma,
                lower=float(lower[row]),
                upper=float(upper[row]),
                snr=float(values[row]) / sigma if sigma > 0 else None,
                independent_sigma=float(independent[row] ** 0.5),
                ratio=float((variance / independent[row]) ** 0.5) if independent[row] > 0 else None,
                effective_voxels=effective_voxels(int(voxels[row]), float(independent[row]), variance)
                if mean and variance > 0
                else None,
                median_sigma=medians[row],
                probes=noise.sigma.probes,
            )
        )
    return summaries
