"""Predictors that are found, kept, refused and found again; and what is kept of what they said."""

import gc
import logging
import re
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.gadgets.predictors import add_predictor, named, pipeline, write_volume, written
from tests.pipelines.runs import STD_MAP, run, write_scan

from voxelsigma.formats.image_file import Series
from voxelsigma.gadgets import estimation
from voxelsigma.gadgets import prediction as module
from voxelsigma.gadgets.prediction import Judged, Refused, predictor_of, told_of, with_prior
from voxelsigma.gadgets.reconstruction import MOST_LOADED
from voxelsigma.models.cards import ModelCard, load_card
from voxelsigma.models.predictor import SigmaPredictor
from voxelsigma.models.predictor_file import load_predictor
from voxelsigma.noise.instant import Instant, instant_sketch

CPU = torch.device("cpu")
WARNING = "no prediction of sigma maps, the sketch runs alone"
PYTHON = (
    "name: mine\narchitecture: python:tests.training.own_magnitude:magnitude\n"
    "fit_for: {acceleration: [1, 8], coils: [1, 32], dimension: 2}\nlicence: none\n"
)
COUNTS = {"seed": "7", "probes": "16"}
DAMAGED = "the predictor is damaged, or not made for this network"
MISSING = "the predictor's file is missing"


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scan(tmp_path_factory.mktemp("scan"))


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Cards whose predictors are read from now on; none are loaded yet."""
    read: list[Path] = []

    def load(card: ModelCard, device: torch.device) -> Any:
        read.append(card.path)
        return load_predictor(card, device)

    monkeypatch.setattr(module, "load_predictor", load)
    monkeypatch.setattr(module, "_loaded", {})
    monkeypatch.setattr(module, "_told", set())
    return read


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]


def file_of(card: Path) -> Path:
    return card.with_name("mine.sigma.safetensors")


# --- what is kept


def test_what_was_loaded_is_kept(tmp_path: Path, loads: list[Path]) -> None:
    card = named(tmp_path)
    first = predictor_of(load_card(str(card)), CPU)
    assert isinstance(first, SigmaPredictor)
    assert predictor_of(load_card(str(card)), CPU) is first
    assert loads == [card]


def test_a_card_without_a_predictor_asks_for_nothing(tmp_path: Path, loads: list[Path]) -> None:
    assert predictor_of(load_card(str(written(tmp_path))), CPU) is None
    assert not loads


def test_no_more_are_kept_than_of_models(tmp_path: Path, loads: list[Path]) -> None:
    cards = [load_card(str(named(tmp_path / str(number)))) for number in range(MOST_LOADED + 1)]
    found = [predictor_of(card, CPU) for card in cards]
    kept = [weakref.ref(one) for one in found if one is not None]
    assert all(isinstance(one, SigmaPredictor) for one in found)
    assert len(kept) == MOST_LOADED + 1
    del found
    gc.collect()
    assert [one() is None for one in kept] == [True, *[False] * MOST_LOADED]
    for card in cards[1:]:
        predictor_of(card, CPU)
    assert len(loads) == MOST_LOADED + 1


# --- what a card that is edited changes


def test_a_card_that_names_another_function_has_another_predictor(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without weights there is no hash that would change."""
    path = tmp_path / "mine.yaml"
    path.write_text(PYTHON)
    add_predictor(path, path)
    assert isinstance(predictor_of(load_card(str(path)), CPU), SigmaPredictor)
    path.write_text(path.read_text().replace(":magnitude", ":another"))
    assert predictor_of(load_card(str(path)), CPU) == Refused(DAMAGED)
    (warning,) = warnings_of(caplog)
    assert re.match(rf"{WARNING}: .*mine\.sigma\.safetensors: predicts the network", warning)


def test_a_card_with_other_hyperparameters_has_another_predictor(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = named(tmp_path)
    assert isinstance(predictor_of(load_card(str(path)), CPU), SigmaPredictor)
    path.write_text(path.read_text().replace("steps: 2", "steps: 3"))
    assert load_card(str(path)).hyperparameters["steps"] == 3
    assert predictor_of(load_card(str(path)), CPU) == Refused(DAMAGED)
    assert len(warnings_of(caplog)) == 1


# --- what cannot be used


def test_a_predictor_of_other_weights_is_warned_of_once(
    scan: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = written(tmp_path / "other", seed=2)
    mine = written(tmp_path / "mine")
    add_predictor(mine, other)
    check_runs_alone(scan, mine, tmp_path, DAMAGED)
    (warning,) = warnings_of(caplog)
    assert re.match(
        rf"{WARNING}: .*mine\.sigma\.safetensors: predicts the network .*, the card .*mine\.yaml is", warning
    )


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_predictor_that_cannot_be_read_is_warned_of_once(
    scan: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    mine = named(tmp_path)
    content = file_of(mine).read_bytes()
    file_of(mine).unlink()
    if damage == "cut":
        file_of(mine).write_bytes(content[:1000])
    check_runs_alone(scan, mine, tmp_path, MISSING if damage == "missing" else DAMAGED)
    (warning,) = warnings_of(caplog)
    told = "does not exist" if damage == "missing" else "sha256 is"
    assert re.match(rf"{WARNING}: .*mine\.sigma\.safetensors.*{told}", warning)


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_predictor_that_is_put_in_place_later_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    card = load_card(str(named(tmp_path)))
    content = file_of(card.path).read_bytes()
    file_of(card.path).unlink()
    if damage == "cut":
        file_of(card.path).write_bytes(content[:1000])
    for _ in range(2):
        assert isinstance(predictor_of(card, CPU), Refused)
    file_of(card.path).write_bytes(content)
    assert isinstance(predictor_of(card, CPU), SigmaPredictor)
    assert len(warnings_of(caplog)) == 1


def test_a_failure_is_told_once_however_many_came_between(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, loads: list[Path]
) -> None:
    bad = load_card(str(named(tmp_path / "bad")))
    file_of(bad.path).unlink()
    cards = [load_card(str(named(tmp_path / str(number)))) for number in range(MOST_LOADED)]
    for card in (bad, bad, *cards, bad):
        predictor_of(card, CPU)
    assert loads.count(bad.path) == 2
    assert len(warnings_of(caplog)) == 1


def test_a_name_that_no_file_can_have_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(PYTHON + f'predictor: "a\\0.sigma.safetensors"\npredictor_sha256: "{"0" * 64}"\n')
    assert predictor_of(load_card(str(path)), CPU) == Refused(MISSING)
    assert len(warnings_of(caplog)) == 1


def test_a_predictor_that_cannot_be_read_is_told_without_its_path(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, loads: list[Path]
) -> None:
    def load(card: ModelCard, device: torch.device) -> Any:
        raise PermissionError(13, "Permission denied", str(file_of(card.path)))

    assert not loads
    monkeypatch.setattr(module, "load_predictor", load)
    assert predictor_of(load_card(str(named(tmp_path))), CPU) == Refused("the predictor's file cannot be read")
    assert len(warnings_of(caplog)) == 1


# --- what is told

REFUSED = Judged(refused=Refused(MISSING))
CERTIFIED = Judged(certified=True)


@pytest.mark.parametrize(
    ("judged", "told"),
    [
        ([], "none"),
        ([CERTIFIED] * 2, "certified"),
        ([CERTIFIED, Judged(worst=0.456)], "dropped for 1 of 2 planes: a region is off by 46 % or more"),
        ([Judged(worst=0.2), Judged(worst=10.0)], "dropped for 2 of 2 planes: a region is off by 1000 % or more"),
        *(
            ([Judged(worst=0.2), Judged(worst=far)], "dropped for 2 of 2 planes: a region is off by more than 1000 %")
            for far in (10.001, 1e300, float("inf"), float("nan"))
        ),
        ([REFUSED] * 2, f"refused: {MISSING}"),
        ([CERTIFIED, REFUSED, CERTIFIED], f"refused for 1 of 3 planes: {MISSING}"),
    ],
)
def test_what_became_of_predictions_is_told(judged: list[Judged], told: str) -> None:
    assert told_of(judged) == told


@pytest.mark.parametrize(
    ("judged", "name"),
    [
        ([], "sketch"),
        ([CERTIFIED] * 2, "sketch, predicted prior"),
        ([CERTIFIED, Judged(worst=0.5)], "sketch, in part with a predicted prior"),
        ([Judged(worst=0.5)], "sketch"),
        ([REFUSED], "sketch"),
    ],
)
def test_an_estimator_is_named_with_the_part_of_predictions(judged: list[Judged], name: str) -> None:
    assert with_prior("sketch", judged) == name


# --- what is kept of what was said


def test_of_a_plane_that_is_done_only_the_maps_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums and the prediction of each end with it."""
    volume = write_volume(tmp_path)
    seen: list[weakref.ref[torch.Tensor]] = []
    left: list[int] = []

    def watched(*given: Any, **named_ones: Any) -> Instant:
        gc.collect()
        left.append(sum(one() is not None for one in seen))
        found = instant_sketch(*given, **named_ones)
        covariate_variance = found.sketch.covariate_variance
        assert covariate_variance is not None
        tensors = [found.sketch.sums.u_abs, found.before.u_abs, covariate_variance, found.certificate.excess]
        tensors += [one.variance for one in found.priors.values()]
        seen.extend(weakref.ref(one) for one in tensors)
        return found

    monkeypatch.setattr(estimation, "instant_sketch", watched)
    run(volume, pipeline(named(tmp_path), tmp_path, **COUNTS), tmp_path / "out.h5")
    assert len(left) > 6
    assert left == [0] * len(left)


def check_runs_alone(scan: Path, card: Path, folder: Path, reason: str) -> None:
    """Twice, and both times as with `prior="off"`; only the metadata say that it was not so wanted."""
    alone = run(scan, pipeline(card, folder, prior="off", **COUNTS), folder / "alone.h5")
    assert prior_of(alone) == "none"
    for number in range(2):
        series = run(scan, pipeline(card, folder, **COUNTS), folder / f"{number}.h5")
        assert prior_of(series) == f"refused: {reason}"
        assert set(series) == set(alone)
        for index, one in alone.items():
            np.testing.assert_array_equal(series[index].data, one.data)


def prior_of(series: dict[int, Series]) -> Any:
    (meta,) = series[STD_MAP].attributes
    return meta["voxelsigma_prior"]
