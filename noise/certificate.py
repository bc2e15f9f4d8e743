"""Whether a predicted σ map agrees with the probes of this very scan, region by region."""

from dataclasses import dataclass
from typing import Final

import scipy.stats
import torch
from torch import Tensor

from voxelsigma.noise.prior import Prior
from voxelsigma.noise.sigma import MapKind

VOXELS_PER_REGION: Final = 400
"""Fewer would hold too few independent numbers to tell 15 % from 30 % with 16 probes."""
MOST_REGIONS: Final = 32
TOLERANCE: Final = 0.15
LEVEL: Final = 0.99

_SMALLEST = 1e-30


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    r"""What the probes say of a prediction.

    Parameters
    ----------
    log_ratio
        :math:`\log(\sigma_\text{probes} / \sigma_\text{predicted})` of every region, shape `(regions,)`.
    error
        Standard error of each, shape `(regions,)`.
    excess
        By how much :math:`|\log|` exceeds 0 for certain (one-sided `LEVEL`, Bonferroni over the regions), `(regions,)`.
    together
        A, how many voxels fluctuate together.
    tolerance
        Largest relative error of σ that is let pass.
    probes
        S, how many were asked.
    """

    log_ratio: Tensor
    error: Tensor
    excess: Tensor
    together: float
    tolerance: float
    probes: int

    @property
    def worst(self) -> float:
        """Largest excess of a region, as a relative error of σ."""
        return float(self.excess.max().expm1())

    @property
    def passed(self) -> bool:
        """Whether no region is off by more than the tolerance for certain."""
        return self.worst <= self.tolerance


def regions(inside: Tensor) -> Tensor:
    """Cut an object into parts of much the same number of voxels, by halving along the longer side again and again.

    Parameters
    ----------
    inside
        Voxels of the object, shape `(y, x)`, boolean.

    Returns
    -------
        Number of each voxel's region, shape `(y, x)`; -1 outside.
    """
    places = inside.cpu().nonzero()
    count = max(1, min(MOST_REGIONS, len(places) // VOXELS_PER_REGION))
    labels = torch.full(inside.shape, -1, dtype=torch.long)
    for number, part in enumerate(_parts(places, count)):
        labels[part[:, 0], part[:, 1]] = number
    return labels.to(inside.device)


def _parts(places: Tensor, count: int) -> list[Tensor]:
    """Divide voxels `(voxels, 2)` into so many parts."""
    if count == 1:
        return [places]
    extent = places.amax(dim=0) - places.amin(dim=0)
    ordered = places[places[:, int(extent.argmax())].argsort(stable=True)]
    first = count // 2
    cut = len(ordered) * first // count
    return [*_parts(ordered[:cut], first), *_parts(ordered[cut:], count - first)]


class RegionEnergies:
    r"""Energy of every probe in every region, :math:`e_{s,g} = \overline{a_{s,i}^2 / v_i}`, and of :math:`|u|^2`.

    Parameters
    ----------
    labels
        Of `regions`, shape `(y, x)`.
    scale
        What energies are measured by, :math:`v_i`, shape `(y, x)`: near their expectation, so that no voxel outweighs
        the others; voxels where it is 0 take no part.
    direction
        Phase factor of the image, shape `(y, x)`, complex.
    """

    def __init__(self, labels: Tensor, scale: Tensor, direction: Tensor) -> None:
        self._labels = labels.flatten()
        self._chosen = (self._labels >= 0) & (scale.flatten() > 0)
        self._scale_map = scale.double()
        self._scale = self._scale_map.flatten()[self._chosen]
        self._direction = direction.flatten()[self._chosen].conj()
        self.counts = torch.bincount(self._labels[self._chosen], minlength=int(self._labels.max()) + 1)
        self._seen: dict[MapKind, list[Tensor]] = {"magnitude": [], "complex": []}

    def add(self, pushed: Tensor) -> None:
        """Take a batch of pushed probes in, shape `(probes, y, x)`."""
        turned = self._direction * pushed.flatten(1)[:, self._chosen].to(self._direction.dtype)
        self._seen["magnitude"].append(self._means(turned.real.square()))
        self._seen["complex"].append(self._means(turned.abs().square()))

    def _means(self, energies: Tensor) -> Tensor:
        """Means over the regions of energies of the chosen voxels, `(probes, voxels)`, by their scale."""
        sums = energies.new_zeros(len(energies), len(self.counts))
        sums.index_add_(1, self._labels[self._chosen], energies / self._scale)
        return (sums / self.counts.clamp_min(1)).cpu()

    def certificate(
        self, variance: Tensor, tolerance: float = TOLERANCE, *, kind: MapKind = "magnitude"
    ) -> Certificate:
        r"""Test a prediction with the probes seen so far.

        .. math:: \log \frac{\hat\sigma_g}{\sigma_{0,g}} = \frac12 \log \frac{\bar e_g}{p_g}, \qquad
            p_g = \overline{E[\sigma_i^2] / v_i}

        A region of N voxels holds :math:`N / A` independent numbers, where the A voxels that fluctuate together follow
        from how its energy varies from probe to probe (the sum of the energies' spatial autocovariance over all its
        pairs of voxels), pooled over the regions:

        .. math:: A = \operatorname{mean}_g \frac{N_g \operatorname{Var}_s e_{s,g}}{2 \bar e_g^2}, \qquad
            \operatorname{SE}(\log \hat\sigma_g) = \tfrac12 \sqrt{2 A / (N_g S)}

        Regions of which nothing is predicted (0) are left out; a prediction that says nothing of any fails.

        Probes that the prediction was made of may be among them: what it took over from them it gets right, to within
        the error of this test. A prediction may be tested again with more probes, each time at this level: one that is
        right is many standard errors away from the tolerance, one that is off by just as much is refused in the end.

        Parameters
        ----------
        variance
            What energies are predicted on average (`Prior.mean`), shape `(y, x)`.
        tolerance
            Largest relative error of σ that is let pass.
        kind
            Of which map: energies of the in-phase component, or of complex voxels.

        Raises
        ------
        ValueError
            With fewer than 2 probes.
        """
        probes = sum(len(one) for one in self._seen[kind])
        if probes < 2:
            raise ValueError(f"certificate: {probes} probes; a test needs at least 2")
        predicted = self._of_map(variance)
        known = (self.counts.cpu() > 0) & (predicted != 0)
        if not bool(known.any()):
            return _nothing_to_test(tolerance, probes)
        mean, error, together = self._measured(known, kind)
        counts, predicted = self.counts.cpu()[known], predicted[known]
        log_ratio = (mean / predicted).log() / 2
        # what is no number is as wrong as can be
        log_ratio = torch.where(log_ratio.isnan(), torch.inf, log_ratio)
        freedom = len(counts) * (probes - 1)
        quantile = float(scipy.stats.t.ppf(1 - (1 - LEVEL) / len(counts), freedom))
        excess = (log_ratio.abs() - quantile * error).clamp_min(0)
        return Certificate(
            log_ratio=log_ratio,
            error=error,
            excess=excess,
            together=max(1.0, together),
            tolerance=tolerance,
            probes=probes,
        )

    def corrected(self, prior: Prior, energy: Tensor, kind: MapKind = "magnitude") -> Prior:
        r"""A prediction that was let pass, moved to the level of the probes, region by region.

        What is tolerated may be several times the error that a prediction states. The regions' ratios
        :math:`r_g = \log(\hat\sigma_g / \sigma_{0,g})` scatter around 0 by their errors :math:`\epsilon_g`, and by what
        the prediction is off by, τ (random effects; DerSimonian & Laird, Control Clin Trials 1986):

        .. math:: \tau^2 = \big(\operatorname{mean}_g (r_g^2 - \epsilon_g^2)\big)_+, \quad
            q_g = \frac{\tau^2}{\tau^2 + \epsilon_g^2}, \quad
            s_0' = s_0 e^{2 q_g r_g}, \quad \frac1{\nu_0'} = \frac1{\nu_0} + 2 q_g \epsilon_g^2

        A prediction that fits keeps what it says. Voxels of which it says next to nothing are not compared.

        Parameters
        ----------
        prior
            Of either kind of map, finite.
        energy
            Mean energy of the probes, of that kind, shape `(y, x)`.
        kind
            Which.
        """
        asked = (prior.variance > 0) & ~prior.vague()
        part, predicted, found = (
            self._of_map(torch.where(asked, one, 0)) for one in (self._scale_map, prior.mean(), energy)
        )
        known = (predicted > 0) & (found > 0)
        if not bool(known.any()):
            return prior
        _, error, _ = self._measured(known, kind)
        error = error / part[known].sqrt()
        ratio = (found[known] / predicted[known]).log() / 2
        off = (ratio.square() - error.square()).mean().clamp_min(0)
        share = off / (off + error.square()).clamp_min(_SMALLEST)
        # one more for what belongs to no region
        moved, doubt = (torch.zeros(len(known) + 1, dtype=torch.float64) for _ in range(2))
        moved[:-1][known], doubt[:-1][known] = 2 * share * ratio, 2 * share * error.square()
        place = self._labels.view(prior.variance.shape)
        return Prior(
            variance=prior.variance * moved.to(place.device)[place].exp(),
            freedom=1 / (1 / prior.freedom.double() + doubt.to(place.device)[place]),
        )

    def _of_map(self, values: Tensor) -> Tensor:
        """Means over the regions of a map by its scale, `(regions,)`."""
        return self._means(values.flatten()[self._chosen].to(self._scale).unsqueeze(0))[0]

    def _measured(self, known: Tensor, kind: MapKind) -> tuple[Tensor, Tensor, float]:
        """Mean energies of some regions, standard errors of half their logarithms, `(regions,)`; and A."""
        energies, counts = torch.cat(self._seen[kind])[:, known], self.counts.cpu()[known].double()
        mean = energies.mean(dim=0).clamp_min(_SMALLEST)
        together = (counts * energies.var(dim=0) / (2 * mean.square())).mean()
        return mean, 0.5 * (2 * together / (counts * len(energies))).sqrt(), float(together)


def _nothing_to_test(tolerance: float, probes: int) -> Certificate:
    """The failure of a prediction that says nothing."""
    wrong = torch.full((1,), torch.inf, dtype=torch.float64)
    return Certificate(
        log_ratio=wrong, error=torch.zeros_like(wrong), excess=wrong, together=1.0, tolerance=tolerance, probes=probes
    )
