"""Print what a prediction saves: `python -m bench.instant`.

Held-out heads, 8 coils, SNR 20, masks along two axes: σ error of the plain sketch, of the control variate, and of what
the predictor makes of the same probes, against the number of probes; and the time to 5 % and to 3 %. The error is the
root mean square over the object, relative, against a reference of its own probes, whose variance is taken off. The
figures go to `bench/results/instant.json`.
"""

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from bench.networks import COILS, SNR, data_folder
from bench.processes import ROOT
from voxelsigma.models.cards import load_card, load_model
from voxelsigma.models.network import Network
from voxelsigma.models.predictor import KINDS, SigmaPredictor, plane_features, probe_features
from voxelsigma.models.predictor_file import load_predictor
from voxelsigma.noise.certificate import RegionEnergies, regions
from voxelsigma.noise.instant import PREDICTED_AT, Instant, Priors
from voxelsigma.noise.linearize import linearize
from voxelsigma.noise.moments import Moments
from voxelsigma.noise.probes import ProbeSource
from voxelsigma.noise.sigma import MapKind, SigmaMap
from voxelsigma.noise.sketch import Sketch, Stopping, sketch
from voxelsigma.noise.voxels import object_mask, phase_factor
from voxelsigma.training.compare import plane_of
from voxelsigma.training.example import Example
from voxelsigma.training.held_out import HELD_OUT, Setting, held_out_slices
from voxelsigma.training.volumes import load_volumes

COUNTS: Final = (8, 16, 32, 64, 128, 256)
ROADS: Final = ("plain", "control variate", "instant")
TARGETS: Final = (0.05, 0.03)
MATRIX: Final = 96
REFERENCE: Final = 768


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cards", nargs="*", default=["unrolled_small", "modl_small"])
    parser.add_argument("--slices", type=int, default=4, help="of each acceleration")
    parser.add_argument("-R", "--acceleration", type=float, nargs="*", default=[4.0, 6.0, 8.0])
    parser.add_argument("--reference", type=int, default=REFERENCE, help="probes of the reference")
    options = parser.parse_args()
    folder = data_folder()
    if folder is None:
        raise SystemExit("bench.instant: needs the held-out heads; VOXELSIGMA_TEST_DATA names their folder")
    torch.set_num_threads(1)
    volumes = load_volumes(Path(folder), only=HELD_OUT)
    console, found = Console(width=140), []
    for name in options.cards:
        card = load_card(name)
        network, predictor = load_model(card, torch.device("cpu")), load_predictor(card, torch.device("cpu"))
        if predictor is None or not isinstance(network, Network):
            raise SystemExit(f"bench.instant: {name} has no predictor; `voxelsigma distill` makes one")
        for acceleration in options.acceleration:
            setting = Setting(mask="random_2d", acceleration=acceleration, matrix=MATRIX, snr=SNR)
            scans = held_out_slices(volumes, setting.examples(), slices=options.slices, seed=3)
            told = track(scans, description=f"{name} R={acceleration:g}", console=Console(stderr=True))
            rows = [one_scan(network, predictor, scan, seed, options.reference) for seed, scan in enumerate(told)]
            found.append({"network": name, "acceleration": acceleration, **pooled(rows)})
            for kind in KINDS:
                console.print(table(found[-1], kind))
    target = ROOT / "bench" / "results" / "instant.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def one_scan(network: Network, predictor: SigmaPredictor, scan: Example, seed: int, reference: int) -> dict[str, Any]:
    """Squared errors, coverage and seconds of one scan: by kind and road, a value for each count."""
    plane = plane_of(scan)
    start = time.perf_counter()
    linearization = linearize(network.bind(plane), scan.kspace)
    covariate = plane.covariate()
    of_scan = plane_features(plane, scan.kspace, linearization.value, covariate)
    once = time.perf_counter() - start
    source = ProbeSource(variance=plane.variance, coils=COILS, seed=seed)
    inside = object_mask(linearization.value)
    energies = RegionEnergies(regions(inside), covariate.variance, phase_factor(linearization.value))
    maps: dict[tuple[MapKind, str], list[SigmaMap]] = {(kind, road): [] for kind in KINDS for road in ROADS}
    passed: list[bool] = []
    seconds: list[float] = []
    asked: list[float] = []
    last: list[tuple[Priors, Moments]] = []
    spent = [0.0, time.perf_counter()]

    def look(state: Sketch) -> bool:
        spent[0] += time.perf_counter() - spent[1]
        if state.sums.count in COUNTS:
            begun = time.perf_counter()
            if state.sums.count in PREDICTED_AT:
                features = torch.cat([of_scan, probe_features(state, covariate.variance)])
                last[:] = [(predictor.predict(features, covariate.variance), state.sums.copy())]
            priors, before = last[0]
            certificate = energies.certificate(priors["magnitude"].variance)
            found = Instant(sketch=state, certificate=certificate, priors=priors, before=before)
            asked.append(time.perf_counter() - begun)
            seconds.append(once + spent[0] + sum(asked))
            passed.append(certificate.passed)
            for kind in KINDS:
                maps[kind, "plain"].append(replace(state, covariate_variance=None).map(kind))
                maps[kind, "control variate"].append(state.map(kind))
                maps[kind, "instant"].append(found.map(kind))
        spent[1] = time.perf_counter()
        return False

    sketch(linearization, source, Stopping(probes=COUNTS[-1]), covariate=covariate, keep=energies.add, enough=look)
    others = replace(source, seed=10_000 + seed)
    truth = sketch(linearization, others, Stopping(probes=reference), covariate=covariate)
    result: dict[str, Any] = {"seconds": seconds, "passed": passed, "squares": {}, "covered": {}}
    for kind in KINDS:
        known = truth.map(kind)
        own_part = float(known.relative_error()[inside].square().mean())
        for road in ROADS:
            result["squares"][f"{kind} {road}"] = [
                float((one.sigma / known.sigma - 1)[inside].square().mean()) - own_part for one in maps[kind, road]
            ]
            result["covered"][f"{kind} {road}"] = [coverage(one, known, inside) for one in maps[kind, road]]
    return result


def coverage(found: SigmaMap, known: SigmaMap, inside: Tensor) -> float:
    """Share of the object whose reference lies in the 95 % interval; the reference's own error counts against it."""
    low, high = found.interval()
    return float(((low <= known.sigma) & (known.sigma <= high))[inside].double().mean())


def pooled(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Root mean square errors over the scans, means of the rest, and the time to every target."""

    def mean(of: Sequence[Sequence[float]]) -> list[float]:
        return [float(value) for value in np.mean(of, axis=0)]

    seconds = [float(value) for value in np.median([row["seconds"] for row in rows], axis=0)]
    errors = {
        name: [max(value, 0.0) ** 0.5 for value in mean([row["squares"][name] for row in rows])]
        for name in rows[0]["squares"]
    }
    return {
        "scans": len(rows),
        "counts": list(COUNTS),
        "seconds": seconds,
        "errors": errors,
        "covered": {name: mean([row["covered"][name] for row in rows]) for name in rows[0]["covered"]},
        "passed": mean([row["passed"] for row in rows]),
        "time_to": {
            name: {f"{target:g}": time_to(target, found, seconds) for target in TARGETS}
            for name, found in errors.items()
        },
    }


def time_to(target: float, errors: Sequence[float], seconds: Sequence[float]) -> float | None:
    """Seconds to an error: between two counts on straight lines in logarithms; before the first, that one's."""
    for place, error in enumerate(errors):
        if error <= target:
            if place == 0:
                return seconds[0]
            (x0, x1), (y0, y1) = np.log(seconds[place - 1 : place + 1]), np.log(errors[place - 1 : place + 1])
            return float(np.exp(x0 + (np.log(target) - y0) * (x1 - x0) / (y1 - y0)))
    # beyond the last count errors fall with the root of the probes
    return seconds[-1] * (errors[-1] / target) ** 2


def table(found: Mapping[str, Any], kind: MapKind) -> Table:
    """Errors, coverage and times of one kind of map."""
    title = f"{found['network']}, R={found['acceleration']:g}, {kind}"
    made = Table(title=f"{title}; error in % (covered by the 95 % interval)")
    for column in ("road", *(f"{count}" for count in found["counts"]), *(f"s to {100 * one:g} %" for one in TARGETS)):
        made.add_column(column, justify="right")
    for row in rows_of(found, kind):
        made.add_row(*row)
    return made


def rows_of(found: Mapping[str, Any], kind: MapKind) -> Iterator[list[str]]:
    """The table's cells."""
    for road in ROADS:
        name = f"{kind} {road}"
        yield [
            road,
            *(
                f"{100 * error:.1f} ({100 * covered:.0f})"
                for error, covered in zip(found["errors"][name], found["covered"][name], strict=True)
            ),
            *(f"{found['time_to'][name][f'{target:g}']:.1f}" for target in TARGETS),
        ]
    yield ["passed", *(f"{100 * share:.0f} %" for share in found["passed"]), *[""] * len(TARGETS)]


if __name__ == "__main__":
    main()
