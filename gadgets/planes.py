"""From k-space items to planes on the device, and back to volumes."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from voxelsigma.gadgets.items import KSpace, Sensitivities
from voxelsigma.gadgets.placement import ReadoutGeometry
from voxelsigma.models.fourier import fft_centred, ifft_centred
from voxelsigma.models.grid import Window, kspace_matrix
from voxelsigma.models.problem import PlaneProblem
from voxelsigma.noise.probes import ProbeSource

NEGLIGIBLE_CORRELATION: Final = 1e-3
"""Between planes of a volume, below which their noise is called independent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plane:
    """One plane to reconstruct.

    Parameters
    ----------
    number
        Its index: 0 for a slice, the readout position for a volume.
    kspace
        Shape `(coils, k1, k0)`, or `(coils, k2, k1)` of a volume.
    problem
        Everything else about it.
    item
        The k-space it is of.
    readout_gain
        Standard deviation of white unit noise behind the decoupling: below 1 where the image is coarser than the
        readout.
    """

    number: int
    kspace: Tensor
    problem: PlaneProblem
    item: KSpace
    readout_gain: float = 1.0

    def probes(self, seed: int) -> ProbeSource:
        """Probes with the noise of this plane."""
        counters = (*self.item.key.counters(), self.number)
        coils, device = len(self.kspace), self.kspace.device
        readout = self.item.readout
        if self.item.volumetric or readout is None:
            return ProbeSource(variance=self.problem.variance, coils=coils, seed=seed, counters=counters, device=device)
        size = self.kspace.shape[-1]
        lines = torch.from_numpy(_line_variance(self.item)[0])
        variance = torch.zeros((len(lines), readout.size))
        variance[:, readout.start : readout.stop] = lines.unsqueeze(1)
        return ProbeSource(
            variance=variance,
            coils=coils,
            seed=seed,
            counters=counters,
            through=lambda probes: _remove_oversampling(probes, size),
            device=device,
        )


def pick_device(name: str) -> torch.device:
    """The device of a property: `auto` is a GPU where there is one.

    Raises
    ------
    ValueError
        If a GPU is asked for and there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("property 'device' is 'cuda', but torch sees no GPU; 'auto' or 'cpu' would do")
    return torch.device(name)


def planes_of(kspace: KSpace, sensitivities: Sensitivities, device: torch.device) -> Iterator[Plane]:
    """The planes of a slice (one) or of a volume (one a readout position of the wanted image).

    A volume is decoupled by the inverse Fourier transform along its fully sampled readout, evaluated where the wanted
    image has its voxels: white noise stays white within every plane.
    """
    maps = torch.from_numpy(sensitivities.maps).to(device)
    if not kspace.volumetric:
        yield Plane(
            number=0,
            kspace=torch.from_numpy(kspace.data[:, 0]).to(device),
            problem=PlaneProblem(
                sensitivities=maps[:, 0],
                variance=torch.from_numpy(kspace.variance[0]).to(device),
                weights=torch.from_numpy(sample_weights(kspace)[0]).to(device),
                limits=kspace.limits[1:],
                size=kspace.recon_matrix[1:],
                field_of_view=_fov_parts(kspace)[1:],
            ),
            item=kspace,
        )
        return
    hybrid = decoupled(kspace, kspace.data)
    # noise along the readout is independent (or, of an asymmetric echo, evenly spread over the planes)
    energy = _decoupling(kspace)[0].abs().square().float()
    variance = (torch.from_numpy(kspace.variance) @ energy).to(device)
    weights = torch.from_numpy(sample_weights(kspace).max(axis=2)).to(device)
    gain = float((variance * weights / 2)[weights > 0].mean().sqrt())
    for number in range(hybrid.shape[-1]):
        yield Plane(
            number=number,
            kspace=hybrid[..., number].to(device),
            problem=PlaneProblem(
                sensitivities=maps[..., number],
                variance=variance,
                weights=weights,
                limits=kspace.limits[:2],
                size=kspace.recon_matrix[:2],
                field_of_view=_fov_parts(kspace)[:2],
            ),
            item=kspace,
            readout_gain=gain,
        )


def sample_weights(kspace: KSpace) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
    """Readouts averaged into each sample, shape `(k2, k1, k0)`; 0 where nothing was sampled.

    What little of an asymmetric echo leaks beyond its own samples, when the readout is cropped, does not count.
    """
    line = _line_variance(kspace)[..., None]
    first, last = kspace.limits[2]
    position = np.arange(kspace.variance.shape[2])
    inside = (position >= first) & (position <= last)
    found = np.where(line > 0, 2 / np.where(line > 0, line, 1), 0) * inside
    return found.astype(np.float32)


def decoupled(kspace: KSpace, data: "np.ndarray[tuple[int, ...], np.dtype[np.complex64]]") -> Tensor:
    """Inverse Fourier transform along the readout, `(coils, k2, k1, k0)` to `(coils, k2, k1, x)`."""
    return torch.from_numpy(data) @ _decoupling(kspace).to(torch.complex64).mT


def _decoupling(kspace: KSpace) -> Tensor:
    """Inverse Fourier transform along the readout at the wanted positions, shape `(x, k0)`.

    Scaled as if the acquired part of an asymmetric echo were the whole readout, like an acquired window of a slice.
    """
    length = kspace.data.shape[-1]
    first, last = kspace.limits[2]
    matrix = kspace_matrix(Window(0, length, length), kspace.recon_matrix[2], _fov_parts(kspace)[2])
    return matrix * (length / (last - first + 1)) ** 0.5


def assemble(kspace: KSpace, planes: list[Tensor]) -> Tensor:
    """Planes `(y, x)` of a slice to `(1, y, x)`; planes `(z, y)` of a volume to `(z, y, x)`."""
    return torch.stack(planes, dim=-1) if kspace.volumetric else planes[0].unsqueeze(0)


def independent_planes(kspace: KSpace) -> bool:
    """Whether the noise of the planes of a slice or volume is independent from plane to plane."""
    if not kspace.volumetric:
        return True
    first, last = kspace.limits[2]
    rows = _decoupling(kspace)[:, first : last + 1]
    gram = (rows @ rows.mH).abs()
    diagonal = torch.diagonal(gram)
    return float((gram - torch.diag(diagonal)).max() / diagonal.max()) < NEGLIGIBLE_CORRELATION


def _fov_parts(kspace: KSpace) -> tuple[float, float, float]:
    """Reconstructed over encoded field of view, `(z, y, x)`, at most 1."""
    z, y, x = (
        min(1.0, wanted / encoded) for wanted, encoded in zip(kspace.recon_fov_mm, kspace.encoded_fov_mm, strict=True)
    )
    return z, y, x


def _line_variance(kspace: KSpace) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
    """Variance of the white noise of each line before its readout was cropped, shape `(k2, k1)`."""
    readout = kspace.readout
    if readout is None:
        return kspace.variance.max(axis=2)
    part = ReadoutGeometry(readout.size, kspace.data.shape[-1]).matrix()[:, readout.start : readout.stop]
    profile = (np.abs(part) ** 2).sum(axis=1)
    return (kspace.variance.sum(axis=2) / profile.sum()).astype(np.float32)


def _remove_oversampling(probes: Tensor, size: int) -> Tensor:
    """Crop the readout's field of view, `(..., oversampled)` to `(..., size)`."""
    oversampled = probes.shape[-1]
    images = ifft_centred(probes, (-1,)).narrow(-1, oversampled // 2 - size // 2, size)
    return fft_centred(images, (-1,))
