"""Train the unrolled network on simulated scans and write its model card.

``python -m voxelsigma.training.fit --data FOLDER --out CARD.yaml``
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from voxelsigma.models.unrolled import Unrolled
from voxelsigma.training.card import load_unrolled, write_card
from voxelsigma.training.examples import Example, ExampleSettings, object_voxels, stream
from voxelsigma.training.volumes import load_volumes

HYPERPARAMETERS = {"steps": 4, "blocks": 2, "channels": 32}


@dataclass(frozen=True, slots=True, kw_only=True)
class FitSettings:
    """How long and how fast to train.

    Parameters
    ----------
    steps
        Number of optimiser steps.
    minutes
        Wall-clock limit; the learning rate falls with whichever of the two budgets is used up further.
    learning_rate
        Adam's step size at the start; it falls to 0 along half a cosine.
    warm_up
        Steps over which the learning rate rises first.
    clip
        Largest norm of the gradient.
    save_minutes
        Time between two intermediate saves.
    """

    steps: int = 16000
    minutes: float = 40.0
    learning_rate: float = 1e-3
    warm_up: int = 100
    clip: float = 1.0
    save_minutes: float = 8.0

    def __post_init__(self) -> None:
        for name in ("steps", "minutes", "learning_rate", "clip", "save_minutes"):
            if not getattr(self, name) > 0:
                raise ValueError(f"fit: {name} must be above 0, got {getattr(self, name)}")


def loss_of(network: nn.Module, example: Example) -> Tensor:
    r"""Mean absolute error in units of the object.

    .. math:: L = \operatorname{mean} \frac{|f(y) - \rho|}{\overline{|\rho|}_\mathrm{object}}
    """
    error = (network(example.kspace, example.sensitivities, example.mask) - example.target).abs()
    # error: (batch, y, x) -> (batch,)
    return (error.mean(dim=(-2, -1)) / _object_magnitude(example.target)).mean()


def fit(
    network: nn.Module,
    examples: Iterable[Example],
    settings: FitSettings,
    *,
    save: Callable[[int], None] | None = None,
    report: Callable[[str], None] | None = None,
) -> list[float]:
    """Train a network in place with Adam.

    Parameters
    ----------
    network
        Called with `(kspace, sensitivities, mask)`, returns images.
    examples
        Batches; training ends where they end, if that is before the budget.
    settings
        Budgets and rates.
    save
        Called with the number of steps done, between times and at the end.
    report
        Called with a line of text every hundred steps.

    Returns
    -------
        The loss of every step.
    """
    optimizer = torch.optim.Adam(_parameter_groups(network))
    losses: list[float] = []
    start = saved = time.monotonic()
    for step, example in enumerate(examples):
        minutes = (time.monotonic() - start) / 60
        progress = max(step / settings.steps, minutes / settings.minutes)
        if progress >= 1:
            break
        rate = _learning_rate(settings, step, progress)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["relative"]
        losses.append(_train_step(network, optimizer, example, settings.clip))
        if report and len(losses) % 100 == 0:
            recent = np.mean(losses[-100:])
            report(f"step {len(losses)}  {minutes:.1f} min  loss {recent:.4f}  rate {rate:.1e}")
        if save and time.monotonic() - saved > 60 * settings.save_minutes:
            saved = time.monotonic()
            save(len(losses))
    if save:
        save(len(losses))
    return losses


def start_network(hyperparameters: Mapping[str, int], seed: int) -> Unrolled:
    """A network with seeded weights whose corrections begin at 0, so that it begins as gradient descent."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = Unrolled(**hyperparameters)
    for step in network.networks:
        nn.init.zeros_(step.leave.weight)  # type: ignore[arg-type, union-attr]
        nn.init.zeros_(step.leave.bias)  # type: ignore[arg-type, union-attr]
    return network


def main(arguments: Sequence[str] | None = None) -> int:
    """Train from the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        settings = FitSettings(
            steps=options.steps,
            minutes=options.minutes,
            learning_rate=options.learning_rate,
            save_minutes=options.save_minutes,
        )
        drawn_from = ExampleSettings(matrix=tuple(options.matrix))
        network, history = _begin(options.start, options.seed)
        volumes = load_volumes(options.data, exclude=options.exclude)
    except (ValueError, FileNotFoundError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    torch.set_num_threads(options.threads)
    names = ", ".join(volume.name for volume in volumes)

    def save_card(steps: int) -> None:
        trained_on = (
            f"{history}Simulated scans of {names} ({options.source}): {steps} steps of {options.batch}, matrices "
            f"{options.matrix[0]} to {options.matrix[1]}, 4 to 16 and 32 coils, four kinds of masks, "
            f"acceleration 2 to 8, SNR 5 to 50, seed {options.seed}. Held out: {', '.join(options.exclude)}."
        )
        write_card(options.out, network, HYPERPARAMETERS, trained_on=trained_on, evaluation="Not measured yet.")
        sys.stdout.write(f"saved {options.out} after {steps} steps\n")

    examples = stream(volumes, drawn_from, batch=options.batch, seed=options.seed)
    fit(network, examples, settings, save=save_card, report=_print_line)
    return 0


def _begin(card: Path | None, seed: int) -> tuple[Unrolled, str]:
    """The network to train, and what the card it comes from says of its training so far."""
    if card is None:
        return start_network(HYPERPARAMETERS, seed), ""
    network = load_unrolled(card)
    entries = yaml.safe_load(card.read_text(encoding="utf-8"))
    if entries["hyperparameters"] != HYPERPARAMETERS:
        raise ValueError(f"{card}: hyperparameters must be {HYPERPARAMETERS}, got {entries['hyperparameters']}")
    return network, f"{entries['trained_on'].strip()} Then: "


def _parameter_groups(network: nn.Module) -> list[dict[str, Any]]:
    """The scalar step sizes move ten times faster than the convolutions."""
    steps = [value for name, value in network.named_parameters() if name == "step_sizes"]
    others = [value for name, value in network.named_parameters() if name != "step_sizes"]
    return [{"params": others, "relative": 1.0}, {"params": steps, "relative": 10.0}]


def _train_step(network: nn.Module, optimizer: torch.optim.Optimizer, example: Example, clip: float) -> float:
    optimizer.zero_grad(set_to_none=True)
    loss = loss_of(network, example)
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), clip)
    optimizer.step()
    return loss.item()


def _learning_rate(settings: FitSettings, step: int, progress: float) -> float:
    warm = min(1.0, (step + 1) / max(settings.warm_up, 1))
    return settings.learning_rate * warm * 0.5 * (1 + float(np.cos(np.pi * progress)))


def _object_magnitude(target: Tensor) -> Tensor:
    """Mean magnitude of each image's object, `(batch, y, x)` to `(batch,)`."""
    magnitudes = target.abs().numpy()
    return torch.tensor([magnitude[object_voxels(magnitude)].mean() for magnitude in magnitudes])


def _print_line(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m voxelsigma.training.fit", description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the volumes")
    parser.add_argument("--out", type=Path, required=True, help="model card to write, CARD.yaml")
    parser.add_argument("--start", type=Path, metavar="CARD.yaml", help="card of a network to train further")
    parser.add_argument("--exclude", nargs="*", default=[], metavar="NAME", help="volumes to hold out")
    parser.add_argument("--source", default="licences not stated", help="licences of the volumes, for the card")
    parser.add_argument("--matrix", nargs=2, type=int, default=[80, 128], metavar=("LOW", "HIGH"))
    parser.add_argument("--steps", type=int, default=16000)
    parser.add_argument("--minutes", type=float, default=40.0, help="wall-clock limit")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--save-minutes", type=float, default=8.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    sys.exit(main())
