"""The scans that reconstructions are compared by."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from voxelsigma.noise.voxels import object_mask
from voxelsigma.training.evaluate import EvaluateOptions
from voxelsigma.training.held_out import Setting, held_out_slices, reference, settings
from voxelsigma.training.volumes import Volume


def ball() -> Volume:
    z, y, x = np.ogrid[-1:1:24j, -1:1:28j, -1:1:26j]
    return Volume("ball", (np.sqrt(z**2 + y**2 + x**2) < 0.95).astype(np.int16), 2)


def test_settings_are_all_combinations() -> None:
    found = settings(["random_2d", "random_1d"], [2, 4], ["full"], matrix=64)
    assert [setting.name for setting in found] == [
        "2D random R=2, full maps",
        "2D random R=4, full maps",
        "1D random R=2, full maps",
        "1D random R=4, full maps",
    ]


def test_the_settings_of_the_documentation() -> None:
    options = EvaluateOptions(cards=("unrolled_small",), data=Path(), maps=("full", "masked"))
    names = [setting.name for setting in options.settings()]
    assert len(names) == 16
    assert {"2D random R=6, masked maps", "1D random R=8, full maps"} <= set(names)
    assert {(setting.matrix, setting.snr) for setting in options.settings()} == {(320, 20.0)}
    (one,) = dataclasses.replace(options, against_trials=True, maps=("full",), snr=5.0).settings()
    assert (one.name, one.matrix, one.snr) == ("2D random R=8, full maps", 96, 5.0)


def test_every_slice_has_its_reference_lines() -> None:
    setting = Setting(mask="uniform_1d", acceleration=4, matrix=128)
    for scan in held_out_slices([ball()], setting.examples(), slices=8, seed=3):
        assert bool(scan.mask[0, 52:76].all())


def test_the_object_is_as_bright_as_asked() -> None:
    setting = Setting(mask="random_2d", acceleration=2, matrix=64, snr=7)
    (scan,) = held_out_slices([ball()], setting.examples(), slices=1, seed=1)
    image = reference(scan)
    assert float(image.abs()[object_mask(image)].mean()) == pytest.approx(7, rel=0.2)


@pytest.mark.parametrize(("acceleration", "lines", "side"), [(2, 24, 24), (4, 24, 24), (8, 24, 24), (12, 20, 24)])
def test_reference_lines_leave_some_for_the_rest(acceleration: float, lines: int, side: int) -> None:
    one, two = (Setting(mask=mask, acceleration=acceleration).centre for mask in ("random_1d", "random_2d"))
    assert (one, two) == (lines, side)


@pytest.mark.parametrize("mask", ["random_1d", "random_2d"])
@pytest.mark.parametrize("acceleration", [2.0, 8.0])
def test_scans_are_those_of_their_setting(mask: Any, acceleration: float) -> None:
    setting = Setting(mask=mask, acceleration=acceleration, matrix=64, maps="masked")
    first, again = (held_out_slices([ball()], setting.examples(), slices=2, seed=1) for _ in range(2))
    for scan, other in zip(first, again, strict=True):
        assert torch.equal(scan.kspace, other.kspace)
        assert scan.kspace.shape == (8, 64, 64)
        assert scan.mask.numel() / float(scan.mask.sum()) == pytest.approx(acceleration, rel=0.01)
        norm = scan.sensitivities.abs().square().sum(dim=0)
        assert 0 < float((norm == 0).float().mean()) < 1
        image = reference(scan)
        assert float(image.abs()[object_mask(image)].mean()) == pytest.approx(20, rel=0.2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": "spiral"}, "evaluate: mask must be one of uniform_1d, random_1d, random_2d, poisson_disc, got 'spir"),
        ({"maps": "half"}, "evaluate: maps must be full or masked, got 'half'"),
        ({"matrix": 30}, "evaluate: matrix must be a multiple of 4 from 32, got 30"),
        ({"acceleration": 0.5}, "evaluate: acceleration must be from 1 to 16, got 0.5"),
        ({"acceleration": 17}, "evaluate: acceleration must be from 1 to 16, got 17"),
        (
            {"mask": "uniform_1d", "acceleration": 2.5},
            "evaluate: acceleration must be a whole number for uniform_1d, got 2.5",
        ),
        ({"snr": 0}, "evaluate: snr must be a finite number above 0, got 0"),
        ({"snr": float("nan")}, "evaluate: snr must be a finite number above 0, got nan"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    given = {"mask": "random_2d", "acceleration": 2, "matrix": 64, **changes}
    with pytest.raises(ValueError, match=message):
        Setting(**given)


def test_no_setting_is_none() -> None:
    with pytest.raises(ValueError, match="evaluate: no setting is left"):
        settings([], [2], ["full"])
