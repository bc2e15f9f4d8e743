"""The command line: `voxelsigma` and `python -m voxelsigma`."""

import logging
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Annotated, NoReturn

import typer

import voxelsigma
from voxelsigma.hosts import cli_distill, cli_models, cli_roi, cli_servers, cli_train
from voxelsigma.hosts.cli_app import app, console, one_line

__all__ = ["app", "cli_distill", "cli_models", "cli_roi", "cli_servers", "cli_train", "main"]


@app.command()
def replay(
    scan: Annotated[Path, typer.Argument(help="ISMRMRD raw data (HDF5).")],
    pipeline: Annotated[
        str, typer.Option("-p", "--pipeline", help="Gadgetron XML file, or a shipped pipeline's name.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="ISMRMRD image file to write (HDF5).")],
    group: Annotated[str, typer.Option(help="Dataset group of the raw data.")] = "dataset",
    output_group: Annotated[str, typer.Option(help="Dataset group of the images.")] = "dataset",
    noise: cli_servers.Noise = None,
    processes: Annotated[
        bool, typer.Option("--processes", help="Run our own gadgets in child processes too, as a Gadgetron does.")
    ] = False,
    keep_probes: Annotated[
        bool, typer.Option("--keep-probes", help="Keep the pushed probes too (OUTPUT.probes.h5), for `voxelsigma roi`.")
    ] = False,
) -> None:
    """Run a recorded scan through a pipeline on the embedded host."""
    from voxelsigma.hosts.progress import progress_report
    from voxelsigma.hosts.replay import replay as run

    with progress_report(console) as report:
        summary = run(
            scan,
            pipeline,
            output,
            group=group,
            output_group=output_group,
            progress=report,
            in_process=not processes,
            noise=noise,
            keep_probes=keep_probes,
        )
    if summary.noise_readouts:
        print(f"{scan}: a noise scan ({summary.noise_readouts} readouts): its covariance is stored, there is no image")
        return
    print(f"{output}:")
    for series, count in sorted(summary.images.items()):
        print(f"  series {series}: {count} image{'s' if count > 1 else ''}, {summary.comments[series]}")
    if keep_probes:
        from voxelsigma.formats.probe_file import probe_path

        print(f"{probe_path(output)}: the pushed probes, for `voxelsigma roi {output}`")
    for name, count in summary.dropped.items():
        print(f"  not images, left out: {count} {name}")


@app.command()
def simulate(
    output: Annotated[Path, typer.Option("-o", "--output", help="ISMRMRD raw data file to write (HDF5).")],
    matrix: Annotated[str, typer.Option(help="Matrix as YxX, or ZxYxX for a 3D scan.")] = "128x128",
    coils: Annotated[int, typer.Option(help="Receive coils.")] = 8,
    acceleration: Annotated[float, typer.Option("-R", "--acceleration", help="Acceleration.")] = 4.0,
    mask: Annotated[
        str, typer.Option(help="uniform_1d, random_1d, random_2d or poisson_disc (the last two for 3D scans).")
    ] = "random_1d",
    reference_lines: Annotated[int, typer.Option(help="Fully sampled lines (or square) in the centre.")] = 24,
    snr: Annotated[float, typer.Option(help="Mean object magnitude over the noise's deviation per component.")] = 20.0,
    slices: Annotated[int, typer.Option(help="Slices.")] = 1,
    repetitions: Annotated[int, typer.Option(help="Repetitions.")] = 1,
    averages: Annotated[int, typer.Option(help="Averages.")] = 1,
    noise_samples: Annotated[int, typer.Option(help="Samples of the noise measurement; 0 for none.")] = 16384,
    seed: Annotated[int, typer.Option(help="Seed.")] = 0,
) -> None:
    """Simulate an accelerated multi-coil scan of a head-like phantom, with a noise measurement."""
    from typing import get_args

    from voxelsigma.formats.masks import Kind
    from voxelsigma.formats.raw_writer import write_raw
    from voxelsigma.formats.simulate import Simulation
    from voxelsigma.formats.simulate import simulate as run

    if mask not in get_args(Kind):
        raise ValueError(f"simulate: mask must be one of {', '.join(get_args(Kind))}, got {mask!r}")
    scan = run(
        Simulation(
            matrix=_matrix(matrix),
            coils=coils,
            acceleration=acceleration,
            mask=mask,  # type: ignore[arg-type]  # checked above
            reference_lines=reference_lines,
            snr=snr,
            slices=slices,
            repetitions=repetitions,
            averages=averages,
            noise_samples=noise_samples,
            seed=seed,
        )
    )
    count = write_raw(output, scan.header_xml, scan.blocks)
    sampled = scan.mask.size / scan.mask.sum()
    print(f"{output}: {count} readouts of {coils} coils, imaging lines sampled at R = {sampled:.2f} ({mask})")


@app.command()
def info(
    file: Annotated[Path, typer.Argument(help="ISMRMRD raw data or image file (HDF5).")],
    group: Annotated[str, typer.Option(help="Dataset group.")] = "dataset",
) -> None:
    """Tell what a raw data or image file holds."""
    from voxelsigma.hosts.info import describe

    for line in describe(file, group):
        print(line)


@app.command()
def picture(
    file: Annotated[Path, typer.Argument(help="ISMRMRD image file, as replay writes it.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="PNG to write.")],
    image: Annotated[int, typer.Option(help="Which image of each series.")] = 0,
    group: Annotated[str, typer.Option(help="Dataset group.")] = "dataset",
) -> None:
    """Draw image, σ, SNR and g-factor side by side."""
    from voxelsigma.formats.image_file import read_series
    from voxelsigma.formats.picture import draw_series

    lines = draw_series(read_series(file, group), output, image=image)
    print(f"{output}:")
    for line in lines:
        print(f"  {line}")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"voxelsigma {voxelsigma.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Log what is done, not warnings only.")] = False,
) -> None:
    del version
    logger = logging.getLogger("voxelsigma")
    logger.handlers = [_ConsoleHandler()]
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    logger.propagate = False


class _ConsoleHandler(logging.Handler):
    """Log lines on the console that shows the progress bar, so that neither breaks the other."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            name = record.name.removeprefix("voxelsigma.")
            console.print(f"{record.levelname.lower()}: {name}: {one_line(record.getMessage())}")
            if record.exc_info:
                # only servers log what they caught: whoever runs one needs to see where it happened
                console.print("".join(traceback.format_exception(*record.exc_info)).rstrip())
        except (Exception, SystemExit):
            # a log that nobody reads any more (rich would leave) must not end a scan
            self.handleError(record)


def main() -> NoReturn:
    """Run the command line; every failure is one line on stderr and an exit code that is not 0."""
    # so that temporary files and child processes are cleaned up
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        app()
    except (ValueError, OSError, LookupError, EOFError, RuntimeError, ModuleNotFoundError, MemoryError) as error:
        if os.environ.get("VOXELSIGMA_DEBUG"):
            traceback.print_exc()
        console.print(f"error: {one_line(str(error) or type(error).__name__)}")
        sys.exit(1)
    except Exception as error:
        if os.environ.get("VOXELSIGMA_DEBUG"):
            traceback.print_exc()
        console.print(
            f"error: internal: {type(error).__name__}: {one_line(str(error))} "
            "(please report it; VOXELSIGMA_DEBUG=1 shows where)"
        )
        sys.exit(70)
    sys.exit(0)


def _matrix(text: str) -> tuple[int, int, int]:
    """`128x96` or `32x128x96` as `(z, y, x)`."""
    try:
        sizes = tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        sizes = ()
    if len(sizes) not in (2, 3):
        raise ValueError(f"simulate: matrix must be YxX or ZxYxX, got {text!r}")
    return (1, sizes[0], sizes[1]) if len(sizes) == 2 else (sizes[0], sizes[1], sizes[2])
