"""The command line's list of models, and its comparison of them."""

import hashlib
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save

from voxelsigma.hosts.model_list import gains, listed, models_grid
from voxelsigma.models.cards import available_cards, load_card
from voxelsigma.models.figures import Figures
from voxelsigma.models.predictor import SigmaPredictor
from voxelsigma.models.unrolled import Unrolled
from voxelsigma.training.card import record_predictor, save_predictor

Outcome = subprocess.CompletedProcess[str]

TINY = {"steps": 1, "blocks": 1, "channels": 3}


def row(mask: str, acceleration: float, psnr: float, **changes: Any) -> Figures:
    given = {"ssim": 0.9, "linear_psnr": 20.0, "zero_filled_psnr": 19.0, "sigma": 0.7, **changes}
    return Figures(mask=mask, acceleration=acceleration, psnr=psnr, **given)


def write_card(folder: Path, name: str = "tiny", *, suffix: str = ".safetensors", **changes: Any) -> Path:
    weights = folder / f"{name}{suffix}"
    if suffix == ".safetensors":
        weights.write_bytes(save(Unrolled(**TINY).state_dict()))
    else:
        torch.save(Unrolled(**TINY).state_dict(), weights)
    entries = {
        "name": name,
        "architecture": "unrolled",
        "hyperparameters": TINY,
        "weights": weights.name,
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "fit_for": {"acceleration": [2, 6.5], "coils": [4, 16], "dimension": 2},
        "licence": "CC0",
        **changes,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(entries), encoding="utf-8")
    return path


# --- the list


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_parameters_are_counted(tmp_path: Path, suffix: str) -> None:
    found = listed(str(write_card(tmp_path, suffix=suffix)))
    expected = sum(value.numel() for value in Unrolled(**TINY).state_dict().values())
    assert (found.parameters, found.size) == (expected, (tmp_path / f"tiny{suffix}").stat().st_size)


@pytest.mark.parametrize("content", [b"", b"cut", b"\xff" * 20])
def test_weights_that_cannot_be_read(tmp_path: Path, content: bytes) -> None:
    path = write_card(tmp_path, sha256=hashlib.sha256(content).hexdigest())
    (tmp_path / "tiny.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"tiny\.safetensors: not a safetensors file"):
        listed(str(path))


def test_gains_are_told_for_every_mask() -> None:
    assert gains(()) == "-"
    rows = (
        row("random_1d", 6, 24.96),
        row("random_2d", 6, 26.0),
        row("random_2d", 4, 25.5),
        row("random_2d", 4, 99.0, maps="masked"),
        row("random_2d", 8, 30.0),
    )
    assert gains(rows) == "1D random -, +5.0; 2D random +5.5, +6.0"
    assert gains((row("random_2d", 2, 25.0),)) == "-"


def test_a_row_of_the_list(tmp_path: Path) -> None:
    found = listed(str(write_card(tmp_path, figures=[row("random_2d", 4, 25.0).entry()])))
    assert models_grid([found]).rows == (
        ("tiny", "unrolled", f"{found.parameters:,}", f"{found.size / 1000:.0f}", "-", "2-6.5", "4-16",
         "2D", "2D random +5.0, -", "CC0"),
    )  # fmt: skip


def test_a_predictor_is_listed_and_checked(tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    path = write_card(tmp_path)
    predictor = tmp_path / "tiny.sigma.safetensors"
    digest = save_predictor(predictor, SigmaPredictor(channels=4, surrogate_channels=4), load_card(str(path)))
    record_predictor(path, predictor.name, digest)
    found = listed(str(path))
    assert found.predictor == predictor.stat().st_size > 0
    assert models_grid([found]).rows[0][4] == f"{found.predictor / 1000:,.0f}"
    predictor.write_bytes(predictor.read_bytes()[:-1])
    outcome = cli("models", path)
    assert outcome.returncode == 1
    assert re.search(r"tiny\.sigma\.safetensors: sha256 is .* the card tiny\.yaml states", outcome.stderr)


def test_the_shipped_models_are_listed(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    card = write_card(tmp_path)
    found = cli("models", card)
    assert (found.returncode, found.stderr) == (0, "")
    names = [line.split()[0] for line in found.stdout.splitlines()[3:] if line.strip()]
    assert names == [*available_cards(), "tiny"]
    assert "Apache-2.0" in found.stdout


def test_the_list_for_machines(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    figures = [row("random_2d", 4, 25.0).entry()]
    found = cli("models", "--json", write_card(tmp_path, figures=figures))
    assert (found.returncode, found.stderr) == (0, "")
    models = json.loads(found.stdout)
    assert [model["name"] for model in models] == [*available_cards(), "tiny"]
    last = models[-1]
    assert (last["acceleration"], last["coils"], last["dimension"]) == ([2, 6.5], [4, 16], 2)
    assert last["figures"][0]["psnr"] == 25.0
    assert models[0]["parameters"] > 0 or models[0]["architecture"] == "sense"


def test_bad_cards_are_named_and_the_others_listed(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    good = write_card(tmp_path)
    for name in ("hash", "weights", "figures"):
        write_card(tmp_path, name, figures=[{"mask": "random_2d"}] if name == "figures" else [])
    (tmp_path / "hash.safetensors").write_bytes(b"other")
    (tmp_path / "weights.safetensors").unlink()
    bad = [tmp_path / f"{name}.yaml" for name in ("hash", "weights", "figures", "none")]
    found = cli("models", *bad, good)
    assert found.returncode == 1
    lines = found.stderr.splitlines()
    expected = (
        r"error: .*hash\.safetensors: sha256 is [0-9a-f]{64}, the card hash\.yaml states [0-9a-f]{64}",
        r"error: .*weights\.safetensors: no such file of weights",
        r"error: .*figures\.yaml: field 'figures\[0\]' lacks the fields acceleration, psnr, .*",
        r"error: .*none\.yaml: no such model card",
    )
    for line, text in zip(lines, expected, strict=True):
        assert re.fullmatch(text, line)
    assert "tiny" in found.stdout


# --- the comparison


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    z, y, x = np.ogrid[-1:1:20j, -1:1:24j, -1:1:22j]
    np.savez(folder / "ball.npz", vol=100 * (np.sqrt(z**2 + y**2 + x**2) < 0.95))
    return folder


def test_a_model_is_compared_and_its_figures_recorded(cli: Callable[..., Outcome], tmp_path: Path, data: Path) -> None:
    card = write_card(tmp_path)
    table = tmp_path / "table.md"
    table.write_text("<!-- reconstructions:begin -->\n<!-- reconstructions:end -->\n", encoding="utf-8")
    arguments = "--head ball --matrix 32 --slices 1 --mask random_2d -R 4 --threads 1 --snr 12 --record"
    found = cli("evaluate", card, "--data", data, *arguments.split(), "--table", table)
    assert found.returncode == 0, found.stderr
    assert [line.split(":")[0] for line in found.stderr.splitlines()] == ["2D random R=4, full maps"] * 2
    assert "PSNR in dB (above zero-filled, above linear)" in found.stdout
    assert "| 2D random R=4, full maps |" in table.read_text(encoding="utf-8")
    assert "SNR 12, " in table.read_text(encoding="utf-8")
    assert len(listed(str(card)).figures) == 1


def test_the_sketch_is_compared_with_repetitions(cli: Callable[..., Outcome], tmp_path: Path, data: Path) -> None:
    arguments = "--agreement --head ball --matrix 32 -R 4 --probes 16 --trials 16 --threads 1 --snr 8"
    found = cli("evaluate", write_card(tmp_path), "--data", data, *arguments.split())
    assert found.returncode == 0, found.stderr
    assert "PCC" in found.stdout
    assert "SNR 8: " in " ".join(found.stdout.split())
    assert "sketch with control variate, S = 16 probes, against N = 16 repetitions" in " ".join(found.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("unrolled_huge", "no model card is called 'unrolled_huge'; shipped are .*sense, .*"),
        ("sense", r".*sense\.yaml: 'sense' is not a network; expected the card of one"),
        ("unrolled_small --head nobody", "volumes: .* holds no .* file named nobody; found 1 others.*"),
        ("unrolled_small --mask spiral", "evaluate: mask must be one of uniform_1d, .*, got 'spiral'"),
        ("unrolled_small --mask uniform_1d -R 2.5", "evaluate: acceleration must be a whole number for uniform_1d, .*"),
        ("unrolled_small --snr 0", "evaluate: snr must be a finite number above 0, got 0"),
        ("unrolled_small --threads 0", "evaluate: threads must be at least 1, got 0"),
        (
            "unrolled_small --agreement --record",
            "evaluate: a comparison with repetitions gives no figures to record .*",
        ),
        ("unrolled_small --table none.md", r"none\.md: no such file; expected one with the lines <!-- rec.*"),
    ],
)
def test_what_cannot_be_compared(cli: Callable[..., Outcome], data: Path, arguments: str, text: str) -> None:
    found = cli("evaluate", *arguments.split(), "--data", data)
    assert (found.returncode, found.stdout) == (1, "")
    assert re.fullmatch(f"error: {text}\n", found.stderr)


def test_a_device_that_is_not_there(cli: Callable[..., Outcome], data: Path) -> None:
    found = cli("evaluate", "unrolled_small", "--data", data, "--device", "abacus")
    assert (found.returncode, found.stdout) == (1, "")
    assert re.match("error: .*abacus", found.stderr)
    assert found.stderr.count("\n") == 1
