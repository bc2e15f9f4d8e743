r"""Noise beyond the diagonal, from pushed probes that were kept: functionals and correlations.

A pushed probe u = J v is a draw of the image's noise: its covariance is the noise's. Whatever is linear in the
image has its standard deviation from the same draws. All functions take the probes of one plane batch by batch,
so memory does not grow with their number.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import scipy.stats
import torch
from torch import Tensor

from voxelsigma.noise.moments import Moments, moments
from voxelsigma.noise.sigma import MapKind, SigmaMap, root_bias, sigma_map

Batches: TypeAlias = Iterable[Tensor]
"""Pushed probes u of one plane, `(probes, y, x)` each, complex or real."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Functionals:
    r"""Weighted sums over the voxels of a plane, :math:`L_r = \sum_i w_{ri} z_i`, kept sparse.

    Parameters
    ----------
    rows
        Which functional an entry belongs to, shape `(entries,)`, integer.
    places
        Its voxel, as an index of the flattened plane, shape `(entries,)`, integer.
    weights
        Its weight, shape `(entries,)`, real or complex.
    count
        Number of functionals.
    """

    rows: Tensor
    places: Tensor
    weights: Tensor
    count: int

    @classmethod
    def dense(cls, weights: Tensor) -> "Functionals":
        """From weights of shape `(functionals, y, x)`, real or complex."""
        flat = weights.flatten(start_dim=1)
        rows, places = flat.nonzero(as_tuple=True)
        return cls(rows=rows, places=places, weights=flat[rows, places], count=len(weights))

    @classmethod
    def of_labels(cls, labels: Tensor, weights: Tensor) -> "Functionals":
        """From labels `(y, x)`, 0 for none, r + 1 for functional r, and a weight for each functional `(functionals,)`.

        With :math:`w_r = 1/n_r` these are the means of regions of :math:`n_r` voxels.
        """
        flat = labels.flatten()
        places = flat.nonzero().squeeze(1)
        rows = flat[places] - 1
        return cls(rows=rows, places=places, weights=weights[rows], count=len(weights))

    def of(self, images: Tensor, direction: Tensor | None = None) -> Tensor:
        r"""Evaluate on images `(probes, y, x)`: `(probes, functionals)`, complex128.

        Parameters
        ----------
        images
            Pushed probes.
        direction
            Phase factor :math:`e^{i\phi}` of the reconstructed voxels `(y, x)`: the real part of the result is then
            :math:`\sum_i w_i \Re(e^{-i\phi_i} u_i)`, for real weights, by which :math:`\sum_i w_i |x_i|` of
            the image x moves. None for :math:`\sum_i w_i u_i`.
        """
        weights = self.weights.to(torch.complex128)
        if direction is not None:
            weights = weights * direction.flatten()[self.places].conj()
        terms = images.flatten(start_dim=1)[:, self.places].to(torch.complex128) * weights
        found = torch.zeros((len(images), self.count), dtype=torch.complex128, device=images.device)
        return found.index_add_(1, self.rows, terms)


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionalNoise:
    r"""Noise of the functionals of a plane, or of independent planes together.

    Parameters
    ----------
    sigma
        Standard deviations and their degrees of freedom, shape `(functionals,)`.
    covariance
        :math:`E[\Re L_r \Re L_s]` for `magnitude`, :math:`E[L_r L_s^*]` for `complex`, shape
        `(functionals, functionals)`, positive semidefinite, unbiased; its diagonal is σ̂² before the bias of the
        square root is taken off.
    """

    sigma: SigmaMap
    covariance: Tensor

    def correlation(self) -> Tensor:
        """Correlation coefficients, shape `(functionals, functionals)`; 0 where a functional has no noise."""
        deviation = self.covariance.diagonal().real.sqrt()
        scale = torch.where(deviation > 0, 1 / deviation, 0)
        return self.covariance * scale[:, None] * scale[None, :]


def functional_noise(
    batches: Batches,
    functionals: Functionals,
    direction: Tensor | None,
    *,
    kind: MapKind = "magnitude",
    complex_linear: bool = False,
) -> FunctionalNoise:
    r"""Standard deviation and covariance of functionals of one plane's noise.

    .. math:: \hat\sigma_r^2 = \frac1S \sum_s \big(\Re L_r^{(s)}\big)^2, \qquad
              L_r^{(s)} = \sum_i w_{ri} e^{-i\phi_i} u_i^{(s)}

    for `magnitude`, the mean of :math:`|L_r|^2` for `complex`, of :math:`|L_r|^2/2` for the magnitude of a
    complex-linear reconstruction. Degrees of freedom, the correction of the square root's bias and the intervals are
    those of a plain σ map (`sigma_map`): one voxel with the weight 1 is that map's voxel.

    Parameters
    ----------
    batches
        At least 2 probes.
    functionals
        Over the voxels of a batch.
    direction
        As in `Functionals.of`; None takes the functionals as they are.
    kind, complex_linear
        Which component; whether the reconstruction is complex-linear.

    Raises
    ------
    ValueError
        If there are fewer than 2 probes.
    """
    sums: Moments | None = None
    products = torch.zeros((functionals.count, functionals.count), dtype=torch.complex128)
    for batch in batches:
        values = functionals.of(batch, direction).cpu()
        step = moments(values, None)
        sums = step if sums is None else sums + step
        if kind == "magnitude" and not complex_linear:
            products += values.real.mT @ values.real
        else:
            products += values.mT @ values.conj()
    check_enough(0 if sums is None else sums.count)
    assert sums is not None
    if kind == "magnitude" and complex_linear:
        products = products / 2
    ones = torch.ones(functionals.count, dtype=torch.complex128)
    covariance = products / sums.count
    return FunctionalNoise(
        sigma=sigma_map(sums, kind, direction=ones, complex_linear=complex_linear),
        covariance=covariance.real if kind == "magnitude" else covariance,
    )


def independent_sum(parts: Sequence[FunctionalNoise]) -> FunctionalNoise:
    r"""Noise of functionals that reach over planes whose noise is independent: variances add.

    .. math:: \hat\sigma^2 = \sum_p \hat\sigma_p^2, \qquad
              \nu = \frac{(\sum_p \hat\sigma_p^2)^2}{\sum_p \hat\sigma_p^4 / \nu_p}

    (Satterthwaite, Biometrics Bulletin 1946): a plane counts with as many probes as it had.

    Parameters
    ----------
    parts
        The same functionals on each plane, at least one.
    """
    variances = torch.stack([part.sigma.sigma * root_bias(part.sigma.degrees_of_freedom) for part in parts]).square()
    freedoms = torch.stack([part.sigma.degrees_of_freedom for part in parts])
    total = variances.sum(dim=0)
    spread = (variances.square() / freedoms).sum(dim=0)
    # a functional without any noise has no degrees of freedom of its own: those of one plane
    freedom = torch.where(spread > 0, total.square() / torch.where(spread > 0, spread, 1), freedoms[0])
    first = parts[0].sigma
    return FunctionalNoise(
        sigma=SigmaMap(
            sigma=total.sqrt() / root_bias(freedom),
            degrees_of_freedom=freedom,
            kind=first.kind,
            probes=min(part.sigma.probes for part in parts),
            explained=torch.zeros_like(total),
        ),
        covariance=torch.stack([part.covariance for part in parts]).sum(dim=0),
    )


def voxel_sigma(
    batches: Batches, direction: Tensor, *, kind: MapKind = "magnitude", complex_linear: bool = False
) -> SigmaMap:
    """The plain σ map of a plane, or of a part of it, shape `(y, x)`, from its probes."""
    sums: Moments | None = None
    for batch in batches:
        step = moments(batch, None)
        sums = step if sums is None else sums + step
    check_enough(0 if sums is None else sums.count)
    assert sums is not None
    return sigma_map(sums, kind, direction=direction, complex_linear=complex_linear)


def effective_voxels(voxels: float, independent_variance: float, variance: float) -> float:
    r"""Number of independent voxels whose mean would be as noisy as the mean of a region.

    .. math:: n_\text{eff} = \frac{\frac1n \sum_i \sigma_i^2}{\sigma_\text{mean}^2}
              = n \, \frac{\sum_i w_i^2 \sigma_i^2}{\sigma_\text{mean}^2}, \qquad w_i = \frac1n

    It may exceed n where neighbours are anticorrelated.

    Parameters
    ----------
    voxels
        n.
    independent_variance
        :math:`\sum_i w_i^2 \sigma_i^2`, the mean's variance if its voxels were independent.
    variance
        :math:`\sigma_\text{mean}^2`.
    """
    return voxels * independent_variance / variance if variance > 0 else float("nan")


@dataclass(frozen=True, slots=True, kw_only=True)
class Correlation:
    r"""Noise correlation of one voxel with others.

    Parameters
    ----------
    coefficient
        r per voxel, shape `(y, x)`; 1 at the voxel itself, 0 where there is no noise. Its bias towards 0,
        :math:`-r(1-r^2)/2n`, is not corrected.
    observations
        Real pairs n behind it: S probes, or 2 S of a complex-linear reconstruction.
    """

    coefficient: Tensor
    observations: int

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        r"""Interval by Fisher's z: :math:`\tanh(\operatorname{artanh} r \pm q / \sqrt{n - 2})`, shape `(y, x)` each.

        The mean of the noise is known to be 0, so n pairs count like n + 1. For a complex-linear reconstruction with
        a complex correlation it is wider than need be. Fewer than 3 pairs bound nothing.
        """
        if self.observations < 3:
            return torch.full_like(self.coefficient, -1), torch.full_like(self.coefficient, 1)
        reach = float(scipy.stats.norm.ppf((1 + level) / 2)) / (self.observations - 2) ** 0.5
        centre = self.coefficient.clamp(-1, 1).atanh()
        return (centre - reach).tanh(), (centre + reach).tanh()


def noise_correlation(
    batches: Batches, direction: Tensor, voxel: tuple[int, int], *, complex_linear: bool = False
) -> Correlation:
    r"""Correlation of the in-phase noise of a voxel v with that of every voxel of the plane.

    .. math:: r_i = \frac{\sum_s a_v a_i}{\sqrt{\sum_s a_v^2 \sum_s a_i^2}}, \qquad a = \Re(e^{-i\phi} u)

    For a complex-linear reconstruction products :math:`a a'` become :math:`\Re(c c'^*)` of
    :math:`c = e^{-i\phi} u`, with the same mean (but for a factor that cancels) and two real pairs a probe.

    Parameters
    ----------
    batches
        At least 2 probes.
    direction
        Phase factor of the reconstructed voxels, shape `(y, x)`.
    voxel
        `(y, x)`, inside.
    complex_linear
        Whether the reconstruction is complex-linear.

    Raises
    ------
    ValueError
        If there are fewer than 2 probes.
    """
    y, x = voxel
    joint = torch.zeros(direction.shape, dtype=torch.float64)
    squares = torch.zeros_like(joint)
    count = 0
    for batch in batches:
        turned = batch.to(torch.complex128) * direction.conj()
        parts = torch.view_as_real(turned) if complex_linear else turned.real.unsqueeze(-1)
        parts = parts.cpu()
        count += len(batch)
        joint += (parts * parts[:, y, x, None, None]).sum(dim=(0, -1))
        squares += parts.square().sum(dim=(0, -1))
    check_enough(count)
    scale = (squares * squares[y, x]).sqrt()
    return Correlation(
        coefficient=torch.where(scale > 0, joint / torch.where(scale > 0, scale, 1), 0).clamp(-1, 1),
        observations=2 * count if complex_linear else count,
    )


def check_enough(count: int) -> None:
    """Refuse fewer than 2 probes."""
    if count < 2:
        raise ValueError(f"{count} pushed probes; a variance needs at least 2")
