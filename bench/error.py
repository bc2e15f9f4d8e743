"""Error of both maps against the number of probes, for every estimator, against a converged reference.

The pushed probes of one long run are kept; a figure at S probes is the root mean square, over the object's voxels and
over all disjoint groups of S probes of that run, of the relative error of σ, less the reference's own variance. Every
group goes through `sketch` anew, which learns the covariate's filter from the group's first block. Monte Carlo gets
noise so weak that it estimates the same Jacobian, and the same regression on its deviations from the group's mean.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, cast, get_args

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from bench.networks import SHIPPED, Case, make_case
from bench.processes import ROOT, Call
from bench.roads import TRIAL_SCALE, trials
from voxelsigma.noise.linearize import Linearization, linearize
from voxelsigma.noise.probes import BLOCK_SIZE, ProbeSource
from voxelsigma.noise.sigma import MapKind
from voxelsigma.noise.sketch import Covariate, Sketch, Stopping, sketch
from voxelsigma.noise.voxels import object_mask

COUNTS: Final = (8, 16, 32, 64, 128, 256, 512)
FIT_FROM: Final = 16
REFERENCE_SEED, SEED = 10**6, 1
CACHE = ROOT / "bench" / "results"

COVARIATES: Mapping[str, Callable[[Case], Covariate | None]] = {
    "plain": lambda case: None,
    "zero-filled": lambda case: replace(case.plane.covariate(), filtered_variance=None),
    "learned filter": lambda case: case.plane.covariate(),
}
"""Control variates, by the name of their column. Both the sketch and Monte Carlo get each."""


def calls(
    *, accelerations: Sequence[float], probes: int, reference: int, data: str | None, network: str = SHIPPED, size: int
) -> list[Call]:
    """One process an acceleration."""
    common = {"probes": probes, "reference": reference, "data": data, "network": network, "size": size}
    return [
        Call(target="bench.error:measure", arguments={**common, "acceleration": acceleration})
        for acceleration in accelerations
    ]


def measure(
    acceleration: float, probes: int, reference: int, data: str | None, network: str, size: int
) -> dict[str, Any]:
    """Errors of all estimators on one scan.

    Parameters
    ----------
    acceleration
        R of the 2D random mask.
    probes, reference
        Probes (and trials) of the run, and of the reference.
    data
        Folder with the held-out head; None for the phantom.
    network, size
        The network, and the side of the matrix.
    """
    case = make_case(network, (size, size), acceleration=acceleration, data=data)
    with torch.no_grad():
        linearization = linearize(case.reconstruction, case.kspace)
        inside = object_mask(linearization.value)
        true = _reference(case, reference)
        covariate = case.plane.covariate()
        runs = {
            "sketch": _pushed(case, linearization.push, covariate, probes),
            "Monte Carlo": _repeated(case, linearization.value, covariate, probes),
        }
        counts = [count for count in COUNTS if count <= probes]
        curves: dict[str, dict[str, dict[str, float]]] = {}
        for method, run in runs.items():
            for name, make in COVARIATES.items():
                kinds: dict[str, dict[str, float]] = {kind: {} for kind in get_args(MapKind)}
                curves[f"{method}, {name}"] = kinds
                for count in counts:
                    groups = list(_groups(run, linearization.value, make(case), count))
                    for kind in get_args(MapKind):
                        kinds[kind][str(count)] = _error(groups, kind, true[kind], inside)
    return {
        "network": network,
        "matrix": [size, size],
        "acceleration": acceleration,
        "reached_acceleration": case.plane.acceleration(),
        "scan": case.scan,
        "voxels": int(inside.sum()),
        "reference_probes": reference,
        "reference_error": {kind: true[kind].own for kind in true},
        "probes": probes,
        "curves": curves,
        "constants": {name: {kind: constant(curve) for kind, curve in kinds.items()} for name, kinds in curves.items()},
    }


def constant(curve: Mapping[str, float]) -> float | None:
    r"""Constant c of the error :math:`c/\sqrt S`: geometric mean of error · √S from `FIT_FROM` on."""
    kept = [math.log(error * int(count) ** 0.5) for count, error in curve.items() if int(count) >= FIT_FROM and error]
    return math.exp(sum(kept) / len(kept)) if kept else None


@dataclass(frozen=True, slots=True)
class Run:
    """Images u of probes or trials, and zero-filled images w of the same noise, `(probes, y, x)`.

    The mean of trials is not known to be 0: deviations from it are worth one observation less.
    """

    images: Tensor
    covariates: Tensor
    centred: bool = False


class Places:
    """Stands for the probes of a group: in place of noise it draws where in the group they are."""

    def blocks(self, start: int, stop: int) -> Iterator[Tensor]:
        for number in range(start, stop):
            yield BLOCK_SIZE * number + torch.arange(BLOCK_SIZE)


@dataclass(frozen=True, slots=True)
class Reference:
    """A converged map, and its own relative error inside the object, root mean square."""

    sigma: Tensor
    own: float


def _pushed(case: Case, push: Callable[[Tensor], Tensor], covariate: Covariate, probes: int) -> Run:
    pairs = [(push(batch), covariate.push(batch)) for batch in case.source(SEED).blocks(0, probes // BLOCK_SIZE)]
    return Run(torch.cat([images for images, _ in pairs]), torch.cat([covariates for _, covariates in pairs]))


def _repeated(case: Case, value: Tensor, covariate: Covariate, probes: int) -> Run:
    pairs = [
        ((image - value) / TRIAL_SCALE, covariate.push(noise.unsqueeze(0))[0])
        for image, noise in trials(case, probes, torch.Generator().manual_seed(SEED))
    ]
    return Run(torch.stack([image for image, _ in pairs]), torch.stack([linear for _, linear in pairs]), centred=True)


def _groups(run: Run, value: Tensor, covariate: Covariate | None, count: int) -> Iterator[Sketch]:
    """What `sketch` makes of every disjoint group of `count` probes."""
    for start in range(0, len(run.images) - count + 1, count):
        part = slice(start, start + count)
        images, covariates = run.images[part], run.covariates[part]
        if run.centred:
            images, covariates = images - images.mean(dim=0), covariates - covariates.mean(dim=0)
        known = covariate and replace(covariate, push=covariates.__getitem__)
        found = sketch(
            Linearization(value, images.__getitem__),
            cast(ProbeSource, Places()),
            Stopping(probes=count),
            covariate=known,
            chunk=BLOCK_SIZE,
        )
        yield replace(found, sums=replace(found.sums, count=count - 1)) if run.centred else found


def _error(groups: Sequence[Sketch], kind: MapKind, true: Reference, inside: Tensor) -> float:
    """Root mean square relative error of some maps."""
    squares = [float((group.map(kind).sigma / true.sigma - 1)[inside].square().mean()) for group in groups]
    return math.sqrt(max(0.0, sum(squares) / len(squares) - true.own**2))


def _reference(case: Case, probes: int) -> dict[MapKind, Reference]:
    """Converged maps of both kinds, ours with the control variate, kept for the next run."""
    path = CACHE / f"reference_{_fingerprint(case)}_{probes}.npz"
    if not path.is_file():
        linearization = linearize(case.reconstruction, case.kspace)
        seen = sketch(
            linearization, case.source(REFERENCE_SEED), Stopping(probes=probes), covariate=case.plane.covariate()
        )
        inside = object_mask(linearization.value)
        kept: dict[str, Any] = {}
        for kind in get_args(MapKind):
            found = seen.map(kind)
            kept[kind] = found.sigma.numpy()
            kept[f"{kind}_own"] = float(found.relative_error()[inside].square().mean().sqrt())
        path.parent.mkdir(exist_ok=True)
        np.savez(path, **kept)
    with np.load(path) as kept_before:
        return {
            kind: Reference(torch.from_numpy(kept_before[kind]), float(kept_before[f"{kind}_own"]))
            for kind in get_args(MapKind)
        }


def _fingerprint(case: Case) -> str:
    """Of the data and of what the network makes of them."""
    image = case.reconstruction(case.kspace)
    # what another machine's rounding changes is no other image
    rounded = torch.view_as_real(image / image.abs().max()).mul(1e3).round().to(torch.int32)
    digest = hashlib.sha256(case.kspace.numpy().tobytes() + rounded.numpy().tobytes())
    return digest.hexdigest()[:16]


def tables(entries: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Error of each estimator against the count, for every scan and kind of map."""
    found = []
    for entry in entries:
        for kind in get_args(MapKind):
            counts = list(entry["curves"]["sketch, plain"][kind])
            table = Table(
                title=f"Error of the {kind} map, {entry['network']}, {entry['scan']}, {entry['matrix'][0]}², 2D random "
                f"R = {entry['acceleration']:g}; reference {entry['reference_probes']} probes"
            )
            for column in ("estimator", *(f"S = {count}" for count in counts), "x √S"):
                table.add_column(column, justify="left" if column == "estimator" else "right")
            plain = entry["curves"]["sketch, plain"][kind]
            for name, kinds in entry["curves"].items():
                cells = [f"{100 * error:.1f} %" for error in kinds[kind].values()]
                fitted = entry["constants"][name][kind]
                table.add_row(name, *cells, "" if fitted is None else f"{fitted:.3f}")
                if name.startswith("sketch") and name != "sketch, plain":
                    ratios = [f"{kinds[kind][count] / plain[count]:.2f}" for count in counts]
                    table.add_row("  of plain", *ratios, "")
            found.append(table)
    return found
