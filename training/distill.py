"""From a model card to a predictor of its σ maps: scans are measured and learned from, the card names what comes."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from lightning_fabric import Fabric

import voxelsigma
from voxelsigma.models.cards import PREDICTOR_SUFFIX, ModelCard, load_card, load_model
from voxelsigma.models.network import Network
from voxelsigma.models.predictor import FEATURES, SigmaPredictor
from voxelsigma.models.predictor_file import MOST_CHANNELS, MOST_LEVELS, model_identity
from voxelsigma.models.surrogate_net import SurrogateNet
from voxelsigma.training.card import save_predictor
from voxelsigma.training.checks import check_choice, check_number, check_whole
from voxelsigma.training.config import DataSettings, FitSettings
from voxelsigma.training.distill_files import claim, destination, record
from voxelsigma.training.example import Example
from voxelsigma.training.fit import fit, make_fabric
from voxelsigma.training.held_out import HELD_OUT
from voxelsigma.training.responses import ResponseTarget, measure_response, response_drawer, response_loss
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
_CLIPS: Final = (1.0, 0.3)
"""Largest gradient, of the predictor and of its surrogate."""
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
    surrogate_scans, surrogate_steps, surrogate_learning_rate, surrogate_crop, surrogate_channels, surrogate_levels
        The same of its `SurrogateNet`, which is made first, from a block of probes a scan.
    precision
        `32-true`, `bf16-mixed` or `64-true`.
    checkpoint_every, log_every
        Steps between two.
    seed
        Of scans, probes, weights and crops.
    """

    scans: int = 400
    probes: int = 8
    calibration_scans: int = 40
    matrix: tuple[int, int] = (80, 128)
    steps: int = 1500
    batch: int = 4
    learning_rate: float = 2e-3
    crop: int = 80
    channels: int = 24
    levels: int = 3
    surrogate_scans: int = 800
    surrogate_steps: int = 12000
    surrogate_learning_rate: float = 1.5e-3
    surrogate_crop: int = 48
    surrogate_channels: int = 32
    surrogate_levels: int = 3
    precision: Literal["32-true", "bf16-mixed", "64-true"] = "bf16-mixed"
    checkpoint_every: int = 200
    log_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("calibration_scans", "batch", "checkpoint_every", "log_every"):
            check_whole("distill", name, getattr(self, name), 1)
        for part in ("", "surrogate_"):
            for name in ("scans", "steps", "channels", "levels"):
                check_whole("distill", part + name, getattr(self, part + name), 1)
            check_whole("distill", f"{part}crop", getattr(self, f"{part}crop"), 16)
            for name, most in (("scans", _CALIBRATION_FIRST), ("channels", MOST_CHANNELS), ("levels", MOST_LEVELS)):
                check_number("distill", part + name, getattr(self, part + name), 1, most)
            check_number("distill", f"{part}learning_rate", getattr(self, f"{part}learning_rate"), 1e-8, 1)
        for name, least in (("probes", 2), ("seed", 0)):
            check_whole("distill", name, getattr(self, name), least)
        check_choice("distill", "precision", self.precision, _PRECISIONS)

    def fit_settings(self, *, surrogate: bool = False) -> FitSettings:
        """What the training loop of either network is told."""
        steps = self.surrogate_steps if surrogate else self.steps
        return FitSettings(
            steps=steps,
            batch=self.batch,
            learning_rate=self.surrogate_learning_rate if surrogate else self.learning_rate,
            warm_up=min(100, steps // 10),
            clip=_CLIPS[surrogate],
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
    target = destination(model, out)
    examples = example_settings(model, chosen.matrix)
    source = open_source(data.kind, Path(data.folder), exclude=data.exclude)
    if data.kind == "volumes":
        check_drawable(examples)
    for problem in source.skipped:
        tell(f"left out: {problem}")
    folder = target.parent / f"{target.stem}.distill"
    run = _Run(model, source, examples, chosen, folder, tell)
    described = run.described(data.kind)
    claim(folder, described)
    fabric = make_fabric(chosen.fit_settings(), folder, accelerator=accelerator)
    fabric.launch()
    network = load_model(model, fabric.device)
    assert isinstance(network, Network)
    predictor = run.begun()
    run.surrogate_trained(predictor.surrogate, network, fabric, described)
    scans, checks = run.measured(network, predictor.surrogate, fabric.device)
    run.trained(predictor, scans, fabric, described)
    factors = calibrate(predictor, [ScanTarget.load(path) for path in checks])
    tell("calibrated: " + ", ".join(f"{kind} freedom x {factor:.2f}" for kind, factor in factors.items()))
    file = target.with_name(f"{target.stem}{PREDICTOR_SUFFIX}")
    digest = save_predictor(file, predictor, model)
    record(model, target, file.name, digest)
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
        # what the surrogate begins from, and is taught by; its rate may change where a run diverged
        own = ("batch", "precision", "channels", "levels")
        content = {
            "model": model_identity(self.card),
            "surrogate": {
                key: value
                for key, value in asdict(self.settings).items()
                if key in own or (key.startswith("surrogate_") and key != "surrogate_learning_rate")
            },
            "seed": self.settings.seed,
            "probes": [*FIRST_PROBES, self.settings.probes],
            "features": FEATURES,
            "examples": asdict(self.examples),
            "data": [kind, *self.source.names],
            "versions": [voxelsigma.__version__, torch.__version__.split("+")[0]],
        }
        return json.loads(json.dumps(content))

    def begun(self) -> SigmaPredictor:
        """The predictor before training."""
        chosen = self.settings
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(chosen.seed)
            return SigmaPredictor(
                channels=chosen.channels,
                levels=chosen.levels,
                surrogate_channels=chosen.surrogate_channels,
                surrogate_levels=chosen.surrogate_levels,
            )

    def scan(self, number: int, device: torch.device) -> Example:
        """The scan of a number, without a batch axis."""
        one = next(self.source.batches(self.examples, batch=1, seed=self.settings.seed, start=number)).to(device)
        return Example(one.kspace[0], one.sensitivities[0], one.mask[0], None)

    def surrogate_trained(
        self, surrogate: SurrogateNet, network: Network, fabric: Fabric, described: dict[str, Any]
    ) -> None:
        """Train what makes the control variate."""
        settings = self.settings

        def measured(number: int) -> ResponseTarget:
            return measure_response(network, self.scan(number, fabric.device), seed=settings.seed, number=number)

        scans = target_files(
            self.folder / "responses",
            settings.surrogate_scans,
            make=measured,
            load=ResponseTarget.load,
            tell=self.tell,
        )
        crop = _crop_of([ResponseTarget.load(path).shape for path in scans], settings.surrogate_crop)
        folder = self.folder / "surrogate"
        folder.mkdir(exist_ok=True)
        fit(
            surrogate,
            response_loss,
            response_drawer(scans, crop, batch=settings.batch, seed=settings.seed),
            settings.fit_settings(surrogate=True),
            folder=folder,
            fabric=fabric,
            fingerprint=_hash(described),
            report=lambda line: self.tell(f"surrogate: {line}"),
        )
        surrogate.to(fabric.device, torch.float32).eval().requires_grad_(False)

    def measured(
        self, network: Network, surrogate: SurrogateNet, device: torch.device
    ) -> tuple[list[Path], list[Path]]:
        """Files of the scans to learn from and of those to calibrate with, the missing ones measured."""
        settings, seed = self.settings, self.settings.seed

        def measured(number: int) -> ScanTarget:
            first = FIRST_PROBES[int(np.random.default_rng([seed, number, 3]).integers(len(FIRST_PROBES)))]
            return measure(
                network,
                self.scan(number, device),
                first=first,
                probes=settings.probes,
                seed=seed,
                number=number,
                surrogate=surrogate,
            )

        def checked(number: int) -> ScanTarget:
            return measured(_CALIBRATION_FIRST + number)

        scans, checks = (
            target_files(self.folder / name, count, make=make, load=ScanTarget.load, tell=self.tell)
            for name, count, make in (
                ("scans", settings.scans, measured),
                ("calibration", settings.calibration_scans, checked),
            )
        )
        return scans, checks

    def trained(
        self, predictor: SigmaPredictor, scans: Sequence[Path], fabric: Fabric, described: dict[str, Any]
    ) -> None:
        """Fit the predictor to the scans; its surrogate stays."""
        settings = self.settings
        crop = _crop_of([ScanTarget.load(path).shape for path in scans], settings.crop)
        fit(
            predictor,
            prediction_loss,
            crop_drawer(scans, crop, batch=settings.batch, seed=settings.seed),
            settings.fit_settings(),
            folder=self.folder,
            fabric=fabric,
            fingerprint=self._fingerprint(described),
            report=self.tell,
        )
        # as it will be read again
        predictor.to("cpu", torch.float32).eval()

    def _fingerprint(self, described: dict[str, Any]) -> str:
        """Of everything that the result depends on."""
        # rates may change where a run diverged, how often something is saved or told at any time
        free = ("learning_rate", "surrogate_learning_rate", "checkpoint_every", "log_every", "calibration_scans")
        return _hash([described, {key: value for key, value in asdict(self.settings).items() if key not in free}])


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _crop_of(shapes: Sequence[tuple[int, int]], side: int) -> tuple[int, int]:
    """The crop, or as much of it as the smallest scan has."""
    return min(side, *(y for y, _ in shapes)), min(side, *(x for _, x in shapes))
