"""The command line's questions to kept probes: roi."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from voxelsigma.hosts.cli_app import app

if TYPE_CHECKING:
    from voxelsigma.hosts.roi import Stack

_NEIGHBOURS = 3
_NARROWEST = 120

Box = tuple[slice, slice]


@app.command()
def roi(
    images: Annotated[Path, typer.Argument(help="Image file of a replay with --keep-probes, or its file of probes.")],
    mask: Annotated[
        list[Path] | None,
        typer.Option(help="Mask or labels (.npy, .nii), axes (y, x) or (z, y, x) as the image's; may be repeated."),
    ] = None,
    weights: Annotated[
        list[Path] | None, typer.Option(help="Real weights of a sum (.npy, .nii), axes as a mask's; may be repeated.")
    ] = None,
    box: Annotated[list[str] | None, typer.Option(help="Box y0:y1,x0:x1, ends exclusive; may be repeated.")] = None,
    voxel: Annotated[str | None, typer.Option(help="Voxel y,x: its noise correlation with its surroundings.")] = None,
    slice_number: Annotated[int | None, typer.Option("--slice", help="Look at one slice, from 0.")] = None,
    stack: Annotated[
        int, typer.Option(help="Which set of slices, where there are several contrasts, phases, repetitions or sets.")
    ] = 0,
    spectrum: Annotated[
        Path | None, typer.Option(help="Write the noise power spectrum of the box (.npy or .png).")
    ] = None,
    window: Annotated[str, typer.Option(help="Window of the spectrum: none or hann.")] = "none",
    correlation: Annotated[Path | None, typer.Option(help="Write the voxel's correlation map (.npy).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell the noise of regions, of a voxel with its surroundings, of a spectrum, from kept probes."""
    from voxelsigma.hosts.roi import kept_probes, stack_of

    if not (mask or weights or box or voxel):
        raise ValueError("roi: nothing to look at; give --mask, --weights, --box or --voxel")
    if spectrum is not None and len(box or []) != 1:
        raise ValueError(f"roi: --spectrum needs one --box y0:y1,x0:x1, got {len(box or [])}")
    if correlation is not None and voxel is None:
        raise ValueError("roi: --correlation needs --voxel y,x")
    if correlation is not None and correlation.suffix != ".npy":
        raise ValueError(f"{correlation}: a correlation map is written as .npy")
    if window not in ("none", "hann"):
        raise ValueError(f"roi: --window must be none or hann, got {window!r}")
    answer: dict[str, Any] = {}
    with kept_probes(images) as kept:
        chosen = stack_of(kept, stack, slice_number)
        answer |= _about(images, chosen)
        boxes = {text: _box(text, chosen.shape) for text in box or []}
        if mask or weights or boxes:
            answer |= _regions(chosen, mask or [], weights or [], boxes)
        if voxel is not None:
            answer["voxel"] = _voxel(chosen, _pair(voxel), correlation)
        if spectrum is not None:
            answer["spectrum"] = _spectrum(chosen, next(iter(boxes.values())), window, spectrum)
    if as_json:
        print(json.dumps(answer, indent=2, allow_nan=False))
    else:
        _show(answer)


def _about(images: Path, stack: "Stack") -> dict[str, Any]:
    metas = [volume.meta for volume, _, _ in stack.parts()]
    return {
        "file": str(images),
        "shape": list(stack.shape),
        "model": metas[0].model,
        "units": metas[0].units,
        "labels": " ".join(sorted({label for meta in metas for label in meta.labels.split()})),
        "covariance_bias": metas[0].bias,
        "covariance_error": metas[0].covariance_error or None,
        "independent_planes": all(meta.independent_planes for meta in metas),
    }


def _regions(stack: "Stack", masks: list[Path], weights: list[Path], boxes: dict[str, Box]) -> dict[str, Any]:
    from voxelsigma.formats.region_file import read_labels, read_weights
    from voxelsigma.hosts.roi_regions import Regions, region_noise

    if boxes and stack.shape[0] > 1:
        raise ValueError(f"roi: a box is looked at in one slice; name one of the {stack.shape[0]} with --slice")
    parts: list[Regions] = [
        *(Regions.of_labels(path.name, read_labels(path, stack.shape)) for path in masks),
        *(Regions.of_weights(path.name, read_weights(path, stack.shape)) for path in weights),
        *(Regions.of_box(text, place, stack.shape) for text, place in boxes.items()),
    ]
    found, noise = region_noise(stack, Regions.joined(parts))
    return {
        "regions": [asdict(region) for region in found],
        "covariance": noise.covariance.tolist(),
        "correlation": noise.correlation().tolist(),
    }


def _voxel(stack: "Stack", voxel: tuple[int, int], path: Path | None) -> dict[str, Any]:
    from voxelsigma.formats.spectrum_file import write_array
    from voxelsigma.hosts.roi import voxel_correlation

    found, sigma, (row, column), axes = voxel_correlation(stack, voxel)
    if path is not None:
        write_array(found.coefficient.numpy(), path)
    rows = slice(max(0, row - _NEIGHBOURS), row + _NEIGHBOURS + 1)
    columns = slice(max(0, column - _NEIGHBOURS), column + _NEIGHBOURS + 1)
    own_lower, own_upper = sigma.interval()
    lower, upper = found.interval()
    return {
        "voxel": list(voxel),
        "sigma": float(sigma.sigma[row, column]),
        "lower": float(own_lower[row, column]),
        "upper": float(own_upper[row, column]),
        "axes": axes,
        "first": [rows.start, columns.start],
        "correlation": found.coefficient[rows, columns].tolist(),
        "correlation_lower": lower[rows, columns].tolist(),
        "correlation_upper": upper[rows, columns].tolist(),
        "pairs": found.observations,
        **({} if path is None else {"file": str(path)}),
    }


def _spectrum(stack: "Stack", box: Box, window: str, path: Path) -> dict[str, Any]:
    from voxelsigma.formats.spectrum_file import write_spectrum
    from voxelsigma.hosts.roi import box_spectrum

    found, unit = box_spectrum(stack, box, "hann" if window == "hann" else "none")
    write_spectrum(found, path, unit)
    return {
        "file": str(path),
        "unit": unit,
        "window": window,
        "probes": found.probes,
        "variance": found.variance,
        "radial_frequency": found.radial_frequency.tolist(),
        "radial_power": found.radial_power.tolist(),
        "radial_error": found.radial_error.tolist(),
    }


def _show(answer: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    # a table that is piped somewhere must not be squeezed
    names = [len(region["name"]) for region in answer.get("regions", [])]
    console.width = max(console.width, _NARROWEST + max(names, default=0))
    labels = f", {answer['labels']}" if answer["labels"] else ""
    shape = " x ".join(map(str, answer["shape"]))
    console.print(f"{answer['file']}: {answer['model'] or 'image'}, {shape}, {answer['units']}{labels}")
    if "regions" in answer:
        console.print(_table(answer["regions"]))
    if "voxel" in answer:
        _show_voxel(console, answer["voxel"])
    if "spectrum" in answer:
        found = answer["spectrum"]
        console.print(
            f"{found['file']}: noise power spectrum, cycles/{found['unit']}, window {found['window']}, its integral "
            f"(mean variance) {found['variance']:.4g}, {found['probes']} probes"
        )
    for line in _notes(answer):
        console.print(line)


def _notes(answer: dict[str, Any]) -> list[str]:
    error = answer["covariance_error"]
    random = "random part unknown" if error is None else f"random part {100 * error:.2g} % of sigma, common to all"
    lines = [f"coil covariance: factor {answer['covariance_bias']:.4g} applied, {random}, not in the intervals"]
    if not answer["independent_planes"]:
        lines.append(
            "the readout was interpolated: noise of neighbouring x is correlated, which sigma over several x leaves out"
        )
    return lines


def _table(regions: "list[dict[str, Any]]") -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("region", overflow="fold")
    headings = ("voxels", "of", "value", "sigma", "95 %", "SNR", "if independent", "ratio", "effective", "voxel sigma")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for region in regions:
        table.add_row(
            region["name"],
            str(region["voxels"]),
            region["quantity"],
            f"{region['value']:.4g}",
            f"{region['sigma']:.4g}",
            f"{region['lower']:.4g} - {region['upper']:.4g}",
            _number(region["snr"]),
            f"{region['independent_sigma']:.4g}",
            _number(region["ratio"]),
            _number(region["effective_voxels"]),
            f"{region['median_sigma']:.4g}",
        )
    return table


def _show_voxel(console: Any, found: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table

    y, x = found["voxel"]
    chance = 1.96 / found["pairs"] ** 0.5
    console.print(
        f"voxel {y},{x}: sigma {found['sigma']:.4g} ({found['lower']:.4g} - {found['upper']:.4g}); its noise "
        f"correlation around it, {found['axes']}, {found['pairs']} pairs (0 is within +-{chance:.2f}):"
    )
    table = Table(box=box.SIMPLE, pad_edge=False)
    first_row, first_column = found["first"]
    table.add_column("")
    for column in range(len(found["correlation"][0])):
        table.add_column(str(first_column + column), justify="right")
    for number, row in enumerate(found["correlation"]):
        table.add_row(str(first_row + number), *(f"{value:.2f}" for value in row))
    console.print(table)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _pair(text: str) -> tuple[int, int]:
    """`y,x`."""
    found = re.fullmatch(r"(\d+),(\d+)", text.replace(" ", ""))
    if found is None:
        raise ValueError(f"roi: --voxel must be y,x, got {text!r}")
    return int(found[1]), int(found[2])


def _box(text: str, shape: tuple[int, int, int]) -> Box:
    """`y0:y1,x0:x1`, ends exclusive."""
    found = re.fullmatch(r"(\d+):(\d+),(\d+):(\d+)", text.replace(" ", ""))
    if found is None:
        raise ValueError(f"roi: --box must be y0:y1,x0:x1, got {text!r}")
    y0, y1, x0, x1 = map(int, found.groups())
    if not (y0 < y1 <= shape[1] and x0 < x1 <= shape[2]):
        raise ValueError(f"roi: box {text} is empty or reaches outside; the image has (y, x) = {shape[1:]}")
    return slice(y0, y1), slice(x0, x1)
