"""`voxelsigma train`."""

from pathlib import Path
from typing import Annotated

import typer

from voxelsigma.hosts.cli_app import app, without_extra


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="YAML file, or the name of a shipped preset.")],
    data: Annotated[
        str | None, typer.Option(help="Folder with the data, instead of the configuration's data.folder.")
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the model card and its run.")] = Path(),
    accelerator: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int, typer.Option(help="Threads of this process; 0 leaves the choice to torch.")] = 0,
) -> None:
    """Train a network and write its model card; started again after a kill, it goes on where it was."""
    try:
        from voxelsigma.training.checks import check_whole
        from voxelsigma.training.config import load_config
        from voxelsigma.training.run import train as run
    except ModuleNotFoundError as error:
        raise without_extra("train", error) from None
    import torch

    check_whole("train", "threads", threads, 0)
    if threads > 0:
        torch.set_num_threads(threads)
    card = run(load_config(config, folder=data), out, accelerator=accelerator, report=print)
    print(f"{card}: written; `voxelsigma evaluate {card} --data FOLDER --record` measures it")
