"""Predicted σ maps in a pipeline: tested by its probes, dropped where they are wrong, refused if another network's."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.gadgets.predictors import add_predictor, named, pipeline, write_volume, written
from tests.pipelines.runs import SIZE, STD_MAP, run, write_scan
from torch import Tensor

from voxelsigma.formats.image_file import Series, read_series
from voxelsigma.gadgets import estimation, sketching
from voxelsigma.gadgets.planes import Plane
from voxelsigma.gadgets.prediction import prediction, predictor_of
from voxelsigma.hosts.replay import replay
from voxelsigma.models.cards import load_card
from voxelsigma.models.predictor import FEATURES, KINDS, PARTS, SigmaPredictor
from voxelsigma.noise.prior import Prior
from voxelsigma.noise.sigma import MapKind
from voxelsigma.noise.sketch import Covariate

SEED = "7"
SIGMA_COMPLEX, FREEDOM = 2010, 2050
SMOOTHED = slice(FEATURES - 7, FEATURES - 5)
# the network of these tests is nearly linear, so that the control variate alone knows its noise well
WORTH = 1e6

Patch = Callable[..., list[Tensor]]
Alone = Callable[[int], dict[int, Series]]


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scan(tmp_path_factory.mktemp("scan"))


@pytest.fixture(autouse=True)
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no property states a seed, this one is drawn."""
    monkeypatch.setattr(sketching, "secrets", SimpleNamespace(randbits=lambda _: int(SEED)))


@pytest.fixture
def predicts(monkeypatch: pytest.MonkeyPatch) -> Patch:
    """Make every predictor say the measured variance, smoothed, times a factor; gives the features it is asked with."""

    def patched(factor: float = 1.0, *, from_call: int = 1) -> list[Tensor]:
        asked: list[Tensor] = []

        def predict(self: SigmaPredictor, features: Tensor, zero_filled_variance: Tensor) -> dict[MapKind, Prior]:
            del self
            asked.append(features)
            variance = zero_filled_variance.double() * (factor if len(asked) >= from_call else 1.0)
            return {
                kind: Prior(
                    variance=PARTS[kind] * variance * smooth.double().exp(), freedom=WORTH * torch.ones(smooth.shape)
                )
                for kind, smooth in zip(KINDS, features[SMOOTHED], strict=True)
            }

        monkeypatch.setattr(SigmaPredictor, "predict", predict)
        return asked

    return patched


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a predictor that nobody trained."""
    return named(tmp_path_factory.mktemp("card"))


@pytest.fixture(scope="module")
def alone(scan: Path, card: Path, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """What a sketch of so many probes gives with the predictor's surrogate, of which nothing is predicted."""
    folder, own = tmp_path_factory.mktemp("alone"), estimation.Estimator._covariate
    predictor = predictor_of(load_card(str(card)), torch.device("cpu"))
    assert isinstance(predictor, SigmaPredictor)

    def taught(self: estimation.Estimator, plane: Plane, image: Tensor) -> Covariate:
        covariate = own(self, plane, image)
        assert covariate is not None
        return prediction(predictor, plane, image, covariate)[1]

    @cache
    def made(probes: int) -> dict[int, Series]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(estimation.Estimator, "_covariate", taught)
            chosen = pipeline(card, folder, prior="off", seed=SEED, probes=str(probes))
            return run(scan, chosen, folder / f"{probes}.h5")

    return made


@pytest.fixture(scope="module")
def plain(scan: Path, card: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Series]:
    """What the sketch gives without a predictor and its surrogate."""
    folder = tmp_path_factory.mktemp("plain")
    return run(scan, pipeline(card, folder, prior="off", seed=SEED), folder / "out.h5")


def meta_of(series: dict[int, Series]) -> dict[str, Any]:
    (meta,) = series[STD_MAP].attributes
    return dict(meta)


def map_of(series: dict[int, Series], index: int = STD_MAP) -> NDArray[np.float32]:
    return np.asarray(series[index].data[0, 0, 0])


def check_same_maps(one: dict[int, Series], other: dict[int, Series]) -> None:
    """All series of two runs, to the last bit."""
    assert set(one) == set(other) == {1, STD_MAP, SIGMA_COMPLEX, FREEDOM}
    for index, series in one.items():
        np.testing.assert_array_equal(series.data, other[index].data)


# --- predictions that count


def test_a_predictor_that_nobody_trained_is_asked_all_the_same(scan: Path, card: Path, tmp_path: Path) -> None:
    series = run(scan, pipeline(card, tmp_path), tmp_path / "out.h5")
    told = meta_of(series)["voxelsigma_prior"]
    assert told == "certified" or told.startswith("dropped for 1 of 1 planes")
    for index in (STD_MAP, SIGMA_COMPLEX):
        assert np.isfinite(map_of(series, index)).all()
        assert (map_of(series, index) > 0).mean() > 0.1


def test_of_data_that_the_model_is_not_fit_for_more_is_asked(
    scan: Path, card: Path, tmp_path: Path, predicts: Patch
) -> None:
    predicts()
    for file in card.parent.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    other = tmp_path / card.name
    text = other.read_text(encoding="utf-8")
    assert text.count("coils: [1, 32]") == 1
    other.write_text(text.replace("coils: [1, 32]", "coils: [16, 32]"), encoding="utf-8")
    meta = meta_of(run(scan, pipeline(other, tmp_path), tmp_path / "out.h5"))
    assert meta["voxelsigma_prior"] == "certified"
    assert int(meta["voxelsigma_probes"]) == 16


def test_without_it_the_sketch_is_alone(plain: dict[int, Series]) -> None:
    meta = meta_of(plain)
    assert meta["voxelsigma_prior"] == "none"
    assert meta["voxelsigma_estimator"] == "sketch with control variate"
    assert int(meta["voxelsigma_probes"]) == 64


def test_a_prediction_that_passes_is_enough_with_eight_probes(
    scan: Path, card: Path, plain: dict[int, Series], tmp_path: Path, predicts: Patch
) -> None:
    asked = predicts()
    series = run(scan, pipeline(card, tmp_path), tmp_path / "out.h5")
    meta = meta_of(series)
    assert meta["voxelsigma_prior"] == "certified"
    assert meta["voxelsigma_estimator"] == "sketch with control variate, predicted prior"
    assert int(meta["voxelsigma_probes"]) == 8
    assert [one.shape for one in asked] == [(FEATURES, SIZE, SIZE)]
    freedom = map_of(series, FREEDOM)
    image = map_of(series, 1)
    inside = image > 0.2 * image.max()
    alone = run(scan, pipeline(card, tmp_path, prior="off", probes="8"), tmp_path / "alone.h5")
    # nowhere much less than what the probes alone are worth; at most what it says itself, but for what its level is off
    assert (2 * freedom >= map_of(alone, FREEDOM)).all()
    assert (freedom > map_of(alone, FREEDOM))[inside].mean() > 0.9
    median = float(meta["voxelsigma_degrees_of_freedom"])
    assert float(meta_of(alone)["voxelsigma_degrees_of_freedom"]) < median <= WORTH
    assert float(meta["voxelsigma_sketch_error"]) == pytest.approx((2 * median) ** -0.5, rel=1e-3)
    np.testing.assert_array_equal(image, map_of(plain, 1))
    # what was predicted are the measured maps, smoothed: not far from those of 64 probes
    for index in (STD_MAP, SIGMA_COMPLEX):
        ratio = map_of(series, index)[inside] / map_of(plain, index)[inside]
        assert np.median(ratio) == pytest.approx(1, abs=0.1)


def test_voxels_that_no_coil_sees_are_the_sketches(
    scan: Path, card: Path, tmp_path: Path, predicts: Patch, alone: Alone
) -> None:
    predicts()
    series = run(scan, pipeline(card, tmp_path), tmp_path / "out.h5")
    own = map_of(series, FREEDOM) == map_of(alone(8), FREEDOM)
    unseen = map_of(alone(8)) == 0
    # the maps of the coils end where the object does
    assert 0.05 < unseen.mean() <= own.mean() < 0.9
    for index in (STD_MAP, FREEDOM):
        np.testing.assert_array_equal(map_of(series, index)[own], map_of(alone(8), index)[own])
    for index in (STD_MAP, SIGMA_COMPLEX):
        assert not map_of(series, index)[unseen].any()


@pytest.mark.parametrize(
    ("properties", "probes", "asked"),
    [
        ({"prior_probes": "16"}, 16, [8, 16]),
        ({"prior_probes": "64", "probes": "24"}, 24, [8, 16]),
        ({"probes": "48", "target_error": "0.0005"}, 48, [8, 16, 32]),
        ({"probes": "8"}, 8, [8]),
        ({"target_error": "0.04"}, 8, [8]),
    ],
)
def test_it_is_asked_as_often_as_it_can_be(
    scan: Path, card: Path, tmp_path: Path, predicts: Patch, properties: dict[str, str], probes: int, asked: list[int]
) -> None:
    seen = predicts()
    meta = meta_of(run(scan, pipeline(card, tmp_path, **properties), tmp_path / "out.h5"))
    assert meta["voxelsigma_prior"] == "certified"
    assert int(meta["voxelsigma_probes"]) == probes
    assert [round(8 * float(one[-1, 0, 0].exp())) for one in seen] == asked


@pytest.mark.parametrize(
    ("factor", "properties", "probes"),
    [
        (1.0, {}, 64),
        (1.0, {"prior_probes": "16", "probes": "24"}, 24),
        # 1 + 1 / (2 * 0.2^2) is 13.5
        (1.0, {"target_error": "0.2"}, 14),
        (4.0, {"target_error": "0.2"}, 14),
        (4.0, {"probes": "24"}, 24),
        (1.0, {"probes": "8"}, 8),
    ],
)
def test_what_is_to_be_repeated_stops_on_counts_alone(
    scan: Path, card: Path, tmp_path: Path, predicts: Patch, factor: float, properties: dict[str, str], probes: int
) -> None:
    """Whatever the certificate says, and whatever the map is worth."""
    asked = predicts(factor)
    meta = meta_of(run(scan, pipeline(card, tmp_path, seed=SEED, **properties), tmp_path / "out.h5"))
    assert asked
    assert (meta["voxelsigma_prior"] == "certified") == (factor == 1)
    assert int(meta["voxelsigma_probes"]) == probes


def test_a_count_that_is_too_small_for_a_prediction_is_kept_to(
    scan: Path, card: Path, tmp_path: Path, predicts: Patch
) -> None:
    asked = predicts()
    meta = meta_of(run(scan, pipeline(card, tmp_path, seed=SEED, target_error="0.3"), tmp_path / "out.h5"))
    assert not asked
    # 1 + 1 / (2 * 0.3^2) is 6.6
    assert (meta["voxelsigma_prior"], int(meta["voxelsigma_probes"])) == ("none", 7)


@pytest.mark.parametrize("properties", [{}, {"prior_probes": "16"}, {"probes": "40", "target_error": "0.0005"}])
def test_the_stated_seed_and_number_of_probes_repeat_a_map(
    scan: Path, card: Path, tmp_path: Path, predicts: Patch, properties: dict[str, str]
) -> None:
    predicts()
    once = run(scan, pipeline(card, tmp_path, **properties), tmp_path / "once.h5")
    stated = {name: str(meta_of(once)[f"voxelsigma_{name}"]) for name in ("seed", "probes")}
    again = run(scan, pipeline(card, tmp_path, **stated), tmp_path / "again.h5")
    assert meta_of(again)["voxelsigma_prior"] == meta_of(once)["voxelsigma_prior"] == "certified"
    check_same_maps(once, again)


def test_a_real_image_has_a_predicted_map_too(scan: Path, tmp_path: Path, predicts: Patch) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\narchitecture: python:tests.training.own_magnitude:magnitude\n"
        "fit_for: {acceleration: [1, 8], coils: [1, 32], dimension: 2}\nlicence: none\n"
    )
    add_predictor(path, path)
    asked = predicts()
    meta = meta_of(run(scan, pipeline(path, tmp_path, maps="magnitude"), tmp_path / "out.h5"))
    assert meta["voxelsigma_prior"] == "certified"
    (features,) = asked
    assert torch.equal(features[SMOOTHED][0], features[SMOOTHED][1])


# --- and those that do not


@pytest.mark.parametrize(("factor", "off"), [(4.0, 50), (0.25, 50)])
def test_a_wrong_prediction_leaves_the_sketch(
    scan: Path, card: Path, alone: Alone, tmp_path: Path, predicts: Patch, factor: float, off: int
) -> None:
    asked = predicts(factor)
    series = run(scan, pipeline(card, tmp_path), tmp_path / "out.h5")
    meta = meta_of(series)
    told = re.fullmatch(r"dropped for 1 of 1 planes: a region is off by (\d+) % or more", meta["voxelsigma_prior"])
    assert told is not None
    assert off < int(told[1]) < 120
    assert len(asked) == 1
    check_same_maps(series, alone(64))
    for name in ("estimator", "probes", "sketch_error", "degrees_of_freedom", "explained"):
        assert meta[f"voxelsigma_{name}"] == meta_of(alone(64))[f"voxelsigma_{name}"]


def test_far_off_is_told_without_a_figure(scan: Path, card: Path, tmp_path: Path, predicts: Patch) -> None:
    predicts(1e-100)
    meta = meta_of(run(scan, pipeline(card, tmp_path, probes="8"), tmp_path / "out.h5"))
    assert meta["voxelsigma_prior"] == "dropped for 1 of 1 planes: a region is off by more than 1000 %"


def test_the_surrogate_of_a_dropped_prediction_changes_the_error_alone(plain: dict[int, Series], alone: Alone) -> None:
    """Both sketches are of the same probes; the surrogate, which nobody trained, is adapted to the scan."""
    inside = map_of(plain, 1) > 0.1 * map_of(plain, 1).max()
    for index in (STD_MAP, SIGMA_COMPLEX):
        assert np.mean(map_of(alone(64), index)[inside] / map_of(plain, index)[inside]) == pytest.approx(1, abs=0.005)
    taught, untaught = meta_of(alone(64)), meta_of(plain)
    assert float(taught["voxelsigma_sketch_error"]) < 0.95 * float(untaught["voxelsigma_sketch_error"])
    assert float(taught["voxelsigma_explained"]) > float(untaught["voxelsigma_explained"])


def test_one_that_becomes_wrong_leaves_the_sketch_too(
    scan: Path, card: Path, alone: Alone, tmp_path: Path, predicts: Patch
) -> None:
    asked = predicts(4.0, from_call=2)
    series = run(scan, pipeline(card, tmp_path, prior_probes="64"), tmp_path / "out.h5")
    assert meta_of(series)["voxelsigma_prior"].startswith("dropped for 1 of 1 planes")
    assert len(asked) == 2
    check_same_maps(series, alone(64))


def test_planes_of_a_volume_are_judged_one_by_one(tmp_path: Path, card: Path, predicts: Patch) -> None:
    """16 planes along the readout; of those that no coil sees nothing is predicted."""
    volume = write_volume(tmp_path)
    asked = predicts(4.0, from_call=6)
    series = run(volume, pipeline(card, tmp_path, probes="16"), tmp_path / "out.h5")
    told = re.match(r"dropped for (\d+) of (\d+) planes", meta_of(series)["voxelsigma_prior"])
    assert told is not None
    dropped, planes = int(told[1]), int(told[2])
    assert len(asked) == planes
    assert 6 < planes < 16
    # planes are small, so that one of the others may happen to be dropped as well
    assert planes - 5 <= dropped < planes
    assert meta_of(series)["voxelsigma_estimator"] == "sketch with control variate, in part with a predicted prior"
    assert int(meta_of(series)["voxelsigma_probes"]) == 16
    alone = run(volume, pipeline(card, tmp_path, probes="16", prior="off"), tmp_path / "alone.h5")
    # (1, 1, z, y, x): the readout is the last axis
    predicted = (series[FREEDOM].data[0, 0] != alone[FREEDOM].data[0, 0]).any(axis=(0, 1))
    assert 0 < predicted.sum() <= planes - dropped
    assert np.isfinite(series[STD_MAP].data).all()


@pytest.mark.parametrize(
    ("properties", "kept"),
    [({"probes": "7"}, False), ({"control_variate": "false"}, False), ({"prior": "off"}, False), ({}, True)],
    ids=["few probes", "no control variate", "off", "kept probes"],
)
def test_it_is_not_asked(
    scan: Path, card: Path, tmp_path: Path, predicts: Patch, properties: dict[str, str], kept: bool
) -> None:
    asked = predicts()
    # a card without a predictor says what the sketch alone does
    bare = written(tmp_path / "bare")
    found = []
    for number, one in enumerate((card, bare)):
        output = tmp_path / f"{number}.h5"
        replay(scan, pipeline(one, tmp_path, **properties), output, keep_probes=kept)
        found.append({series.index: series for series in read_series(output)})
    assert not asked
    assert meta_of(found[0])["voxelsigma_prior"] == meta_of(found[1])["voxelsigma_prior"] == "none"
    assert int(meta_of(found[0])["voxelsigma_probes"]) == int(properties.get("probes", "64"))
    check_same_maps(*found)
