"""Model cards and the weights beside them."""

import dataclasses
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from tests.models.written_cards import TINY, card_writer, edited, fit_for, good_card, tiny_weights
from torch import Tensor

from voxelsigma.formats.masks import Kind
from voxelsigma.models.cards import ModelCard, available_cards, load_card, load_model
from voxelsigma.models.figures import MASKS, Figures
from voxelsigma.models.network import Network
from voxelsigma.models.problem import PlaneProblem
from voxelsigma.models.sense import Sense, SenseReconstruction
from voxelsigma.models.unrolled import Unrolled

CPU = torch.device("cpu")


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Any], str]:
    return card_writer(tmp_path)


# --- good cards


@pytest.mark.parametrize("name", available_cards())
def test_shipped_cards_load_with_their_weights(name: str) -> None:
    card = load_card(name)
    assert card.name == name
    model = load_model(card, CPU)
    assert isinstance(model, Sense if card.architecture == "sense" else Network)


def test_shipped_are_sense_and_a_network() -> None:
    assert {"sense", "unrolled_small"} <= set(available_cards())


def test_a_card_is_read_as_it_is_written(write: Callable[[Any], str], tmp_path: Path) -> None:
    card = load_card(write(good_card()))
    assert card == ModelCard(
        path=tmp_path / "tiny.yaml",
        name="tiny",
        architecture="unrolled",
        hyperparameters=TINY,
        weights=tmp_path / "tiny.safetensors",
        sha256=hashlib.sha256(tiny_weights()).hexdigest(),
        acceleration=(2, 6.5),
        coils=(4, 16),
        dimension=2,
        licence="Apache-2.0",
    )


def test_a_predictor_lies_beside_its_card(write: Callable[[Any], str], tmp_path: Path) -> None:
    card = load_card(write(edited(predictor="tiny.sigma.safetensors", predictor_sha256="ab")))
    assert (card.predictor, card.predictor_sha256) == (tmp_path / "tiny.sigma.safetensors", "ab")


def test_weights_are_those_of_the_file(write: Callable[[Any], str]) -> None:
    model = load_model(load_card(write(good_card())), CPU)
    assert isinstance(model, Network)
    assert isinstance(model.function, Unrolled)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        expected = Unrolled(**TINY).state_dict()
    for key, value in model.function.state_dict().items():
        assert torch.equal(value, expected[key])
    assert not any(parameter.requires_grad for parameter in model.function.parameters())
    assert not model.function.training


@pytest.mark.parametrize("suffix", ["yaml", "yml"])
def test_a_method_without_weights_takes_its_hyperparameters(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"mine.{suffix}"
    path.write_text(
        "name: mine\narchitecture: sense\nhyperparameters: {regularization: 0.25, tolerance: 1.0e-5}\n"
        "fit_for: {acceleration: [1, 4], coils: [1, 8], dimension: 3}\nlicence: none\n",
        encoding="utf-8",
    )
    card = load_card(str(path))
    assert (card.weights, card.sha256, card.dimension) == (None, "", 3)
    assert load_model(card, CPU) == Sense(regularization=0.25, tolerance=1e-5)
    assert load_model(card, CPU, regularization=0.5) == Sense(regularization=0.5, tolerance=1e-5)


def test_models_bind_to_a_plane(write: Callable[[Any], str], smooth_maps: Callable[..., Tensor]) -> None:
    problem = PlaneProblem(
        sensitivities=smooth_maps(4, 12, 10).to(torch.complex64),
        variance=torch.full((12, 10), 2.0),
        weights=torch.ones(12, 10),
        limits=((0, 11), (0, 9)),
        size=(12, 10),
    )
    scan = torch.ones(4, 12, 10, dtype=torch.complex64)
    for name in (write(good_card()), "sense"):
        reconstruction = load_model(load_card(name), CPU).bind(problem)
        image = reconstruction(scan)
        assert image.shape == (12, 10)
        assert bool(image.isfinite().all())
    assert isinstance(reconstruction, SenseReconstruction)


# --- what a model is fit for


@pytest.mark.parametrize(
    ("acceleration", "coils", "dimension", "expected"),
    [
        (4.0, 8, 2, ""),
        (2.0, 4, 2, ""),
        (6.5, 16, 2, ""),
        (1.96, 8, 2, ""),
        (6.54, 8, 2, ""),
        (1.94, 8, 2, "acceleration 1.9 (fit for 2 to 6.5)"),
        (8.0, 8, 2, "acceleration 8.0 (fit for 2 to 6.5)"),
        (4.0, 2, 2, "2 coils (fit for 4 to 16)"),
        (4.0, 17, 2, "17 coils (fit for 4 to 16)"),
        (4.0, 8, 3, "3D data (fit for 2D)"),
        (1.0, 32, 3, "acceleration 1.0 (fit for 2 to 6.5), 32 coils (fit for 4 to 16), 3D data (fit for 2D)"),
    ],
)
def test_unfit_data_are_told_in_words(
    write: Callable[[Any], str], acceleration: float, coils: int, dimension: int, expected: str
) -> None:
    card = load_card(write(good_card()))
    assert card.unfit(acceleration=acceleration, coils=coils, dimension=dimension) == expected


# --- what is refused


@pytest.mark.parametrize("name", ["unrolled_huge", "", "../models/sense", "sense.yml.bak"])
def test_missing_card_lists_those_shipped(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"no model card is called .*shipped are .*sense.*unrolled_small"):
        load_card(name)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml: no such model card"):
        load_card(str(tmp_path / "nowhere.yaml"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param("name: [unclosed", r"tiny\.yaml: not valid YAML", id="syntax"),
        pytest.param("!!python/object/apply:os.getcwd []", "not valid YAML .*could not determine", id="python"),
        pytest.param("- a\n- b\n", "must be a mapping, got list", id="list"),
        pytest.param("", "must be a mapping, got NoneType", id="empty"),
        pytest.param(edited(wieghts="x"), "unknown field 'wieghts'; known are name, architecture", id="unknown"),
        pytest.param(edited(name=3), "field 'name' must be a str, got 3", id="type of a text"),
        pytest.param(edited(hyperparameters=[1]), r"field 'hyperparameters' must be a dict, got \[1\]", id="list"),
        pytest.param(edited(name=..., licence=...), "lacks the fields name, licence", id="missing fields"),
        pytest.param(edited(fit_for=...), "lacks the fields fit_for", id="missing fit"),
        pytest.param(
            edited(architecture="transformer"),
            "field 'architecture' must be one of sense, modl, unet, unrolled, varnet, or python:package.module:Name, "
            "got 'transformer'",
            id="architecture",
        ),
        *(
            pytest.param(
                edited(architecture=name),
                re.escape(f"field 'architecture' must be python:package.module:Name, got {name!r}"),
                id=f"name {number}",
            )
            for number, name in enumerate(("python:", "python:os.system", "python:a:b c", "python:os:__import__('x')"))
        ),
        pytest.param(
            edited(architecture="python:os:path", weights=...),
            "lacks 'weights' or 'sha256', which 'python:os:path' needs",
            id="hash of nothing",
        ),
        pytest.param(
            edited(estimates_sensitivities=True),
            "field 'estimates_sensitivities' must be false for 'unrolled', got true",
            id="sensitivities of its own",
        ),
        pytest.param(
            edited(estimates_sensitivities="yes"), "'estimates_sensitivities' must be a bool, got 'yes'", id="no bool"
        ),
        pytest.param(edited(weights=...), "lacks 'weights' or 'sha256', which 'unrolled' needs", id="no weights"),
        pytest.param(edited(sha256=...), "lacks 'weights' or 'sha256', which 'unrolled' needs", id="no hash"),
        *(
            pytest.param(
                edited(**{key: "tiny.sigma.safetensors"}),
                f"has only '{key}' of 'predictor' and 'predictor_sha256'; expected both or none",
                id=f"{key} alone",
            )
            for key in ("predictor", "predictor_sha256")
        ),
        *(
            pytest.param(
                edited(predictor=name, predictor_sha256="ab"),
                re.escape(f"field 'predictor' must name a .sigma.safetensors file beside the card, got {name!r}"),
                id=f"predictor {number}",
            )
            for number, name in enumerate(("../tiny.sigma.safetensors", "tiny.safetensors", "/x.sigma.safetensors", ""))
        ),
        pytest.param(
            fit_for(coils=...),
            "field 'fit_for' must have acceleration, coils, dimension, got acceleration, dimension",
            id="fit without coils",
        ),
        pytest.param(fit_for(field="3T"), "field 'fit_for' must have .*, got .*field", id="fit for something else"),
        pytest.param(
            fit_for(acceleration=[8, 2]),
            r"field 'fit_for.acceleration' must be \[smallest, largest\], got \[8, 2\]",
            id="range upside down",
        ),
        pytest.param(fit_for(coils=8), r"'fit_for.coils' must be \[smallest, largest\], got 8", id="no range"),
        pytest.param(fit_for(coils=[1, 2, 3]), r"'fit_for.coils' must be .* got \[1, 2, 3\]", id="three numbers"),
        pytest.param(fit_for(coils=["a", "b"]), r"'fit_for.coils' must be .* got \['a', 'b'\]", id="texts"),
        pytest.param(fit_for(dimension=4), "'fit_for.dimension' must be 2 or 3, got 4", id="dimension"),
        pytest.param(
            edited(weights="../tiny.safetensors"),
            r"field 'weights' must name a .safetensors, .pt, .pth or .ckpt file beside the card, got '\.\./tiny",
            id="weights above",
        ),
        pytest.param(
            edited(weights="/etc/tiny.safetensors"), "file beside the card, got '/etc", id="weights elsewhere"
        ),
        pytest.param(edited(weights="sub/tiny.safetensors"), "file beside the card, got 'sub/", id="weights below"),
        pytest.param(edited(weights="tiny.pkl"), "file beside the card, got 'tiny.pkl'", id="pickle"),
    ],
)
def test_bad_cards_are_refused(write: Callable[[Any], str], content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        load_card(write(content))
    assert "tiny.yaml" in str(refused.value)


def test_weights_that_are_not_there_are_named(write: Callable[[Any], str], tmp_path: Path) -> None:
    card = load_card(write(good_card()))
    (tmp_path / "tiny.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"tiny\.yaml: weights .*tiny\.safetensors do not exist"):
        load_model(card, CPU)


def test_other_weights_than_the_card_s_are_refused(write: Callable[[Any], str], tmp_path: Path) -> None:
    card = load_card(write(good_card()))
    content = bytearray(tiny_weights())
    content[-1] ^= 1
    (tmp_path / "tiny.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=rf"sha256 is [0-9a-f]{{64}}, the card tiny\.yaml states {card.sha256}"):
        load_model(card, CPU)


def test_weights_of_another_shape_are_refused(write: Callable[[Any], str]) -> None:
    card = load_card(write(edited(hyperparameters={**TINY, "channels": 4})))
    with pytest.raises(
        ValueError,
        match=r"does not fit unrolled .*'channels': 4.*networks\.0\.enter\.weight "
        r"\(has \(3, 2, 3, 3\), needs \(4, 2, 3, 3\)\)",
    ):
        load_model(card, CPU)


def test_weights_with_keys_too_few_or_too_many_are_refused(write: Callable[[Any], str]) -> None:
    fewer = load_card(write(edited(hyperparameters={**TINY, "steps": 3})))
    with pytest.raises(ValueError, match=r"networks\.2\.enter\.bias \(missing, needs \(3,\)\)"):
        load_model(fewer, CPU)
    more = load_card(write(edited(hyperparameters={**TINY, "steps": 1})))
    with pytest.raises(ValueError, match=r"networks\.1\.enter\.bias \(unknown, has \(3,\)\)"):
        load_model(more, CPU)


@pytest.mark.parametrize("architecture", ["unrolled", "sense"])
def test_hyperparameters_that_the_architecture_does_not_know_are_refused(
    write: Callable[[Any], str], architecture: str
) -> None:
    card = load_card(write(edited(hyperparameters={"colour": 3}, architecture=architecture)))
    with pytest.raises(ValueError, match=rf"tiny\.yaml: hyperparameters do not fit {architecture} .*'colour'"):
        load_model(card, CPU)


def test_cards_are_frozen(write: Callable[[Any], str]) -> None:
    card = load_card(write(good_card()))
    with pytest.raises(dataclasses.FrozenInstanceError):
        card.name = "other"  # type: ignore[misc]


# --- figures

ROW = {
    "mask": "random_2d",
    "acceleration": 6,
    "psnr": 28.3,
    "ssim": 0.9,
    "linear_psnr": 22.7,
    "zero_filled_psnr": 22.5,
    "sigma": 0.7,
}


def test_figures_are_read(write: Callable[[Any], str]) -> None:
    rows = [ROW, {**ROW, "mask": "random_1d", "maps": "masked", "noise_ratio": 0.3, "linear_ssim": 0.5}]
    card = load_card(write(edited(figures=rows)))
    assert card.figures == tuple(Figures(**row) for row in rows)  # type: ignore[arg-type]
    assert card.figures[0].gain == pytest.approx(5.6)
    assert [{key: one.entry()[key] for key in row} for one, row in zip(card.figures, rows, strict=True)] == rows


def test_masks_of_figures_are_those_that_there_are() -> None:
    assert get_args(Kind) == MASKS


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("PSNR 28 dB", r"field 'figures\[1\]' must be a mapping, got 'PSNR 28 dB'"),
        ({**ROW, "snr": 20}, r"field 'figures\[1\]' has the unknown field 'snr'; known are mask, acceleration, psnr"),
        ({"mask": "random_2d", "psnr": 1}, r"figures\[1\]' lacks the fields acceleration, ssim, linear_psnr, .*sigma"),
        ({**ROW, "mask": "spiral"}, r"'figures\[1\].mask' must be one of uniform_1d, .*poisson_disc, got 'spiral'"),
        ({**ROW, "mask": []}, r"'figures\[1\].mask' must be one of .* got \[\]"),
        ({**ROW, "maps": "half"}, r"'figures\[1\].maps' must be one of full, masked, got 'half'"),
        ({**ROW, "psnr": "28"}, r"'figures\[1\].psnr' must be a finite number, got '28'"),
        ({**ROW, "ssim": True}, r"'figures\[1\].ssim' must be a finite number, got True"),
        ({**ROW, "psnr": float("inf")}, r"'figures\[1\].psnr' must be a finite number, got inf"),
        ({**ROW, "acceleration": 0.5}, r"'figures\[1\].acceleration' must be at least 1, got 0.5"),
        ({**ROW, "sigma": -0.1}, r"'figures\[1\].sigma' must be at least 0, got -0.1"),
    ],
)
def test_bad_figures_are_refused(write: Callable[[Any], str], row: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"tiny\.yaml: .*{message}"):
        load_card(write(edited(figures=[ROW, row])))
