"""`voxelsigma distill`."""

from pathlib import Path
from typing import Annotated

import typer

from voxelsigma.hosts.cli_app import app, without_extra


@app.command()
def distill(
    card: Annotated[str, typer.Argument(help="Model card (YAML file), or the name of a shipped one.")],
    data: Annotated[Path, typer.Option(help="Folder with volumes to simulate scans of, or fully sampled scans.")],
    kind: Annotated[str, typer.Option(help="What is in it: volumes, ismrmrd or fastmri.")] = "volumes",
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Name to hold out, once for each; '' for none. By default those that figures are taken of."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder for a copy of the card, instead of changing the card.")
    ] = None,
    start: Annotated[
        str | None, typer.Option(help="Card of a like network, whose predictor to begin from: then fewer steps do.")
    ] = None,
    scans: Annotated[int, typer.Option(help="Scans to learn from.")] = 400,
    probes: Annotated[int, typer.Option(help="Probes pushed through each.")] = 8,
    steps: Annotated[int, typer.Option(help="Steps of the training.")] = 1500,
    surrogate_scans: Annotated[int, typer.Option(help="Scans that its control variate learns from.")] = 800,
    surrogate_steps: Annotated[int, typer.Option(help="Steps of that training, which comes first.")] = 12000,
    seed: Annotated[int, typer.Option(help="Seed.")] = 0,
    accelerator: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int, typer.Option(help="Threads of this process; 0 leaves the choice to torch.")] = 0,
) -> None:
    """Make the predictor of a model's sigma maps; started again after a kill, it goes on where it was."""
    try:
        from voxelsigma.training.checks import check_whole
        from voxelsigma.training.config import DataSettings
        from voxelsigma.training.distill import distill as run
        from voxelsigma.training.distill import held_out_in
        from voxelsigma.training.distill_settings import DistillSettings
    except ModuleNotFoundError as error:
        raise without_extra("distill", error) from None
    import torch

    check_whole("distill", "threads", threads, 0)
    if threads > 0:
        torch.set_num_threads(threads)
    excluded = held_out_in(data) if exclude is None else tuple(name for name in exclude if name)
    written = run(
        card,
        DataSettings(folder=str(data), kind=kind, exclude=excluded),  # type: ignore[arg-type]  # checked when opened
        out=out,
        settings=DistillSettings(
            scans=scans,
            probes=probes,
            steps=steps,
            surrogate_scans=surrogate_scans,
            surrogate_steps=surrogate_steps,
            seed=seed,
        ),
        start=start,
        accelerator=accelerator,
        report=print,
    )
    print(f"{written}: names its predictor now; the gadget `sketch` uses it where its property `prior` is auto")
