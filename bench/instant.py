"""Print what a prediction saves: `python -m bench.instant CARD`.

Scans of held-out heads, 8 coils, SNR 20, masks along two axes, R = 4, 6, 8: σ error of the plain sketch, of the control
variate, and of what pipelines make of a prediction and the same probes, against the number of probes; the time to 5 %
and to 3 %; and how many scans keep the prediction. Then scans elsewhere: more acceleration than it was made for, lines
alone on another matrix with more coils, a phantom, another network; `--brains` adds measured ones.

Errors are root mean squares over the object, relative, against a reference of its own probes, whose variance is taken
off; the 95 % interval is that of the quotient of two estimates, so that the reference's error does not count. Every
road pays for what it needs alone: the plain sketch for no covariate, nobody else for the prediction. Figures go to
`bench/results/instant.json`; `python -m bench.instant_picture` draws them.
"""

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import scipy.stats
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.brains import full_scan, poisson_scan
from bench.networks import SHIPPED, SNR, data_folder, make_case
from bench.processes import ROOT
from bench.recorded import Recorded, sketched
from voxelsigma.models.cards import ModelCard, load_card, load_model
from voxelsigma.models.network import Network
from voxelsigma.models.predictor import KINDS, SigmaPredictor, plane_features, probe_features
from voxelsigma.models.predictor_file import load_predictor
from voxelsigma.models.problem import PlaneProblem
from voxelsigma.noise.certificate import TOLERANCE, RegionEnergies, regions
from voxelsigma.noise.fusion import measured_variance
from voxelsigma.noise.instant import Judge, Priors
from voxelsigma.noise.linearize import linearize
from voxelsigma.noise.prior import Prior
from voxelsigma.noise.probes import ProbeSource
from voxelsigma.noise.sigma import MapKind, SigmaMap
from voxelsigma.noise.sketch import Sketch, Stopping, sketch
from voxelsigma.noise.voxels import object_mask, phase_factor
from voxelsigma.training.compare import plane_of
from voxelsigma.training.examples import Example, ExampleSettings
from voxelsigma.training.held_out import HELD_OUT, Setting, held_out_slices
from voxelsigma.training.volumes import Volume, load_volumes

COUNTS: Final = (8, 16, 32, 64, 128, 256)
ROADS: Final = ("plain", "control variate", "instant")
TARGETS: Final = (0.05, 0.03)
ACCELERATIONS: Final = (4.0, 6.0, 8.0)
MATRIX: Final = 96
REFERENCE: Final = 512
JUDGED_AT: Final = 16
WRONG: Final = 0.3
WORSE: Final = 1.05

_BEYOND = 12.0
_OTHER_MATRIX, _OTHER_COILS = 144, 20
_OTHERS = ("unrolled_small", "unrolled_ssdu")
_SMALLEST = 1e-4


@dataclass(frozen=True, kw_only=True)
class Case:
    """A scan, k-space `(coils, k1, k0)`, and the network that reconstructs it; `group` is what its figures are of."""

    group: str
    network: Network
    plane: PlaneProblem
    kspace: Tensor


@dataclass
class Seen:
    """What one scan showed, a value for each count."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: {road: [] for road in ROADS})
    maps: dict[tuple[MapKind, str], list[SigmaMap]] = field(default_factory=dict)
    passed: list[bool] = field(default_factory=list)
    said: list[Prior] = field(default_factory=list)

    def add(self, kind: MapKind, road: str, found: SigmaMap) -> None:
        self.maps.setdefault((kind, road), []).append(found)


def main() -> None:
    """Measure, print, write."""
    options = parsed()
    torch.set_num_threads(1)
    console, found = Console(width=150), []
    for name in options.cards:
        card = load_card(name)
        rows = measured(card, options, console)
        groups = summed(card, rows)
        for one in tables(groups):
            console.print(one)
        console.print(told := certified([row for seen in rows.values() for row in seen]))
        found += [*groups, {"network": card.name, "group": "certificate", **told}]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def figures(
    *,
    name: str,
    data: str,
    accelerations: Sequence[float] = ACCELERATIONS,
    matrix: int = MATRIX,
    reference: int = REFERENCE,
) -> list[dict[str, Any]]:
    """Of a short run, for `make bench`: one held-out head of each acceleration, and nothing elsewhere."""
    given = {"slices": 1, "elsewhere": 0, "matrix": matrix, "reference": reference, "minutes": 5, "data": data}
    options = parsed([name, *(f"--{option}={value}" for option, value in given.items())])
    options.acceleration, card = list(accelerations), load_card(name)
    return summed(card, measured(card, options, Console(stderr=True)))


def measured(card: ModelCard, options: argparse.Namespace, console: Console) -> dict[str, list[dict[str, Any]]]:
    """Figures of the scans of every group, as many as there is time for."""
    network, predictor = load_model(card, torch.device("cpu")), load_predictor(card, torch.device("cpu"))
    if predictor is None or not isinstance(network, Network):
        raise SystemExit(f"bench.instant: {card.name} has no predictor; `voxelsigma distill` makes one")
    cases = list(all_cases(card.name, network, options))
    until = time.monotonic() + options.minutes * 60
    rows: dict[str, list[dict[str, Any]]] = {}
    for number, case in enumerate(cases):
        if time.monotonic() > until:
            console.print(f"{len(cases) - number} of {len(cases)} scans left out: --minutes {options.minutes:g}")
            break
        rows.setdefault(case.group, []).append(one_scan(case, predictor, number, options.reference))
        console.print(f"{card.name}: {number + 1}/{len(cases)} scans ({case.group})", style="dim")
    return rows


def summed(card: ModelCard, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    return [{"network": card.name, "group": group, **pooled(seen)} for group, seen in rows.items()]


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cards", nargs="+", help="names, or YAML files, of cards with a predictor")
    parser.add_argument("--slices", type=int, default=2, help="of each acceleration")
    parser.add_argument("-R", "--acceleration", type=float, nargs="*", default=list(ACCELERATIONS))
    parser.add_argument("--matrix", type=int, default=MATRIX)
    parser.add_argument("--reference", type=int, default=REFERENCE, help="probes of the reference")
    parser.add_argument("--elsewhere", type=int, default=1, help="scans of each kind that it was not made for")
    parser.add_argument("--brains", action="store_true", help="and measured brains, which take minutes each")
    parser.add_argument("--minutes", type=float, default=12.0, help="for one card; scans beyond are left out")
    parser.add_argument("--data", help="folder with the held-out heads")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "instant.json")
    return parser.parse_args(arguments)


def all_cases(name: str, network: Network, options: argparse.Namespace) -> Iterator[Case]:
    """Scans in the order in which they are measured: one of every kind before the second of any."""
    given = options.data or data_folder()
    if given is None:
        raise SystemExit("bench.instant: needs the held-out heads; VOXELSIGMA_TEST_DATA or --data names their folder")
    folder = Path(given)
    volumes = load_volumes(folder, only=[name for name in HELD_OUT if any(folder.rglob(f"{name}.*"))])
    for number in range(max(options.slices, options.elsewhere)):
        if number < options.slices:
            for acceleration in options.acceleration:
                yield head_case(network, volumes, acceleration, options.matrix, number)
        if number < options.elsewhere:
            yield from _elsewhere(name, network, volumes, number, options.matrix)
    if options.brains:
        for scan in (full_scan(folder), poisson_scan(folder)):
            yield _case(f"measured brain ({scan.name})", network, scan.example)


def _elsewhere(name: str, network: Network, volumes: Sequence[Volume], number: int, matrix: int) -> Iterator[Case]:
    """Other scans than heads with a mask along two axes, 8 coils, and an R that the predictor was made for."""
    beyond = Setting(mask="random_2d", acceleration=_BEYOND, matrix=matrix, snr=SNR)
    yield _case(f"R={_BEYOND:g}", network, _head(volumes, beyond.examples(), number))
    lines = Setting(mask="random_1d", acceleration=4.0, matrix=_OTHER_MATRIX, snr=SNR, maps="masked").examples()
    drawn = replace(lines, coils=(_OTHER_COILS, _OTHER_COILS))
    words = f"lines, R=4, {_OTHER_MATRIX}, {_OTHER_COILS} coils, masked maps"
    yield _case(words, network, _head(volumes, drawn, number))
    phantom = make_case(SHIPPED, (matrix, matrix), acceleration=6.0, seed=number)
    yield Case(group="phantom, R=6", network=network, plane=phantom.plane, kspace=phantom.kspace)
    other = next(one for one in _OTHERS if one != name)
    bound = load_model(load_card(other), torch.device("cpu"))
    assert isinstance(bound, Network)
    usual = Setting(mask="random_2d", acceleration=6.0, matrix=matrix, snr=SNR)
    yield _case(f"another network ({other}), R=6", bound, _head(volumes, usual.examples(), number))


def head_case(network: Network, volumes: Sequence[Volume], acceleration: float, matrix: int, number: int) -> Case:
    """A held-out head with a mask along two axes."""
    setting = Setting(mask="random_2d", acceleration=acceleration, matrix=matrix, snr=SNR)
    return _case(f"held-out heads, R={acceleration:g}", network, _head(volumes, setting.examples(), number))


def _head(volumes: Sequence[Volume], drawn: ExampleSettings, number: int) -> Example:
    return held_out_slices(volumes, drawn, slices=number + 1, seed=3)[number]


def _case(group: str, network: Network, scan: Example) -> Case:
    return Case(group=group, network=network, plane=plane_of(scan), kspace=scan.kspace)


@torch.no_grad()
def one_scan(case: Case, predictor: SigmaPredictor, seed: int, reference: int) -> dict[str, Any]:
    """Squared errors, coverage and seconds of one scan: by kind and road, a value for each count."""
    plane, begun = case.plane, time.perf_counter()
    linearization = linearize(case.network.bind(plane), case.kspace)
    once = time.perf_counter() - begun
    image = linearization.value
    real = not image.is_complex()
    kinds: tuple[MapKind, ...] = KINDS[:1] if real else KINDS
    begun = time.perf_counter()
    covariate = plane.covariate(case.kspace if real else None)
    by_covariate = time.perf_counter() - begun
    source = ProbeSource(variance=plane.variance, coils=len(case.kspace), seed=seed)
    seen, recorded = Seen(), Recorded(linearization.push)

    def look(state: Sketch, seconds: float) -> None:
        pushing = once + recorded.seconds(state.sums.count)
        seen.seconds["plain"].append(pushing)
        seen.seconds["control variate"].append(pushing + by_covariate + seconds)
        for kind in kinds:
            seen.add(kind, "plain", replace(state, covariate_variance=None).map(kind))
            seen.add(kind, "control variate", state.map(kind))

    sketched(replace(linearization, push=recorded), source, covariate, COUNTS, look)
    begun = time.perf_counter()
    of_scan = plane_features(plane, case.kspace, image, covariate)
    assert covariate.normal is not None
    learned = replace(covariate, learned=predictor.surrogate.surrogate(of_scan, covariate.normal))
    energies = RegionEnergies(regions(object_mask(image)), covariate.variance, phase_factor(image))
    by_prediction = time.perf_counter() - begun + by_covariate

    def predict(state: Sketch) -> Priors:
        features = torch.cat([of_scan, probe_features(state, covariate.variance, real=real)])
        priors = predictor.predict(features, covariate.variance)
        seen.said.append(priors["magnitude"])
        return {kind: priors[kind] for kind in kinds}

    judge = Judge(energies=energies, predict=predict)

    def judged(state: Sketch, seconds: float) -> None:
        # what was found after this step, within the seconds
        verdict = judge.verdict(state)
        seen.seconds["instant"].append(once + recorded.seconds(state.sums.count) + by_prediction + seconds)
        seen.passed.append(verdict.certified)
        for kind in kinds:
            seen.add(kind, "instant", verdict.map(kind))

    again = replace(linearization, push=recorded.replayed())
    sketched(again, source, learned, COUNTS, judged, keep=energies.add, between=judge.verdict)
    others = replace(source, seed=10_000 + seed)
    truth = sketch(linearization, others, Stopping(probes=reference), covariate=learned)
    inside = object_mask(image)
    return {**compared(seen, truth, kinds, inside), "kinds": kinds, **told_right(seen, truth, covariate.variance)}


def compared(seen: Seen, truth: Sketch, kinds: Sequence[MapKind], inside: Tensor) -> dict[str, Any]:
    """Errors and coverage of the maps of a scan."""
    result: dict[str, Any] = {"seconds": seen.seconds, "passed": seen.passed, "squares": {}, "covered": {}}
    for kind in kinds:
        known = truth.map(kind)
        own_part = float(known.relative_error()[inside].square().mean())
        for road in ROADS:
            found = seen.maps[kind, road]
            result["squares"][f"{kind} {road}"] = [
                float((one.sigma / known.sigma - 1)[inside].square().mean()) - own_part for one in found
            ]
            result["covered"][f"{kind} {road}"] = [coverage(one, known, inside) for one in found]
    return result


def told_right(seen: Seen, truth: Sketch, scale: Tensor) -> dict[str, Any]:
    """Whether the test at 16 probes was right: how far the worst region of the last prediction till then is off."""
    labels, known = regions(truth.inside), measured_variance(truth.map())
    said = seen.said[min(1, len(seen.said) - 1)]
    worst = worst_region(said.mean(), known, torch.where(said.vague(), -1, labels), scale)
    return {"worst_region": worst, "kept": seen.passed[COUNTS.index(JUDGED_AT)]}


def worst_region(variance: Tensor, truth: Tensor, labels: Tensor, scale: Tensor) -> float:
    """Relative error of σ in the region where it is largest; 0 where no region has a voxel that is compared."""
    off = [0.0]
    for number in range(int(labels.max()) + 1):
        here = (labels == number) & (scale > 0)
        if bool(here.any()):
            ratio = (variance[here] / scale[here]).mean() / (truth[here] / scale[here]).mean()
            off.append(abs(float(ratio.log()) / 2))
    return float(np.expm1(max(off)))


def certified(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How the test did on all scans; None where there was no such scan."""

    def share(chosen: Sequence[bool]) -> float | None:
        return float(np.mean(chosen)) if chosen else None

    return {
        "scans": len(rows),
        "worst_regions": [row["worst_region"] for row in rows],
        "kept": [row["kept"] for row in rows],
        "wrong_found": share([not row["kept"] for row in rows if row["worst_region"] > WRONG]),
        "false_alarms": share([not row["kept"] for row in rows if row["worst_region"] <= TOLERANCE]),
        "worse_than_control_variate": share([worse for row in rows for worse in _worse(row)]),
    }


def _worse(row: Mapping[str, Any]) -> list[bool]:
    """Whether a prediction did harm, by kind and count."""
    pairs = [(row["squares"][f"{kind} instant"], row["squares"][f"{kind} control variate"]) for kind in row["kinds"]]
    return [one > WORSE**2 * max(two, 0) for ours, theirs in pairs for one, two in zip(ours, theirs, strict=True)]


def coverage(found: SigmaMap, known: SigmaMap, inside: Tensor) -> float:
    r"""Share of the object in which a map agrees with the reference: :math:`\hat s / s \sim F_{\nu, \nu_r}`."""
    ratio = (measured_variance(found) / measured_variance(known))[inside].numpy()
    ours, theirs = (one.degrees_of_freedom[inside].double().numpy() for one in (found, known))
    low, high = (scipy.stats.f.ppf(level, ours, theirs) for level in (0.025, 0.975))
    return float(((low <= ratio) & (ratio <= high)).mean())


def pooled(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Root mean square errors over the scans, means of the rest, and the time to every target."""

    def mean(of: Sequence[Sequence[float]]) -> list[float]:
        return [float(value) for value in np.mean(of, axis=0)]

    seconds = {road: np.median([row["seconds"][road] for row in rows], axis=0).tolist() for road in ROADS}
    errors = {
        name: [max(value, _SMALLEST**2) ** 0.5 for value in mean([row["squares"][name] for row in rows])]
        for name in rows[0]["squares"]
    }
    return {
        "scans": len(rows),
        "kinds": list(rows[0]["kinds"]),
        "counts": list(COUNTS),
        "seconds": seconds,
        "errors": errors,
        "covered": {name: mean([row["covered"][name] for row in rows]) for name in rows[0]["covered"]},
        "passed": mean([row["passed"] for row in rows]),
        "worst_regions": [row["worst_region"] for row in rows],
        "time_to": {
            f"{kind} {road}": {f"{one:g}": time_to(one, errors[f"{kind} {road}"], seconds[road]) for one in TARGETS}
            for kind in rows[0]["kinds"]
            for road in ROADS
        },
    }


def time_to(target: float, errors: Sequence[float], seconds: Sequence[float]) -> float:
    """Seconds to an error: between two counts on straight lines in logarithms; before the first, that one's."""
    for place, error in enumerate(errors):
        if error <= target:
            if place == 0:
                return seconds[0]
            (x0, x1), (y0, y1) = np.log(seconds[place - 1 : place + 1]), np.log(errors[place - 1 : place + 1])
            return float(np.exp(x0 + (np.log(target) - y0) * (x1 - x0) / (y1 - y0)))
    # beyond the last count errors fall with the root of the probes
    return seconds[-1] * (errors[-1] / target) ** 2


def tables(groups: Sequence[Mapping[str, Any]]) -> Iterator[Table]:
    """Of every group, one for each kind of map."""
    return (table(found, kind) for found in groups for kind in found["kinds"])


def table(found: Mapping[str, Any], kind: MapKind) -> Table:
    """Errors, coverage and times of one kind of map."""
    title = f"{found['network']}, {found['group']}, {kind}, {found['scans']} scans"
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
        both = zip(found["errors"][name], found["covered"][name], strict=True)
        times = (f"{found['time_to'][name][f'{target:g}']:.1f}" for target in TARGETS)
        yield [road, *(f"{100 * error:.1f} ({100 * covered:.0f})" for error, covered in both), *times]
    # error falls with the root of the probes: how many a plain sketch needs for the same
    plain, ours = (found["errors"][f"{kind} {road}"] for road in ("plain", "instant"))
    equal = (count * (one / two) ** 2 for count, one, two in zip(found["counts"], plain, ours, strict=True))
    yield ["as plain probes", *(f"{count:.0f}" for count in equal), *[""] * len(TARGETS)]
    yield ["kept", *(f"{100 * share:.0f} %" for share in found["passed"]), *[""] * len(TARGETS)]


if __name__ == "__main__":
    main()
