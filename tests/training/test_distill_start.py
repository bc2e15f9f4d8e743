"""Distillations that begin from the predictor of another card."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.distilled import run, tiny_card
from torch import Tensor, nn

from voxelsigma.models.cards import load_card
from voxelsigma.models.predictor_file import load_predictor
from voxelsigma.training import distill as distilling
from voxelsigma.training.config import DataSettings

NAME = "tiny.sigma.safetensors"


class Stop(BaseException):
    """A kill."""


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A network with other weights."""
    return tiny_card(tmp_path / "other", seed=2)


def test_weights_are_those_of_the_other_predictor(
    other: Path, data: DataSettings, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[dict[str, Tensor]] = []

    def noted(network: nn.Module, *_: Any, **__: Any) -> None:
        begun.append({name: value.clone() for name, value in network.state_dict().items()})
        raise Stop

    monkeypatch.setattr(distilling, "fit", noted)
    with pytest.raises(Stop):
        run(other, data, start=whole / "tiny.yaml")
    predictor = load_predictor(load_card(str(whole / "tiny.yaml")), torch.device("cpu"))
    assert predictor is not None
    (found,) = begun
    expected = predictor.surrogate.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value)


def test_it_ends_with_a_predictor_of_its_own(tmp_path: Path, card: Path, data: DataSettings, whole: Path) -> None:
    begun = whole / "tiny.yaml"
    found, _ = run(card, data, tmp_path, start=begun)
    assert found != (whole / NAME).read_bytes()
    # once more there is nothing to do
    assert run(card, data, tmp_path, start=begun)[0] == found
    with pytest.raises(ValueError, match=r"tiny\.distill: holds another run \(differing in start\)"):
        run(card, data, tmp_path)


def test_the_predictor_that_will_be_written_is_nothing_to_begin_from(
    tmp_path: Path, data: DataSettings, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between its file and the card, such a run could not go on; nothing is touched, however it is named."""
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    (tmp_path / "link").symlink_to(folder)
    (folder / "again.yaml").write_text((folder / "tiny.yaml").read_text())
    before = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    monkeypatch.chdir(folder)
    for start, out in (
        (folder / "tiny.yaml", None),
        (Path("tiny.yaml"), None),
        (folder / "again.yaml", folder),
        (tmp_path / "link" / "tiny.yaml", None),
        (folder / "tiny.yaml", tmp_path / "link"),
    ):
        told = r"tiny\.sigma\.safetensors, to begin from, is the very file that will be written; name .* with --out"
        with pytest.raises(ValueError, match=told):
            run(folder / "tiny.yaml", replace(data, folder="nowhere"), out, start=start)
    assert before == {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    # in another folder it is
    found, _ = run(folder / "tiny.yaml", data, tmp_path / "other", start=folder / "tiny.yaml")
    assert run(folder / "tiny.yaml", data, tmp_path / "other", start=folder / "tiny.yaml")[0] == found


@pytest.mark.parametrize(
    "changes", [{"channels": 5}, {"levels": 1}, {"surrogate_channels": 5}, {"surrogate_stages": (0.0, 0.5, 0.0)}]
)
def test_a_predictor_of_other_sizes_is_refused(
    other: Path, data: DataSettings, whole: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"whole.*tiny\.yaml: its predictor is of other sizes or stages"):
        run(other, data, start=whole / "tiny.yaml", **changes)
    assert sorted(path.name for path in other.parent.iterdir()) == ["tiny.safetensors", "tiny.yaml"]


def test_a_card_without_a_predictor_is_refused(other: Path, card: Path, data: DataSettings) -> None:
    with pytest.raises(ValueError, match=r"tiny\.yaml: names no predictor to begin from; distill it first"):
        run(other, data, start=card)
    with pytest.raises(FileNotFoundError, match="nothing"):
        run(other, data, start=card.with_name("nothing.yaml"))
