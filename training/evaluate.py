"""Compare trained networks with linear reconstructions on held-out heads, and sketched σ with repetitions."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from voxelsigma.models.cards import ModelCard, load_card, load_model
from voxelsigma.models.figures import merged_figures
from voxelsigma.models.network import Network
from voxelsigma.training.agreement import Agreement, agreement
from voxelsigma.training.card import record
from voxelsigma.training.compare import applied, baselines, compared, median_sigma, scores
from voxelsigma.training.held_out import (
    HELD_OUT,
    MATRIX,
    SNR,
    Setting,
    held_out_slices,
    settings,
)
from voxelsigma.training.report import (
    Result,
    agreement_grid,
    agreement_text,
    figures,
    grids,
    method_text,
    scans_text,
    summary,
)
from voxelsigma.training.tables import Grid, check_markers, join, replace_between, terminal_table, width_of
from voxelsigma.training.volumes import Volume, load_volumes

__all__ = ["HELD_OUT", "EvaluateOptions", "agree", "evaluate", "run"]

QUALITY_MASKS = ("random_2d", "random_1d")
QUALITY_ACCELERATIONS = (2.0, 4.0, 6.0, 8.0)
AGREEMENT_MASKS = ("random_2d",)
AGREEMENT_ACCELERATIONS = (8.0,)
AGREEMENT_MATRIX = 96

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateOptions:
    """What to evaluate, and how.

    Parameters
    ----------
    cards
        Names of shipped cards, or paths.
    data, heads
        Folder with the volumes, and the names of those to take slices of.
    against_trials
        Whether to compare the sketch with repetitions rather than reconstructions with each other.
    masks, accelerations, maps, matrix, snr
        Settings; where None, those of the documentation.
    slices, seed
        How many scans of each setting, and the seed of all randomness.
    probes, trials
        Of a comparison with repetitions.
    record
        Whether to write the figures into the cards; those of other masks, R and maps stay.
    table
        Markdown file to write the tables into, between its two markers.
    device
        Of the networks: `cpu`, `cuda`, …
    """

    cards: tuple[str, ...]
    data: Path
    heads: tuple[str, ...] = HELD_OUT
    against_trials: bool = False
    masks: tuple[str, ...] | None = None
    accelerations: tuple[float, ...] | None = None
    maps: tuple[str, ...] = ("full",)
    matrix: int | None = None
    snr: float = SNR
    slices: int = 8
    seed: int = 1
    probes: int = 1000
    trials: int = 3000
    record: bool = False
    table: Path | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not self.cards:
            raise ValueError("evaluate: no model card is named; expected at least one")
        for name, least in (("slices", 1), ("probes", 2), ("trials", 2), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"evaluate: {name} must be at least {least}, got {getattr(self, name)}")
        if self.record and self.against_trials:
            raise ValueError("evaluate: a comparison with repetitions gives no figures to record in a card")

    def settings(self) -> tuple[Setting, ...]:
        """The scans to evaluate on."""
        masks, accelerations, matrix = (
            (AGREEMENT_MASKS, AGREEMENT_ACCELERATIONS, AGREEMENT_MATRIX)
            if self.against_trials
            else (QUALITY_MASKS, QUALITY_ACCELERATIONS, MATRIX)
        )
        return settings(
            self.masks or masks,
            self.accelerations or accelerations,
            self.maps,
            matrix=matrix if self.matrix is None else self.matrix,
            snr=self.snr,
        )


def run(options: EvaluateOptions, console: Console, tell: Tell) -> None:
    """Evaluate, print the tables, and write what is to be written.

    Raises
    ------
    ValueError, FileNotFoundError, OSError
        With one line that names the card, the file or the option; what can be seen beforehand, beforehand.
    """
    chosen = options.settings()
    name = "agreement" if options.against_trials else "reconstructions"
    if options.table is not None:
        check_markers(options.table, name)
    models = load_networks(options.cards, options.device)
    volumes = load_volumes(options.data, only=options.heads)
    heads = [volume.name for volume in volumes]
    if options.against_trials:
        found = agree(models, volumes, chosen, options, tell)
        tables: tuple[Grid, ...] = (agreement_grid(found),)
        paragraphs: tuple[str, ...] = (agreement_text(found, heads=heads),)
    else:
        results = evaluate(models, volumes, chosen, options, tell)
        tables = grids(results)
        paragraphs = scans_text(chosen, slices=options.slices, heads=heads), method_text()
    show(console, tables, paragraphs)
    if options.record:
        for card, _ in models:
            record_results(card.path, results[card.name], slices=options.slices, heads=heads)
    if options.table is not None:
        replace_between(options.table, name, join(tables, " ".join(paragraphs)))


def load_networks(cards: Sequence[str], device: str) -> list[tuple[ModelCard, Network]]:
    """Networks by their cards, in their order.

    Raises
    ------
    FileNotFoundError, ValueError
        If a card cannot be read, is of no network, or two have one name.
    """
    found: list[tuple[ModelCard, Network]] = []
    for name in cards:
        card = load_card(name)
        model = load_model(card, torch.device(device))
        if not isinstance(model, Network):
            raise ValueError(f"{card.path}: {card.architecture!r} is not a network; expected the card of one")
        for other, _ in found:
            if other.name == card.name:
                raise ValueError(f"{card.path}: its name {card.name!r} is that of {other.path} too")
        found.append((card, model))
    return found


def record_results(card: Path, found: Mapping[Setting, Result], *, slices: int, heads: Sequence[str]) -> None:
    """Write figures into a card; those of other kinds of scans stay."""
    new = figures(found)
    # read again: an evaluation takes long, and another one may have ended since
    rows = merged_figures(load_card(str(card)).figures, new)
    others = [row for row in rows if row not in new]
    record(card, summary(found, slices=slices, heads=heads, others=others), rows)


def evaluate(
    models: Sequence[tuple[ModelCard, Network]],
    volumes: Sequence[Volume],
    chosen: Sequence[Setting],
    options: EvaluateOptions,
    tell: Tell,
) -> dict[str, dict[Setting, Result]]:
    """Every network on every setting; the other reconstructions are made once."""
    results: dict[str, dict[Setting, Result]] = {card.name: {} for card, _ in models}
    for setting in chosen:
        drawn = held_out_slices(volumes, setting.examples(), slices=options.slices, seed=options.seed)
        scans = [scan.to(options.device) for scan in drawn]
        others = baselines(scans)
        tell(f"{setting.name}: linear {others.linear.mean_psnr:.1f} dB")
        for card, model in models:
            with _naming(card, setting):
                one = compared(scores(applied(model), scans), others)
                sigma, ratio = median_sigma(model, scans[0], seed=options.seed)
            results[card.name][setting] = Result(one, sigma, ratio)
            tell(f"{setting.name}: {card.name} {one.network:.1f} dB, sigma {sigma:.2f}")
    return results


def agree(
    models: Sequence[tuple[ModelCard, Network]],
    volumes: Sequence[Volume],
    chosen: Sequence[Setting],
    options: EvaluateOptions,
    tell: Tell,
) -> dict[str, dict[Setting, Agreement]]:
    """Every network's sketch against repetitions, on one slice of every setting."""
    found: dict[str, dict[Setting, Agreement]] = {card.name: {} for card, _ in models}
    for setting in chosen:
        (scan,) = held_out_slices(volumes, setting.examples(), slices=1, seed=options.seed)
        scan = scan.to(options.device)
        for card, model in models:
            with _naming(card, setting):
                one = agreement(model, scan, probes=options.probes, trials=options.trials, seed=options.seed)
            found[card.name][setting] = one
            tell(f"{setting.name}: {card.name} PCC {100 * one.correlation:.2f} %")
    return found


def show(console: Console, tables: Sequence[Grid], paragraphs: Sequence[str]) -> None:
    """Print tables that nothing squeezes."""
    for paragraph in paragraphs:
        console.print(paragraph)
    # a table that is piped somewhere must not be squeezed
    console.width = max(console.width, *(width_of(grid) for grid in tables))
    for grid in tables:
        console.print(f"\n{grid.title}:")
        console.print(terminal_table(grid))


@contextmanager
def _naming(card: ModelCard, setting: Setting) -> Iterator[None]:
    """Adds to an error which card and setting it belongs to."""
    try:
        yield
    except (ValueError, RuntimeError, TypeError) as error:
        raise ValueError(f"{card.path}: {setting.name}: {error}") from error
