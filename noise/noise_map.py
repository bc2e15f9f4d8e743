"""σ of any differentiable reconstruction, for people without Gadgetron."""

import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from voxelsigma.noise.linearize import linearize
from voxelsigma.noise.probes import ProbeSource
from voxelsigma.noise.sigma import MapKind, SigmaMap
from voxelsigma.noise.sketch import Stopping, sketch
from voxelsigma.noise.voxels import object_mask

HERMITIAN_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseMap:
    """The image and its noise standard deviation.

    Parameters
    ----------
    image
        The reconstruction, shape `(...)`.
    sigma
        Noise standard deviation of each voxel, shape `(...)`, in the image's units.
    estimate
        The whole estimate: degrees of freedom, standard error, intervals.
    seed
        With which the same map comes again.
    fallbacks
        What the fast linearization did not know and left to `torch.func`, in words.
    cuts
        Where the reconstruction leaves differentiable torch (`detach`, `item`): σ takes these values as fixed.
    """

    image: Tensor
    sigma: Tensor
    estimate: SigmaMap
    seed: int
    fallbacks: tuple[str, ...] = ()
    cuts: tuple[str, ...] = ()

    @property
    def error(self) -> float:
        """Median relative standard error of σ over the object."""
        return float(self.estimate.relative_error()[object_mask(self.image)].median())


def noise_map(
    reconstruct: Callable[[Tensor], Tensor],
    kspace: Any,
    *,
    covariance: Any = None,
    mask: Any = None,
    probes: int = 64,
    target_error: float | None = None,
    time_budget: float | None = None,
    kind: MapKind = "magnitude",
    seed: int | None = None,
    chunk: int | None = None,
) -> NoiseMap:
    r"""Noise standard deviation of every voxel of a reconstruction, by a sketch through its Jacobian.

    .. math:: \sigma_i^2 = E|(J v)_i|^2, \qquad E[v_k v_k^H] = \Psi \text{ at every sampled position } k

    (Dalmaz et al., ICML 2025); for `magnitude` of the component in phase with the voxel.

    Parameters
    ----------
    reconstruct
        From k-space `(coils, …)` to an image `(…)`, complex or real, made of differentiable torch operations;
        deterministic.
    kspace
        The measured data, shape `(coils, …)`, complex tensor or array.
    covariance
        :math:`\Psi = E[n n^H]` of one k-space sample, shape `(coils, coils)`, Hermitian, in squared units of `kspace`.
        None for whitened data: :math:`2 I`, a standard deviation of 1 per real component.
    mask
        Sampled positions, shape of `kspace` without coils (or one that broadcasts to it); numbers above 1 say how many
        readouts were averaged there. None: wherever any coil's sample is not 0.
    probes
        At most so many, at least 2.
    target_error
        Stop when the median relative standard error over the object is reached.
    time_budget
        Seconds; the map is given with the error that it has then.
    kind
        `magnitude` or `complex` (:math:`\sqrt{E|u|^2}`).
    seed
        For the same map again; by default a new one is drawn and returned.
    chunk
        Probes at a time; by default from the size of the data.

    Returns
    -------
        Image, σ and how well it is known.

    Raises
    ------
    ValueError
        If an argument is bad (the text names it and what is valid), or the reconstruction is not deterministic, not
        finite, or cannot be differentiated.

    Examples
    --------
    Root-sum-of-squares of two coils with correlated noise:

    >>> import torch, voxelsigma
    >>> kspace = torch.fft.fft2(torch.full((2, 16, 16), 100.0, dtype=torch.complex64), norm="ortho")
    >>> mask = torch.ones(16, 16)
    >>> covariance = torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    >>> def reconstruct(y):
    ...     return torch.fft.ifft2(y, norm="ortho").abs().square().sum(dim=0).sqrt()
    >>> found = voxelsigma.noise_map(reconstruct, kspace, covariance=covariance, mask=mask, probes=256, seed=1)
    >>> found.sigma.shape
    torch.Size([16, 16])
    >>> # both coils have equal weight: a variance of (2 + 1 + 2 * 0.5) / 2, half of it in phase with the voxel
    >>> abs(float(found.sigma.mean()) - 1) < 0.02
    True
    """
    data = _kspace(kspace)
    if probes < 2:
        raise ValueError(f"noise_map: probes is {probes}; a variance needs at least 2")
    if seed is not None and time_budget is not None:
        raise ValueError("noise_map: time_budget cannot go with seed: a repeatable run stops on counts alone")
    variance = _variance(data, mask)
    factor = _factor(covariance, data)
    stopping = Stopping(probes=probes, target_error=target_error, time_budget=time_budget)
    chosen = secrets.randbits(62) if seed is None else seed
    linearization = linearize(reconstruct, data, repeat=True)
    if not bool(torch.view_as_real(linearization.value + 0j).isfinite().all()):
        raise ValueError("noise_map: the reconstruction holds NaN or Inf; expected finite values")
    source = ProbeSource(
        variance=variance,
        coils=len(data),
        seed=chosen,
        through=None if factor is None else lambda drawn: torch.einsum("ab,pb...->pa...", factor, drawn),
        dtype=data.dtype,
        device=data.device,
    )
    found = sketch(linearization, source, stopping if seed is None else stopping.seeded(), kind=kind, chunk=chunk)
    estimate = found.map(kind)
    return NoiseMap(
        image=linearization.value,
        sigma=estimate.sigma,
        estimate=estimate,
        seed=chosen,
        fallbacks=linearization.fallbacks,
        cuts=linearization.cuts,
    )


def _kspace(given: Any) -> Tensor:
    data = torch.as_tensor(given)
    if not data.is_complex() or data.dim() < 2:
        raise ValueError(
            f"noise_map: kspace is {data.dtype} of shape {tuple(data.shape)}; expected complex of shape (coils, ...)"
        )
    if not bool(torch.view_as_real(data).isfinite().all()):
        raise ValueError("noise_map: kspace holds NaN or Inf; expected finite values")
    return data.detach()


def _variance(data: Tensor, mask: Any) -> Tensor:
    """Variance of each position for unit covariance halves: 2/n where n readouts were averaged."""
    if mask is None:
        count = (data.abs().amax(dim=0) > 0).to(data.real.dtype)
    else:
        given = torch.as_tensor(mask).to(data.device)
        try:
            count = torch.broadcast_to(given, data.shape[1:]).to(data.real.dtype)
        except RuntimeError:
            raise ValueError(
                f"noise_map: mask has shape {tuple(given.shape)}; expected one that fits {tuple(data.shape[1:])}"
            ) from None
    if not bool((count > 0).any()):
        raise ValueError("noise_map: no k-space position is sampled; expected a mask with at least one")
    if bool((count < 0).any()) or not bool(count.isfinite().all()):
        raise ValueError("noise_map: mask holds negative or infinite numbers; expected counts of readouts")
    return torch.where(count > 0, 2 / count.clamp_min(torch.finfo(count.dtype).tiny), torch.zeros_like(count))


def _factor(covariance: Any, data: Tensor) -> Tensor | None:
    r"""Cholesky factor L of half the covariance, so that L v has it for probes of variance 2."""
    if covariance is None:
        return None
    matrix = np.asarray(torch.as_tensor(covariance).cpu()).astype(np.complex128)
    coils = len(data)
    if matrix.shape != (coils, coils):
        raise ValueError(f"noise_map: covariance has shape {matrix.shape}; expected {(coils, coils)} for {coils} coils")
    scale = float(np.abs(matrix).max(initial=0))
    if not math.isfinite(scale) or scale == 0:
        raise ValueError("noise_map: covariance is zero, NaN or Inf; expected a Hermitian positive definite matrix")
    if np.abs(matrix - matrix.conj().T).max() > HERMITIAN_TOLERANCE * scale:
        raise ValueError("noise_map: covariance is not Hermitian")
    try:
        factor = np.linalg.cholesky((matrix + matrix.conj().T) / 4)
    except np.linalg.LinAlgError:
        smallest = float(np.linalg.eigvalsh(matrix).min())
        raise ValueError(
            f"noise_map: covariance is not positive definite (smallest eigenvalue {smallest:.3g})"
        ) from None
    return torch.from_numpy(factor).to(data.device, data.dtype)
