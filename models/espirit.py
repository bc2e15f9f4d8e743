"""Coil sensitivities by ESPIRiT: eigenvectors of the calibration region's own kernels."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class EspiritSettings:
    """How ESPIRiT is done.

    Parameters
    ----------
    kernel
        Kernel width in k-space samples, odd or even, at least 2.
    calibration
        Largest width of the calibration region that is used.
    threshold
        Singular values below this times the largest belong to the null space.
    crop
        Maps are 0 where the largest eigenvalue is below this; 0 keeps every voxel, so that every voxel
        has a σ.
    iterations
        Power iterations for the leading eigenvector.
    """

    kernel: int = 6
    calibration: int = 24
    threshold: float = 0.03
    crop: float = 0.0
    iterations: int = 30


def espirit(
    reference: Tensor,
    size: tuple[int, int],
    settings: EspiritSettings | None = None,
    *,
    phase: Tensor | None = None,
) -> Tensor:
    r"""Estimate unit-norm coil sensitivities from a fully sampled centre of k-space.

    The kernels that span the row space of the calibration matrix make, voxel by voxel, a coil × coil operator
    whose eigenvector to the eigenvalue 1 are the sensitivities (Uecker et al., Magn Reson Med 2014).

    Parameters
    ----------
    reference
        Reference lines around the origin, shape `(..., coils, r1, r0)`, complex; leading axes are a batch.
    size
        Matrix of the maps, `(y, x)`, over the field of view of the reference lines.
    settings
        How it is done.
    phase
        Virtual coil whose phase the maps are relative to, shape `(coils,)`; None takes the first principal
        component of the reference lines.

    Returns
    -------
        Shape `(..., coils, y, x)`, complex, unit norm over coils (0 where cropped).

    Raises
    ------
    ValueError
        If the reference region is smaller than the kernel.
    """
    chosen = settings or EspiritSettings()
    region = _centre(reference, chosen.calibration)
    if min(region.shape[-2:]) < chosen.kernel:
        raise ValueError(
            f"espirit: the reference region has {tuple(reference.shape[-2:])} samples; at least "
            f"{chosen.kernel} × {chosen.kernel} are needed around the centre of k-space"
        )
    virtual = principal_coil(region) if phase is None else phase
    batch = region.reshape(-1, *region.shape[-3:])
    maps = torch.stack([_espirit_plane(plane, size, chosen, virtual) for plane in batch])
    return maps.reshape(*reference.shape[:-2], *size)


def principal_coil(reference: Tensor) -> Tensor:
    """First principal component of the coils over all reference samples, `(..., coils, r1, r0)` to `(coils,)`."""
    # (..., coils, r1, r0) -> (coils, samples)
    samples = reference.movedim(-3, 0).flatten(1)
    return torch.linalg.eigh(samples @ samples.mH).eigenvectors[:, -1]


def _espirit_plane(region: Tensor, size: tuple[int, int], settings: EspiritSettings, virtual: Tensor) -> Tensor:
    """Maps of one plane, from its calibration region `(coils, r1, r0)`."""
    correlation = _kernel_correlation(region, settings)
    lags = torch.arange(correlation.shape[-1], device=region.device) - (settings.kernel - 1)
    rows, columns = (
        torch.exp(2j * torch.pi * torch.outer(torch.arange(n, device=region.device) - n // 2, lags) / n).to(
            region.dtype
        )
        for n in size
    )
    coils = region.shape[0]
    start = virtual.to(region.dtype)
    parts = []
    # rows in groups: the full operator, coils² · voxels, need not fit in memory
    for some in rows.split(max(1, 2**22 // (coils * coils * size[1]))):
        # operator: (y, x, coils, coils)
        operator = torch.einsum("yu,abuv,xv->yxab", some, correlation, columns)
        parts.append(_leading_eigenvector(operator, start, settings))
    # (y, x, coils) -> (coils, y, x)
    return torch.cat(parts).permute(2, 0, 1)


def _kernel_correlation(region: Tensor, settings: EspiritSettings) -> Tensor:
    r"""Correlation of the row-space kernels, :math:`\sum_k v_k \star v_k^*`, shape `(coils, coils, lags, lags)`."""
    coils, width, dtype = region.shape[0], settings.kernel, region.dtype
    # in float32 the last bits of the kernels are worth 2e-4 in the maps where no coil sees anything
    region = region.to(torch.complex128)
    # patches: (coils, r1, r0) -> (positions, coils · kernel²)
    patches = region.unfold(1, width, 1).unfold(2, width, 1).permute(1, 2, 0, 3, 4).reshape(-1, coils * width**2)
    values, vectors = torch.linalg.eigh(patches.mT @ patches.conj())
    kept = vectors[:, values > settings.threshold**2 * values[-1]]
    kernels = kept.mT.reshape(-1, coils, width, width)
    padded = torch.fft.fft2(kernels, s=(2 * width - 1, 2 * width - 1))
    spectrum = torch.einsum("kauv,kbuv->abuv", padded, padded.conj())
    return (torch.fft.fftshift(torch.fft.ifft2(spectrum), dim=(-2, -1)) / width**2).to(dtype)


def _leading_eigenvector(operator: Tensor, virtual: Tensor, settings: EspiritSettings) -> Tensor:
    """Unit eigenvector to the largest eigenvalue by power iteration, `(y, x, coils, coils)` to `(y, x, coils)`."""
    vector = virtual.expand(operator.shape[:-1]).unsqueeze(-1)
    value = torch.ones_like(vector[..., :1, :].real)
    for _ in range(settings.iterations):
        vector = operator @ vector
        value = vector.norm(dim=-2, keepdim=True)
        vector = vector / value.clamp_min(1e-12)
    projection = (virtual.conj().unsqueeze(-1) * vector).sum(dim=-2, keepdim=True)
    turned = vector * torch.where(projection.abs() > 0, projection.conj() / projection.abs().clamp_min(1e-20), 1)
    return (turned * (value >= settings.crop)).squeeze(-1)


def _centre(reference: Tensor, width: int) -> Tensor:
    """The central samples of the last two axes, at most `width` of each, around index n//2."""
    for axis in (-2, -1):
        size = reference.shape[axis]
        kept = min(size, width)
        reference = reference.narrow(axis, size // 2 - kept // 2, kept)
    return reference
