"""Coil sensitivities from the reference lines."""

import logging
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from voxelsigma.gadgets.context import Context
from voxelsigma.gadgets.items import KSpace, Sensitivities, Stream
from voxelsigma.gadgets.planes import decoupled, pick_device, sample_weights
from voxelsigma.gadgets.properties import choice, integer, number, sidecars
from voxelsigma.gadgets.recon_data import refuse_collected
from voxelsigma.models.espirit import EspiritSettings, espirit, principal_coil
from voxelsigma.models.grid import acquired_window, symmetric_window
from voxelsigma.models.walsh import walsh

logger = logging.getLogger("voxelsigma.coil_maps")

Mask = npt.NDArray[np.bool_]

SMALLEST_REGION = 8
"""Lines around the centre of k-space without which no sensitivities are estimated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CoilMapsProperties:
    """Properties of `coil_maps`."""

    method: str = choice("espirit", "espirit", "walsh")
    kernel: int = integer(6, 2, 16)
    calibration: int = integer(24, 8, 256)
    threshold: float = number(0.03, 0.0, 0.5)
    crop: float = number(0.0, 0.0, 1.0)
    smoothing: int = integer(7, 1, 63)
    device: str = choice("auto", "auto", "cpu", "cuda")
    forward: tuple[str, ...] = sidecars()


@dataclass(frozen=True, slots=True)
class CoilMaps:
    """Estimate the sensitivities of every k-space that comes along, from its reference lines."""

    properties: CoilMapsProperties
    context: Context

    def __call__(self, items: Stream) -> Stream:
        """`KSpace` in; `Sensitivities`, then the k-space where it is to be forwarded, out."""
        device = pick_device(self.properties.device)
        for item in items:
            if not isinstance(item, KSpace):
                refuse_collected("coil_maps", item)
                yield item
                continue
            with self.context.turns():
                found = self.estimate(item, device)
            yield found
            if "kspace" in self.properties.forward:
                yield item

    def estimate(self, kspace: KSpace, device: torch.device) -> Sensitivities:
        """Sensitivities of one k-space, on the grid that its lines span."""
        region = calibration_region(kspace)
        if kspace.volumetric:
            # (coils, k2, k1, x) -> (x, coils, k2, k1)
            hybrid = decoupled(kspace, region).to(device).movedim(-1, 0)
            # one phase reference for all planes, so that the maps do not jump between them
            virtual = principal_coil(hybrid)
            planes = [self._maps(plane, self._size(kspace, (0, 1)), virtual) for plane in hybrid]
            maps = torch.stack(planes, dim=-1)
        else:
            plane = torch.from_numpy(region[:, 0]).to(device)
            maps = self._maps(plane, self._size(kspace, (1, 2)), None).unsqueeze(1)
        chosen = self.properties
        detail = f"kernel {chosen.kernel}, crop {chosen.crop:g}" if chosen.method == "espirit" else "adaptive"
        return Sensitivities(
            maps=maps.cpu().numpy().astype(np.complex64, copy=False),
            key=kspace.key,
            method=f"{chosen.method} ({detail})",
        )

    def _maps(self, reference: Tensor, size: tuple[int, int], virtual: Tensor | None) -> Tensor:
        chosen = self.properties
        if chosen.method == "walsh":
            return walsh(reference, size, smoothing=chosen.smoothing | 1, phase=virtual)
        settings = EspiritSettings(
            kernel=chosen.kernel,
            calibration=chosen.calibration,
            threshold=chosen.threshold,
            crop=chosen.crop,
        )
        return espirit(reference, size, settings, phase=virtual)

    @staticmethod
    def _size(kspace: KSpace, axes: tuple[int, int]) -> tuple[int, int]:
        """Matrix of the grid around the origin that the acquired lines span."""
        weights = torch.from_numpy(sample_weights(kspace))
        rows, columns = (
            symmetric_window(
                acquired_window((weights > 0).amax(dim=tuple({0, 1, 2} - {axis})), kspace.limits[axis])
            ).size
            for axis in axes
        )
        return rows, columns


def calibration_region(kspace: KSpace) -> npt.NDArray[np.complex64]:
    """The fully sampled block of k-space around the origin: reference lines, or else the imaging lines' own centre.

    Returns
    -------
        Shape `(coils, r2, r1, k0)`, the origin at n//2 of each axis.

    Raises
    ------
    ValueError
        If there are no reference lines and the centre of k-space is not fully sampled.
    """
    widths = []
    for lines, data in (
        (kspace.reference_lines, kspace.reference),
        (kspace.headers["number_of_samples"] > 0, kspace.data),
    ):
        rows, columns = _central_block(lines)
        widths.append(
            min(part.stop - part.start for part, size in zip((rows, columns), lines.shape, strict=True) if size > 1)
        )
        if data is not None and widths[-1] >= SMALLEST_REGION:
            return data[:, rows, columns]
    found = f"only {widths[0]} contiguous reference lines" if widths[0] else "no reference lines"
    raise ValueError(
        f"coil_maps: {kspace.key} has {found}, and only {widths[1]} fully sampled imaging lines around the centre of "
        f"k-space; at least {SMALLEST_REGION} are needed for the coil sensitivities"
    )


def _central_block(sampled: Mask) -> tuple[slice, slice]:
    """The largest full block, symmetric around the origin (index n//2 of both axes), of a mask `(k2, k1)`.

    The longer side shrinks to what both axes can hold; empty slices if the origin is not sampled.
    """
    centre = (sampled.shape[0] // 2, sampled.shape[1] // 2)
    half = [0 if size == 1 else 1 for size in sampled.shape]
    if not sampled[centre]:
        return slice(0, 0), slice(0, 0)
    best = (slice(centre[0], centre[0] + 1), slice(centre[1], centre[1] + 1))
    growing = [size > 1 for size in sampled.shape]
    while any(growing):
        for axis in (0, 1):
            if not growing[axis]:
                continue
            trial = list(best)
            start, stop = centre[axis] - half[axis], centre[axis] + half[axis]
            trial[axis] = slice(start, stop)
            if start < 0 or stop > sampled.shape[axis] or not sampled[trial[0], trial[1]].all():
                growing[axis] = False
                continue
            best = (trial[0], trial[1])
            half[axis] += 1
    return best
