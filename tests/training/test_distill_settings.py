"""What a distillation is told, and what it draws its scans from."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.training.distilled import tiny_card, volume_folder

from voxelsigma.models.cards import ModelCard, load_card
from voxelsigma.training.distill import DistillSettings, example_settings, held_out_in


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
        ({"seed": -1}, "distill: seed must be a whole number of at least 0, got -1"),
    ],
)
def test_settings_are_checked(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        DistillSettings(**changes)


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
