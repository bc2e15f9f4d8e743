"""The picture of what predictions save has a panel for each network and R, and says which figures it lacks."""

import importlib
import json
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
COUNTS = [8, 16, 32, 64]


@pytest.fixture(scope="module")
def module() -> Iterator[Any]:
    """`bench`, which is no part of the installed package, from the source tree."""
    if not (ROOT / "bench" / "instant_picture.py").is_file():
        pytest.skip(f"{ROOT / 'bench'} is not there")
    sys.path.insert(0, str(ROOT))
    yield importlib.import_module("bench.instant_picture")
    sys.path.remove(str(ROOT))


def group(name: str, network: str = "mine", scans: int = 2) -> dict[str, Any]:
    """Errors as the root of the probes says; what costs more has less of them."""
    roads = {"plain": (1.0, 1.0), "control variate": (0.6, 1.2), "instant": (0.3, 2.0)}
    return {
        "network": network,
        "group": name,
        "scans": scans,
        "counts": COUNTS,
        "seconds": {road: [cost * count / 10 for count in COUNTS] for road, (_, cost) in roads.items()},
        "errors": {
            f"magnitude {road}": [gain * (2 * count) ** -0.5 for count in COUNTS] for road, (gain, _) in roads.items()
        },
    }


def heads(acceleration: int, network: str = "mine", scans: int = 2) -> dict[str, Any]:
    return group(f"held-out heads, R={acceleration}", network, scans)


def written(folder: Path, content: Sequence[object], name: str = "found.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_a_png_is_written(module: Any, tmp_path: Path) -> None:
    others = [group("phantom, R=6"), {"network": "mine", "group": "certificate", "scans": 3}]
    one = written(tmp_path, [heads(4), heads(6), *others])
    two = written(tmp_path, [heads(4, "yours"), heads(6, "yours")], "more.json")
    module.main([str(one), str(two), "-o", str(tmp_path / "out.png")])
    content = (tmp_path / "out.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert 500 < height < width
    assert len(content) < 150_000


def test_rows_are_networks_and_columns_accelerations(module: Any, tmp_path: Path) -> None:
    one = written(tmp_path, [heads(6), heads(4)])
    two = written(tmp_path, [heads(6, "yours", 1)], "more.json")
    figure = module.drawn(module.panels([one, two]))
    assert [axis.get_title() for axis in figure.axes] == [
        "mine, R = 4 (2 scans)",
        "mine, R = 6 (2 scans)",
        "",
        "yours, R = 6 (1 scan)",
    ]
    assert not figure.axes[2].axison
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["plain", "control variate", "instant"]


def test_a_panel_has_what_was_measured(module: Any, tmp_path: Path) -> None:
    (axis,) = module.drawn(module.panels([written(tmp_path, [heads(4)])])).axes
    lines = {line.get_label(): line for line in axis.lines}
    for road, gain, cost in (("plain", 1.0, 1.0), ("control variate", 0.6, 1.2), ("instant", 0.3, 2.0)):
        assert list(lines[road].get_xdata()) == pytest.approx([cost * count / 10 for count in COUNTS])
        assert list(lines[road].get_ydata()) == pytest.approx([100 * gain * (2 * count) ** -0.5 for count in COUNTS])
    level = [line.get_ydata()[0] for line in axis.lines if line.get_label() not in module.ROADS]
    assert level == pytest.approx([5, 3])
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
    assert [text.get_text() for text in axis.texts] == 2 * [str(count) for count in COUNTS]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("nothing", "found.json: expected what bench.instant writes"),
        ('[{"network": "mine"}]', r"found.json: expected what bench.instant writes \(KeyError\('group'\)\)"),
        ("3", "found.json: expected what bench.instant writes"),
        (json.dumps([group("R=12")]), r"found.json: has no group 'held-out heads, R=', got \['R=12'\]"),
        (json.dumps([heads(4), heads(4)]), "found.json: mine, 'held-out heads, R=4' is there twice"),
    ],
)
def test_what_cannot_be_drawn_is_named(module: Any, tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "found.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(SystemExit, match=said):
        module.main([str(path), "-o", str(tmp_path / "out.png")])
    assert not (tmp_path / "out.png").exists()


def test_a_missing_file_is_named(module: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"bench.instant_picture: .*nowhere.json"):
        module.main([str(tmp_path / "nowhere.json"), "-o", str(tmp_path / "out.png")])
