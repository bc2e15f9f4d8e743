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


def one_line(text: str) -> str:
    """A text without line breaks."""
    return " ".join(text.split())
