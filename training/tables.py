"""Tables for the terminal and for Markdown files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.cells import cell_len
from rich.table import Table

from voxelsigma.formats.atomic import write_whole


@dataclass(frozen=True, slots=True)
class Grid:
    """A table of texts.

    Parameters
    ----------
    title
        What it shows.
    headings
        Of the columns.
    rows
        As many cells each.
    """

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def terminal_table(grid: Grid) -> Table:
    """For rich, without the title; the first column is aligned to the left, the others to the right."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    for number, heading in enumerate(grid.headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    for row in grid.rows:
        table.add_row(*row)
    return table


def width_of(grid: Grid) -> int:
    """Characters that a row needs at most, so that a table that is piped somewhere is not squeezed."""
    rows = (grid.headings, *grid.rows)
    columns = (max(cell_len(cell) for cell in column) for column in zip(*rows, strict=True))
    # a space on both sides, and the border between
    return sum(width + 3 for width in columns)


def markdown_table(grid: Grid) -> str:
    """Title and table in Markdown."""
    alignment = ("---", *("---:" for _ in grid.headings[1:]))
    lines = (grid.headings, alignment, *grid.rows)
    return f"{grid.title}:\n\n" + "".join(f"| {' | '.join(_escaped(cell) for cell in line)} |\n" for line in lines)


def markers(name: str) -> tuple[str, str]:
    """The two lines of a Markdown file between which a table stands."""
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def check_markers(path: Path, name: str) -> None:
    """Find the place of a table in a Markdown file.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it does not have both lines, once each and in order.
    """
    _split(path, name)


def replace_between(path: Path, name: str, text: str) -> None:
    """Replace what stands between the two lines of a Markdown file; the rest stays as it is.

    Raises
    ------
    FileNotFoundError, ValueError
        As `check_markers`.
    OSError
        If it cannot be written.
    """
    before, after = _split(path, name)
    write_whole(path, f"{before}\n\n{text.strip()}\n\n{after}".encode())


def join(grids: Sequence[Grid], *paragraphs: str) -> str:
    """Paragraphs, then tables, in Markdown."""
    return "\n\n".join([*paragraphs, *(markdown_table(grid).rstrip("\n") for grid in grids)]) + "\n"


def _split(path: Path, name: str) -> tuple[str, str]:
    """Up to the first line of the two, and from the second on."""
    begin, end = markers(name)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected one with the lines {begin} and {end}")
    text = path.read_text(encoding="utf-8")
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{path}: must have the lines {begin} and {end}, once each and in this order")
    start, stop = text.index(begin) + len(begin), text.index(end)
    return text[:start], text[stop:]


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")
