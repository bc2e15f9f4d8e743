"""The training loop: it repeats itself, goes on where it was, and stops where it must."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from voxelsigma.models.cards import ARCHITECTURES
from voxelsigma.models.encoding import SenseEncoding
from voxelsigma.training.config import FitSettings
from voxelsigma.training.examples import Example, ExampleSettings, stream
from voxelsigma.training.fit import CHECKPOINT, DivergedError, fit, make_fabric
from voxelsigma.training.objectives import Objective, make_objective
from voxelsigma.training.start import parameter_groups, start_network
from voxelsigma.training.volumes import Volume

TINY = {"steps": 2, "blocks": 1, "channels": 4}
SMALL = {
    "unrolled": TINY,
    "modl": TINY,
    "unet": {"channels": 2, "levels": 2},
    "varnet": {
        "cascades": 1,
        "channels": 2,
        "levels": 2,
        "sensitivity_channels": 2,
        "sensitivity_levels": 2,
    },
}
SETTINGS = FitSettings(steps=6, warm_up=2, checkpoint_every=2, log_every=2, learning_rate=2e-3)

Draw = Callable[[int], Example]


@pytest.fixture(scope="module")
def draw() -> Draw:
    z, y, x = np.ogrid[-1:1:24j, -1:1:28j, -1:1:26j]
    radius = np.sqrt(z**2 + y**2 + x**2)
    volumes = [Volume("ball", (radius < 0.95).astype(np.int16) + (radius < 0.5), 3)]
    settings = ExampleSettings(
        matrix=(24, 32), coils=(3, 4), many_coils_share=0.0, acceleration=(2, 3), kinds=("random_2d",), centre=6
    )
    return lambda number: next(stream(volumes, settings, batch=2, seed=0, start=number))


def run(
    folder: Path,
    draw: Draw,
    settings: FitSettings = SETTINGS,
    *,
    objective: Objective | None = None,
    network: nn.Module | None = None,
    fingerprint: str = "one",
    report: Callable[[str], None] | None = None,
) -> tuple[Tensor, int]:
    """Weights after a run, and where it began."""
    network = network or start_network("unrolled", TINY, seed=3)
    fabric = make_fabric(settings, folder, accelerator="cpu")
    fabric.launch()
    first = fit(
        network,
        objective or make_objective("supervised", {}),
        draw,
        settings,
        folder=folder,
        fabric=fabric,
        fingerprint=fingerprint,
        report=report,
    )
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()]), first


def losses(folder: Path, version: int = 0) -> list[float]:
    lines = (folder / "log" / f"version_{version}" / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("loss")
    return [float(line.split(",")[column]) for line in lines[1:]]


def test_steps_reduce_the_loss_of_one_example(tmp_path: Path, draw: Draw) -> None:
    lines: list[str] = []
    settings = replace(SETTINGS, steps=40, warm_up=1, learning_rate=5e-3, log_every=1)
    run(tmp_path, lambda number: draw(0), settings, report=lines.append)
    found = losses(tmp_path)
    assert len(found) == len(lines) == 40
    assert found[-1] < 0.9 * found[0]
    assert lines[-1].startswith("step 40/40  loss ")


def test_training_repeats_itself_for_a_seed(tmp_path: Path, draw: Draw) -> None:
    settings = replace(SETTINGS, steps=20)
    one, _ = run(tmp_path / "one", draw, settings)
    two, _ = run(tmp_path / "two", draw, settings)
    assert torch.equal(one, two)
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
    other, _ = run(tmp_path / "three", lambda number: draw(number + 1), settings)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("objective", ["supervised", "noise2recon", "vortex", "ssdu"])
@pytest.mark.parametrize("stopped_at", [1, 2, 5])
def test_a_stopped_run_ends_as_one_that_was_not(tmp_path: Path, draw: Draw, objective: str, stopped_at: int) -> None:
    consistent = {"supervised_consistency": True} if objective in ("noise2recon", "vortex") else {}
    loss = make_objective(objective, consistent)
    whole, _ = run(tmp_path / "whole", draw, objective=loss)

    def stopping(number: int) -> Example:
        if number == stopped_at:
            raise KeyboardInterrupt
        return draw(number)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", stopping, objective=loss)
    seen: list[int] = []

    def watched(number: int) -> Example:
        seen.append(number)
        return draw(number)

    # the weights that it is given do not matter: those of the checkpoint do
    other = start_network("unrolled", TINY, seed=3 if stopped_at == 1 else 4)
    rest, first = run(tmp_path / "parts", watched, objective=loss, network=other)
    # a checkpoint every two steps
    assert first == stopped_at // 2 * 2
    assert seen == list(range(first, 6))
    assert torch.equal(rest, whole)
    # and once more there is nothing to do
    again, first = run(tmp_path / "parts", watched, objective=loss)
    assert first == 6
    assert torch.equal(again, whole)


def test_objectives_draw_from_another_stream_than_examples(tmp_path: Path, draw: Draw) -> None:
    seen: list[float] = []

    def watching(network: nn.Module, example: Example, rng: np.random.Generator, *, progress: float = 1.0) -> Tensor:
        seen.extend(rng.random(3).tolist())
        return make_objective("supervised", {})(network, example, rng, progress=progress)

    run(tmp_path, draw, objective=watching)
    of_examples = [
        value for number in range(6) for value in np.random.default_rng([SETTINGS.seed, number]).random(5).tolist()
    ]
    assert len(set(seen)) == 18
    assert not set(seen) & set(of_examples)


def test_examples_drawn_ahead_are_the_same(tmp_path: Path, draw: Draw) -> None:
    here, _ = run(tmp_path / "here", draw)
    ahead, _ = run(tmp_path / "ahead", draw, replace(SETTINGS, workers=2))
    assert torch.equal(here, ahead)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
@pytest.mark.parametrize("architecture", SMALL)
def test_every_network_trains_in_every_precision(
    tmp_path: Path, draw: Draw, architecture: str, precision: Literal["32-true", "bf16-mixed", "64-true"]
) -> None:
    network = start_network(architecture, SMALL[architecture], seed=0)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    settings = FitSettings(steps=2, warm_up=2, log_every=2, learning_rate=2e-3, precision=precision)

    run(tmp_path, draw, settings, network=network)
    still = [
        name
        for old, (name, new) in zip(before, network.named_parameters(), strict=True)
        if torch.equal(old, new.detach())
    ]
    # the first cascade begins with the data themselves
    assert still == (["cascades.0.dc_weight"] if architecture == "varnet" else [])
    assert np.isfinite(losses(tmp_path)).all()


class Failing:
    """Supervised, until a step whose loss or gradient is not finite."""

    def __init__(self, step: int, kind: str) -> None:
        self.step, self.kind, self.calls = step, kind, 0

    def __call__(
        self, network: nn.Module, example: Example, rng: np.random.Generator, *, progress: float = 1.0
    ) -> Tensor:
        loss = make_objective("supervised", {})(network, example, rng, progress=progress)
        self.calls += 1
        if self.calls <= self.step:
            return loss
        # the root of 0 has no finite derivative
        return loss * float("nan") if self.kind == "loss" else loss + (loss - loss.detach()).sqrt()


@pytest.mark.parametrize(("kind", "told"), [("loss", "the loss is nan"), ("gradient", "the gradient is not finite")])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, draw: Draw, kind: str, told: str) -> None:
    good, _ = run(tmp_path / "good", draw, replace(SETTINGS, steps=6))
    with pytest.raises(DivergedError, match=rf"train: {told} in step 6; the last good checkpoint is .*last\.ckpt"):
        run(tmp_path / "bad", draw, objective=Failing(5, kind))
    # what is kept is the state of before, from which a mended run goes on
    rest, first = run(tmp_path / "bad", draw)
    assert first == 4
    assert torch.equal(rest, good)
    with pytest.raises(DivergedError, match=rf"{told} in step 1; there is no checkpoint yet"):
        run(tmp_path / "at once", draw, objective=Failing(0, kind))


def test_checkpoints_of_other_runs_are_refused(tmp_path: Path, draw: Draw) -> None:
    run(tmp_path, draw)
    with pytest.raises(ValueError, match=r"last\.ckpt: is of another run"):
        run(tmp_path, draw, fingerprint="two")


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


@pytest.mark.parametrize("content", ["nothing", "garbage", "code", "another"])
def test_files_that_are_no_checkpoints_are_refused(
    tmp_path: Path, draw: Draw, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / CHECKPOINT
    if content in ("nothing", "garbage"):
        path.write_bytes(b"PK\x03\x04 nothing" if content == "garbage" else b"")
    else:
        torch.save({"step": Code()} if content == "code" else {"step": 3}, path)
    with pytest.raises(ValueError, match=r"last\.ckpt: not a checkpoint of a training run"):
        run(tmp_path, draw)
    assert not Path("ran").exists()


def test_the_network_starts_as_gradient_descent(draw: Draw) -> None:
    example = draw(0)
    encoding = SenseEncoding(example.sensitivities, example.mask)
    zero_filled = encoding.adjoint(example.kspace)
    image = zero_filled
    for _ in range(2):
        image = image - encoding.adjoint(encoding.forward(image)) + zero_filled
    with torch.no_grad():
        found = start_network("unrolled", TINY, seed=0)(example.kspace, example.sensitivities, example.mask)
    torch.testing.assert_close(found, image, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("architecture", SMALL)
def test_every_parameter_learns_in_one_group(architecture: str) -> None:
    network = ARCHITECTURES[architecture](**SMALL[architecture])
    groups = parameter_groups(network, 10.0)
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert len(grouped) == len({id(parameter) for parameter in grouped}) == len(list(network.parameters()))
    fast = sum(parameter.numel() for group in groups if group["relative"] > 1 for parameter in group["params"])
    assert fast == {"unrolled": 2, "modl": 2, "unet": 0, "varnet": 1}[architecture]
    with pytest.raises(ValueError, match=f"hyperparameters do not fit {architecture} .*'width'"):
        start_network(architecture, {"width": 3}, seed=0)


def test_logs_for_tensorboard(tmp_path: Path, draw: Draw) -> None:
    run(tmp_path, draw, replace(SETTINGS, logger="tensorboard"))
    assert list(tmp_path.rglob("events.out.tfevents.*"))
