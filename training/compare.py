"""Networks beside the zero-filled and the linear reconstruction of the same scans."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from voxelsigma.models.conjugate_gradients import conjugate_gradients
from voxelsigma.models.encoding import SenseEncoding
from voxelsigma.models.network import Network
from voxelsigma.models.problem import PlaneProblem
from voxelsigma.noise.gfactor import noise_ratio
from voxelsigma.noise.linearize import Linearization, linearize
from voxelsigma.noise.probes import ProbeSource
from voxelsigma.noise.sketch import Sketch, Stopping, sketch
from voxelsigma.noise.voxels import object_mask
from voxelsigma.training.examples import Example
from voxelsigma.training.held_out import reference
from voxelsigma.training.metrics import psnr, ssim

REGULARIZATIONS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64)
TOLERANCE = 1e-4
PROBES = 16

Reconstruct: TypeAlias = Callable[[Example], Tensor]


@dataclass(frozen=True, slots=True)
class Scores:
    """PSNR in dB and SSIM of every slice."""

    psnr: tuple[float, ...]
    ssim: tuple[float, ...]

    @property
    def mean_psnr(self) -> float:
        """Mean over the slices, in dB."""
        return float(np.mean(self.psnr))

    @property
    def mean_ssim(self) -> float:
        """Mean over the slices."""
        return float(np.mean(self.ssim))


@dataclass(frozen=True, slots=True)
class Baselines:
    """What every network is compared with.

    Parameters
    ----------
    zero_filled
        Of the coil-combined zero-filled image.
    linear
        Of regularised least squares at `regularization`.
    regularization
        The one λ whose mean PSNR over all slices is best.
    """

    zero_filled: Scores
    linear: Scores
    regularization: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Mean PSNR in dB, and mean SSIM, over the slices of one setting.

    Parameters
    ----------
    zero_filled, linear, network
        PSNR.
    gains
        Network minus linear, of every slice.
    regularization
        Of the linear reconstruction: the one λ that is best over all slices.
    zero_filled_ssim, linear_ssim, network_ssim
        SSIM.
    """

    zero_filled: float
    linear: float
    network: float
    gains: tuple[float, ...]
    regularization: float
    zero_filled_ssim: float
    linear_ssim: float
    network_ssim: float

    @property
    def gain(self) -> float:
        """Mean of the network's PSNR above the linear reconstruction's."""
        return float(np.mean(self.gains))

    @property
    def gain_over_zero_filled(self) -> float:
        """Mean of the network's PSNR above the zero-filled image's."""
        return self.network - self.zero_filled


def least_squares(example: Example, regularization: float, *, tolerance: float = TOLERANCE) -> Tensor:
    r"""Regularised linear reconstruction :math:`(A^H A + \lambda)^{-1} A^H y`, shape `(..., y, x)`."""
    encoding = SenseEncoding(example.sensitivities, example.mask)

    def normal(images: Tensor) -> Tensor:
        return encoding.adjoint(encoding.forward(images)) + regularization * images

    return conjugate_gradients(normal, encoding.adjoint(example.kspace), tolerance=tolerance)


def zero_filled(example: Example) -> Tensor:
    """The coil-combined zero-filled image, shape `(..., y, x)`."""
    return SenseEncoding(example.sensitivities, example.mask).adjoint(example.kspace)


@torch.no_grad()
def scores(reconstruct: Reconstruct, scans: Sequence[Example]) -> Scores:
    """Scores of a reconstruction, slice after slice; of complex images the magnitude counts."""
    pairs = [_scores(reconstruct(scan), reference(scan)) for scan in scans]
    return Scores(tuple(peak for peak, _ in pairs), tuple(structure for _, structure in pairs))


def baselines(scans: Sequence[Example], regularizations: Sequence[float] = REGULARIZATIONS) -> Baselines:
    """Zero-filled and linear reconstruction of some slices.

    The best λ is found by going up or down from the middle one as long as the mean PSNR grows: it has one maximum.

    Parameters
    ----------
    scans
        The slices.
    regularizations
        What λ may be, ascending.
    """

    @cache
    def tried(place: int) -> Scores:
        return scores(lambda scan: least_squares(scan, regularizations[place]), scans)

    best = len(regularizations) // 2
    for step in (1, -1):
        while 0 <= best + step < len(regularizations) and tried(best + step).mean_psnr > tried(best).mean_psnr:
            best += step
    return Baselines(zero_filled=scores(zero_filled, scans), linear=tried(best), regularization=regularizations[best])


def applied(network: Network) -> Reconstruct:
    """A network, as pipelines have it, as a reconstruction of scans without a batch axis."""
    return lambda scan: network.bind(plane_of(scan))(scan.kspace)


def compared(network: Scores, others: Baselines) -> Comparison:
    """A network's scores beside the others'."""
    return Comparison(
        zero_filled=others.zero_filled.mean_psnr,
        linear=others.linear.mean_psnr,
        network=network.mean_psnr,
        gains=tuple(own - other for own, other in zip(network.psnr, others.linear.psnr, strict=True)),
        regularization=others.regularization,
        zero_filled_ssim=others.zero_filled.mean_ssim,
        linear_ssim=others.linear.mean_ssim,
        network_ssim=network.mean_ssim,
    )


def plane_of(scan: Example) -> PlaneProblem:
    """The scan, without a batch axis, as a plane on its own matrix."""
    rows, columns = scan.kspace.shape[-2:]
    sampled = scan.mask[0]
    return PlaneProblem(
        sensitivities=scan.sensitivities,
        variance=2 * sampled,
        weights=sampled,
        limits=((0, rows - 1), (0, columns - 1)),
        size=(rows, columns),
    )


def sketched(network: Network, scan: Example, *, probes: int, seed: int) -> tuple[Linearization, Sketch]:
    """The sketch with control variate, as pipelines make it, at one scan without a batch axis."""
    plane = plane_of(scan)
    linearization = linearize(network.bind(plane), scan.kspace, repeat=True)
    source = ProbeSource(
        variance=plane.variance, coils=len(scan.kspace), seed=seed, device=scan.kspace.device, dtype=scan.kspace.dtype
    )
    covariate = plane.covariate(None if linearization.value.is_complex() else scan.kspace)
    found = sketch(linearization, source, Stopping(probes=probes), covariate=covariate)
    return linearization, found


@torch.no_grad()
def median_sigma(network: Network, scan: Example, *, probes: int = PROBES, seed: int = 1) -> tuple[float, float]:
    r"""Median over the object of the magnitude σ map, and of its ratio to :math:`\sigma_\text{full} \sqrt{R}`.

    Parameters
    ----------
    network
        The network.
    scan
        One scan with its reference, without a batch axis.
    probes, seed
        Of the sketch.
    """
    sigma = sketched(network, scan, probes=probes, seed=seed)[1].map("magnitude").sigma
    inside = object_mask(reference(scan)).to(sigma.device)
    ratio = noise_ratio(sigma, scan.sensitivities.to(sigma.device), plane_of(scan).acceleration())
    return float(sigma[inside].median()), float(ratio[inside].median())


def _scores(image: Tensor, truth: Tensor) -> tuple[float, float]:
    return float(psnr(image, truth)), ssim(image, truth)
