"""What all parts of the command line share."""

import typer
from rich.console import Console

app = typer.Typer(
    name="voxelsigma",
    help="Voxel-wise noise standard deviation for MRI reconstructions.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)

console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def without_extra(command: str, error: ModuleNotFoundError) -> ModuleNotFoundError:
    """What to install for a command that needs the extra `train`; the error itself if a module of ours is missing."""
    package = (error.name or "").split(".")[0]
    if package in ("", "voxelsigma"):
        return error
    return ModuleNotFoundError(f"{command}: the package {package!r} is missing; pip install 'voxelsigma[train]'")


def one_line(text: str) -> str:
    """A text without line breaks."""
    return " ".join(text.split())
