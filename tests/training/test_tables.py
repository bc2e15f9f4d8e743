"""Tables in Markdown files and on terminals."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from voxelsigma.training.tables import (
    Grid,
    check_markers,
    join,
    markdown_table,
    replace_between,
    terminal_table,
    width_of,
)

GRID = Grid("Fruit", ("name", "σ"), (("apple | pear", "1.0"), ("fig", "20.0 (+1.0)")))
BEGIN, END = "<!-- fruit:begin -->", "<!-- fruit:end -->"


def test_a_table_in_markdown() -> None:
    assert markdown_table(GRID).splitlines() == [
        "Fruit:",
        "",
        "| name | σ |",
        "| --- | ---: |",
        "| apple \\| pear | 1.0 |",
        "| fig | 20.0 (+1.0) |",
    ]


def test_a_table_is_not_squeezed() -> None:
    output = io.StringIO()
    Console(file=output, width=width_of(GRID)).print(terminal_table(GRID))
    for row in GRID.rows:
        for cell in row:
            assert cell in output.getvalue()


def test_what_is_between_the_markers_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "table.md"
    path.write_text(f"# Fruit\n{BEGIN}\nold\n{END}\nthe rest, no newline", encoding="utf-8")
    replace_between(path, "fruit", join([GRID, GRID], "Words."))
    text = path.read_text(encoding="utf-8")
    assert text.startswith(f"# Fruit\n{BEGIN}\n\nWords.\n\nFruit:\n\n| name")
    assert text.endswith(f"(+1.0) |\n\n{END}\nthe rest, no newline")
    assert text.count("apple") == 2
    replace_between(path, "fruit", join([GRID, GRID], "Words."))
    assert path.read_text(encoding="utf-8") == text


@pytest.mark.parametrize("text", ["", BEGIN, END, f"{END}\n{BEGIN}", f"{BEGIN}{BEGIN}{END}", f"{BEGIN}{END}{END}"])
def test_a_file_without_its_markers_is_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "table.md"
    path.write_text(text, encoding="utf-8")
    message = r"table\.md: must have the lines <!-- fruit:begin --> and <!-- fruit:end -->, once each and in this order"
    with pytest.raises(ValueError, match=message):
        check_markers(path, "fruit")
    with pytest.raises(ValueError, match=message):
        replace_between(path, "fruit", "x")
    assert path.read_text(encoding="utf-8") == text


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.md: no such file; expected one with the lines <!-- fruit:b"):
        check_markers(tmp_path / "none.md", "fruit")
