"""A scanner simulator: a file of raw data, sent to a server at a scanner's pace, and how long its images took."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ismrmrd import Image

from voxelsigma.formats.image_file import ImageWriter, image_writer
from voxelsigma.gadgets.items import ReadoutBlock, VolumeKey
from voxelsigma.hosts.mrd_client import Address, Arrival, Session, connect, opening, parse_address
from voxelsigma.hosts.pipeline import PIPELINE_FOLDER, shipped_pipelines
from voxelsigma.hosts.tape import Tape, recorded

Progress = Callable[[str, int, int], None]

MAX_TR: Final = 60.0
MAX_TIMEOUT: Final = 86400.0
COMMENT_KEYS: Final = ("ImageComments", "GADGETRON_ImageComment", "DataRole", "GADGETRON_DataRole")


@dataclass(frozen=True, slots=True)
class SeriesLatency:
    """How long the images of one series took.

    Parameters
    ----------
    index
        Its `image_series_index`.
    comment
        Its name, of the first image.
    images
        How many came.
    latencies
        Seconds from the last readout of an image's slice to the image, one for each image that has a slice.
    """

    index: int
    comment: str
    images: int
    latencies: tuple[float, ...]

    @property
    def unmatched(self) -> int:
        """Images whose counters are no slice's, or that came before its last readout was sent."""
        return self.images - len(self.latencies)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a simulated scan measured.

    Parameters
    ----------
    readouts, waveforms
        How many were sent.
    tr
        Wanted seconds from one readout to the next; 0 for no pace.
    late
        Readouts that the socket had taken later than one `tr` after their time.
    lag
        Largest such delay of any readout, in seconds; 0 without a pace.
    sending
        Seconds from the first readout to the last.
    closing
        Seconds from there to the server's CLOSE.
    series
        Latencies by series, in the order of their index.
    dropped
        Items that came and are no images, by type.
    """

    readouts: int
    waveforms: int
    tr: float
    late: int
    lag: float
    sending: float
    closing: float
    series: tuple[SeriesLatency, ...]
    dropped: Mapping[str, int]


def send(
    scan: Path,
    to: str,
    *,
    pipeline: str,
    send_xml: bool = False,
    tr: float = 0.0,
    group: str = "dataset",
    output: Path | None = None,
    output_group: str = "dataset",
    timeout: float = 60.0,
    progress: Progress | None = None,
) -> Report:
    """Send a scan to a server as a scanner would, and measure the latency of its images.

    Readout i is sent at `start + i·tr`, noise readouts too; waveforms go with the readout they precede. Latency counts
    from the last readout of an image's slice (see `recorded`) to the arrival of the whole image.

    Parameters
    ----------
    scan
        ISMRMRD raw data.
    to
        The server, `host:port` or `[IPv6 address]:port`.
    pipeline
        Name of a pipeline that the server knows; with `send_xml` a file, or the name of a shipped one.
    send_xml
        Whether the pipeline's XML is sent and not its name.
    tr
        Seconds from one readout to the next; 0 sends as fast as the server reads.
    group, output_group
        Dataset groups in the two files.
    output
        ISMRMRD image file to write; it appears only when the server has closed without an error.
    timeout
        How many seconds the server may be silent after the scan's end, or take no data.
    progress
        Told (stage, done, total).

    Raises
    ------
    RuntimeError
        With the server's own text, if it sends an error.
    FileNotFoundError, ValueError, OSError
        With one line that says what is wrong with which option, file, item or server (absent, gone, or silent).
    """
    address = parse_address(to)
    _check_seconds("tr", tr, 0.0, MAX_TR)
    _check_seconds("timeout", timeout, 1e-3, MAX_TIMEOUT)
    if output is not None and output.exists() and scan.exists() and output.samefile(scan):
        raise ValueError(f"{output}: is the scan itself; the images need a file of their own")
    chosen = _pipeline_xml(pipeline) if send_xml else pipeline
    report = progress or (lambda stage, done, total: None)
    with recorded(scan, group, report) as tape, _writer(output, output_group) as writer:
        player = Player(tape, opening(chosen, tape.header_xml), tr)
        basket = _Basket(writer)
        closed = _converse(address, timeout, player, basket, report)
        if writer is not None and not basket.images:
            raise ValueError(f"{address}: no image came out of {pipeline}; nothing was written")
    return player.report(closed, latencies(basket.images, player.ends), basket.dropped)


def report_lines(report: Report) -> list[str]:
    """A report as text: what was sent, and a table of the series."""
    waveforms = f" and {report.waveforms} waveforms" if report.waveforms else ""
    pace = "as fast as the server read them"
    if report.tr:
        pace = (
            f"every {1000 * report.tr:g} ms; {report.late} were late by more than that, "
            f"the largest lag was {1000 * report.lag:.1f} ms"
        )
    lines = [
        f"sent {report.readouts} readouts{waveforms} in {report.sending:.2f} s, {pace}",
        f"the server closed {report.closing:.3f} s after the last",
    ]
    rows = [("series", "images", "median [s]", "max [s]", "no slice", "comment")]
    for series in report.series:
        times = series.latencies
        median, maximum = (f"{statistics.median(times):.3f}", f"{max(times):.3f}") if times else ("-", "-")
        comment = " ".join(series.comment.split())
        rows.append((str(series.index), str(series.images), median, maximum, str(series.unmatched), comment))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    table = ["  ".join([*map(str.rjust, row[:-1], widths), row[-1]]).rstrip() for row in rows]
    lines += table if report.series else ["no images came"]
    return lines + [f"not images, left out: {count} {name}" for name, count in report.dropped.items()]


class Player:
    """Sends a tape at its pace.

    Parameters
    ----------
    tape
        What to send.
    first_words
        What is sent before, at once.
    tr
        Seconds from one readout to the next, or 0.
    """

    def __init__(self, tape: Tape, first_words: bytes, tr: float) -> None:
        self._tape = tape
        self._first_words = first_words
        self._tr = tr
        self._start = self._end = 0.0
        self._late, self._lag = 0, 0.0
        self._marks = {readout: key for key, readout in tape.last.items()}
        self.sent = 0
        self.ends: dict[VolumeKey, tuple[float, float]] = {}
        """When the last readout of a volume began to be sent, and when the socket had taken it."""

    @property
    def total(self) -> int:
        """How many readouts there are to send."""
        return self._tape.readouts

    def __call__(self, session: Session) -> None:
        """Send all of it; the sending thread's work."""
        session.send(self._first_words)
        self._start = time.monotonic()
        for content, is_readout in self._tape.messages():
            # from the start and not from the readout before, so that delays do not add up
            due = self._start + min(self.sent, self.total - 1) * self._tr
            session.wait_until(due)
            began = time.monotonic()
            session.send(content)
            self._end = time.monotonic()
            if is_readout:
                self._count(began, due)

    def account(self) -> str:
        """How much of the scan has been sent."""
        return f"{self.sent} of {self.total} readouts"

    def report(self, closed: float, series: tuple[SeriesLatency, ...], dropped: Mapping[str, int]) -> Report:
        """What was measured, when the server has closed."""
        return Report(
            readouts=self.sent,
            waveforms=len(self._tape.waveforms),
            tr=self._tr,
            late=self._late,
            lag=self._lag,
            sending=self._end - self._start,
            closing=closed - self._end,
            series=series,
            dropped=dropped,
        )

    def _count(self, began: float, due: float) -> None:
        """Note that a readout is out."""
        if self._tr:
            lag = self._end - due
            self._lag = max(self._lag, lag)
            self._late += lag > self._tr
        if self.sent in self._marks:
            self.ends[self._marks[self.sent]] = (began, self._end)
        self.sent += 1


@dataclass(frozen=True, slots=True)
class ArrivedImage:
    """What is kept of an image: its series and name, the volume it shows, and when the whole of it was here."""

    series: int
    comment: str
    key: VolumeKey
    at: float


def latencies(
    images: Iterable[ArrivedImage], ends: Mapping[VolumeKey, tuple[float, float]]
) -> tuple[SeriesLatency, ...]:
    """Latencies by series.

    Parameters
    ----------
    images
        What arrived.
    ends
        When the last readout of each volume began to be sent, and when it was sent.
    """
    found: dict[int, list[ArrivedImage]] = {}
    for image in images:
        found.setdefault(image.series, []).append(image)
    return tuple(
        SeriesLatency(index, members[0].comment, len(members), tuple(_latencies(members, ends)))
        for index, members in sorted(found.items())
    )


def _latencies(images: Iterable[ArrivedImage], ends: Mapping[VolumeKey, tuple[float, float]]) -> list[float]:
    times = []
    for image in images:
        began, sent = ends.get(image.key, (math.inf, math.inf))
        # a quick answer can be here before the thread that sent has noted so
        if image.at >= began:
            times.append(max(0.0, image.at - sent))
    return times


@dataclass(slots=True)
class _Basket:
    """What came from the server."""

    writer: ImageWriter | None
    images: list[ArrivedImage] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)

    def take(self, arrival: Arrival) -> None:
        """Write it, if it is an image, and keep its counters."""
        item = arrival.item
        if not isinstance(item, Image):
            name = type(item).__name__
            count = len(item) if isinstance(item, ReadoutBlock) else 1
            self.dropped[name] = self.dropped.get(name, 0) + count
            return
        if self.writer is not None:
            self.writer.write(item)
        key = VolumeKey(**{name: int(getattr(item, name)) for name in VolumeKey.__dataclass_fields__})
        self.images.append(ArrivedImage(int(item.image_series_index), _comment(item), key, arrival.at))


def _converse(address: Address, timeout: float, player: Player, basket: _Basket, report: Progress) -> float:
    """Send everything and take everything; when the server closed, on the monotonic clock."""

    def tick() -> None:
        if player.sent < player.total:
            report("readouts", player.sent, player.total)
        else:
            report("images", len(basket.images), 0)

    with connect(address) as connection:
        session = Session(connection, address, timeout)
        with closing(session.arrivals(player, tick)) as arrivals:
            for arrival in arrivals:
                basket.take(arrival)
    return session.ended


def _comment(image: Image) -> str:
    """The name of an image's series: its comment, or else its role."""
    value = next((image.meta[key] for key in COMMENT_KEYS if image.meta.get(key)), "")
    return value if isinstance(value, str) else " ".join(map(str, value))


def _writer(output: Path | None, group: str) -> AbstractContextManager[ImageWriter | None]:
    return nullcontext() if output is None else image_writer(output, group)


def _pipeline_xml(name: str) -> bytes:
    """XML of a pipeline file, or of a shipped one; the server judges it."""
    path = Path(name)
    if not path.is_file():
        if path.name != name or name not in shipped_pipelines():
            raise FileNotFoundError(f"{name}: no such pipeline file; shipped are {', '.join(shipped_pipelines())}")
        path = PIPELINE_FOLDER / name
    return path.read_bytes()


def _check_seconds(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"send: {name} must be from {low:g} to {high:g} seconds, got {value!r}")
