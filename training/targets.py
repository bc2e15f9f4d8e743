"""What a predictor is taught: the sums of a few probes pushed through a reconstruction, scan by scan."""

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from voxelsigma.formats.atomic import unwritable, whole_file
from voxelsigma.models.network import Network
from voxelsigma.models.predictor import FEATURES, KINDS, PARTS, scan_features
from voxelsigma.models.problem import PlaneProblem
from voxelsigma.noise.certificate import RegionEnergies, regions
from voxelsigma.noise.linearize import Linearization, linearize
from voxelsigma.noise.moments import projected
from voxelsigma.noise.probes import ProbeSource
from voxelsigma.noise.sigma import MapKind, SigmaMap, sigma_map
from voxelsigma.noise.sketch import Covariate, Sketch, Stopping, sketch
from voxelsigma.noise.voxels import object_mask, phase_factor
from voxelsigma.training.compare import plane_of
from voxelsigma.training.example import Example

Plane = NDArray[np.float32]
TargetT = TypeVar("TargetT", bound="ScanTarget")

_STORED: Final[Mapping[str, tuple[str, tuple[int, ...] | None]]] = {
    # type, and axes before (y, x); None for a number
    "features": ("float16", (FEATURES,)),
    "measured": ("float32", (len(KINDS),)),
    "freedom": ("float32", (len(KINDS),)),
    "zero_filled": ("float32", ()),
    "inside": ("bool", ()),
    "probes": ("int64", None),
    "real": ("bool", None),
    "found": ("float32", (len(KINDS),)),
    "found_freedom": ("float32", (len(KINDS),)),
    "together": ("float64", None),
}
_DAMAGES = (ValueError, KeyError, EOFError, OSError, MemoryError, NotImplementedError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScanTarget:
    r"""One scan: what a predictor sees, and what a few probes say.

    Parameters
    ----------
    features
        Of `scan_features`, shape `(FEATURES, y, x)`, float16.
    measured
        Mean energies over the probes, of the in-phase component :math:`\overline{a^2}` and of the complex voxel
        :math:`\overline{|u|^2}`, shape `(kinds, y, x)`.
    freedom
        ν of either: S, and :math:`2S / (1 + |\kappa|^2)` with the circularity quotient κ, shape `(kinds, y, x)`.
    zero_filled
        Closed-form variance of the zero-filled image, shape `(y, x)`.
    inside
        Voxels of the object, shape `(y, x)`.
    probes
        S.
    real
        Whether the reconstruction is real: then there is a magnitude map only.
    """

    features: NDArray[np.float16]
    measured: Plane
    freedom: Plane
    zero_filled: Plane
    inside: NDArray[np.bool_]
    probes: int
    real: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Matrix `(y, x)`."""
        return self.inside.shape[0], self.inside.shape[1]

    def save(self, path: Path) -> None:
        """Write it as `.npz`, whole or not at all."""
        _save(path, self)

    @classmethod
    def load(cls: type[TargetT], path: Path) -> TargetT:
        """Read it back.

        Raises
        ------
        ValueError
            If the file is missing or damaged, with its name.
        """
        return cls(**_load(path, [one.name for one in fields(cls)]))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CheckTarget(ScanTarget):
    """A scan with two independent halves of probes; what `ScanTarget` holds is of the second.

    Parameters
    ----------
    found, found_freedom
        σ and degrees of freedom of the maps that the first half gives with the control variate, `(kinds, y, x)`.
    together
        A, voxels whose energies fluctuate together, from the first half.
    """

    found: Plane
    found_freedom: Plane
    together: float

    def first(self, kind: MapKind) -> SigmaMap:
        """The first half's map of a kind, float64."""
        place = KINDS.index(kind)
        sigma = torch.from_numpy(self.found[place]).double()
        return SigmaMap(
            sigma=sigma,
            degrees_of_freedom=torch.from_numpy(self.found_freedom[place]).double(),
            kind=kind,
            probes=self.probes,
            explained=torch.zeros_like(sigma),
        )


@torch.no_grad()
def measure(network: Network, scan: Example, *, probes: int, seed: int, number: int = 0) -> ScanTarget:
    """Sketch one scan.

    Parameters
    ----------
    network
        The network, on the device of the scan.
    scan
        Without a batch axis.
    probes
        S, at least 2.
    seed, number
        Seed of the run and number of the scan in it: the probes follow from both.

    Raises
    ------
    ValueError
        If the reconstruction cannot be linearised, or what it gives is not finite.
    """
    bound = _bound(network, scan)
    return ScanTarget(**_arrays(bound, _sketched(bound, Stopping(probes=probes), (seed, number, 0))))


@torch.no_grad()
def measure_twice(network: Network, scan: Example, *, probes: int, seed: int, number: int = 0) -> CheckTarget:
    """Sketch one scan twice, first as a pipeline does; parameters as of `measure`, probes those of each sketch."""
    bound, stopping = _bound(network, scan), Stopping(probes=probes)
    energies = RegionEnergies(
        regions(object_mask(bound.linearization.value)),
        # whatever is near the prediction: A is pooled over ratios
        bound.covariate.variance * PARTS["magnitude"],
        phase_factor(bound.linearization.value),
    )
    first = _sketched(bound, stopping, (seed, number, 1), covariate=bound.covariate, keep=energies.add)
    maps = [first.map(kind) for kind in KINDS]
    return CheckTarget(
        **_arrays(bound, _sketched(bound, stopping, (seed, number, 2))),
        found=_stored(torch.stack([one.sigma for one in maps])),
        found_freedom=_stored(torch.stack([one.degrees_of_freedom for one in maps])),
        together=energies.certificate().together,
    )


@dataclass(frozen=True, slots=True)
class _Bound:
    """A network bound to a scan, at the scan's data."""

    kspace: Tensor
    plane: PlaneProblem
    linearization: Linearization
    covariate: Covariate


def _bound(network: Network, scan: Example) -> _Bound:
    plane = plane_of(scan)
    linearization = linearize(network.bind(plane), scan.kspace)
    covariate = plane.covariate(None if linearization.value.is_complex() else scan.kspace)
    return _Bound(scan.kspace, plane, linearization, covariate)


def _sketched(bound: _Bound, stopping: Stopping, key: tuple[int, int, int], **more: Any) -> Sketch:
    """A sketch with probes of (seed, number of the scan, number of the sketch)."""
    kspace = bound.kspace
    source = ProbeSource(
        variance=bound.plane.variance,
        coils=len(kspace),
        seed=key[0],
        counters=key[1:],
        device=kspace.device,
        dtype=kspace.dtype,
    )
    return sketch(bound.linearization, source, stopping, **more)


def _arrays(bound: _Bound, found: Sketch) -> dict[str, Any]:
    """The fields of a `ScanTarget`."""
    covariate, sums, image = bound.covariate, found.sums, bound.linearization.value
    assert covariate.correlation is not None
    sampled = bound.plane.cropped_weights(bound.plane.windows(symmetric=True)) > 0
    features = scan_features(
        image,
        covariate.push(bound.kspace.unsqueeze(0))[0],
        covariate.variance,
        covariate.correlation,
        float(sampled.float().mean()),
    )
    energies = torch.stack([projected(sums.u_u, sums.u_abs, found.direction), sums.u_abs])
    plain = [sigma_map(sums, kind, direction=found.direction) for kind in KINDS]
    in_phase = torch.full_like(sums.u_abs, sums.count)
    return {
        "features": _stored(features, np.float16),
        "measured": _stored(energies.clamp_min(0) / sums.count),
        "freedom": _stored(torch.stack([in_phase, plain[1].degrees_of_freedom])),
        "zero_filled": _stored(covariate.variance),
        "inside": found.inside.cpu().numpy(),
        "probes": sums.count,
        "real": not image.is_complex(),
    }


def _stored(values: Tensor, kind: DTypeLike = np.float32) -> NDArray[Any]:
    """Values as they are stored."""
    stored = values.cpu().numpy().astype(kind)
    if not np.isfinite(stored).all():
        raise ValueError("the scan's features or σ are not finite, or too large to be stored")
    return stored


def _save(path: Path, target: ScanTarget) -> None:
    with whole_file(path) as partial:
        try:
            with partial.open("wb") as file:
                np.savez(file, **{one.name: getattr(target, one.name) for one in fields(target)})
        except OSError as error:
            raise unwritable(path, error) from error


def _load(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """The fields of a target, checked."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            found = {name: file[name] for name in names}
        plane = found["inside"].shape
        for name, values in found.items():
            kind, leading = _STORED[name]
            wanted = () if leading is None else (*leading, *plane)
            if values.dtype != kind or values.shape != wanted or not np.isfinite(values).all():
                raise ValueError(f"{name!r} is {values.dtype} of shape {values.shape}, or not finite")
        if len(plane) != 2:
            raise ValueError(f"the matrix is {plane}")
    except _DAMAGES as error:
        raise ValueError(f"{path}: damaged ({' '.join(str(error).split()) or type(error).__name__})") from None
    return {name: values if values.ndim else values.item() for name, values in found.items()}
