"""Cards as training writes them: whole, with their weights, and with figures."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from voxelsigma.models.cards import ARCHITECTURES, load_card
from voxelsigma.models.figures import Figures
from voxelsigma.training.card import load_network, record, write_card

SMALL: dict[str, dict[str, Any]] = {
    "modl": {"steps": 2, "blocks": 1, "channels": 2, "shared": True, "tolerance": 1e-5},
    "unet": {"channels": 2, "levels": 2, "residual": True},
    "unrolled": {"steps": 2, "blocks": 1, "channels": 3},
    "varnet": {"cascades": 1, "channels": 2, "levels": 2, "sensitivity_channels": 2, "sensitivity_levels": 2},
}
FIT = {"acceleration": [2, 8], "coils": [4, 32], "dimension": 2}
ROW = Figures(
    mask="random_2d", acceleration=6.0, psnr=28.31, ssim=0.9, linear_psnr=22.7, zero_filled_psnr=22, sigma=0.7
)


def built(architecture: str, seed: int = 1) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ARCHITECTURES[architecture](**SMALL[architecture])


def write(card: Path, architecture: str = "unrolled", seed: int = 1, **changes: Any) -> nn.Module:
    network = changes.pop("network", None) or built(architecture, seed)
    arguments = {
        "architecture": architecture,
        "hyperparameters": SMALL.get(architecture, {}),
        "fit_for": FIT,
        "trained_on": "balls: of one size, " * 20,
        "evaluation": "Not measured yet.",
        "licence": "CC0-1.0",
        **changes,
    }
    write_card(card, network, **arguments)
    return network


@pytest.fixture
def card(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    write(path)
    return path


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_a_network_comes_back_ready_to_train(tmp_path: Path, architecture: str) -> None:
    path = tmp_path / "tiny.yaml"
    network = write(path, architecture)
    loaded = load_network(path)
    assert type(loaded) is type(network)
    assert loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    for name, value in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert load_card(str(path)).hyperparameters == SMALL[architecture]


def test_the_entries_of_a_card(card: Path) -> None:
    entries = yaml.safe_load(card.read_text(encoding="utf-8"))
    assert entries == {
        "name": "tiny",
        "architecture": "unrolled",
        "hyperparameters": SMALL["unrolled"],
        "weights": "tiny.safetensors",
        "sha256": hashlib.sha256((card.parent / "tiny.safetensors").read_bytes()).hexdigest(),
        "fit_for": FIT,
        "trained_on": f"{('balls: of one size, ' * 20).strip()}\n",
        "evaluation": "Not measured yet.\n",
        "licence": "CC0-1.0",
    }
    assert sorted(path.name for path in card.parent.iterdir()) == ["tiny.safetensors", "tiny.yaml"]


@pytest.mark.parametrize("name", ["007", "yes", "a: b", "né"])
def test_a_name_that_yaml_would_read_otherwise(tmp_path: Path, name: str) -> None:
    write(tmp_path / f"{name}.yaml")
    assert load_card(str(tmp_path / f"{name}.yaml")).name == name
    load_network(tmp_path / f"{name}.yaml")


def test_writing_touches_no_random_numbers(tmp_path: Path) -> None:
    network = built("unrolled")
    before = torch.random.get_rng_state()
    write(tmp_path / "tiny.yaml", network=network)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_crash_between_weights_and_card_is_seen(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = Path.replace

    def crash(self: Path, target: Path) -> Path:
        if target.suffix == ".yaml":
            raise OSError("power is gone")
        return replace(self, target)

    text = card.read_text(encoding="utf-8")
    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(OSError, match=r"tiny\.yaml: cannot be written \(power is gone\)"):
        write(card, seed=2)
    monkeypatch.undo()
    assert card.read_text(encoding="utf-8") == text
    assert sorted(path.name for path in card.parent.iterdir()) == ["tiny.safetensors", "tiny.yaml"]
    with pytest.raises(ValueError, match=r"tiny\.safetensors: sha256 is [0-9a-f]{64}, the card tiny\.yaml states"):
        load_network(card)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architecture": "sense", "network": built("unet")},
            "field 'architecture' must be one of modl, unet, unrolled, varnet, got 'sense'",
        ),
        ({"hyperparameters": {"colour": 3}}, "hyperparameters do not fit unrolled .*colour"),
        (
            {"hyperparameters": {**SMALL["unrolled"], "channels": 4}},
            r"does not fit unrolled .*'channels': 4.*networks\.0\.blocks\.0\.first\.bias \(has \(3,\), needs \(4,\)\)"
            r".*networks\.1\.leave\.weight",
        ),
        ({"network": built("unet")}, "does not fit unrolled"),
    ],
)
def test_a_network_that_its_card_does_not_describe(card: Path, changes: dict[str, Any], message: str) -> None:
    before = {path.name: path.read_bytes() for path in card.parent.iterdir()}
    with pytest.raises(ValueError, match=rf"tiny\.yaml: {message}"):
        write(card, **changes)
    assert {path.name: path.read_bytes() for path in card.parent.iterdir()} == before


def test_weights_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    network = built("unrolled")
    with torch.no_grad():
        network.get_parameter("step_sizes")[0] = torch.nan
    with pytest.raises(ValueError, match=r"tiny\.yaml: weights that are not finite: step_sizes"):
        write(tmp_path / "tiny.yaml", network=network)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fit_for": {"acceleration": [2, 8], "coils": [4, 32]}}, "field 'fit_for' must have acceleration, coils, dim"),
        (
            {"fit_for": {**FIT, "coils": [32, 4]}},
            r"field 'fit_for\.coils' must be \[smallest, largest\], got \[32, 4\]",
        ),
        ({"fit_for": {**FIT, "dimension": 4}}, r"field 'fit_for\.dimension' must be 2 or 3, got 4"),
        ({"licence": 7}, "field 'licence' must be a str, got 7"),
    ],
)
def test_a_card_that_its_reader_would_refuse_is_not_written(card: Path, changes: dict[str, Any], message: str) -> None:
    before = {path.name: path.read_bytes() for path in card.parent.iterdir()}
    with pytest.raises(ValueError, match=rf"tiny\.yaml: {message}"):
        write(card, seed=2, **changes)
    assert {path.name: path.read_bytes() for path in card.parent.iterdir()} == before


def test_a_licence_must_be_stated(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="licence"):
        write_card(  # type: ignore[call-arg]
            tmp_path / "tiny.yaml",
            built("unrolled"),
            architecture="unrolled",
            hyperparameters=SMALL["unrolled"],
            fit_for=FIT,
            trained_on="",
            evaluation="",
        )


def test_a_card_is_yaml(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tiny\.txt: a model card must be a \.yaml or \.yml file"):
        write(tmp_path / "tiny.txt")


@pytest.mark.parametrize(
    ("architecture", "got"), [("sense", "'sense'"), ('"python:torch.nn:Identity"', "'python:torch.nn:Identity'")]
)
def test_a_card_of_no_network_of_ours_cannot_be_trained(tmp_path: Path, architecture: str, got: str) -> None:
    card = tmp_path / "other.yaml"
    card.write_text(f"name: other\narchitecture: {architecture}\nfit_for: {FIT}\nlicence: none\n", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"other\.yaml: field 'architecture' must be one of .* trained, got {got}"):
        load_network(card)


# --- figures


def test_figures_are_recorded_and_all_else_stays(card: Path) -> None:
    before = card.read_text(encoding="utf-8")
    entries = yaml.safe_load(before)
    record(card, "PSNR: 40 dB, " * 20, [ROW, ROW])
    after = yaml.safe_load(card.read_text(encoding="utf-8"))
    assert load_card(str(card)).figures == (ROW, ROW)
    assert after.pop("figures") == [ROW.entry(), ROW.entry()]
    assert after == {**entries, "evaluation": f"{('PSNR: 40 dB, ' * 20).strip()}\n"}
    load_network(card)
    # twice is once, and back again
    text = card.read_text(encoding="utf-8")
    record(card, "PSNR: 40 dB, " * 20, [ROW, ROW])
    assert card.read_text(encoding="utf-8") == text
    record(card, "Not measured yet.")
    assert card.read_text(encoding="utf-8") == before


def test_a_card_by_hand_keeps_its_comments(card: Path) -> None:
    written = card.read_text(encoding="utf-8").replace("architecture:", "# ours\narchitecture:")
    written = written.replace("evaluation: >\n  Not measured yet.\n", "figures:\n- {mask: x}\n\n  # old\n- 3\n")
    card.write_text(f"{written.rstrip()}  # no newline", encoding="utf-8")
    record(card, "fine", [ROW])
    text = card.read_text(encoding="utf-8")
    assert "# ours\n" in text
    assert "old" not in text
    assert load_card(str(card)).figures == (ROW,)
    assert yaml.safe_load(text)["evaluation"].strip() == "fine"
    assert text.endswith("licence: CC0-1.0  # no newline\n")


def test_a_card_that_is_one_mapping_in_a_line_is_left_alone(card: Path) -> None:
    text = yaml.safe_dump(yaml.safe_load(card.read_text(encoding="utf-8")), default_flow_style=True, width=9999)
    card.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"tiny\.yaml: figures cannot be recorded; expected every field at the begin"):
        record(card, "fine", [ROW])
    assert card.read_text(encoding="utf-8") == text


def test_figures_that_are_none_are_not_recorded(card: Path) -> None:
    text = card.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match=r"tiny\.yaml: field 'figures\[1\]\.psnr' must be a finite number, got nan"):
        record(card, "fine", [ROW, dataclasses.replace(ROW, psnr=float("nan"))])
    assert card.read_text(encoding="utf-8") == text
