"""The sketch against repeated reconstructions with fresh noise."""

from dataclasses import dataclass

import torch

from voxelsigma.models.network import Network
from voxelsigma.noise.montecarlo import monte_carlo
from voxelsigma.noise.sigma import MapKind
from voxelsigma.noise.voxels import object_mask
from voxelsigma.training.compare import plane_of, sketched
from voxelsigma.training.examples import Example
from voxelsigma.training.metrics import correlation, normalized_error, object_error

ESTIMATOR = "sketch with control variate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    r"""How well two maps agree.

    Parameters
    ----------
    kind
        Which map: `complex`, or `magnitude` for a real reconstruction.
    correlation, normalized_error
        PCC and NRMSE (root mean square error over the reference's maximum) of the σ maps over the whole image, as the
        paper defines them.
    object_error
        :math:`\|a - b\| / \|b\|` inside the object.
    expected_error
        What the last should be for two unbiased estimates of so many probes and trials.
    probes, trials
        Of the sketch, and of the repetition.
    """

    kind: MapKind
    correlation: float
    normalized_error: float
    object_error: float
    expected_error: float
    probes: int
    trials: int


@torch.no_grad()
def agreement(network: Network, scan: Example, *, probes: int = 1000, trials: int = 3000, seed: int = 1) -> Agreement:
    r"""Compare the sketched σ map of one scan with the standard deviation over repetitions, at :math:`\alpha = 1`.

    Network and sketch are as pipelines have them, bound to the scan and with the control variate; the noise added in
    the repetitions is the scan's own. The map is the complex one, that of a real reconstruction the magnitude one.

    Parameters
    ----------
    network
        The network.
    scan
        One scan, without a batch axis.
    probes, trials
        S and N, both at least 2.
    seed
        Of both.

    Raises
    ------
    ValueError
        If there are fewer than 2 probes or trials, or the reconstruction cannot be linearised.
    """
    plane = plane_of(scan)
    linearization, state = sketched(network, scan, probes=probes, seed=seed)
    kind: MapKind = "complex" if linearization.value.is_complex() else "magnitude"
    found = state.map(kind)
    truth = monte_carlo(
        network.bind(plane),
        scan.kspace,
        plane.variance,
        trials,
        generator=torch.Generator().manual_seed(seed),
        kind=kind,
    )
    inside = object_mask(linearization.value)
    # both are random, and independent of each other
    spread = (found.relative_error().square() + truth.relative_error().square())[inside]
    weights = truth.sigma[inside].square()
    return Agreement(
        kind=kind,
        correlation=correlation(found.sigma, truth.sigma),
        normalized_error=normalized_error(found.sigma, truth.sigma),
        object_error=object_error(found.sigma, truth.sigma, inside),
        expected_error=float(((spread * weights).sum() / weights.sum()).sqrt()),
        probes=probes,
        trials=trials,
    )
