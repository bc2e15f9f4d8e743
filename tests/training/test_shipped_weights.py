"""The shipped networks on heads they have not seen."""

from pathlib import Path
from typing import Final

import pytest
import torch
import yaml

from voxelsigma.models.cards import available_cards, load_card, load_model
from voxelsigma.models.network import Network
from voxelsigma.models.varnet import VarNet
from voxelsigma.training.compare import Baselines, applied, baselines, compared, scores
from voxelsigma.training.examples import Example
from voxelsigma.training.held_out import HELD_OUT, Maps, Setting, held_out_slices
from voxelsigma.training.volumes import load_volumes

LEAST: Final = {
    "modl_small": (4.0, 3.0),
    "unrolled_n2r": (2.5, 1.3),
    "unrolled_small": (4.0, 3.0),
    "unrolled_ssdu": (3.0, 2.0),
    "unrolled_vortex": (3.0, 1.5),
}
"""Decibels above the best linear reconstruction, 144², R=6, by the network: with full maps, with masked ones."""

LEAST_ABOVE_ZERO_FILLED: Final = {"unet_small": (0.4, 0.3), "varnet_small": (1.6, 1.5)}
"""The same above the zero-filled image, for networks that the linear reconstruction may beat: one sees no samples of
single coils, the other is given no sensitivities."""

NAMES: Final = sorted({*LEAST, *LEAST_ABOVE_ZERO_FILLED})


@pytest.fixture(scope="module", params=["full", "masked"])
def held_out(request: pytest.FixtureRequest, shared_data: Path) -> tuple[Maps, list[Example], Baselines]:
    volumes = load_volumes(shared_data, only=HELD_OUT)
    setting = Setting(mask="random_2d", acceleration=6, maps=request.param, matrix=144)
    scans = held_out_slices(volumes, setting.examples(), slices=8, seed=2)
    return request.param, scans, baselines(scans)


def shipped(name: str) -> Network:
    model = load_model(load_card(name), torch.device("cpu"))
    assert isinstance(model, Network)
    return model


def test_every_network_has_its_decibels() -> None:
    assert {name for name in available_cards() if load_card(name).weights is not None} == set(NAMES)
    assert not set(LEAST) & set(LEAST_ABOVE_ZERO_FILLED)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(LEAST))
def test_network_is_decibels_above_the_linear_reconstruction(
    held_out: tuple[Maps, list[Example], Baselines], name: str
) -> None:
    maps, scans, others = held_out
    result = compared(scores(applied(shipped(name)), scans), others)
    assert 0.01 < result.regularization < 0.64
    assert result.zero_filled < result.linear
    assert result.gain >= LEAST[name][maps == "masked"]
    assert min(result.gains) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(LEAST_ABOVE_ZERO_FILLED))
def test_network_is_decibels_above_the_zero_filled_image(
    held_out: tuple[Maps, list[Example], Baselines], name: str
) -> None:
    maps, scans, others = held_out
    own = scores(applied(shipped(name)), scans)
    result = compared(own, others)
    assert result.gain_over_zero_filled >= LEAST_ABOVE_ZERO_FILLED[name][maps == "masked"]
    if maps == "full" or not shipped(name).estimates_sensitivities:
        # a root sum of squares keeps the noise outside the object, which masked maps take from the others
        assert result.network_ssim > result.zero_filled_ssim + 0.02
    # no scan pays for the others: 0.2 dB is what one may lose
    assert min(mine - other for mine, other in zip(own.psnr, others.zero_filled.psnr, strict=True)) > -0.2


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_small_and_say_where_they_are_from(name: str) -> None:
    card = load_card(name)
    assert card.weights is not None
    assert card.weights.stat().st_size <= 4_000_000
    assert {row.acceleration for row in card.figures} >= {2, 4, 6, 8}
    trained_on = " ".join(yaml.safe_load(card.path.read_text(encoding="utf-8"))["trained_on"].split())
    assert "studyforrest_t1" in trained_on
    assert "Held out: head_07, head_09" in trained_on
    assert shipped(name).estimates_sensitivities == isinstance(shipped(name).function, VarNet)
