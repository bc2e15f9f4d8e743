"""From a model card to a predictor of its σ maps: scans are measured and learned from, the card names what comes."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from lightning_fabric import Fabric

import voxelsigma
from voxelsigma.formats.atomic import unwritable, whole_file, write_whole
from voxelsigma.models.cards import PREDICTOR_SUFFIX, ModelCard, load_card, load_model
from voxelsigma.models.network import Network
from voxelsigma.models.predictor import FEATURES, SigmaPredictor
from voxelsigma.models.predictor_file import MOST_CHANNELS, MOST_LEVELS, model_identity
from voxelsigma.training.card import record_predictor, save_predictor
from voxelsigma.training.checks import check_choice, check_number, check_whole
from voxelsigma.training.config import DataSettings, FitSettings
from voxelsigma.training.example import Example
from voxelsigma.training.fit import fit, make_fabric
from voxelsigma.training.held_out import HELD_OUT
from voxelsigma.training.sampling import ExampleSettings, check_drawable
from voxelsigma.training.sources import Source, open_source
from voxelsigma.training.target_files import target_files
from voxelsigma.training.targets import ScanTarget, measure
from voxelsigma.training.teaching import calibrate, crop_drawer, prediction_loss
from voxelsigma.training.volumes import volume_name

Report = Callable[[str], None]

MOST_COILS: Final = 16
MANY_COILS: Final = 32
MOST_ACCELERATION: Final = 12.0
"""What examples are drawn up to; beyond, it is the certificate that decides about a prediction."""

FIRST_PROBES: Final = (8, 8, 16, 32)
"""Probes behind a prediction, each as likely: what pipelines predict from, the fewest most often."""

_CALIBRATION_FIRST: Final = 2**20
_SNR: Final = (5.0, 50.0)
_MANY_SHARE: Final = 0.04
_PRECISIONS: Final = ("32-true", "bf16-mixed", "64-true")


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillSettings:
    """How a predictor is made.

    Parameters
    ----------
    scans, probes
        Scans to learn from, and probes pushed through each to be predicted, beside those to predict from.
    calibration_scans
        Further scans that tell what predictions are worth.
    matrix
        Range of the simulated scans' matrix, multiples of 4.
    steps, batch, learning_rate
        Of Adam, batches of crops.
    crop
        Side of a crop, or that of the smallest scan.
    channels, levels
        Of the `SigmaPredictor`.
    precision
        `32-true`, `bf16-mixed` or `64-true`.
    checkpoint_every, log_every
        Steps between two.
    seed
        Of scans, probes, weights and crops.
    """

    scans: int = 800
    probes: int = 8
    calibration_scans: int = 40
    matrix: tuple[int, int] = (80, 128)
    steps: int = 4000
    batch: int = 4
    learning_rate: float = 2e-3
    crop: int = 80
    channels: int = 24
    levels: int = 3
    precision: Literal["32-true", "bf16-mixed", "64-true"] = "bf16-mixed"
    checkpoint_every: int = 200
    log_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("scans", "calibration_scans", "steps", "batch", "channels", "levels", "checkpoint_every"):
            check_whole("distill", name, getattr(self, name), 1)
        for name, least in (("probes", 2), ("crop", 16), ("log_every", 1), ("seed", 0)):
            check_whole("distill", name, getattr(self, name), least)
        for name, most in (("scans", _CALIBRATION_FIRST), ("channels", MOST_CHANNELS), ("levels", MOST_LEVELS)):
            check_number("distill", name, getattr(self, name), 1, most)
        check_number("distill", "learning_rate", self.learning_rate, 1e-8, 1)
        check_choice("distill", "precision", self.precision, _PRECISIONS)

    def fit_settings(self) -> FitSettings:
        """What the training loop is told."""
        return FitSettings(
            steps=self.steps,
            batch=self.batch,
            learning_rate=self.learning_rate,
            warm_up=min(100, self.steps // 10),
            precision=self.precision,
            checkpoint_every=self.checkpoint_every,
            log_every=self.log_every,
            seed=self.seed,
        )


def distill(
    card: str | Path,
    data: DataSettings,
    *,
    out: Path | None = None,
    settings: DistillSettings | None = None,
    accelerator: str = "auto",
    report: Report | None = None,
) -> Path:
    """Make the predictor of a model card, from where an earlier run stopped, and note it on the card.

    Measured scans and checkpoints lie in `NAME.distill` beside the card. A run that is killed at any point and started
    again ends with the same predictor.

    Parameters
    ----------
    card
        Name of a shipped card, or path of a YAML file.
    data
        Where scans come from.
    out
        Folder for the predictor and for copies of the card and its weights; None for the card's own.
    settings
        How; None for the defaults.
    accelerator
        As Lightning has it: `auto`, `cpu`, `cuda`.
    report
        Called with lines of text.

    Returns
    -------
        Path of the card that names the predictor.

    Raises
    ------
    FileNotFoundError, ValueError
        If card, weights or data are not valid, the card is not of a network, the folder holds another run, or a
        scan cannot be measured.
    OSError
        If the folder cannot be written; nothing was done then.
    """
    chosen, tell = settings or DistillSettings(), report or print
    model = load_card(str(card))
    if model.architecture == "sense":
        raise ValueError(f"{model.path}: 'sense' is linear: its σ needs no predictor; name the card of a network")
    network = load_model(model, torch.device("cpu"))
    assert isinstance(network, Network)
    target = _destination(model, out)
    examples = example_settings(model, chosen.matrix)
    source = open_source(data.kind, Path(data.folder), exclude=data.exclude)
    if data.kind == "volumes":
        check_drawable(examples)
    for problem in source.skipped:
        tell(f"left out: {problem}")
    folder = target.parent / f"{target.stem}.distill"
    run = _Run(model, source, examples, chosen, folder, tell)
    described = run.described(data.kind)
    _claim(folder, described)
    fabric = make_fabric(chosen.fit_settings(), folder, accelerator=accelerator)
    fabric.launch()
    network = load_model(model, fabric.device)
    assert isinstance(network, Network)
    scans, checks = run.measured(network, fabric.device)
    predictor = run.trained(scans, fabric, described)
    factors = calibrate(predictor, [ScanTarget.load(path) for path in checks])
    tell("calibrated: " + ", ".join(f"{kind} freedom x {factor:.2f}" for kind, factor in factors.items()))
    file = target.with_name(f"{target.stem}{PREDICTOR_SUFFIX}")
    digest = save_predictor(file, predictor, model)
    _record(model, target, file.name, digest)
    return target


def held_out_in(folder: Path) -> tuple[str, ...]:
    """Of the volumes that figures are taken of (`HELD_OUT`), those in a folder."""
    names = {volume_name(path) for path in folder.rglob("*")}
    return tuple(name for name in HELD_OUT if name in names)


def example_settings(card: ModelCard, matrix: tuple[int, int]) -> ExampleSettings:
    """What a card's scans are drawn from: its own ranges, as far as simulated scans go."""
    low, high = card.coils
    least, most = max(1.0, card.acceleration[0]), card.acceleration[1]
    return ExampleSettings(
        matrix=matrix,
        acceleration=(least, max(least, min(most, MOST_ACCELERATION))),
        coils=(int(low), int(max(low, min(high, MOST_COILS)))),
        many_coils=MANY_COILS,
        many_coils_share=_MANY_SHARE if low <= MANY_COILS <= high else 0.0,
        snr=_SNR,
    )


@dataclass(frozen=True, slots=True)
class _Run:
    """A run's parts."""

    card: ModelCard
    source: Source
    examples: ExampleSettings
    settings: DistillSettings
    folder: Path
    tell: Report

    def described(self, kind: str) -> dict[str, Any]:
        """What the measured scans depend on, but for their number."""
        content = {
            "model": model_identity(self.card),
            "seed": self.settings.seed,
            "probes": [*FIRST_PROBES, self.settings.probes],
            "features": FEATURES,
            "examples": asdict(self.examples),
            "data": [kind, *self.source.names],
            "versions": [voxelsigma.__version__, torch.__version__.split("+")[0]],
        }
        return json.loads(json.dumps(content))

    def measured(self, network: Network, device: torch.device) -> tuple[list[Path], list[Path]]:
        """Files of the scans to learn from and of those to calibrate with, the missing ones measured."""
        settings, probes, seed = self.settings, self.settings.probes, self.settings.seed

        def scan(number: int) -> Example:
            batches = self.source.batches(self.examples, batch=1, seed=seed, start=number)
            one = next(batches).to(device)
            return Example(one.kspace[0], one.sensitivities[0], one.mask[0], None)

        def measured(number: int) -> ScanTarget:
            first = FIRST_PROBES[int(np.random.default_rng([seed, number, 3]).integers(len(FIRST_PROBES)))]
            return measure(network, scan(number), first=first, probes=probes, seed=seed, number=number)

        def checked(number: int) -> ScanTarget:
            return measured(_CALIBRATION_FIRST + number)

        scans = target_files(self.folder / "scans", settings.scans, make=measured, tell=self.tell)
        checks = target_files(self.folder / "calibration", settings.calibration_scans, make=checked, tell=self.tell)
        return scans, checks

    def trained(self, scans: Sequence[Path], fabric: Fabric, described: dict[str, Any]) -> SigmaPredictor:
        """The predictor, fitted to the scans."""
        settings = self.settings
        shapes = [ScanTarget.load(path).shape for path in scans]
        crop = min(settings.crop, *(y for y, _ in shapes)), min(settings.crop, *(x for _, x in shapes))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            predictor = SigmaPredictor(channels=settings.channels, levels=settings.levels)
        # rate and clipping may change where a run diverged, how often something is saved or told at any time
        free = ("learning_rate", "checkpoint_every", "log_every", "calibration_scans")
        content = [described, {key: value for key, value in asdict(settings).items() if key not in free}]
        fit(
            predictor,
            prediction_loss,
            crop_drawer(scans, crop, batch=settings.batch, seed=settings.seed),
            settings.fit_settings(),
            folder=self.folder,
            fabric=fabric,
            fingerprint=hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest(),
            report=self.tell,
        )
        # as it will be read again
        return predictor.to("cpu", torch.float32).eval()


def _destination(card: ModelCard, out: Path | None) -> Path:
    """The card that will name the predictor, in a folder that can be written."""
    folder = card.path.parent if out is None else out
    # the folder itself is made when there is something to be put into it
    there = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise OSError(f"{folder}: cannot be written, and the predictor lies beside its card; name a folder with --out")
    target = folder / card.path.name
    if target.exists() and model_identity(load_card(str(target))) != model_identity(card):
        raise ValueError(f"{target}: is the card of another network than {card.path}; choose another folder")
    copied = None if card.weights is None else folder / card.weights.name
    if copied is not None and copied.exists() and hashlib.sha256(copied.read_bytes()).hexdigest() != card.sha256:
        raise ValueError(f"{copied}: are other weights than those of {card.path}; choose another folder")
    return target


def _claim(folder: Path, described: dict[str, Any]) -> None:
    """Make the folder of a run, or see that it is of this one."""
    note = folder / "run.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error
    if not note.exists():
        write_whole(note, json.dumps(described, indent=1).encode())
        return
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
        differing = [key for key in described if found.get(key) != described[key]]
    except (ValueError, AttributeError):
        raise ValueError(f"{note}: not the note of a run; delete the folder {folder}") from None
    if differing:
        raise ValueError(
            f"{folder}: holds another run (differing in {', '.join(differing)}); delete it, or choose another folder "
            "with --out"
        )


def _record(card: ModelCard, target: Path, name: str, digest: str) -> None:
    """Name the predictor on the card, or on its copy, whose weights go with it."""
    if card.weights is not None and not (copied := target.parent / card.weights.name).exists():
        with whole_file(copied) as partial:
            shutil.copyfile(card.weights, partial)
    record_predictor(target if target.exists() else card.path, name, digest, into=target)
