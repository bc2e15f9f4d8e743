"""From a model card to a predictor of its σ maps: scans are measured and learned from, the card names what comes."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from lightning_fabric import Fabric

import voxelsigma
from voxelsigma.models.cards import PREDICTOR_SUFFIX, ModelCard, load_card, load_model
from voxelsigma.models.network import Network
from voxelsigma.models.predictor import FEATURES, SigmaPredictor
from voxelsigma.models.predictor_file import load_predictor, model_identity, round_weights
from voxelsigma.models.surrogate_net import GRADIENT_STAGES, SOLVED_STAGES, SurrogateNet
from voxelsigma.training.card import save_predictor
from voxelsigma.training.config import DataSettings
from voxelsigma.training.distill_files import check_start, claim, destination, record
from voxelsigma.training.distill_settings import CALIBRATION_FIRST, DistillSettings
from voxelsigma.training.example import Example
from voxelsigma.training.fit import fit, make_fabric
from voxelsigma.training.held_out import HELD_OUT
from voxelsigma.training.responses import ResponseLoss, ResponseTarget, measure_response, response_drawer
from voxelsigma.training.sampling import ExampleSettings, check_drawable
from voxelsigma.training.sources import Parts, Source, divided, open_source
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

_SNR: Final = (5.0, 50.0)
_MANY_SHARE: Final = 0.04
_MOST_TOLD: Final = 5


def distill(
    card: str | Path,
    data: DataSettings,
    *,
    out: Path | None = None,
    settings: DistillSettings | None = None,
    start: str | Path | None = None,
    accelerator: str = "auto",
    report: Report | None = None,
) -> Path:
    """Make the predictor of a model card, from where an earlier run stopped, and note it on the card.

    Scans, as they were measured, and checkpoints lie in `NAME.distill` beside the card. A run that is killed at any
    point and started again ends with the same predictor.

    What predictions are worth is found out with further scans. Of scanners' files a fifth is held back for that
    (`divided`). Scans that are simulated are of the heads that are learned from, with other slices, contrasts, coils,
    masks and noise: what heads differ in beyond that is not in it.

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
    start
        Name or path of a card whose predictor to begin from, of the same sizes, and another file than the one that
        will be written: a network of the same architecture needs fewer steps. None to begin from nothing.
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
        If card, weights, data or the predictor to begin from are not valid, the card is not of a network, the folder
        holds another run, there is no such accelerator, or too many scans cannot be measured.
    RuntimeError
        If the accelerator is not to be had here; nothing was done then.
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
    file = target.with_name(f"{target.stem}{PREDICTOR_SUFFIX}")
    begin = None if start is None else load_card(str(start))
    if begin is not None:
        check_start(begin, file)
    examples = example_settings(model, chosen.matrix)
    source = open_source(data.kind, Path(data.folder), exclude=data.exclude)
    if data.kind == "volumes":
        check_drawable(examples)
    for problem in source.skipped:
        tell(f"left out: {problem}")
    parts = divided(source)
    if data.kind != "volumes":
        tell(_told(parts))
    folder = target.parent / f"{target.stem}.distill"
    run = _Run(model, source, parts, examples, chosen, folder, begin, tell)
    predictor = run.begun()
    described = run.described(data.kind)
    surrogate_folder = folder / "surrogate"
    # each has a log of its own; an accelerator that is not there must not leave a folder
    fabrics = [make_fabric(chosen.fit_settings(), one, accelerator=accelerator) for one in (folder, surrogate_folder)]
    for one in fabrics:
        one.launch()
    fabric = fabrics[0]
    claim(folder, described)
    surrogate_folder.mkdir(exist_ok=True)
    network = load_model(model, fabric.device)
    assert isinstance(network, Network)
    run.surrogate_trained(predictor.surrogate, network, fabrics[1], described)
    scans, checks = run.measured(network, predictor.surrogate, fabric.device)
    run.trained(predictor, scans, fabric, described)
    factors = calibrate(predictor, [ScanTarget.load(path) for path in checks])
    tell("calibrated: " + ", ".join(f"{kind} freedom x {factor:.2f}" for kind, factor in factors.items()))
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
    parts: Parts
    examples: ExampleSettings
    settings: DistillSettings
    folder: Path
    start: ModelCard | None
    tell: Report

    @property
    def stages(self) -> tuple[float, ...]:
        """Of the surrogate: as the reconstruction's own."""
        if self.settings.surrogate_stages is not None:
            return self.settings.surrogate_stages
        return SOLVED_STAGES if self.card.architecture == "modl" else GRADIENT_STAGES

    def described(self, kind: str) -> dict[str, Any]:
        """What the measured scans depend on, but for their number."""
        # what the surrogate begins from, and is taught by; its rate may change where a run diverged
        own = ("precision", "channels", "levels")
        content = {
            "model": model_identity(self.card),
            "surrogate": {
                key: value
                for key, value in asdict(self.settings).items()
                if key in own or (key.startswith("surrogate_") and key != "surrogate_learning_rate")
            }
            | {"surrogate_stages": self.stages},
            "start": None if self.start is None else self.start.predictor_sha256,
            "seed": self.settings.seed,
            "probes": [*FIRST_PROBES, self.settings.probes],
            "features": FEATURES,
            "examples": asdict(self.examples),
            "data": [kind, *self.source.names],
            "versions": [voxelsigma.__version__, torch.__version__.split("+")[0]],
        }
        if kind != "volumes":
            content["held back"] = list(self.parts.held_back)
        return json.loads(json.dumps(content))

    def begun(self) -> SigmaPredictor:
        """The predictor before training."""
        chosen = self.settings
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(chosen.seed)
            predictor = SigmaPredictor(
                channels=chosen.channels,
                levels=chosen.levels,
                surrogate_channels=chosen.surrogate_channels,
                surrogate_levels=chosen.surrogate_levels,
                surrogate_stages=self.stages,
            )
        if self.start is not None:
            other = load_predictor(self.start, torch.device("cpu"))
            if other is None:
                raise ValueError(f"{self.start.path}: names no predictor to begin from; distill it first")
            sizes = [{name: one.shape for name, one in each.state_dict().items()} for each in (predictor, other)]
            if sizes[0] != sizes[1] or predictor.surrogate.stages != other.surrogate.stages:
                raise ValueError(f"{self.start.path}: its predictor is of other sizes or stages than this one shall be")
            predictor.load_state_dict(other.state_dict())
            predictor.calibration.fill_(1)
        return predictor

    def scan(self, source: Source, number: int, device: torch.device) -> Example:
        """The scan of a number, without a batch axis."""
        one = next(source.batches(self.examples, batch=1, seed=self.settings.seed, start=number)).to(device)
        return Example(one.kspace[0], one.sensitivities[0], one.mask[0], None)

    def surrogate_trained(
        self, surrogate: SurrogateNet, network: Network, fabric: Fabric, described: dict[str, Any]
    ) -> None:
        """Train what makes the control variate."""
        settings = self.settings

        def measured(number: int) -> ResponseTarget:
            scan = self.scan(self.parts.learned, number, fabric.device)
            return measure_response(network, scan, seed=settings.seed, number=number)

        scans = target_files(
            self.folder / "responses",
            settings.surrogate_scans,
            make=measured,
            load=ResponseTarget.load,
            tell=self.tell,
        )
        fit(
            surrogate,
            ResponseLoss(surrogate.stages),
            response_drawer(scans, seed=settings.seed),
            settings.fit_settings(surrogate=True),
            folder=self.folder / "surrogate",
            fabric=fabric,
            fingerprint=_hash(described),
            report=lambda line: self.tell(f"surrogate: {line}"),
        )
        surrogate.to(fabric.device, torch.float32).eval().requires_grad_(False)
        round_weights(surrogate)

    def measured(
        self, network: Network, surrogate: SurrogateNet, device: torch.device
    ) -> tuple[list[Path], list[Path]]:
        """Files of the scans to learn from and of those to calibrate with, the missing ones measured."""
        settings, seed = self.settings, self.settings.seed

        def measured(number: int, source: Source = self.parts.learned, probes: int = settings.probes) -> ScanTarget:
            first = FIRST_PROBES[int(np.random.default_rng([seed, number, 3]).integers(len(FIRST_PROBES)))]
            return measure(
                network,
                self.scan(source, number, device),
                first=first,
                probes=probes,
                seed=seed,
                number=number,
                surrogate=surrogate,
            )

        def checked(number: int) -> ScanTarget:
            return measured(CALIBRATION_FIRST + number, self.parts.checked, settings.calibration_probes)

        # features show its maps: scans of another one are of no use
        weights = {name: one.cpu().numpy().tobytes().hex() for name, one in surrogate.state_dict().items()}
        claim(self.folder / "scans", {"surrogate": _hash(weights)})
        claim(self.folder / "calibration", {"surrogate": _hash(weights), "probes": settings.calibration_probes})
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
        round_weights(predictor)

    def _fingerprint(self, described: dict[str, Any]) -> str:
        """Of everything that the result depends on."""
        # rates may change where a run diverged, how often something is saved or told at any time
        free = (
            "learning_rate",
            "surrogate_learning_rate",
            "checkpoint_every",
            "log_every",
            "calibration_scans",
            "calibration_probes",
        )
        return _hash([described, {key: value for key, value in asdict(self.settings).items() if key not in free}])


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _told(parts: Parts) -> str:
    """What is held back, as far as it fits a line."""
    if not parts.held_back:
        return (
            "calibration: of a single slice nothing can be held back; with what was learned from, predictions seem to "
            "be worth more than they are"
        )
    more = len(parts.held_back) - _MOST_TOLD
    told = ", ".join(parts.held_back[:_MOST_TOLD]) + (f" and {more} more" if more > 0 else "")
    return f"calibration: held back are {told}"


def _crop_of(shapes: Sequence[tuple[int, int]], side: int) -> tuple[int, int]:
    """The crop, or as much of it as the smallest scan has."""
    return min(side, *(y for y, _ in shapes)), min(side, *(x for _, x in shapes))
