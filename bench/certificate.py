"""Print what the test of a prediction finds: `python -m bench.certificate [CARD]`.

Held-out heads, 8 coils, SNR 20, R = 4, 6, 8. Right predictions are the reference maps, magnitude and complex, and those
with every voxel off by 10 % at random; wrong ones are reference maps of other networks, of the same head at another
acceleration, of another slice, and the right ones with one region off by 20 to 100 %. Each is tested with 16 probes
(`RegionEnergies.certificate`, both maps). How far the worse of the two is off in its worst region follows from the
reference: within the tolerance it must be kept, beyond 30 % found. Figures go to `bench/results/certificate.json`.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.instant import ACCELERATIONS, JUDGED_AT, MATRIX, WRONG, Case, head_case, worst_region
from bench.networks import data_folder
from bench.processes import ROOT
from voxelsigma.models.cards import load_card, load_model
from voxelsigma.models.network import Network
from voxelsigma.models.predictor import KINDS
from voxelsigma.noise.certificate import TOLERANCE, RegionEnergies, regions
from voxelsigma.noise.fusion import measured_variance
from voxelsigma.noise.linearize import Linearization, linearize
from voxelsigma.noise.probes import ProbeSource
from voxelsigma.noise.sigma import MapKind
from voxelsigma.noise.sketch import Covariate, Sketch, Stopping, sketch
from voxelsigma.noise.voxels import object_mask, phase_factor
from voxelsigma.training.held_out import HELD_OUT
from voxelsigma.training.volumes import Volume, load_volumes

OTHERS: Final = ("unrolled_n2r", "unrolled_ssdu")
OFF: Final = (1.2, 1.35, 1.5, 2.0)
REFERENCE: Final = 128

Variances: TypeAlias = Mapping[MapKind, Tensor]

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Told:
    """One prediction: its kind, how far its worst region is off as a relative error of σ, and whether it was kept."""

    kind: str
    worst: float
    kept: bool


@torch.no_grad()
def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("card", nargs="?", default="unrolled_small")
    parser.add_argument("--slices", type=int, default=8, help="of each acceleration")
    parser.add_argument("--repeats", type=int, default=6, help="sets of probes for each prediction")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "certificate.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = data_folder()
    if folder is None:
        raise SystemExit("bench.certificate: needs the held-out heads; VOXELSIGMA_TEST_DATA names their folder")
    volumes, console = load_volumes(Path(folder), only=HELD_OUT), Console(width=120)
    found: list[Told] = []
    for acceleration in ACCELERATIONS:
        for number in range(options.slices):
            found += told_of(options.card, volumes, acceleration, number, options.repeats)
            console.print(f"R={acceleration:g}: {number + 1}/{options.slices} slices", style="dim")
    console.print(table(found))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps([[one.kind, one.worst, one.kept] for one in found]) + "\n", encoding="utf-8")


def told_of(card: str, volumes: Sequence[Volume], acceleration: float, number: int, repeats: int) -> Iterator[Told]:
    """Every prediction of one slice, tested with several sets of probes."""
    case = head_case(_network(card), volumes, acceleration, MATRIX, number)
    linearization, covariate = _linearized(case)
    inside, direction = object_mask(linearization.value), phase_factor(linearization.value)
    truth = _both(_sketched(case, linearization, covariate, REFERENCE, seed=1))
    labels, scale = regions(inside), covariate.variance
    predictions = list(_predictions(card, volumes, acceleration, number, truth, labels))
    for repeat in range(repeats):
        energies = RegionEnergies(labels, scale, direction)
        for block in _source(case, seed=100 + repeat).blocks(0, JUDGED_AT // 8):
            energies.add(linearization.push(block))
        for name, said in predictions:
            worst = max(worst_region(said[kind], truth[kind], labels, scale) for kind in KINDS)
            yield Told(name, worst, all(energies.certificate(said[kind], kind=kind).passed for kind in KINDS))


def _predictions(
    card: str, volumes: Sequence[Volume], acceleration: float, number: int, truth: Variances, labels: Tensor
) -> Iterator[tuple[str, Variances]]:
    """Variances that are said to be this slice's."""
    rng = np.random.default_rng([int(acceleration), number])
    for error in (0.0, 0.1):
        scatter = torch.from_numpy(np.exp(2 * error * rng.standard_normal(labels.shape)))
        yield f"right, voxels off by {100 * error:g} %", {kind: one * scatter for kind, one in truth.items()}
    for name in OTHERS:
        yield "another network", _maps_of(head_case(_network(name), volumes, acceleration, MATRIX, number))
    yield "another acceleration", _maps_of(head_case(_network(card), volumes, 2.0, MATRIX, number))
    yield "another slice", _maps_of(head_case(_network(card), volumes, acceleration, MATRIX, number + 1))
    for factor in OFF:
        off = torch.where(labels == int(rng.integers(int(labels.max()) + 1)), factor**2, 1.0)
        yield f"one region off by {100 * (factor - 1):.0f} %", {kind: one * off for kind, one in truth.items()}


def _network(name: str) -> Network:
    network = load_model(load_card(name), _CPU)
    assert isinstance(network, Network)
    return network


def _linearized(case: Case) -> tuple[Linearization, Covariate]:
    return linearize(case.network.bind(case.plane), case.kspace), case.plane.covariate()


def _maps_of(case: Case) -> Variances:
    linearization, covariate = _linearized(case)
    return _both(_sketched(case, linearization, covariate, REFERENCE // 2, seed=2))


def _both(found: Sketch) -> Variances:
    return {kind: measured_variance(found.map(kind)) for kind in KINDS}


def _source(case: Case, seed: int) -> ProbeSource:
    return ProbeSource(variance=case.plane.variance, coils=len(case.kspace), seed=seed)


def _sketched(case: Case, linearization: Linearization, covariate: Covariate, probes: int, *, seed: int) -> Sketch:
    return sketch(linearization, _source(case, seed), Stopping(probes=probes), covariate=covariate)


def table(found: Sequence[Told]) -> Table:
    """How many were kept, by kind; false alarms and what was missed."""
    made = Table(title=f"predictions tested with {JUDGED_AT} probes")
    for column in ("prediction", "tests", "worst region off by", "dropped", "off > 30 %: found", "off < 15 %: dropped"):
        made.add_column(column, justify="right")
    for kind in [*dict.fromkeys(one.kind for one in found), "all"]:
        chosen = [one for one in found if kind in ("all", one.kind)]
        low, high = min(one.worst for one in chosen), max(one.worst for one in chosen)
        wrong = [not one.kept for one in chosen if one.worst > WRONG]
        right = [not one.kept for one in chosen if one.worst <= TOLERANCE]
        dropped = f"{sum(not one.kept for one in chosen)}"
        made.add_row(
            kind, f"{len(chosen)}", f"{100 * low:.0f}-{100 * high:.0f} %", dropped, _share(wrong), _share(right)
        )
    return made


def _share(answers: Sequence[bool]) -> str:
    return f"{sum(answers)} of {len(answers)}" if answers else "-"


if __name__ == "__main__":
    main()
