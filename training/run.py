"""A training run from its configuration to its model card."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

import voxelsigma
from voxelsigma.models.cards import load_card
from voxelsigma.training.card import load_network, write_card
from voxelsigma.training.config import TrainConfig
from voxelsigma.training.examples import Example
from voxelsigma.training.fit import fit, make_fabric
from voxelsigma.training.objectives import make_objective
from voxelsigma.training.sampling import check_drawable
from voxelsigma.training.sources import Source, open_source
from voxelsigma.training.start import start_network

Report = Callable[[str], None]


def train(config: TrainConfig, out: Path, *, accelerator: str = "auto", report: Report | None = None) -> Path:
    """Train what a configuration describes, from where an earlier run in the same folder stopped, and write its card.

    Parameters
    ----------
    config
        The run.
    out
        Folder for `NAME.yaml` and `NAME.safetensors`; the run's checkpoints and logs lie in `NAME.run`.
    accelerator
        As Lightning has it: `auto`, `cpu`, `cuda`.
    report
        Called with lines of text.

    Returns
    -------
        Path of the card.

    Raises
    ------
    FileNotFoundError, ValueError
        If the data, the card to start from, hyperparameters or the checkpoint are not valid; if training diverges.
    """
    data = config.data
    objective = make_objective(config.objective, config.objective_settings)
    network = _network(config)
    source = open_source(data.kind, Path(data.folder), exclude=data.exclude, labelled=data.labelled)
    if data.kind == "volumes":
        check_drawable(config.examples)
    tell = report or print
    for problem in source.skipped:
        tell(f"left out: {problem}")
    known = len(source.skipped)
    folder = out / f"{config.name}.run"
    folder.mkdir(parents=True, exist_ok=True)

    def draw(number: int) -> Example:
        return next(source.batches(config.examples, batch=config.fit.batch, seed=config.fit.seed, start=number))

    fabric = make_fabric(config.fit, folder, accelerator=accelerator)
    fabric.launch()
    fit(
        network,
        objective,
        draw,
        config.fit,
        folder=folder,
        fabric=fabric,
        fingerprint=fingerprint(config, source),
        report=report,
    )
    for problem in source.skipped[known:]:
        tell(f"left out: {problem}")
    card = out / f"{config.name}.yaml"
    if fabric.is_global_zero and not _is_of(card, network):
        write_card(
            card,
            network.to("cpu"),
            architecture=config.architecture,
            hyperparameters=config.hyperparameters,
            fit_for={
                "acceleration": list(config.examples.acceleration),
                "coils": list(_coils(config, source)),
                "dimension": 2,
            },
            trained_on=description(config, source),
            evaluation="Not measured yet.",
            licence=config.licence,
        )
    fabric.barrier()
    return card


def fingerprint(config: TrainConfig, source: Source) -> str:
    """Hash of what the weights depend on: configuration, names of the data, versions.

    Rate and clipping are left out: a run that diverged may go on with smaller ones.
    """
    content = asdict(config)
    for name in ("checkpoint_every", "log_every", "logger", "workers", "learning_rate", "clip"):
        del content["fit"][name]
    del content["data"]["folder"], content["notes"], content["licence"]
    versions = voxelsigma.__version__, torch.__version__.split("+")[0]
    described = json.dumps([content, source.names, versions], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()


def description(config: TrainConfig, source: Source) -> str:
    """What the card says of the training."""
    fitted, drawn = config.fit, config.examples
    before = f"Started from {Path(config.start).stem}. " if config.start else ""
    held_out = f" Held out: {', '.join(config.data.exclude)}." if config.data.exclude else ""
    labelled = config.data.labelled
    references = "" if labelled is None else f" References of {', '.join(labelled) or 'none'} alone were used."
    settings = "".join(f", {name} {value}" for name, value in config.objective_settings.items())
    low, high = _coils(config, source)
    if config.data.kind == "volumes":
        simulated, sizes = "Simulated scans", f"matrices {drawn.matrix[0]} to {drawn.matrix[1]}, "
    else:
        simulated, sizes = "Retrospectively undersampled scans", ""
    return (
        f"{before}{simulated} of {', '.join(source.names)} ({config.data.licences}): {fitted.steps} steps of "
        f"{fitted.batch * fitted.devices}, objective {config.objective}{settings}, {sizes}{low} to {high} coils, masks "
        f"{', '.join(drawn.kinds)}, acceleration {drawn.acceleration[0]:g} to {drawn.acceleration[1]:g}, SNR "
        f"{drawn.snr[0]:g} to {drawn.snr[1]:g}, precision {fitted.precision}, seed {fitted.seed}."
        f"{references}{held_out} {config.notes}"
    ).strip()


def _coils(config: TrainConfig, source: Source) -> tuple[int, int]:
    """Least and most coils that were seen."""
    if source.coils is not None:
        return source.coils
    low, high = config.examples.coils
    return low, max(high, config.examples.many_coils if config.examples.many_coils_share > 0 else 0)


def _is_of(card: Path, network: nn.Module) -> bool:
    """Whether a card, with what has been measured since, already is that of these weights."""
    try:
        written = load_network(card).state_dict()
    except (OSError, ValueError):
        return False
    own = network.state_dict()
    return written.keys() == own.keys() and all(torch.equal(written[name], own[name].cpu()) for name in own)


def _network(config: TrainConfig) -> nn.Module:
    if not config.start:
        return start_network(config.architecture, config.hyperparameters, config.fit.seed)
    card = load_card(config.start)
    wanted = config.architecture, dict(config.hyperparameters)
    found = card.architecture, dict(card.hyperparameters)
    if found != wanted:
        raise ValueError(
            f"train: field 'start' names {card.path}, a {found[0]} with {found[1]}; the configuration asks for a "
            f"{wanted[0]} with {wanted[1]}"
        )
    return load_network(card.path)
