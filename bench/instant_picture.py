"""Draw what a prediction saves: `python -m bench.instant_picture RESULTS.json... -o PICTURE.png`.

The error of the magnitude map against time, as `bench.instant` found it: a row for each network, a column for each R of
held-out heads. Numbers along the lines are probes.
"""

import argparse
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from bench.instant import ROADS, TARGETS
from voxelsigma.formats.atomic import write_whole
from voxelsigma.noise.sigma import MapKind

KIND: Final[MapKind] = "magnitude"
HEADS: Final = "held-out heads, R="

# told apart by those who see no red or green
_COLOURS: Final = dict(zip(ROADS, ("0.45", "#0072b2", "#d55e00"), strict=True))
_MARKERS: Final = dict(zip(ROADS, ("o", "s", "D"), strict=True))
# which lines have numbers, and where, in points: two lines that nearly meet have no room for both
_NUMBERED: Final = {"plain": (5, 3, "left"), "instant": (-5, -9, "right")}
_ERRORS: Final = (2, 3, 5, 10, 20, 30)
_SECONDS: Final = tuple(step * 10**power for power in range(-2, 5) for step in (1, 2, 5))

Panels = dict[str, dict[float, Mapping[str, Any]]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="files of `bench.instant`")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the PNG to write")
    options = parser.parse_args(arguments)
    try:
        content = io.BytesIO()
        drawn(panels(options.results)).savefig(content, dpi=100, format="png", pil_kwargs={"optimize": True})
        write_whole(options.out, content.getvalue())
    except (OSError, ValueError) as error:
        raise SystemExit(f"bench.instant_picture: {error}") from None


def panels(paths: Sequence[Path]) -> Panels:
    """Figures of held-out heads by network and R.

    Raises
    ------
    ValueError
        If a file is no JSON, has no such figures, or has those of a network that another has too.
    OSError
        If it cannot be read.
    """
    found: Panels = {}
    for path in paths:
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
            chosen = [one for one in read if one["group"].startswith(HEADS)]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}: expected what bench.instant writes ({error!r})") from None
        if not chosen:
            raise ValueError(f"{path}: has no group {HEADS!r}, got {[one['group'] for one in read]}")
        for one in chosen:
            row, acceleration = found.setdefault(one["network"], {}), float(one["group"].removeprefix(HEADS))
            if acceleration in row:
                raise ValueError(f"{path}: {one['network']}, {one['group']!r} is there twice; expected each one once")
            row[acceleration] = one
    return found


def drawn(found: Panels) -> Figure:
    """All panels; one that nothing was measured for is empty."""
    columns = sorted({acceleration for row in found.values() for acceleration in row})
    figure = Figure(figsize=(0.6 + 3.1 * len(columns), 0.7 + 2.7 * len(found)), layout="constrained")
    axes = figure.subplots(len(found), len(columns), squeeze=False, sharex="row", sharey=True)
    for line, (network, row) in zip(axes, found.items(), strict=True):
        for axis, acceleration in zip(line, columns, strict=True):
            if acceleration in row:
                draw_panel(axis, row[acceleration])
                axis.set_title(_title(network, acceleration, row[acceleration]["scans"]), fontsize=10)
            else:
                axis.set_axis_off()
        line[0].set_ylabel(f"error of σ ({KIND}), %")
    for axis in axes[-1]:
        axis.set_xlabel("seconds")
    lines = next(axis for axis in axes.flat if axis.lines).get_legend_handles_labels()
    figure.legend(*lines, loc="outside upper center", ncols=len(ROADS), frameon=False)
    return figure


def draw_panel(axis: Axes, found: Mapping[str, Any]) -> None:
    """Three lines over two targets."""
    axis.set(xscale="log", yscale="log")
    for target in TARGETS:
        axis.axhline(100 * target, color="0.7", linestyle="--", linewidth=0.9, zorder=0)
    for road in ROADS:
        seconds, errors = found["seconds"][road], [100 * error for error in found["errors"][f"{KIND} {road}"]]
        axis.plot(
            seconds, errors, label=road, color=_COLOURS[road], marker=_MARKERS[road], markersize=3.5, linewidth=1.3
        )
        if road in _NUMBERED:
            right, up, side = _NUMBERED[road]
            for count, second, error in zip(found["counts"], seconds, errors, strict=True):
                axis.annotate(
                    str(count),
                    (second, error),
                    xytext=(right, up),
                    textcoords="offset points",
                    ha=side,
                    fontsize=7,
                    color=_COLOURS[road],
                    path_effects=[withStroke(linewidth=2, foreground="white")],
                )
    axis.margins(x=0.12, y=0.1)
    for one, places in ((axis.xaxis, _SECONDS), (axis.yaxis, _ERRORS)):
        one.set_major_locator(FixedLocator(places))
        one.set_minor_locator(NullLocator())
        one.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.tick_params(labelsize=8)


def _title(network: str, acceleration: float, scans: int) -> str:
    return f"{network}, R = {acceleration:g} ({scans} {'scan' if scans == 1 else 'scans'})"


if __name__ == "__main__":
    main()
