"""Files of σ predictors: they come back as they were, and only to the network that they are of."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save
from tests.models.written_cards import TINY, card_writer, edited
from torch import Tensor

from voxelsigma.models.cards import ModelCard, load_card
from voxelsigma.models.predictor import FEATURES, OF_SCAN, SigmaPredictor
from voxelsigma.models.predictor_file import load_predictor, model_identity, predictor_content

CPU = torch.device("cpu")
NAME = "tiny.sigma.safetensors"
SIZES = {"channels": 3, "levels": 2, "surrogate_channels": 2, "surrogate_levels": 1}

Write = Callable[..., ModelCard]


def predictor(seed: int = 0) -> SigmaPredictor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = SigmaPredictor(**SIZES)
        for network in (made, made.surrogate):
            torch.nn.init.normal_(network.last.weight)
    made.calibration.copy_(torch.tensor([0.5, 2.0]))
    return made


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a card that names a predictor's file of some content."""
    write_card = card_writer(tmp_path)

    def written(content: bytes | None, **changes: Any) -> ModelCard:
        if content is None:
            return load_card(write_card(edited(**changes)))
        (tmp_path / NAME).write_bytes(content)
        named = {"predictor": NAME, "predictor_sha256": hashlib.sha256(content).hexdigest()}
        return load_card(write_card(edited(**{**named, **changes})))

    return written


@pytest.fixture
def content(write: Write) -> bytes:
    return predictor_content(predictor(), write(None))


def noted(card: ModelCard) -> dict[str, str]:
    """What such a file says of itself."""
    return {"model": model_identity(card), **{key: str(size) for key, size in SIZES.items()}}


def packed(tensors: dict[str, Tensor], metadata: dict[str, str] | None) -> bytes:
    return save(tensors, metadata)


def test_a_predictor_comes_back_as_it_was(write: Write, content: bytes) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    found = load_predictor(write(content), CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert found is not None
    assert not found.training
    assert not any(parameter.requires_grad for parameter in found.parameters())
    for name, value in predictor().state_dict().items():
        assert torch.equal(found.state_dict()[name], value)
    features = torch.randn(FEATURES, 11, 9, generator=torch.Generator().manual_seed(1))
    expected = predictor().predict(features, torch.ones(11, 9))["complex"]
    assert torch.equal(found.predict(features, torch.ones(11, 9))["complex"].freedom, expected.freedom)
    of_scan = features[:OF_SCAN]
    one, other = found.surrogate.surrogate(of_scan), predictor().surrogate.surrogate(of_scan)
    assert torch.equal(one.near.weights, other.near.weights)
    assert torch.equal(one.again.weights, other.again.weights)


def test_the_same_predictor_makes_the_same_file(write: Write, content: bytes, tmp_path: Path) -> None:
    card = write(content)
    assert predictor_content(predictor(), card) == content
    assert predictor_content(predictor(1), card) != content
    with safe_open(tmp_path / NAME, framework="pt") as file:
        assert file.metadata() == noted(card)


def test_a_card_without_a_predictor_has_none(write: Write) -> None:
    assert load_predictor(write(None), CPU) is None


def test_the_identity_is_of_architecture_hyperparameters_and_weights(write: Write) -> None:
    one = model_identity(write(None))
    assert one == model_identity(write(None, name="other", licence="none", trained_on="more"))
    assert one == model_identity(write(None, hyperparameters=dict(reversed(TINY.items()))))
    others = [
        write(None, sha256="ab"),
        write(None, hyperparameters={**TINY, "steps": 3}),
        write(None, architecture="modl"),
    ]
    assert len({one, *map(model_identity, others)}) == 4


# --- what is refused


def test_a_file_that_is_missing(write: Write) -> None:
    card = write(None, predictor=NAME, predictor_sha256="ab")
    with pytest.raises(FileNotFoundError, match=r"tiny\.yaml: predictor .*tiny\.sigma\.safetensors does not exist"):
        load_predictor(card, CPU)


def test_another_hash_than_the_cards(write: Write, content: bytes) -> None:
    digest = hashlib.sha256(content).hexdigest()
    with pytest.raises(ValueError, match=rf"sigma\.safetensors: sha256 is {digest}, the card tiny\.yaml states ab"):
        load_predictor(write(content, predictor_sha256="ab"), CPU)


@pytest.mark.parametrize("changes", [{"sha256": "ab"}, {"hyperparameters": {**TINY, "channels": 4}}])
def test_a_predictor_of_another_network(write: Write, content: bytes, changes: dict[str, Any]) -> None:
    own, other = model_identity(write(None)), write(content, **changes)
    told = rf"tiny\.sigma\.safetensors: predicts the network {own}, the card .*tiny\.yaml is of {model_identity(other)}"
    with pytest.raises(ValueError, match=told):
        load_predictor(other, CPU)


@pytest.mark.parametrize("cut", [0, 7, 8, 100, -1])
def test_a_file_that_ends_early(write: Write, content: bytes, cut: int) -> None:
    with pytest.raises(ValueError, match=r"sigma\.safetensors: not a safetensors file"):
        load_predictor(write(content[:cut]), CPU)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": "129"}, "field 'channels' must be a whole number from 1 to 128, got '129'"),
        ({"channels": "0"}, "field 'channels' must be .* got '0'"),
        ({"channels": "3.0"}, "field 'channels' must be"),
        ({"channels": "-3"}, "field 'channels' must be"),
        ({"channels": "9" * 5000}, "field 'channels' must be"),
        ({"levels": "٣"}, "field 'levels' must be a whole number from 1 to 6"),
        ({"levels": "7"}, "field 'levels' must be"),
        ({"levels": ""}, "field 'levels' must be"),
        ({"surrogate_channels": "129"}, "field 'surrogate_channels' must be a whole number from 1 to 128, got '129'"),
        ({"surrogate_channels": "0"}, "field 'surrogate_channels' must be"),
        ({"surrogate_levels": "7"}, "field 'surrogate_levels' must be a whole number from 1 to 6, got '7'"),
        ({"surrogate_levels": "1.0"}, "field 'surrogate_levels' must be"),
        (
            {"levels": "3"},
            "does not fit a predictor of channels 3, levels 3, surrogate_channels 2, surrogate_levels 1: .*missing",
        ),
        ({"channels": "4"}, "does not fit a predictor of channels 4, levels 2, .*last.weight"),
        ({"surrogate_levels": "2"}, "does not fit .* surrogate_levels 2: surrogate.* .*missing"),
        ({"surrogate_channels": "3"}, r"does not fit .* surrogate_channels 3, .*: surrogate\.down"),
        ({"levels": None}, "not the file of a predictor: lacks levels in its metadata"),
        (dict.fromkeys(("model", *SIZES)), f"not the file .* lacks model, {', '.join(SIZES)} in its metadata"),
        # as it was before predictors had a surrogate
        (dict.fromkeys(list(SIZES)[2:]), "not the file .* lacks surrogate_channels, surrogate_levels in its metadata"),
    ],
)
def test_sizes_are_checked_first(write: Write, content: bytes, changes: dict[str, str | None], message: str) -> None:
    given: dict[str, str | None] = {**noted(write(None)), **changes}
    metadata = {key: value for key, value in given.items() if value is not None}
    with pytest.raises(ValueError, match=rf"sigma\.safetensors: {message}"):
        load_predictor(write(packed(load(content), metadata or None)), CPU)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("last.weight", None, r"last\.weight \(missing, needs \(4, 3, 1, 1\)\)"),
        ("more", torch.ones(2), r"more \(unknown, has \(2,\)\)"),
        ("last.bias", torch.ones(5), r"last\.bias \(has \(5,\), needs \(4,\)\)"),
        ("last.bias", torch.tensor([1.0, 2.0, float("nan"), 0.0]), r"weights that are not finite: last\.bias"),
        ("calibration", torch.tensor([1.0, 0.0]), r"'calibration' must be above 0, got \[1\.0, 0\.0\]"),
        ("surrogate.last.weight", None, r": surrogate\.last\.weight \(missing, needs \(98, 2, 1, 1\)\)"),
        ("surrogate.last.bias", torch.full((98,), float("inf")), r"not finite: surrogate\.last\.bias"),
    ],
)
def test_tensors_that_are_not_a_predictors(
    write: Write, content: bytes, name: str, value: Tensor | None, message: str
) -> None:
    tensors = {key: one for key, one in {**load(content), name: value}.items() if one is not None}
    with pytest.raises(ValueError, match=message):
        load_predictor(write(packed(tensors, noted(write(None)))), CPU)


def test_a_predictor_that_no_reader_takes_is_not_written(write: Write) -> None:
    card = write(None)
    broken = predictor()
    broken.calibration[0] = float("inf")
    with pytest.raises(ValueError, match=r"tiny \(predictor\): weights that are not finite: calibration"):
        predictor_content(broken, card)
    with pytest.raises(ValueError, match="field 'levels' must be a whole number from 1 to 6, got '7'"):
        predictor_content(SigmaPredictor(channels=1, levels=7, surrogate_channels=1), card)
    with pytest.raises(ValueError, match="field 'surrogate_levels' must be a whole number from 1 to 6, got '7'"):
        predictor_content(SigmaPredictor(channels=1, surrogate_channels=1, surrogate_levels=7), card)


def test_the_header_is_what_the_format_wants(content: bytes) -> None:
    size = int.from_bytes(content[:8], "little")
    assert size % 8 == 0
    assert next(iter(json.loads(content[8 : 8 + size]))) == "__metadata__"
