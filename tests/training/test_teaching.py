"""How a predictor learns: crops by their numbers, a loss that falls, and what predictions turn out to be worth."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.training.distilled import tiny_network, tiny_scan

from voxelsigma.models.predictor import FEATURES, KINDS, SigmaPredictor
from voxelsigma.training.config import FitSettings
from voxelsigma.training.fit import fit, make_fabric
from voxelsigma.training.targets import ScanTarget, measure
from voxelsigma.training.teaching import calibrate, crop_drawer, prediction_loss

# of the features, what an untrained predictor repeats
SMOOTHED = slice(FEATURES - 7, FEATURES - 5)


def test_crops_depend_on_their_number_alone(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.npz" for number in range(3)]
    for number, path in enumerate(paths):
        measure(tiny_network(real=number == 1), tiny_scan(number), first=8, probes=4, seed=0).save(path)
    one, other = (crop_drawer(paths, (16, 20), batch=5, seed=1) for _ in range(2))
    first, again, next_one = one(7), other(7), one(8)
    assert first.features.shape == (5, FEATURES, 16, 20)
    for name in ("ratio", "freedom", "weight"):
        assert getattr(first, name).shape == (5, 2, 16, 20)
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.features, next_one.features)
    assert float(first.ratio.min()) > 0
    assert {round(weight, 6) for weight in first.weight.unique().tolist()} <= {0.0, 0.1, 1.0}
    # of real reconstructions only the magnitude map is learned
    real = [bool((one(number).weight[:, 1].flatten(1).amax(dim=1) == 0).any()) for number in range(10)]
    assert any(real)
    assert float(one(0).weight[:, 0].max()) == 1
    assert first.to("cpu", torch.float64).ratio.dtype == torch.float64


def test_the_loss_falls(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.npz" for number in range(3)]
    scans = [measure(tiny_network(), tiny_scan(number), first=8, probes=4, seed=0) for number in range(3)]
    for scan, path in zip(scans, paths, strict=True):
        replace(scan, measured=8 * scan.measured).save(path)
    draw = crop_drawer(paths, (24, 24), batch=3, seed=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        predictor = SigmaPredictor(channels=4, levels=2)
    before = scans[0].measured[:, scans[0].inside].mean(axis=1)
    with torch.no_grad():
        begun = float(prediction_loss(predictor, draw(99), np.random.default_rng()))
    settings = FitSettings(steps=60, warm_up=5, learning_rate=2e-2, log_every=60)
    fabric = make_fabric(settings, tmp_path, accelerator="cpu")
    fabric.launch()
    fit(predictor, prediction_loss, draw, settings, folder=tmp_path, fabric=fabric)
    with torch.no_grad():
        ended = float(prediction_loss(predictor, draw(99), np.random.default_rng()))
    assert ended < begun - 1
    # from about one times the energy on the way to eight times
    found = predictor.predict(torch.from_numpy(scans[0].features), torch.from_numpy(scans[0].zero_filled))
    for kind, energy in zip(KINDS, before, strict=True):
        mean = found[kind].variance[torch.from_numpy(scans[0].inside)].mean()
        assert 3 * energy < float(mean) < 12 * energy


def made(freedom: float, *, scans: int, seed: int) -> list[ScanTarget]:
    """Scans whose true variances scatter around the untrained prediction as if it were worth so many numbers."""
    rng = np.random.default_rng(seed)
    shape, probes = (40, 40), 16
    found = []
    for _ in range(scans):
        features = np.zeros((FEATURES, *shape), dtype=np.float16)
        # an untrained predictor says what the smoothed maps say
        features[SMOOTHED] = rng.normal(size=(2, *shape))
        said = np.exp(features[SMOOTHED].astype(np.float64)) * np.array([0.5, 1.0]).reshape(2, 1, 1)
        counts = np.array([probes, 2 * probes]).reshape(2, 1, 1) * np.ones(shape)
        truth = said * freedom / rng.chisquare(freedom, (2, *shape))
        found.append(
            ScanTarget(
                features=features,
                measured=(truth * rng.chisquare(counts) / counts).astype(np.float32),
                freedom=counts.astype(np.float32),
                zero_filled=np.ones(shape, dtype=np.float32),
                inside=np.ones(shape, dtype=bool),
                first=8,
                probes=probes,
                real=False,
            )
        )
    return found


@pytest.mark.parametrize("freedom", [5.0, 40.0, 120.0])
def test_calibration_finds_what_predictions_are_worth(freedom: float) -> None:
    predictor = SigmaPredictor(channels=2, levels=1)
    predictor.calibration.fill_(3)
    scans = made(freedom, scans=4, seed=1)
    factors = calibrate(predictor, scans)
    # of 6400 voxels: standard errors of a few per cent, of 8 % for the magnitude map where little can be seen
    for place, kind in enumerate(KINDS):
        assert 10 * factors[kind] == pytest.approx(freedom, rel=0.2)
        assert float(predictor.calibration[place]) == pytest.approx(factors[kind])
    priors = predictor.predict(torch.from_numpy(scans[0].features), torch.from_numpy(scans[0].zero_filled))
    assert float(priors["complex"].freedom.mean()) == pytest.approx(10 * factors["complex"], rel=1e-4)


def test_only_known_voxels_of_the_object_count() -> None:
    predictor = SigmaPredictor(channels=2, levels=1)
    scans = made(20.0, scans=2, seed=4)
    whole = calibrate(predictor, scans)
    spoilt = []
    for scan in scans:
        measured, zero_filled, inside = scan.measured.copy(), scan.zero_filled.copy(), scan.inside.copy()
        inside[:10] = False
        measured[:, :10] *= 1000
        # no noise at all, and no coil
        measured[:, 10:12] = 0
        zero_filled[12:14] = 0
        spoilt.append(replace(scan, measured=measured, zero_filled=zero_filled, inside=inside))
    left = [replace(scan, inside=np.repeat(np.arange(40)[:, None] >= 14, 40, axis=1)) for scan in scans]
    assert calibrate(predictor, spoilt) == pytest.approx(calibrate(predictor, left))
    assert calibrate(predictor, spoilt) == pytest.approx(whole, rel=0.3)


def test_calibration_stays_within_its_range_and_leaves_maps_alone_that_are_not_there() -> None:
    predictor = SigmaPredictor(channels=2, levels=1)
    exact = made(1e6, scans=1, seed=2)
    assert calibrate(predictor, exact)["magnitude"] == pytest.approx(20, rel=1e-2)
    # and far off: worth next to nothing
    wrong = [replace(scan, measured=scan.measured * np.float32(1e4)) for scan in exact]
    assert calibrate(predictor, wrong)["magnitude"] == pytest.approx(0.05, rel=1e-2)
    real = [replace(scan, real=True) for scan in made(20, scans=1, seed=3)]
    assert calibrate(predictor, real)["complex"] == 1
    empty = [replace(scan, inside=np.zeros_like(scan.inside)) for scan in exact]
    assert calibrate(predictor, empty) == {"magnitude": 1.0, "complex": 1.0}
    assert calibrate(predictor, []) == {"magnitude": 1.0, "complex": 1.0}
