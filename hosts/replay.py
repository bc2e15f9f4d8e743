"""Replay: a file of raw data through a pipeline into a file of image series."""

from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from ismrmrd import Image

from voxelsigma.formats.image_file import ImageWriter, image_writer
from voxelsigma.formats.probe_file import probe_path
from voxelsigma.formats.probe_writer import probe_writer
from voxelsigma.formats.raw_file import open_raw
from voxelsigma.gadgets.context import Context
from voxelsigma.gadgets.items import Stream
from voxelsigma.hosts.embedded import connect
from voxelsigma.hosts.noise_scan import Watched
from voxelsigma.hosts.pipeline import load_pipeline
from voxelsigma.hosts.scan_items import scan_items


@dataclass(slots=True)
class Summary:
    """What a replay wrote.

    Parameters
    ----------
    images
        Images by series.
    dropped
        Items that are no images and so have no place in the output, by type.
    comments
        One comment of each series.
    noise_readouts
        Of a noise scan, how many; it has no images, and no file is written.
    """

    images: dict[int, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    comments: dict[int, str] = field(default_factory=dict)
    noise_readouts: int = 0


def replay(
    scan: Path,
    pipeline: str,
    output: Path,
    *,
    group: str = "dataset",
    output_group: str = "dataset",
    progress: Callable[[str, int, int], None] | None = None,
    in_process: bool = True,
    noise: Path | None = None,
    keep_probes: bool = False,
) -> Summary:
    """Run a scan through a pipeline; the output file appears only when it is whole.

    Parameters
    ----------
    scan
        ISMRMRD raw data.
    pipeline
        Path of a Gadgetron XML file, or the name of a shipped one.
    output
        ISMRMRD image file to write.
    group, output_group
        Dataset groups in the two files.
    progress
        Told (stage, done, total).
    in_process
        Whether our own gadgets run in this process.
    noise
        A noise scan or covariance to use instead of the scan's own.
    keep_probes
        Whether the pushed probes are kept, in a file beside the output (`formats/probe_file.py`).

    Raises
    ------
    FileNotFoundError, ValueError, OSError, RuntimeError
        With one line that says what is wrong with which file or item.
    """
    parsed = load_pipeline(pipeline)
    if output.exists() and scan.exists() and output.samefile(scan):
        raise ValueError(f"{output}: is the scan itself; the images need a file of their own")
    summary = Summary()
    with open_raw(scan, group) as raw:
        report = progress or (lambda stage, done, total: None)

        def counted(stage: str, done: int, total: int) -> None:
            report(stage, done, total or (len(raw) if stage == "readouts" else 0))

        watched = Watched(scan_items(raw, counted))
        try:
            # the probes get their name first: no image is there without what it says it has
            with (
                image_writer(output, output_group) as writer,
                probe_writer(probe_path(output)) if keep_probes else nullcontext() as keeper,
            ):
                context = Context(header=raw.header, progress=counted, noise=noise, probes=keeper)
                with closing(connect(parsed, context, iter(watched), in_process=in_process)) as items:
                    _write(items, writer, summary)
        except _NoImageError:
            if not watched.noise_scan:
                raise ValueError(f"{scan}: no image came out of {parsed.source}; nothing was written") from None
            summary.noise_readouts = watched.noise
    return summary


class _NoImageError(Exception):
    """Leaves the writer, so that no file appears."""


def _write(items: Stream, writer: ImageWriter, summary: Summary) -> None:
    for item in items:
        if isinstance(item, Image):
            writer.write(item)
            series = item.image_series_index
            summary.images[series] = summary.images.get(series, 0) + 1
            summary.comments.setdefault(series, str(item.meta.get("ImageComments", "")))
        else:
            name = type(item).__name__
            summary.dropped[name] = summary.dropped.get(name, 0) + 1
    if not summary.images:
        raise _NoImageError
