"""The training loop: Lightning Fabric's, on examples that depend on their number alone."""

import pickle
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_fabric.loggers.csv_logs import CSVLogger
from lightning_fabric.loggers.logger import Logger
from lightning_fabric.loggers.tensorboard import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from voxelsigma.formats.atomic import whole_file
from voxelsigma.models.weights import check_safe_pickles
from voxelsigma.training.config import FitSettings
from voxelsigma.training.start import parameter_groups

CHECKPOINT = "last.ckpt"

Moved = TypeVar("Moved")


class Batch(Protocol):
    """What a step trains on, such as `Example`."""

    def to(self: Moved, device: torch.device | str, dtype: torch.dtype | None = None) -> Moved:
        """Move it to a device, and to a real type if one is given."""
        ...


BatchT = TypeVar("BatchT", bound=Batch)
Seen_contra = TypeVar("Seen_contra", contravariant=True)

Draw = Callable[[int], BatchT]
"""Batch of a number, always the same one."""


class Loss(Protocol[Seen_contra]):
    """The loss of a network on a batch; see `Objective`, which is the one for examples."""

    def __call__(
        self, network: nn.Module, example: Seen_contra, rng: np.random.Generator, *, progress: float = 1.0
    ) -> Tensor:
        """Loss, a function of its arguments alone."""
        ...


class DivergedError(ValueError):
    """The loss or its gradient is not finite any more."""


def make_fabric(settings: FitSettings, folder: Path, *, accelerator: str = "auto") -> Fabric:
    """Fabric with the devices, the precision and the logger that the settings name."""
    logger: Logger
    if settings.logger == "csv":
        logger = CSVLogger(folder, name="log", flush_logs_every_n_steps=1)
    else:
        logger = TensorBoardLogger(folder, name="log")
    return Fabric(accelerator=accelerator, devices=settings.devices, precision=settings.precision, loggers=[logger])


def fit(
    network: nn.Module,
    objective: Loss[BatchT],
    draw: Draw[BatchT],
    settings: FitSettings,
    *,
    folder: Path,
    fabric: Fabric,
    fingerprint: str = "",
    report: Callable[[str], None] | None = None,
) -> int:
    """Train a network in place, from the last checkpoint of the folder if there is one.

    Step s of device r sees batch s · devices + r, its objective a generator seeded by the same numbers, and the
    learning rate depends on s alone: a run that is killed and started again ends with the weights of one that was not.

    Parameters
    ----------
    network
        Called by the objective alone.
    objective
        The loss of a batch.
    draw
        Batch of a number.
    settings
        Budget and rates.
    folder
        For checkpoints (`last.ckpt`).
    fabric
        Of `make_fabric`, launched.
    fingerprint
        Of everything that the result depends on; a checkpoint of another one is refused.
    report
        Called with a line of text every `log_every` steps.

    Returns
    -------
        Steps done before this call, from the checkpoint.

    Raises
    ------
    DivergedError
        A loss or gradient is not finite; the last checkpoint is kept as it was.
    ValueError
        The checkpoint is of another run.
    """
    optimizer = torch.optim.Adam(parameter_groups(network, settings.scalar_rate), weight_decay=settings.weight_decay)
    wrapped, stepper = fabric.setup(network, optimizer)
    path = folder / CHECKPOINT
    first = _resumed(fabric, path, wrapped, stepper, fingerprint)
    if report and first and fabric.is_global_zero:
        report(f"resumed after step {first} of {settings.steps}")
    start = time.monotonic()
    recent: list[float] = []
    loader = _loader(draw, settings, fabric, first)
    for step, batch in enumerate(loader, start=first):
        progress = step / settings.steps
        rate = _learning_rate(settings, step)
        for group in stepper.param_groups:
            group["lr"] = rate * group["relative"]
        example = batch.to(fabric.device, torch.float64 if settings.precision == "64-true" else None)
        # not the stream of the examples: numpy takes missing numbers of a seed for 0
        rng = np.random.default_rng([settings.seed, step, fabric.global_rank + 1])
        # dropout draws from torch's own generator
        torch.manual_seed(int(rng.integers(2**62)))
        stepper.zero_grad(set_to_none=True)
        loss = objective(wrapped, example, rng, progress=progress)
        value = _finite(fabric, loss, step, path)
        fabric.backward(loss)
        _clip(fabric, wrapped, stepper, settings.clip, step, path)
        stepper.step()
        recent.append(value)
        done = step + 1
        if done % settings.log_every == 0 or done == settings.steps:
            mean = float(np.mean(recent))
            fabric.log_dict({"loss": mean, "learning_rate": rate}, step=done)
            if report and fabric.is_global_zero:
                report(_line(done, settings.steps, mean, rate, (time.monotonic() - start) / (done - first)))
            recent.clear()
        if done % settings.checkpoint_every == 0 or done == settings.steps:
            _save(fabric, path, wrapped, stepper, done, fingerprint)
    return first


class _Batches(Dataset[BatchT]):
    def __init__(self, draw: Draw[BatchT]) -> None:
        self.draw = draw

    def __getitem__(self, number: int) -> BatchT:
        return self.draw(number)


def _loader(draw: Draw[BatchT], settings: FitSettings, fabric: Fabric, first: int) -> "DataLoader[BatchT]":
    world = fabric.world_size
    numbers = range(first * world + fabric.global_rank, settings.steps * world, world)
    return DataLoader(_Batches(draw), batch_size=None, sampler=numbers, num_workers=settings.workers)


def _learning_rate(settings: FitSettings, step: int) -> float:
    warm = min(1.0, (step + 1) / max(settings.warm_up, 1))
    falling = 0.5 * (1 + float(np.cos(np.pi * step / settings.steps))) if settings.schedule == "cosine" else 1.0
    return settings.learning_rate * warm * falling


def _finite(fabric: Fabric, loss: Tensor, step: int, path: Path) -> float:
    """Value of the loss, over all devices."""
    value = float(fabric.all_reduce(loss.detach()))  # type: ignore[arg-type]
    if not np.isfinite(value):
        raise _diverged(f"the loss is {value}", step, path)
    return value


def _clip(fabric: Fabric, network: Any, stepper: Any, clip: float, step: int, path: Path) -> None:
    try:
        fabric.clip_gradients(network, stepper, max_norm=clip, error_if_nonfinite=True)
    except RuntimeError as error:
        if "non-finite" not in str(error):
            raise
        raise _diverged("the gradient is not finite", step, path) from None


def _diverged(what: str, step: int, path: Path) -> DivergedError:
    kept = f"the last good checkpoint is {path}" if path.exists() else "there is no checkpoint yet"
    return DivergedError(f"train: {what} in step {step + 1}; {kept}; a smaller fit.learning_rate or fit.clip may help")


def _save(fabric: Fabric, path: Path, network: Any, stepper: Any, done: int, fingerprint: str) -> None:
    """Save under a temporary name, then rename."""
    state = {"network": network, "optimizer": stepper, "step": done, "fingerprint": fingerprint}
    with whole_file(path) if fabric.is_global_zero else nullcontext(path) as partial:
        fabric.save(partial, state)
    fabric.barrier()


def _resumed(fabric: Fabric, path: Path, network: Any, stepper: Any, fingerprint: str) -> int:
    """Steps that the checkpoint has behind it, its state put in place; 0 without any."""
    if not path.exists():
        return 0
    check_safe_pickles(path)
    try:
        found = fabric.load(path, weights_only=True)
        step, of, weights, state = (found[name] for name in ("step", "fingerprint", "network", "optimizer"))
    except (KeyError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: not a checkpoint of a training run ({reason})") from None
    if of != fingerprint:
        raise ValueError(
            f"{path}: is of another run (other settings, data or version of torch); choose another folder, or delete it"
        )
    network.load_state_dict(weights)
    stepper.load_state_dict(state)
    return int(step)


def _line(done: int, steps: int, loss: float, rate: float, seconds: float) -> str:
    minutes = (steps - done) * seconds / 60
    return f"step {done}/{steps}  loss {loss:.4f}  rate {rate:.1e}  {seconds:.2f} s a step, {minutes:.0f} min to go"
