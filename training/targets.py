"""What a predictor is taught: from a few probes pushed through a reconstruction, what others say, scan by scan."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from voxelsigma.models.network import Network
from voxelsigma.models.predictor import FEATURES, KINDS, plane_features, probe_features
from voxelsigma.models.problem import PlaneProblem
from voxelsigma.models.surrogate_net import SurrogateNet
from voxelsigma.noise.linearize import linearize
from voxelsigma.noise.moments import projected
from voxelsigma.noise.probes import ProbeSource
from voxelsigma.noise.sigma import sigma_map
from voxelsigma.noise.sketch import Covariate, Sketch, Stopping, sketch
from voxelsigma.training.compare import plane_of
from voxelsigma.training.example import Example
from voxelsigma.training.stored import Layout, StoredScan, stored

Plane = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScanTarget(StoredScan):
    r"""One scan: what a predictor sees, and what a few probes say.

    Parameters
    ----------
    features
        Of `scan_features` and `probe_features`, shape `(FEATURES, y, x)`, float16.
    measured
        Of further probes: mean energies, of the in-phase component :math:`\overline{a^2}` and of the complex voxel
        :math:`\overline{|u|^2}`, shape `(kinds, y, x)`.
    freedom
        ν of either: S, and :math:`2S / (1 + |\kappa|^2)` with the circularity quotient κ, shape `(kinds, y, x)`.
    zero_filled
        Closed-form variance of the zero-filled image, shape `(y, x)`.
    first, probes
        Probes behind the features; S of those that are to be predicted.
    real
        Whether the reconstruction is real: then there is a magnitude map only.
    """

    layout: ClassVar[Layout] = {
        "features": ("float16", (FEATURES,)),
        "measured": ("float32", (len(KINDS),)),
        "freedom": ("float32", (len(KINDS),)),
        "zero_filled": ("float32", ()),
        "inside": ("bool", ()),
        "first": ("int64", None),
        "probes": ("int64", None),
        "real": ("bool", None),
    }
    features: NDArray[np.float16]
    measured: Plane
    freedom: Plane
    zero_filled: Plane
    first: int
    probes: int
    real: bool


@torch.no_grad()
def measure(
    network: Network,
    scan: Example,
    *,
    first: int,
    probes: int,
    seed: int,
    number: int = 0,
    surrogate: SurrogateNet | None = None,
) -> ScanTarget:
    """Sketch one scan twice: as a pipeline begins, for the features, and again, for what is to be predicted.

    Parameters
    ----------
    network
        The network, on the device of the scan.
    scan
        Without a batch axis.
    first, probes
        Of the two sketches, at least 2 each.
    seed, number
        Seed of the run and number of the scan in it: the probes follow from both.
    surrogate
        What makes the control variate of the first sketch, None for none.

    Raises
    ------
    ValueError
        If the reconstruction cannot be linearised, or what it gives is not finite.
    """
    plane = plane_of(scan)
    linearization = linearize(network.bind(plane), scan.kspace)
    real = not linearization.value.is_complex()
    covariate = plane.covariate(scan.kspace if real else None)

    of_scan = plane_features(plane, scan.kspace, linearization.value, covariate)
    learned = covariate
    if surrogate is not None:
        assert covariate.normal is not None
        stand_in = surrogate.surrogate(of_scan, covariate.normal)
        learned = replace(covariate, learned=stand_in)

    def sketched(place: int, count: int, known: Covariate | None) -> Sketch:
        source = probes_of(plane, scan, seed=seed, counters=(number, place))
        return sketch(linearization, source, Stopping(probes=count), covariate=known)

    of_probes = probe_features(sketched(1, first, learned), covariate.variance, real=real)
    found = sketched(2, probes, None)
    sums = found.sums
    energies = torch.stack([projected(sums.u_u, sums.u_abs, found.direction), sums.u_abs])
    in_phase = torch.full_like(sums.u_abs, sums.count)
    plain = sigma_map(sums, "complex", direction=found.direction)
    return ScanTarget(
        features=stored(torch.cat([of_scan, of_probes.to(of_scan.device)]), np.float16),
        measured=stored(energies.clamp_min(0) / sums.count),
        freedom=stored(torch.stack([in_phase, plain.degrees_of_freedom])),
        zero_filled=stored(covariate.variance),
        inside=found.inside.cpu().numpy(),
        first=first,
        probes=sums.count,
        real=real,
    )


def probes_of(plane: PlaneProblem, scan: Example, *, seed: int, counters: tuple[int, int]) -> ProbeSource:
    """Probes of a scan; what they are for is the last counter."""
    return ProbeSource(
        variance=plane.variance,
        coils=len(scan.kspace),
        seed=seed,
        counters=counters,
        device=scan.kspace.device,
        dtype=scan.kspace.dtype,
    )
