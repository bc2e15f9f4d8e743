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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from voxelsigma.models.cards import ModelCard, load_card
from voxelsigma.models.predictor import FEATURES, OF_SCAN, SigmaPredictor
from voxelsigma.models.predictor_file import (
    CALIBRATION_RANGE,
    load_predictor,
    model_identity,
    predictor_content,
    round_weights,
)

CPU = torch.device("cpu")
NAME = "tiny.sigma.safetensors"
SIZES: dict[str, Any] = {
    "channels": 3,
    "levels": 2,
    "surrogate_channels": 2,
    "surrogate_levels": 1,
    "surrogate_stages": (0.0, 0.5),
}
TOLD = {**{key: str(value) for key, value in SIZES.items()}, "surrogate_stages": "0.0 0.5"}
LAST = SigmaPredictor(**SIZES).surrogate.last.out_channels
LARGEST = {
    "channels": "128",
    "levels": "6",
    "surrogate_channels": "128",
    "surrogate_levels": "6",
    "surrogate_stages": " ".join(["0"] * 8),
}

Write = Callable[..., ModelCard]


def predictor(seed: int = 0) -> SigmaPredictor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = SigmaPredictor(**SIZES)
        for network in (made, made.surrogate):
            torch.nn.init.normal_(network.last.weight)
    made.calibration.copy_(torch.tensor([0.3, 2.0]))
    return made


def rounded(seed: int = 0) -> SigmaPredictor:
    """As a file holds it."""
    made = predictor(seed)
    round_weights(made)
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
    return {"model": model_identity(card), **TOLD}


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
    assert found.surrogate.stages == SIZES["surrogate_stages"]
    state_dict = found.state_dict()
    for name, value in rounded().state_dict().items():
        assert state_dict[name].dtype == torch.float32
        assert torch.equal(state_dict[name], value)
    features = torch.randn(FEATURES, 11, 9, generator=torch.Generator().manual_seed(1))
    prior = found.predict(features, torch.ones(11, 9))["complex"]
    assert torch.equal(prior.freedom, rounded().predict(features, torch.ones(11, 9))["complex"].freedom)
    of_scan = features[:OF_SCAN].unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(found.surrogate(of_scan), rounded().surrogate(of_scan))


# --- float16


def test_weights_are_stored_in_half_the_size(write: Write, content: bytes) -> None:
    stored = load(content)
    assert {name: value.dtype for name, value in stored.items() if value.dtype != torch.float16} == {
        "calibration": torch.float32
    }
    weights = dict(predictor().named_parameters())
    for name, value in weights.items():
        assert torch.equal(stored[name], value.detach().half())
    # what was rounded before is stored as it is
    assert predictor_content(rounded(), write(None)) == content
    size = int.from_bytes(content[:8], "little")
    assert len(content) - 8 - size == 2 * sum(value.numel() for value in weights.values()) + 8


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_predictions_of_sigma_stay_to_a_thousandth(write: Write, seed: int) -> None:
    found = load_predictor(write(predictor_content(predictor(seed), write(None))), CPU)
    assert found is not None
    features = torch.randn(FEATURES, 40, 40, generator=torch.Generator().manual_seed(1))
    before = predictor(seed).predict(features, torch.ones(40, 40))
    for kind, prior in found.predict(features, torch.ones(40, 40)).items():
        torch.testing.assert_close(prior.variance.sqrt(), before[kind].variance.sqrt(), rtol=1e-3, atol=0)
        torch.testing.assert_close(prior.freedom, before[kind].freedom, rtol=2e-3, atol=0)
        assert not torch.equal(prior.variance, before[kind].variance)
    with torch.no_grad():
        one, other = (net.surrogate(features[None, :OF_SCAN]) for net in (found, predictor(seed)))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))


def test_rounding_is_to_float16_and_leaves_buffers() -> None:
    one, other = predictor(), rounded()
    for name, value in one.named_parameters():
        found = other.get_parameter(name)
        assert torch.equal(found, value.half().float())
        assert found.requires_grad
    assert torch.equal(one.calibration, other.calibration)
    assert not torch.equal(one.calibration, one.calibration.half().float())
    round_weights(one.surrogate)
    assert torch.equal(one.surrogate.last.weight, other.surrogate.last.weight)
    assert not torch.equal(one.last.weight, other.last.weight)


@pytest.mark.parametrize("value", [65520.0, -1e30, float("inf"), float("nan")])
def test_weights_beyond_float16_are_refused(write: Write, value: float) -> None:
    broken = predictor()
    with torch.no_grad():
        broken.surrogate.last.weight[1, 0] = value
    told = r"weights that are not finite, or beyond 65504 \(float16\): surrogate\.last\.weight$"
    with pytest.raises(ValueError, match=rf"^tiny \(predictor\): {told}"):
        predictor_content(broken, write(None))
    with pytest.raises(ValueError, match=rf"^predictor: {told}"):
        round_weights(broken)


def test_a_file_in_float32_is_read_too(write: Write) -> None:
    whole = {name: value.detach() for name, value in predictor().state_dict().items()}
    found = load_predictor(write(packed(whole, noted(write(None)))), CPU)
    assert found is not None
    assert torch.equal(found.last.weight, predictor().last.weight)


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
            r"does not fit a predictor of channels 3, levels 3, surrogate_channels 2, surrogate_levels 1, "
            r"surrogate_stages 0\.0 0\.5: .*missing.* and \d+ more$",
        ),
        (
            {"channels": "4"},
            r"does not fit a predictor of channels 4, .*: down\.0\.first\.bias \(has \(3,\)",
        ),
        ({"surrogate_levels": "2"}, "does not fit .* surrogate_levels 2, .*: surrogate.* .*missing"),
        ({"surrogate_channels": "3"}, r"does not fit .* surrogate_channels 3, .*: surrogate\.down"),
        (
            {"surrogate_stages": ""},
            "field 'surrogate_stages' must be 1 to 8 numbers, each 0 or from 0.001 to 100, got",
        ),
        ({"surrogate_stages": " ".join(["0"] * 9)}, "field 'surrogate_stages' must be 1 to 8 numbers"),
        ({"surrogate_stages": "0 " * 10**5}, "field 'surrogate_stages' must be .* got '0 0 [0 ]{36}'$"),
        ({"surrogate_stages": "0.0005"}, "field 'surrogate_stages' must be"),
        ({"surrogate_stages": "0 101"}, "field 'surrogate_stages' must be"),
        ({"surrogate_stages": "0 -1"}, "field 'surrogate_stages' must be"),
        ({"surrogate_stages": "nan"}, "field 'surrogate_stages' must be"),
        ({"surrogate_stages": "1_0"}, "field 'surrogate_stages' must be"),
        ({"surrogate_stages": "0"}, r"does not fit .* surrogate_stages 0\.0: surrogate\.last\.bias"),
        ({"levels": None}, "not the file of a predictor: lacks levels in its metadata"),
        (dict.fromkeys(("model", *SIZES)), f"not the file .* lacks model, {', '.join(SIZES)} in its metadata"),
        # as it was before predictors had a surrogate
        (
            dict.fromkeys(list(SIZES)[2:]),
            "not the file .* lacks surrogate_channels, surrogate_levels, surrogate_stages in its metadata",
        ),
    ],
)
def test_sizes_are_checked_first(write: Write, content: bytes, changes: dict[str, str | None], message: str) -> None:
    given: dict[str, str | None] = {**noted(write(None)), **changes}
    metadata = {key: value for key, value in given.items() if value is not None}
    with pytest.raises(ValueError, match=rf"sigma\.safetensors: {message}"):
        load_predictor(write(packed(load(content), metadata or None)), CPU)


class Memory(TorchDispatchMode):
    """Notes the largest tensor that takes memory."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for one in tree_leaves(found):
            if isinstance(one, Tensor) and one.device.type != "meta":
                self.largest = max(self.largest, one.untyped_storage().nbytes())
        return found


def test_what_sizes_say_takes_no_memory_before_tensors_fit(write: Write, content: bytes) -> None:
    """Of these sizes a predictor is 0.9 GB."""
    card = write(packed(load(content), {**noted(write(None)), **LARGEST}))
    with Memory() as seen, pytest.raises(ValueError, match=r"does not fit a predictor of channels 128, .* more$"):
        load_predictor(card, CPU)
    assert 0 < seen.largest < 10**5
    # and of one that fits it is seen
    with Memory() as seen:
        load_predictor(write(content), CPU)
    weights = [value.numel() for value in predictor().parameters()]
    assert seen.largest >= 4 * max(weights)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("last.weight", None, r"last\.weight \(missing, needs \(4, 3, 1, 1\)\)"),
        ("last.bias", torch.ones(4).double(), r"last\.bias \(is float64, needs float16 or float32\)"),
        ("last.bias", torch.ones(4).int(), r"last\.bias \(is int32, needs float16 or float32\)"),
        ("calibration", torch.ones(2).bfloat16(), r"calibration \(is bfloat16, needs"),
        ("more", torch.ones(2), r"more \(unknown, has \(2,\)\)"),
        ("last.bias", torch.ones(5), r"last\.bias \(has \(5,\), needs \(4,\)\)"),
        ("last.bias", torch.tensor([1.0, 2.0, float("nan"), 0.0]), r"weights that are not finite: last\.bias"),
        ("calibration", torch.tensor([1.0, 0.0]), r"'calibration' must be from 0\.05 to 20, got \[1\.0, 0\.0\]"),
        (
            "calibration",
            torch.tensor([1e30, 1.0]),
            r"'calibration' must be from 0\.05 to 20, got \[1\.0\d*e\+30, 1\.0\]",
        ),
        ("calibration", torch.tensor([1.0, 20.001]), r"'calibration' must be from 0\.05 to 20"),
        ("calibration", torch.tensor([0.0499, 1.0]), r"'calibration' must be from 0\.05 to 20"),
        ("surrogate.last.weight", None, rf": surrogate\.last\.weight \(missing, needs \({LAST}, 2, 1, 1\)\)"),
        ("surrogate.last.bias", torch.full((LAST,), float("inf")), r"not finite: surrogate\.last\.bias"),
    ],
)
def test_tensors_that_are_not_a_predictors(
    write: Write, content: bytes, name: str, value: Tensor | None, message: str
) -> None:
    tensors = {key: one for key, one in {**load(content), name: value}.items() if one is not None}
    with pytest.raises(ValueError, match=message):
        load_predictor(write(packed(tensors, noted(write(None)))), CPU)


@pytest.mark.parametrize("kind", [torch.float16, torch.float32])
def test_calibrations_at_their_limits_are_read(write: Write, content: bytes, kind: torch.dtype) -> None:
    limits = torch.tensor(CALIBRATION_RANGE, dtype=kind)
    found = load_predictor(write(packed({**load(content), "calibration": limits}, noted(write(None)))), CPU)
    assert found is not None
    assert torch.equal(found.calibration, limits.float())


def test_the_bytes_that_were_hashed_are_those_that_are_used(
    write: Write, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the file is replaced meanwhile, by one that says other things of itself."""
    card, real = write(content), Path.read_bytes

    def replaced_after(path: Path) -> bytes:
        found = real(path)
        path.write_bytes(packed(load(content), {**noted(card), "levels": "3"}))
        return found

    monkeypatch.setattr(Path, "read_bytes", replaced_after)
    found = load_predictor(card, CPU)
    assert found is not None
    assert found.levels == SIZES["levels"]


def test_types_that_torch_does_not_have_are_refused(write: Write, content: bytes) -> None:
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    assert header["calibration"]["dtype"] == "F32"
    first, last = header["calibration"]["data_offsets"]
    header["calibration"].update(dtype="F8_E8M0", shape=[last - first])
    text = json.dumps(header).encode()
    with pytest.raises(ValueError, match=r"sigma\.safetensors: weights of types that .* computed with: F8_E8M0"):
        load_predictor(write(len(text).to_bytes(8, "little") + text + content[8 + size :]), CPU)


def test_a_predictor_that_no_reader_takes_is_not_written(write: Write) -> None:
    card = write(None)
    broken = predictor()
    broken.calibration[0] = 20.5
    with pytest.raises(ValueError, match=r"tiny \(predictor\): 'calibration' must be from 0\.05 to 20, got \[20\.5, "):
        predictor_content(broken, card)
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
