"""Cards that are given a predictor: two lines change, all others stay."""

from pathlib import Path

import pytest
import yaml

from voxelsigma.training.card import record_predictor


@pytest.mark.parametrize("licence", ["licence: CC0\n", "licence: CC0"])
def test_lines_of_a_card_are_added_and_replaced(tmp_path: Path, licence: str) -> None:
    path = tmp_path / "tiny.yaml"
    fit = "{acceleration: [1, 2], coils: [1, 2], dimension: 2}"
    text = f"# mine\nname:   tiny   # a name\narchitecture: sense\nfit_for: {fit}\n{licence}"
    path.write_text(text)
    record_predictor(path, "a.sigma.safetensors", "ab")
    first = path.read_text()
    assert first.replace("predictor: a.sigma.safetensors\npredictor_sha256: ab\n", "").rstrip() == text.rstrip()
    record_predictor(path, "b.sigma.safetensors", "0123")
    changed = yaml.safe_load(path.read_text())
    assert (changed["predictor"], changed["predictor_sha256"]) == ("b.sigma.safetensors", "0123")
    assert len(path.read_text().splitlines()) == len(first.splitlines())


@pytest.mark.parametrize(
    ("text", "name", "told"),
    [
        ("{{name: tiny, architecture: sense, {fit}, licence: x}}", "a.sigma.safetensors", "cannot be recorded"),
        ("name: tiny\narchitecture: sense\n{fit}\nlicence: x\n", "a.pt", "field 'predictor' must name a"),
    ],
)
def test_cards_that_cannot_take_a_predictor_stay(tmp_path: Path, text: str, name: str, told: str) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(text.format(fit="fit_for: {acceleration: [1, 2], coils: [1, 2], dimension: 2}"))
    before = path.read_text()
    with pytest.raises(ValueError, match=rf"tiny\.yaml: .*{told}"):
        record_predictor(path, name, "ab")
    assert path.read_text() == before
