"""The command line's questions to model cards: models, evaluate."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from voxelsigma.hosts.cli_app import app, console, one_line, without_extra


@app.command()
def models(
    cards: Annotated[list[Path] | None, typer.Argument(help="Model cards (YAML) beside the shipped ones.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List model cards: the shipped ones, and those named."""
    from rich.console import Console

    from voxelsigma.hosts.model_list import Listed, listed, models_grid
    from voxelsigma.models.cards import available_cards
    from voxelsigma.training.tables import terminal_table, width_of

    def tried(name: str) -> Listed | None:
        try:
            return listed(name)
        except (ValueError, OSError) as error:
            console.print(f"error: {one_line(str(error))}")
            return None

    tries = [tried(name) for name in [*available_cards(), *map(str, cards or [])]]
    found = [one for one in tries if one is not None]
    if as_json:
        print(json.dumps([asdict(card) for card in found], indent=2, allow_nan=False))
    else:
        grid, output = models_grid(found), Console(highlight=False, markup=False)
        # a table that is piped somewhere must not be squeezed
        output.width = max(output.width, width_of(grid))
        output.print(terminal_table(grid))
    if len(found) < len(tries):
        raise typer.Exit(1)


@app.command()
def evaluate(
    cards: Annotated[list[str], typer.Argument(help="Names of shipped model cards, or YAML files.")],
    data: Annotated[Path, typer.Option(help="Folder with volumes of heads (.nii.gz label maps, .npz).")],
    heads: Annotated[
        list[str] | None, typer.Option("--head", help="Volume to take slices of; may be repeated.")
    ] = None,
    agreement: Annotated[
        bool, typer.Option("--agreement", help="Compare the sketch with repetitions (Monte Carlo) instead.")
    ] = False,
    mask: Annotated[
        list[str] | None, typer.Option(help="Sampling mask, as of simulate; random_2d and random_1d; may be repeated.")
    ] = None,
    acceleration: Annotated[
        list[float] | None, typer.Option("-R", "--acceleration", help="Acceleration; may be repeated.")
    ] = None,
    maps: Annotated[
        list[str] | None, typer.Option(help="Sensitivities: full or masked (0 outside the object); may be repeated.")
    ] = None,
    matrix: Annotated[int | None, typer.Option(help="Voxels along y and x; 320, with --agreement 96.")] = None,
    snr: Annotated[float, typer.Option(help="Mean of the object over the noise, fully sampled.")] = 20.0,
    slices: Annotated[int, typer.Option(help="Scans of each setting.")] = 8,
    probes: Annotated[int, typer.Option(help="With --agreement: probes of the sketch.")] = 1000,
    trials: Annotated[int, typer.Option(help="With --agreement: repetitions.")] = 3000,
    seed: Annotated[int, typer.Option(help="Seed.")] = 1,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 2,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    record: Annotated[bool, typer.Option("--record", help="Write the figures into the cards.")] = False,
    table: Annotated[
        Path | None, typer.Option(help="Markdown file to write the tables into, between its two markers.")
    ] = None,
) -> None:
    """Compare networks with linear reconstructions on held-out heads, or their sketch with repetitions."""
    try:
        from voxelsigma.training.evaluate import HELD_OUT, EvaluateOptions, run
    except ModuleNotFoundError as error:
        raise without_extra("evaluate", error) from None
    import torch
    from rich.console import Console

    if threads < 1:
        raise ValueError(f"evaluate: threads must be at least 1, got {threads}")
    options = EvaluateOptions(
        cards=tuple(cards),
        data=data,
        heads=tuple(heads or HELD_OUT),
        against_trials=agreement,
        masks=tuple(mask) if mask else None,
        accelerations=tuple(acceleration) if acceleration else None,
        maps=tuple(maps or ("full",)),
        matrix=matrix,
        snr=snr,
        slices=slices,
        seed=seed,
        probes=probes,
        trials=trials,
        record=record,
        table=table,
        device=device,
    )
    torch.set_num_threads(threads)
    run(options, Console(highlight=False, markup=False), console.print)
