"""The σ maps against many noisy scans through the whole pipeline: `python -m bench.truth --scans 500`.

All scans of a comparison share one noise measurement and, by the contract of σ, the coil sensitivities: their reference
lines are a scan of their own, acquired once. Beside that stand sensitivities that are estimated anew from every scan.
"""

import argparse
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import scipy.stats
import torch
from ismrmrd import Image, constants
from rich.console import Console
from rich.table import Table

from voxelsigma.formats.header import ScanHeader, parse_header
from voxelsigma.formats.readouts import ReadoutBlock
from voxelsigma.formats.simulate import (
    BANDWIDTH,
    DWELL_US,
    FIELD_OF_VIEW_MM,
    NOISE_DWELL_US,
    SimulatedScan,
    Simulation,
    simulate,
)
from voxelsigma.gadgets.chaining import GadgetSpec, chain
from voxelsigma.gadgets.context import Context
from voxelsigma.gadgets.images import SERIES_IMAGE, SERIES_SIGMA
from voxelsigma.gadgets.items import Item, KSpace, NoiseCovariance, Sensitivities, Stream
from voxelsigma.noise.covariance import covariance_bias, covariance_error, whitening_matrix
from voxelsigma.noise.voxels import object_mask

Reference = Literal["shared", "anew", "embedded"]
Mask = Literal["uniform_1d", "random_2d"]
RealArray = npt.NDArray[np.float64]
Voxels = npt.NDArray[np.bool_]

SIZE, COILS, SNR = 96, 8, 20.0
QUIET: Final = 1e6
"""SNR of the scan that noise is added to: its own is then a hundred-thousandth of it."""
GROUPS: Final = 10
"""Groups of scans of the jackknife."""
FLAGS: Final = sum(
    1 << (flag - 1)
    for flag in (constants.ACQ_IS_PARALLEL_CALIBRATION, constants.ACQ_IS_PARALLEL_CALIBRATION_AND_IMAGING)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A reconstruction, with the number of probes of its map (an exact map takes none)."""

    name: str
    model: str
    regularization: float | None = None
    probes: int = 64

    def gadgets(self, *, mapped: bool) -> list[GadgetSpec]:
        """The reconstruction, with its map or without."""
        stated = {} if self.regularization is None else {"regularization": f"{self.regularization:g}"}
        method = GadgetSpec("reconstruct", {"model": self.model, "output": "complex", "device": "cpu", **stated})
        sketch = GadgetSpec("sketch", {"probes": str(self.probes), "seed": "1", "device": "cpu"})
        return [method, sketch] if mapped else [method]


LINES: Final = (Case(name="sense_1d_exact", model="sense", regularization=0.0),)
# one ring of coils does not encode the second axis: without regularisation the equations are singular
PLANES: Final = (
    Case(name="sense_2d_sketch", model="sense", regularization=0.02, probes=128),
    Case(name="unrolled_2d_sketch", model="unrolled_small", probes=256),
)


WHITEN: Final = GadgetSpec("prewhiten", {"store": "false"})
FRONT: Final = (WHITEN, GadgetSpec("accumulate", {}), GadgetSpec("coil_maps", {"forward": "kspace", "device": "cpu"}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What is scanned again and again: readouts without noise, and the factor of the noise that they get."""

    header: ScanHeader
    noise: ReadoutBlock
    clean: ReadoutBlock
    factor: npt.NDArray[np.complex64]
    truth: SimulatedScan
    seed: int

    def scan(self, number: int, reference: Reference) -> list[ReadoutBlock]:
        """One noisy scan: the noise measurement, reference lines, imaging lines."""
        rng = np.random.default_rng((self.seed, 1 + number))
        counters = self.clean.headers["idx"]
        imaging = self.truth.mask[counters["kspace_encode_step_2"], counters["kspace_encode_step_1"]]
        if reference == "embedded":
            return [self.noise, self._noisy(self.clean, rng)]
        # noise of one generator for all scans: the same lines, acquired once
        shared = np.random.default_rng((self.seed, 0)) if reference == "shared" else rng
        centre = (self.clean.headers["flags"] & np.uint64(FLAGS)) != 0
        apart = _flagged(self.clean.select(centre), constants.ACQ_IS_PARALLEL_CALIBRATION)
        return [self.noise, self._noisy(apart, shared), self._noisy(_flagged(self.clean.select(imaging)), rng)]

    def with_own_noise(self, number: int, samples: int) -> list[ReadoutBlock]:
        """A noisy scan with a short noise measurement of its own, and no reference lines."""
        # not the generator of the imaging lines: noise measurement and image are independent
        rng = np.random.default_rng((self.seed, 1 + number, 1))
        headers = self.noise.headers[:1].copy()
        headers["number_of_samples"] = samples
        silent = np.zeros((1, COILS, samples), dtype=np.complex64)
        block = ReadoutBlock(headers, silent, np.zeros((1, samples, 0), dtype=np.float32))
        quiet = replace(self, factor=self.factor * np.float32((DWELL_US * BANDWIDTH / NOISE_DWELL_US) ** 0.5))
        return [quiet._noisy(block, rng), *self.scan(number, "shared")[2:]]

    def _noisy(self, block: ReadoutBlock, rng: np.random.Generator) -> ReadoutBlock:
        parts = rng.standard_normal((2, *block.samples.shape), dtype=np.float32)
        white = np.moveaxis(parts[0] + 1j * parts[1], 1, 0).reshape(COILS, -1)
        coloured = (self.factor @ white).reshape(COILS, len(block), -1)
        return block.with_samples((block.samples + np.moveaxis(coloured, 0, 1)).astype(np.complex64))


def scene(*, mask: Mask, acceleration: int = 4, noise: int = 4096, snr: float = SNR, seed: int = 0) -> Scene:
    """The head phantom; with a 2D mask one voxel of the readout, whose plane has both phase encodings."""
    volumetric = mask == "random_2d"
    matrix = (SIZE, SIZE, 16) if volumetric else (1, SIZE, SIZE)
    common: dict[str, Any] = {"coils": COILS, "snr": QUIET, "noise_samples": noise, "seed": seed}
    truth = simulate(Simulation(matrix=matrix, acceleration=acceleration, mask=mask, **common))
    xml = truth.header_xml.decode()
    if volumetric:
        wanted = (
            f"<matrixSize><x>1</x><y>{SIZE}</y><z>{SIZE}</z></matrixSize><fieldOfView_mm><x>{FIELD_OF_VIEW_MM / 16}"
        )
        xml = re.sub(r"(<reconSpace>).*?<x>.*?<x>[\d.]+", rf"\g<1>{wanted}", xml, flags=re.DOTALL)
    clean = truth.blocks[1]
    colour = np.linalg.cholesky(truth.covariance) * np.sqrt(NOISE_DWELL_US / (DWELL_US * BANDWIDTH) / 2)
    return Scene(
        header=parse_header(xml.encode()),
        noise=truth.blocks[0],
        clean=clean.with_samples((clean.samples * (snr / QUIET)).astype(np.complex64)),
        factor=colour.astype(np.complex64),
        truth=truth,
        seed=seed,
    )


@dataclass(slots=True)
class Spread:
    """Sums of complex images over groups of scans: what their spread along any fixed phase needs."""

    pivot: npt.NDArray[np.complex128] | None = None
    groups: dict[int, list[Any]] = field(default_factory=dict)

    def add(self, number: int, image: npt.NDArray[Any]) -> None:
        """One image."""
        wide = image.astype(np.complex128)
        self.pivot = wide if self.pivot is None else self.pivot
        moved = wide - self.pivot
        new = [1, moved, np.abs(moved) ** 2, moved**2]
        old = self.groups.get(number % GROUPS)
        self.groups[number % GROUPS] = new if old is None else [a + b for a, b in zip(old, new, strict=True)]

    def mean(self) -> npt.NDArray[np.complex128]:
        """Mean image."""
        assert self.pivot is not None
        count, total = (sum(group[part] for group in self.groups.values()) for part in (0, 1))
        return np.asarray(self.pivot + total / count)

    def deviation(self, without: int | None = None) -> RealArray:
        r"""Standard deviation of :math:`\Re(e^{-i\phi}x)`, φ the phase of the mean image; its median is σ."""
        kept = [group for number, group in self.groups.items() if number != without]
        count, total, power, square = (sum(group[part] for group in kept) for part in range(4))
        phase = np.exp(-2j * np.angle(self.mean()))
        mean = total / count
        variance = (power - count * np.abs(mean) ** 2 + (phase * (square - count * mean**2)).real) / 2 / (count - 1)
        freedom = count - 1
        # a sample deviation is skewed: its median, not its mean, is compared
        skew = np.sqrt(scipy.stats.chi2.ppf(0.5, freedom) / freedom)
        return np.asarray(np.sqrt(variance) / skew)

    def against(self, sigma: RealArray, inside: Voxels) -> dict[str, float]:
        """Median over the object of deviation / σ, its jackknife error over scans, tenth and ninetieth percentile."""
        ratio = self.deviation()[inside] / sigma[inside]
        left_out = [np.median(self.deviation(number)[inside] / sigma[inside]) for number in self.groups]
        error = np.sqrt((len(left_out) - 1) * np.var(left_out))
        low, high = np.percentile(ratio, [10, 90])
        return {"ratio": float(np.median(ratio)), "error": float(error), "p10": float(low), "p90": float(high)}


def inside_of(spread: Spread) -> Voxels:
    """Voxels of the object, by the mean image."""
    return np.asarray(object_mask(torch.from_numpy(spread.mean())).numpy())


def compare(found: Scene, cases: tuple[Case, ...], scans: int, reference: Reference) -> dict[str, dict[str, float]]:
    """The spread of many scans against the σ map of the first, for each case.

    Where all scans share their reference lines, the first two show that the sensitivities are the same to the last
    bit; those of the first then serve the others.
    """
    context = Context(header=found.header)
    maps: dict[str, RealArray] = {}
    for case in cases:
        whole = chain([*FRONT, *case.gadgets(mapped=True)], context)
        maps[case.name] = _series(whole(iter(found.scan(0, reference))), SERIES_SIGMA).astype(np.float64)
    spreads = {case.name: Spread() for case in cases}
    methods = {case.name: chain(case.gadgets(mapped=False), context) for case in cases}
    front, short = chain(list(FRONT), context), chain(list(FRONT[:2]), context)
    known: list[Sensitivities] = []
    for number in range(scans):
        whole_front = reference != "shared" or number < 2
        items: list[Item] = list((front if whole_front else short)(iter(found.scan(number, reference))))
        if not whole_front:
            items = [known[0], *items]
        elif reference == "shared":
            known += [item for item in items if isinstance(item, Sensitivities)]
            assert np.array_equal(known[0].maps, known[-1].maps)
        for name, method in methods.items():
            spreads[name].add(number, _series(method(iter(items)), SERIES_IMAGE))
    return {
        name: {**spread.against(maps[name], inside_of(spread)), "scans": scans, "voxels": int(inside_of(spread).sum())}
        for name, spread in spreads.items()
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnNoise:
    """Scans with a noise measurement each, un-whitened to a common scale; medians over the object.

    Parameters
    ----------
    scans, samples, acceleration
        Number of scans, noise samples of each, R.
    truth, error
        Deviation of the images over the scans' mean σ before the bias factor: what that factor should be; and its
        jackknife standard error.
    bias, derived
        The factor that the maps have, 1 + p/N, and that by the theory of complex Wishart matrices (`derived_bias`).
    spread, common, stated
        Relative standard deviation over the scans of a voxel's σ and of the map's median; what the maps state, 1/(2√N).
    covered
        Part of all voxels and scans where the truth lies within 1.96 stated deviations of the map.
    """

    scans: int
    samples: int
    acceleration: int
    truth: float
    error: float
    bias: float
    derived: float
    spread: float
    common: float
    stated: float
    covered: float


def own_noise(scans: int, *, acceleration: int, samples: int = 96, seed: int = 0) -> OwnNoise:
    """Linear reconstruction of scans that each have a short noise measurement of their own."""
    found = scene(mask="uniform_1d", acceleration=acceleration, seed=seed)
    context = Context(header=found.header)
    front = chain([WHITEN, GadgetSpec("accumulate", {"forward": "covariance"})], context)
    method = chain(LINES[0].gadgets(mapped=True), context)
    spread, sigmas, effective = Spread(), [], []
    # whitening with the true covariance: the common scale
    scale = np.sqrt(2 * DWELL_US / NOISE_DWELL_US * BANDWIDTH)
    true_norm = np.linalg.norm(_whitened_maps(found, found.truth.covariance, scale), axis=0)
    for number in range(scans):
        items = list(front(iter(found.with_own_noise(number, samples))))
        covariance = next(item for item in items if isinstance(item, NoiseCovariance))
        kspace = next(item for item in items if isinstance(item, KSpace))
        assert covariance.applied_scale is not None
        maps = _whitened_maps(found, covariance.matrix, covariance.applied_scale)
        norm = np.linalg.norm(maps, axis=0)
        known = Sensitivities(maps=(maps / norm).astype(np.complex64), key=kspace.key, method="true")
        images = list(method(iter([known, kspace])))
        common = (true_norm / norm)[0]
        spread.add(number, _series(iter(images), SERIES_IMAGE) * common)
        sigmas.append(_series(iter(images), SERIES_SIGMA).astype(np.float64) * common)
        effective.append(covariance.effective_samples)
    counted = float(np.mean(effective))
    bias, stated = covariance_bias(COILS, counted), covariance_error(counted)
    inside = inside_of(spread)
    sigma = np.stack(sigmas)[:, inside]
    mean = sigma.mean(axis=0)
    true = spread.against(np.stack(sigmas).mean(axis=0) / bias, inside)
    # the images' own deviation is too noisy voxel by voxel to be the truth of an interval
    deviations = sigma / (mean * true["ratio"] / bias) - 1
    return OwnNoise(
        scans=scans,
        samples=samples,
        acceleration=acceleration,
        truth=true["ratio"],
        error=true["error"],
        bias=bias,
        derived=derived_bias(COILS, samples, acceleration),
        spread=float(np.median(sigma.std(axis=0, ddof=1) / mean)),
        stated=stated,
        common=float(np.std(np.median(sigma / mean, axis=1), ddof=1)),
        covered=float(np.mean(np.abs(deviations) <= 1.96 * stated)),
    )


def derived_bias(coils: int, samples: int, folded: int) -> float:
    r"""Deviation over mean estimated σ of least squares weighted by a covariance from N samples of p coils.

    With r voxels folded onto each other, :math:`\hat\sigma^2 = [(S^H \hat\Psi^{-1} S)^{-1}]_{ii}` follows a gamma
    distribution of mean :math:`(N-p+r)/(N-1)` and shape :math:`N-p+r`, and the images have the variance
    :math:`N/(N-p+r)`, both in units of the best possible variance.
    """
    left = samples - coils + folded
    return float(np.sqrt(samples * (samples - 1)) / left * (1 + 1 / (8 * left)))


def figures(scans: int, *, noise: int = 4096, seed: int = 0) -> dict[str, Any]:
    """All comparisons; those that stand beside the first take a fifth of the scans, those with own noise two fifths."""
    fewer = max(2 * GROUPS, scans // 5)
    start = time.perf_counter()
    lines, planes = (scene(mask=mask, noise=noise, seed=seed) for mask in ("uniform_1d", "random_2d"))
    quiet = scene(mask="random_2d", noise=noise, snr=4 * SNR, seed=seed)
    compared: dict[str, dict[str, Any]] = {case.name: {} for case in (*LINES, *PLANES)}

    def run(label: str, found: Scene, cases: tuple[Case, ...], count: int, reference: Reference) -> None:
        for name, result in compare(found, cases, count, reference).items():
            compared[name][label] = result
            print(f"{time.perf_counter() - start:6.0f} s  {name}, {label}: {result}", flush=True)

    run("shared", lines, LINES, scans, "shared")
    run("shared", planes, PLANES, scans, "shared")
    # a network is not linear: the lower the noise, the nearer its images' spread is to its Jacobian's
    run("shared_snr_80", quiet, PLANES[1:], fewer, "shared")
    own = {f"R{factor}": asdict(own_noise(2 * fewer, acceleration=factor, seed=seed)) for factor in (1, 4)}
    print(f"{time.perf_counter() - start:6.0f} s  own noise: {own}", flush=True)
    for reference in ("anew", "embedded"):
        run(reference, lines, LINES, fewer, reference)
        run(reference, planes, PLANES, fewer, reference)
    found = {"noise_samples": noise, "coils": COILS, "stated": covariance_error(noise)}
    return {**found, "cases": compared, "own_noise": own, "seconds": time.perf_counter() - start}


def tables(found: Mapping[str, Any]) -> Iterator[Table]:
    """The figures as tables."""
    table = Table(
        *("reconstruction", "sensitivities", "scans", "ratio", "error", "10 to 90 %"),
        title=f"Deviation of scans over the σ map of one, median in the object: {SIZE}², {COILS} coils, R = 4, one "
        f"noise measurement of {found['noise_samples']} samples (random part {100 * found['stated']:.2f} %)",
    )
    for name, kinds in found["cases"].items():
        for kind, entry in kinds.items():
            span = f"{entry['p10']:.3f} to {entry['p90']:.3f}"
            table.add_row(name, kind, str(entry["scans"]), f"{entry['ratio']:.4f}", f"{entry['error']:.4f}", span)
    yield table
    entries = found["own_noise"]
    own = Table("figure", *entries, title="Scans with a noise measurement each, exact σ of SENSE, on a common scale")
    for name in OwnNoise.__dataclass_fields__:
        own.add_row(name, *(f"{entry[name]:.4g}" for entry in entries.values()))
    yield own


def main() -> None:
    """Compare σ maps with many scans."""
    parser = argparse.ArgumentParser(prog="python -m bench.truth", description=main.__doc__)
    parser.add_argument("--scans", type=int, default=500, help="scans of a comparison, at least 20")
    parser.add_argument("--noise-samples", type=int, default=4096, help="of the shared noise measurement, per coil")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    console = Console()
    for table in tables(figures(options.scans, noise=options.noise_samples, seed=options.seed)):
        console.print(table)


def _series(items: Stream, series: int) -> npt.NDArray[Any]:
    """The one image of a series, as a plane."""
    (image,) = (item for item in items if isinstance(item, Image) and item.image_series_index == series)
    return np.asarray(image.data).squeeze()


def _whitened_maps(found: Scene, covariance: npt.NDArray[Any], scale: float) -> npt.NDArray[np.complex64]:
    """The true sensitivities `(coils, z, y, x)` behind whitening."""
    maps = found.truth.sensitivities[0]
    whitened = whitening_matrix(covariance, float(scale)) @ maps.reshape(COILS, -1)
    return np.asarray(whitened.reshape(maps.shape))


def _flagged(block: ReadoutBlock, *flags: int) -> ReadoutBlock:
    """Readouts with these calibration flags and no others; the flags that end an image stay."""
    headers = block.headers.copy()
    headers["flags"] &= ~np.uint64(FLAGS)
    for flag in flags:
        headers["flags"] |= np.uint64(1 << (flag - 1))
    return replace(block, headers=headers)


if __name__ == "__main__":
    main()
