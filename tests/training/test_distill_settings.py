"""What a distillation is told, what it draws its scans from, and where it does not even begin."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lightning_fabric.accelerators.cuda import CUDAAccelerator
from tests.training.distilled import SETTINGS, tiny_card, volume_folder

from voxelsigma.models.cards import ModelCard, load_card
from voxelsigma.training.config import DataSettings
from voxelsigma.training.distill import distill, example_settings, held_out_in
from voxelsigma.training.distill_settings import DistillSettings


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"scans": 0}, "distill: scans must be a whole number of at least 1, got 0"),
        ({"probes": 1}, "distill: probes must be a whole number of at least 2, got 1"),
        ({"steps": 1.5}, "distill: steps must be a whole number of at least 1, got 1.5"),
        ({"crop": 8}, "distill: crop must be a whole number of at least 16, got 8"),
        ({"channels": 129}, "distill: channels must be a number from 1 to 128, got 129"),
        ({"levels": 7}, "distill: levels must be a number from 1 to 6, got 7"),
        ({"learning_rate": 0}, "distill: learning_rate must be a number from 1e-08 to 1, got 0"),
        ({"precision": "16"}, "distill: precision must be one of '32-true', 'bf16-mixed', '64-true', got '16'"),
        ({"surrogate_scans": 0}, "distill: surrogate_scans must be a whole number of at least 1, got 0"),
        ({"surrogate_steps": 1.5}, "distill: surrogate_steps must be a whole number of at least 1, got 1.5"),
        ({"surrogate_stages": ()}, "predictor: surrogate_stages must be 1 to 8 numbers, got 0"),
        ({"surrogate_stages": (0, -1)}, "predictor: surrogate_stages must each be 0, or .*0.001 to 100, got -1"),
        ({"surrogate_channels": 129}, "distill: surrogate_channels must be a number from 1 to 128, got 129"),
        ({"surrogate_levels": 7}, "distill: surrogate_levels must be a number from 1 to 6, got 7"),
        ({"surrogate_learning_rate": 2}, "distill: surrogate_learning_rate must be a number from 1e-08 to 1, got 2"),
        ({"seed": -1}, "distill: seed must be a whole number of at least 0, got -1"),
    ],
)
def test_settings_are_checked(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        DistillSettings(**changes)


def test_both_networks_are_trained_by_their_own_rates() -> None:
    settings = DistillSettings(
        steps=50, learning_rate=1e-3, surrogate_steps=3000, surrogate_learning_rate=2e-4, batch=3, seed=5
    )
    one, other = settings.fit_settings(), settings.fit_settings(surrogate=True)
    assert (one.steps, one.learning_rate, one.warm_up) == (50, 1e-3, 5)
    assert (other.steps, other.learning_rate, other.warm_up) == (3000, 2e-4, 100)
    assert other.clip < one.clip
    for name in ("batch", "seed", "precision", "checkpoint_every", "log_every"):
        assert getattr(one, name) == getattr(other, name) == getattr(settings, name)


# --- what it draws


@pytest.mark.parametrize(
    ("acceleration", "coils", "expected"),
    [
        ((2, 8), (4, 32), ((2, 8), (4, 16), 0.04)),
        ((1, 4), (1, 8), ((1, 4), (1, 8), 0.0)),
        ((0.5, 100), (20, 64), ((1, 12), (20, 20), 0.04)),
        ((16, 20), (40, 64), ((16, 16), (40, 40), 0.0)),
    ],
)
def test_scans_are_drawn_from_the_cards_range(
    tmp_path: Path, acceleration: tuple[float, float], coils: tuple[int, int], expected: tuple[Any, ...]
) -> None:
    checked: ModelCard = replace(load_card(str(tiny_card(tmp_path))), acceleration=acceleration, coils=coils)
    found = example_settings(checked, (80, 128))
    assert (found.acceleration, found.coils, found.many_coils_share) == expected
    assert (found.matrix, found.snr, found.many_coils) == ((80, 128), (5, 50), 32)


def test_held_out_volumes_that_are_there(tmp_path: Path) -> None:
    assert held_out_in(tmp_path) == ()
    assert held_out_in(Path(volume_folder(tmp_path / "volumes").folder)) == ("head_07",)


# --- what it does not even begin


def test_a_folder_with_another_network_is_refused(tmp_path: Path, card: Path, data: DataSettings) -> None:
    other = tiny_card(tmp_path, seed=2)
    with pytest.raises(ValueError, match=r"tiny\.yaml: is the card of another network than .*tiny\.yaml"):
        distill(card, data, out=tmp_path, settings=SETTINGS)
    other.unlink()
    with pytest.raises(ValueError, match=r"tiny\.safetensors: are other weights than those of .*tiny\.yaml"):
        distill(card, data, out=tmp_path, settings=SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.safetensors"]


def test_a_linear_reconstruction_needs_none(tmp_path: Path, data: DataSettings) -> None:
    with pytest.raises(ValueError, match=r"sense\.yaml: 'sense' is linear: its σ needs no predictor"):
        distill("sense", data, out=tmp_path / "out", settings=SETTINGS)
    assert not (tmp_path / "out").exists()


def test_folders_that_cannot_be_written_are_refused_first(
    tmp_path: Path, card: Path, data: DataSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.touch()
    for out in (file, file / "below"):
        told = rf"^{out}: cannot be written \({file} is not a folder\); name another folder with --out$"
        with pytest.raises(OSError, match=told):
            distill(card, data, out=out, settings=SETTINGS)
    # who runs as root may write everywhere
    monkeypatch.setattr(os, "access", lambda *_: False)
    told = r"card.*: cannot be written, and the predictor lies beside its card; name a folder with --out$"
    with pytest.raises(OSError, match=told):
        distill(card, data, settings=SETTINGS)
    told = rf"new: cannot be written \({tmp_path} may not be written to\); name another folder with --out$"
    with pytest.raises(OSError, match=told):
        distill(card, data, out=tmp_path / "new", settings=SETTINGS)
    assert sorted(path.name for path in card.parent.iterdir()) == ["tiny.safetensors", "tiny.yaml"]


@pytest.mark.parametrize("accelerator", ["garbage", "cuda"])
def test_an_accelerator_that_is_not_there_leaves_nothing(
    tmp_path: Path, card: Path, data: DataSettings, accelerator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CUDAAccelerator, "is_available", staticmethod(lambda: False))
    with pytest.raises((ValueError, RuntimeError), match=r"invalid accelerator name|`CUDAAccelerator` can not run"):
        distill(card, data, out=tmp_path / "out", settings=SETTINGS, accelerator=accelerator)
    assert not (tmp_path / "out").exists()


def test_bad_data_leave_nothing(tmp_path: Path, card: Path, data: DataSettings) -> None:
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        distill(card, DataSettings(folder=str(tmp_path / "nowhere")), out=tmp_path / "out", settings=SETTINGS)
    with pytest.raises(ValueError, match="examples: matrix must be a range of multiples of 4"):
        distill(card, data, out=tmp_path / "out", settings=replace(SETTINGS, matrix=(81, 81)))
    far = tiny_card(tmp_path / "far", fit_for={"acceleration": [2, 12], "coils": [3, 4], "dimension": 2})
    with pytest.raises(ValueError, match=r"examples: .* cannot be drawn with centre random, matrix 4"):
        distill(far, data, out=tmp_path / "out", settings=replace(SETTINGS, matrix=(4, 4)))
    assert not (tmp_path / "out").exists()
