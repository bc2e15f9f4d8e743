"""What a predictor is taught: from a few probes pushed through a reconstruction, what others say, scan by scan."""

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from voxelsigma.formats.atomic import unwritable, whole_file
from voxelsigma.models.network import Network
from voxelsigma.models.predictor import FEATURES, KINDS, plane_features, probe_features
from voxelsigma.noise.linearize import linearize
from voxelsigma.noise.moments import projected
from voxelsigma.noise.probes import ProbeSource
from voxelsigma.noise.sigma import sigma_map
from voxelsigma.noise.sketch import Covariate, Sketch, Stopping, sketch
from voxelsigma.training.compare import plane_of
from voxelsigma.training.example import Example

Plane = NDArray[np.float32]

_STORED: Final[Mapping[str, tuple[str, tuple[int, ...] | None]]] = {
    # type, and axes before (y, x); None for a number
    "features": ("float16", (FEATURES,)),
    "measured": ("float32", (len(KINDS),)),
    "freedom": ("float32", (len(KINDS),)),
    "zero_filled": ("float32", ()),
    "inside": ("bool", ()),
    "first": ("int64", None),
    "probes": ("int64", None),
    "real": ("bool", None),
}
_DAMAGES = (ValueError, KeyError, EOFError, OSError, MemoryError, NotImplementedError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScanTarget:
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
    inside
        Voxels of the object, shape `(y, x)`.
    first, probes
        Probes behind the features; S of those that are to be predicted.
    real
        Whether the reconstruction is real: then there is a magnitude map only.
    """

    features: NDArray[np.float16]
    measured: Plane
    freedom: Plane
    zero_filled: Plane
    inside: NDArray[np.bool_]
    first: int
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
    def load(cls, path: Path) -> "ScanTarget":
        """Read it back.

        Raises
        ------
        ValueError
            If the file is missing or damaged, with its name.
        """
        return cls(**_load(path, [one.name for one in fields(cls)]))


@torch.no_grad()
def measure(network: Network, scan: Example, *, first: int, probes: int, seed: int, number: int = 0) -> ScanTarget:
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

    Raises
    ------
    ValueError
        If the reconstruction cannot be linearised, or what it gives is not finite.
    """
    plane = plane_of(scan)
    linearization = linearize(network.bind(plane), scan.kspace)
    real = not linearization.value.is_complex()
    covariate = plane.covariate(scan.kspace if real else None)

    def sketched(place: int, count: int, known: Covariate | None) -> Sketch:
        source = ProbeSource(
            variance=plane.variance,
            coils=len(scan.kspace),
            seed=seed,
            counters=(number, place),
            device=scan.kspace.device,
            dtype=scan.kspace.dtype,
        )
        return sketch(linearization, source, Stopping(probes=count), covariate=known)

    of_scan = plane_features(plane, scan.kspace, linearization.value, covariate)
    of_probes = probe_features(sketched(1, first, covariate), covariate.variance, real=real)
    found = sketched(2, probes, None)
    sums = found.sums
    energies = torch.stack([projected(sums.u_u, sums.u_abs, found.direction), sums.u_abs])
    in_phase = torch.full_like(sums.u_abs, sums.count)
    plain = sigma_map(sums, "complex", direction=found.direction)
    return ScanTarget(
        features=_stored(torch.cat([of_scan, of_probes.to(of_scan.device)]), np.float16),
        measured=_stored(energies.clamp_min(0) / sums.count),
        freedom=_stored(torch.stack([in_phase, plain.degrees_of_freedom])),
        zero_filled=_stored(covariate.variance),
        inside=found.inside.cpu().numpy(),
        first=first,
        probes=sums.count,
        real=real,
    )


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
