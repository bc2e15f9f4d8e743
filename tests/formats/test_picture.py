"""Pictures of series."""

import struct
import sys
from pathlib import Path
from typing import Any

import ismrmrd
import numpy as np
import pytest
from ismrmrd.hdf5 import image_header_dtype
from matplotlib.figure import Figure
from numpy.typing import NDArray

from voxelsigma.formats.image_file import Series
from voxelsigma.formats.picture import draw_series


def series_of(
    index: int, data: NDArray[np.generic] | None = None, comment: str = "a comment", **meta: str | float
) -> Series:
    if data is None:
        data = np.linspace(0.5, 2, 2 * 24, dtype=np.float32).reshape(2, 1, 1, 4, 6)
    return Series(
        index=index,
        headers=np.zeros(len(data), dtype=image_header_dtype),
        attributes=tuple(ismrmrd.Meta({"ImageComments": comment, **meta}) for _ in data),
        data=data,
    )


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved."""
    figures: list[Figure] = []
    original = Figure.savefig

    def savefig(self: Figure, *args: Any, **options: Any) -> None:
        figures.append(self)
        original(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def titles(figure: Figure) -> list[str]:
    return [axis.get_title() for axis in figure.axes if axis.get_title()]


def test_a_png_is_written(tmp_path: Path) -> None:
    found = draw_series((series_of(1), series_of(2000), series_of(2100), series_of(2200)), tmp_path / "out.png")
    content = (tmp_path / "out.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert width > 3 * height > 900
    assert names(tmp_path) == ["out.png"]
    assert found == [
        "Image (series 1): a comment, median 0.867",
        "Noise σ, magnitude (series 2000): a comment, median 0.867",
        "SNR = image / σ (series 2100): a comment, median 0.867",
        "g-factor (series 2200): a comment, median 0.867",
    ]


def test_every_panel_has_a_colour_bar_with_its_unit(tmp_path: Path, drawn: list[Figure]) -> None:
    draw_series((series_of(1), series_of(2000), series_of(2010), series_of(2020)), tmp_path / "out.png")
    units = [axis.get_ylabel() for axis in drawn[0].axes if axis.get_ylabel()]
    assert units == [
        "intensity in SNR units",
        "σ in SNR units (1 = fully sampled)",
        "σ in SNR units (√2 = fully sampled)",
        "σ units",
    ]


@pytest.mark.parametrize(
    ("comment", "title"),
    [
        ("sigma magnitude, SNR units", "Noise σ, magnitude"),
        ("sigma magnitude, SNR units uncalibrated", "Noise σ, magnitude (uncalibrated)"),
        ("sigma magnitude, SNR units incomplete", "Noise σ, magnitude (incomplete)"),
        ("sigma magnitude, SNR units uncalibrated incomplete", "Noise σ, magnitude (uncalibrated, incomplete)"),
    ],
)
def test_what_is_wrong_with_a_map_is_in_its_title(
    tmp_path: Path, drawn: list[Figure], comment: str, title: str
) -> None:
    (line,) = draw_series((series_of(2000, comment=comment),), tmp_path / "out.png")
    assert titles(drawn[0]) == [title]
    assert line.startswith(f"{title} (series 2000): {comment}")


def test_a_networks_ratio_is_not_called_a_g_factor(tmp_path: Path, drawn: list[Figure]) -> None:
    comment = "noise ratio to full sampling, not lost contrast uncalibrated"
    draw_series((series_of(2200, comment=comment),), tmp_path / "out.png")
    assert titles(drawn[0]) == ["Noise ratio to full sampling (uncalibrated)"]
    assert drawn[0].axes[1].get_ylabel() == "σ / (σ fully sampled · √R), no unit"


def test_other_series_are_left_out(tmp_path: Path) -> None:
    found = draw_series((series_of(1), series_of(9000), series_of(20)), tmp_path / "out.png")
    assert len(found) == 1
    with pytest.raises(ValueError, match=r"no series that can be drawn among \[9000, 20\]"):
        draw_series((series_of(9000), series_of(20)), tmp_path / "out.png")


@pytest.mark.parametrize("image", [-1, 2])
def test_an_image_that_is_not_there(tmp_path: Path, image: int) -> None:
    with pytest.raises(ValueError, match=f"series 1 has 2 images; there is none with number {image}"):
        draw_series((series_of(1),), tmp_path / "out.png", image=image)
    assert names(tmp_path) == []


def test_the_second_image_can_be_drawn(tmp_path: Path) -> None:
    first, second = (draw_series((series_of(1),), tmp_path / "out.png", image=number) for number in (0, 1))
    assert first != second


def test_integers_are_shown_in_their_unit(tmp_path: Path) -> None:
    data = np.full((1, 1, 1, 4, 4), 1500, dtype=np.uint16)
    (line,) = draw_series((series_of(2000, data, GADGETRON_ScaleRatio=1000),), tmp_path / "out.png")
    assert line.endswith("median 1.5")


def test_of_a_volume_the_middle_is_drawn(tmp_path: Path) -> None:
    data = np.arange(1, 6, dtype=np.complex64).reshape(1, 1, 5, 1, 1) * np.ones((4, 4), np.complex64) * 1j
    (line,) = draw_series((series_of(1, data),), tmp_path / "out.png")
    assert line.endswith("median 3")


def test_an_empty_map_can_be_drawn(tmp_path: Path) -> None:
    (line,) = draw_series((series_of(2000, np.zeros((1, 1, 1, 4, 4), np.float32)),), tmp_path / "out.png")
    assert line.endswith("median 0")


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"drawing needs matplotlib: pip install 'voxelsigma\[view\]'"):
        draw_series((series_of(1),), tmp_path / "out.png")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"folder .*nowhere does not exist"):
        draw_series((series_of(1),), tmp_path / "nowhere" / "out.png")
