"""The training loop and the card it writes."""

import hashlib
from collections.abc import Iterator
from itertools import islice, repeat
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from voxelsigma.models.encoding import SenseEncoding
from voxelsigma.training.card import load_unrolled, record, write_card, write_whole
from voxelsigma.training.examples import Example, ExampleSettings, stream
from voxelsigma.training.fit import FitSettings, fit, loss_of, main, start_network
from voxelsigma.training.volumes import Volume

TINY = {"steps": 2, "blocks": 1, "channels": 4}


@pytest.fixture(scope="module")
def volumes() -> list[Volume]:
    z, y, x = np.ogrid[-1:1:24j, -1:1:28j, -1:1:26j]
    radius = np.sqrt(z**2 + y**2 + x**2)
    return [Volume("ball", (radius < 0.95).astype(np.int16) + (radius < 0.5), 3)]


def examples(volumes: list[Volume]) -> Iterator[Example]:
    settings = ExampleSettings(matrix=(24, 32), coils=(3, 4), many_coils_share=0.0, acceleration=(2, 3))
    return stream(volumes, settings, batch=2, seed=0)


def test_steps_reduce_the_loss_of_one_example(volumes: list[Volume]) -> None:
    network = start_network(TINY, seed=0)
    example = next(examples(volumes))
    losses = fit(network, repeat(example), FitSettings(steps=40, warm_up=1, learning_rate=5e-3))
    assert len(losses) == 40
    assert losses[-1] < 0.9 * losses[0]
    assert float(loss_of(network, example).detach()) < 0.9 * losses[0]


def test_training_repeats_itself_for_a_seed(volumes: list[Volume]) -> None:
    def trained() -> tuple[list[float], torch.Tensor]:
        network = start_network(TINY, seed=3)
        losses = fit(network, examples(volumes), FitSettings(steps=4))
        return losses, torch.cat([parameter.detach().flatten() for parameter in network.parameters()])

    (losses, weights), (losses_again, weights_again) = trained(), trained()
    assert losses == losses_again
    assert torch.equal(weights, weights_again)


def test_training_ends_with_the_examples(volumes: list[Volume]) -> None:
    lines: list[str] = []
    network = start_network(TINY, seed=0)
    losses = fit(network, islice(examples(volumes), 3), FitSettings(steps=100), report=lines.append)
    assert len(losses) == 3
    assert lines == []


def test_the_loss_is_the_error_in_units_of_the_object(volumes: list[Volume]) -> None:
    class Off(torch.nn.Module):
        def forward(self, kspace: torch.Tensor, sensitivities: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return target + 3j

    example = next(examples(volumes))
    target = example.target
    magnitude = target.abs()
    expected = [3 / m[m > 0.1 * np.percentile(m, 99)].mean() for m in magnitude.numpy()]
    assert float(loss_of(Off(), example)) == pytest.approx(np.mean(expected), rel=1e-4)


def test_the_network_starts_as_gradient_descent(volumes: list[Volume]) -> None:
    example = next(examples(volumes))
    encoding = SenseEncoding(example.sensitivities, example.mask)
    zero_filled = encoding.adjoint(example.kspace)
    image = zero_filled
    for _ in range(2):
        image = image - encoding.adjoint(encoding.forward(image)) + zero_filled
    with torch.no_grad():
        found = start_network(TINY, seed=0)(example.kspace, example.sensitivities, example.mask)
    torch.testing.assert_close(found, image, rtol=1e-4, atol=1e-3)


def test_card_and_weights_go_together(tmp_path: Path) -> None:
    network = start_network(TINY, seed=1)
    card = tmp_path / "tiny.yaml"
    write_card(card, network, TINY, trained_on="balls: of one size, " * 20, evaluation="none")
    entries = yaml.safe_load(card.read_text())
    assert list(entries) == [
        "name", "architecture", "hyperparameters", "weights", "sha256", "fit_for", "trained_on", "evaluation",
        "licence",
    ]  # fmt: skip
    assert entries["hyperparameters"] == TINY
    assert entries["fit_for"] == {"acceleration": [2, 8], "coils": [4, 32], "dimension": 2}
    assert entries["trained_on"].split() == ("balls: of one size, " * 20).split()
    content = (tmp_path / "tiny.safetensors").read_bytes()
    assert entries["sha256"] == hashlib.sha256(content).hexdigest()
    loaded = load_unrolled(card)
    for name, value in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.safetensors", "tiny.yaml"]

    record(card, "PSNR 40 dB")
    assert yaml.safe_load(card.read_text()) == {**entries, "evaluation": "PSNR 40 dB\n"}


def test_changed_weights_are_refused(tmp_path: Path) -> None:
    card = tmp_path / "tiny.yaml"
    write_card(card, start_network(TINY, seed=1), TINY, trained_on="x", evaluation="y")
    card.with_suffix(".safetensors").write_bytes(b"other")
    with pytest.raises(ValueError, match=r"tiny\.safetensors: sha256 is [0-9a-f]{64}, the card tiny\.yaml states"):
        load_unrolled(card)


def test_cards_without_a_network_to_train_are_refused(tmp_path: Path) -> None:
    card = tmp_path / "linear.yaml"
    fit_for = "{acceleration: [1, 16], coils: [1, 256], dimension: 2}"
    card.write_text(f"name: linear\narchitecture: sense\nfit_for: {fit_for}\nlicence: Apache-2.0\n")
    with pytest.raises(ValueError, match=r"linear\.yaml: field 'architecture' must be 'unrolled'"):
        load_unrolled(card)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_whole(path, b"old")

    def fail(self: Path, target: Path) -> None:
        raise OSError("disk is gone")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk is gone"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_command_trains_and_saves(tmp_path: Path, volumes: list[Volume], capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    data.mkdir()
    np.savez(data / "ball.npz", vol=100 * volumes[0].values)
    out = tmp_path / "card.yaml"
    threads = torch.get_num_threads()
    common = ["--data", str(data), "--out", str(out), "--threads", str(threads)]
    assert main([*common, "--steps", "1", "--matrix", "24", "24", "--source", "PDDL", "--exclude", "x"]) == 0
    assert "saved" in capsys.readouterr().out
    assert "ball (PDDL): 1 steps of 2" in yaml.safe_load(out.read_text())["trained_on"]
    more = ["--start", str(out), "--steps", "2", "--matrix", "24", "24", "--seed", "1"]
    assert main([*common, *more]) == 0
    told = yaml.safe_load(out.read_text())["trained_on"].replace("\n", " ")
    assert told.index("1 steps of 2") < told.index("Then: Simulated scans") < told.index("2 steps of 2")
    capsys.readouterr()
    assert main([*common, "--exclude", "ball"]) == 2
    assert "holds no" in capsys.readouterr().err


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="fit: steps must be above 0, got 0"):
        FitSettings(steps=0)
