"""Accumulation: readouts to the k-space of whole volumes."""

import logging
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from ismrmrd import constants

from voxelsigma.formats.header import Encoding
from voxelsigma.formats.readouts import NOT_IMAGING, ReadoutBlock, Samples
from voxelsigma.gadgets.context import Context
from voxelsigma.gadgets.items import KSpace, NoiseCovariance, Stream, VolumeKey, Whitening, volume_key
from voxelsigma.gadgets.placement import ReadoutGeometry, line_position, moved_line, placed_samples, removed_upstream
from voxelsigma.gadgets.properties import boolean, choice, sidecars
from voxelsigma.gadgets.recon_data import recon_readouts
from voxelsigma.gadgets.volume import LineBuffer, Volume
from voxelsigma.gadgets.wire import Bucket, ReconData

logger = logging.getLogger("voxelsigma.accumulate")

Marks: TypeAlias = npt.NDArray[np.bool_]

LAST_OF_ALL = (constants.ACQ_LAST_IN_REPETITION, constants.ACQ_LAST_IN_MEASUREMENT)
NO_LINES = (constants.ACQ_IS_NOISE_MEASUREMENT, *NOT_IMAGING)


@dataclass(frozen=True, slots=True, kw_only=True)
class AccumulateProperties:
    """Properties of `accumulate`.

    `sampling` says how completeness is judged: `regular` counts the lines of the header's acceleration, `irregular`
    trusts the readouts' flags, `auto` counts where all lines lie on the regular grid. `incomplete` says what
    happens to a volume with lines missing. `prewhitened` says that something upstream whitened the data.
    """

    sampling: str = choice("auto", "auto", "regular", "irregular")
    incomplete: str = choice("error", "error", "emit")
    prewhitened: bool = boolean(False)
    forward: tuple[str, ...] = sidecars()


@dataclass(frozen=True, slots=True)
class Accumulate:
    """Place readouts by their counters and emit k-space when a volume is whole.

    A volume ends on its flags, or when the next one of its slice begins, or with the stream; it is emitted only if no
    line is missing. The end of a stream is no evidence of completeness.
    """

    properties: AccumulateProperties
    context: Context

    def __call__(self, items: Stream) -> Stream:
        """Readouts, buckets or RECON_DATA in, one `KSpace` a volume out; everything else passes."""
        for encoding in self.context.header.encodings[:1]:
            if encoding.trajectory != "cartesian":
                raise ValueError(
                    f"accumulate: the header's trajectory is {encoding.trajectory!r}; only 'cartesian' can be placed"
                )
        state = _State(self.properties, self.context)
        for item in items:
            if isinstance(item, NoiseCovariance):
                state.whitening = whitening_of(item)
                state.noise_scan = state.whitening is None
                if "covariance" in self.properties.forward:
                    yield item
            elif isinstance(item, ReadoutBlock):
                yield from state.add(item)
            elif isinstance(item, Bucket):
                yield from item.waveforms
                yield from state.add_collected(item.reference, item.data)
            elif isinstance(item, ReconData):
                yield from state.add_collected(*recon_readouts(item, self.context.header.encodings))
            else:
                yield item
        yield from state.end()


def whitening_of(covariance: NoiseCovariance) -> Whitening | None:
    """Provenance of data that were whitened with a covariance; None if they were not."""
    if covariance.applied_scale is None:
        return None
    return Whitening(
        source=covariance.source,
        samples=covariance.samples,
        effective_samples=covariance.effective_samples,
        coils=covariance.coils,
        dwell_time_us=covariance.dwell_time_us,
        bandwidth=covariance.bandwidth,
        scale=covariance.applied_scale,
        calibrated=covariance.calibrated,
        measured_variance=covariance.measured_variance,
    )


@dataclass(slots=True)
class _State:
    """Volumes under way."""

    properties: AccumulateProperties
    context: Context
    whitening: Whitening | None = None
    coils: int | None = None
    readouts: int = 0
    ignored: int = 0
    cropped_upstream: bool = False
    noise_scan: bool = False
    open: dict[VolumeKey, Volume] = field(default_factory=dict)
    emitted: set[VolumeKey] = field(default_factory=set)
    references: dict[VolumeKey, LineBuffer] = field(default_factory=dict)

    def add(self, block: ReadoutBlock) -> Iterator[KSpace]:
        """Place the readouts of a block, in order."""
        for part, ignored in block.runs(block.flagged(*NO_LINES)):
            if ignored:
                self.ignored += len(part)
                # the last readout of a measurement may be a navigator; its flag counts all the same
                for number in range(len(part)):
                    yield from self._close(part.select(slice(number, number + 1)))
            else:
                only = part.flagged(constants.ACQ_IS_PARALLEL_CALIBRATION)
                both = part.flagged(constants.ACQ_IS_PARALLEL_CALIBRATION_AND_IMAGING)
                yield from self._place(part, only | both, ~only | both, ending=True)

    def add_collected(self, reference: tuple[ReadoutBlock, ...], imaging: tuple[ReadoutBlock, ...]) -> Iterator[KSpace]:
        """Place what a gadget of Gadgetron's own collected.

        Which readouts are reference lines is told by where they are: those that are imaging lines too come twice. All
        of them are placed before any volume ends, since their order may be that of the lines.
        """
        for blocks, is_reference in ((reference, True), (imaging, False)):
            for block in blocks:
                lines = block.select(~block.flagged(*NO_LINES))
                self.ignored += len(block) - len(lines)
                every = np.full(len(lines), is_reference)
                yield from self._place(lines, every, ~every, ending=False)
        for block in (*imaging, *reference):
            for number in np.flatnonzero(block.flagged(constants.ACQ_LAST_IN_SLICE, *LAST_OF_ALL)).tolist():
                yield from self._close(block.select(slice(number, number + 1)))

    def end(self) -> Iterator[KSpace]:
        """Judge what is still open when the stream ends."""
        if self.ignored:
            logger.info("%d noise and navigator readouts are no lines of an image", self.ignored)
        if not self.open and not self.emitted:
            if self.noise_scan and not self.readouts:
                logger.info("the stream is a noise scan: it has no image")
                return
            raise ValueError(
                f"accumulate: the stream ended without an imaging readout "
                f"({self.ignored} noise or navigator readouts, {self.readouts} reference readouts)"
            )
        for volume in list(self.open.values()):
            yield self._finish(volume)

    def _place(self, block: ReadoutBlock, reference: Marks, imaging: Marks, *, ending: bool) -> Iterator[KSpace]:
        """Place readouts as reference lines, imaging lines or both; `ending` says that their flags end volumes."""
        start = 0
        for alike, _ in block.runs(_manner(block)):
            part = slice(start, start + len(alike))
            start = part.stop
            yield from self._place_alike(alike, reference[part], imaging[part], ending=ending)

    def _place_alike(self, block: ReadoutBlock, reference: Marks, imaging: Marks, *, ending: bool) -> Iterator[KSpace]:
        """Place readouts that were acquired alike."""
        self._check(block)
        encoding = self._encoding(block)
        geometry = self._geometry(block, encoding)
        placed, acquired = placed_samples(block, geometry.oversampled)
        samples = geometry.remove(placed)
        lines = np.stack([line_position(block, encoding, axis) for axis in (2, 1)], axis=1)
        last = block.flagged(constants.ACQ_LAST_IN_SLICE, *LAST_OF_ALL) & ending
        for number, header in enumerate(block.headers):
            line = (int(lines[number, 0]), int(lines[number, 1]))
            if reference[number]:
                self._add_reference(samples[number], line, header, encoding)
            if imaging[number]:
                volume = yield from self._volume(volume_key(header), encoding, geometry, len(samples[number]))
                volume.add_image(samples[number], line, header, acquired, geometry)
            if last[number]:
                yield from self._close(block.select(slice(number, number + 1)))
        self.readouts += len(block)

    def _geometry(self, block: ReadoutBlock, encoding: Encoding) -> ReadoutGeometry:
        """The readout axis of readouts that were acquired alike."""
        geometry = ReadoutGeometry.of(encoding)
        if not removed_upstream(block, geometry):
            return geometry
        if not self.cropped_upstream:
            self.cropped_upstream = True
            logger.info(
                "readouts of %d samples with the encoded matrix %d: their oversampling was removed upstream",
                block.samples.shape[2],
                geometry.oversampled,
            )
        return geometry.cropped()

    def _add_reference(self, samples: Samples, line: tuple[int, int], header: np.void, encoding: Encoding) -> None:
        """Keep a reference line, on the matrix of the imaging encoding."""
        imaging = self.context.header.encodings[0]
        if encoding is not imaging:
            samples, line = moved_line(samples, line, encoding, imaging)
        key = volume_key(header)
        if key in self.emitted:
            raise ValueError(
                f"accumulate: reference readout {int(header['scan_counter'])} came after the volume {key} had ended "
                "(a readout before it was flagged as the last); reference lines must come before"
            )
        if key not in self.references:
            matrix = (*imaging.encoded_matrix[:2], ReadoutGeometry.of(imaging).size)
            self.references[key] = LineBuffer.empty(len(samples), matrix)
        self.references[key].add(samples, line)

    def _reference_for(self, key: VolumeKey) -> LineBuffer | None:
        """Reference lines of a volume: its own, or else the latest of its slice (a scan of their own, once)."""
        if key in self.references:
            return self.references[key]
        same = [buffer for other, buffer in self.references.items() if other.slice == key.slice]
        return same[-1] if same else None

    def _volume(
        self, key: VolumeKey, encoding: Encoding, geometry: ReadoutGeometry, coils: int
    ) -> Generator[KSpace, None, Volume]:
        """The open volume of a key; opening it ends whole volumes of the same slice."""
        if key in self.emitted:
            raise ValueError(
                f"accumulate: a readout for the volume {key} came after that volume had ended; the header states "
                f"{encoding.last('average') + 1} averages"
            )
        if key not in self.open:
            for other in [volume for volume in self.open.values() if volume.key.slice == key.slice]:
                if not self._missing(other) and (other.marked or not self._irregular(other)):
                    yield self._finish(other)
            self.open[key] = Volume.start(key, encoding, geometry, coils)
        return self.open[key]

    def _close(self, single: ReadoutBlock) -> Iterator[KSpace]:
        """End volumes on the flags of one readout."""
        header = single.headers[0]
        key = volume_key(header)
        closing: list[Volume] = []
        if single.flagged(constants.ACQ_LAST_IN_MEASUREMENT)[0]:
            closing = list(self.open.values())
        elif single.flagged(constants.ACQ_LAST_IN_REPETITION)[0]:
            closing = [volume for volume in self.open.values() if volume.key.repetition == key.repetition]
        elif single.flagged(constants.ACQ_LAST_IN_SLICE)[0] and key in self.open:
            closing = [self.open[key]]
        whole_scan = bool(single.flagged(*LAST_OF_ALL)[0])
        for volume in closing:
            last_average = int(header["idx"]["average"]) >= volume.encoding.last("average")
            # without a count to go by, the last line of one partition is not the last of the volume
            decisive = last_average and (whole_scan or volume.flat or not self._irregular(volume))
            volume.marked = volume.marked or decisive
            if decisive and not self._missing(volume):
                yield self._finish(volume)

    def _finish(self, volume: Volume) -> KSpace:
        """Take a volume out; refuse it, or label it, if lines are missing."""
        missing = self._missing(volume)
        if not missing and self._irregular(volume) and not volume.marked:
            missing = f"{int((volume.image.count > 0).sum())} lines and no readout flagged as the last one"
        if missing and self.properties.incomplete == "error":
            raise ValueError(
                f"accumulate: the volume {volume.key} is incomplete: {missing} (the header's acceleration is "
                f"{' x '.join(map(str, volume.encoding.acceleration[::-1]))}); set property sampling='irregular' if "
                "the protocol samples like this, or incomplete='emit' to get a labelled series"
            )
        if missing:
            logger.warning("the volume %s is incomplete (%s): its series are labelled", volume.key, missing)
        del self.open[volume.key]
        self.emitted.add(volume.key)
        kspace = volume.finish(self._provenance(), missing, self._reference_for(volume.key))
        if volume.key in self.references:
            # of the volumes that have ended only a slice's latest reference lines may serve others
            for key in [key for key in self.references if key.slice == volume.key.slice and key in self.emitted]:
                if key != volume.key:
                    del self.references[key]
        return kspace

    def _missing(self, volume: Volume) -> str:
        return volume.missing(irregular=self._irregular(volume))

    def _irregular(self, volume: Volume) -> bool:
        sampling = self.properties.sampling
        return sampling == "irregular" or (sampling == "auto" and not volume.regular())

    def _provenance(self) -> Whitening | None:
        if self.whitening is None and self.properties.prewhitened:
            coils = self.coils or 0
            return Whitening(
                source="whitened upstream",
                samples=0,
                effective_samples=0,
                coils=coils,
                dwell_time_us=0,
                bandwidth=0,
                scale=0,
                calibrated=True,
            )
        return self.whitening

    def _check(self, block: ReadoutBlock) -> None:
        scan = int(block.headers["scan_counter"][0])
        coils = block.samples.shape[1]
        self.coils = self.coils or coils
        if coils != self.coils:
            raise ValueError(
                f"accumulate: readout {scan} has {coils} channels, those before it {self.coils}; "
                "the number of channels must not change in a scan"
            )
        if block.trajectory.shape[2]:
            raise ValueError(
                f"accumulate: readout {scan} brings a trajectory of {block.trajectory.shape[2]} dimensions; "
                "only Cartesian readouts without one can be placed"
            )
        if not np.isfinite(block.samples.sum()):
            raise ValueError(f"accumulate: readout {scan} or one soon after it holds NaN or Inf samples")

    def _encoding(self, block: ReadoutBlock) -> Encoding:
        encodings = self.context.header.encodings
        number = int(block.headers["encoding_space_ref"][0])
        if number >= len(encodings):
            raise ValueError(
                f"accumulate: readout {int(block.headers['scan_counter'][0])} is of encoding space {number}; "
                f"the header has {len(encodings)}"
            )
        return encodings[number]


def _manner(block: ReadoutBlock) -> npt.NDArray[np.int64]:
    """A number for each readout that changes where its encoding space, direction or window does."""
    names = ("encoding_space_ref", "discard_pre", "discard_post", "center_sample")
    columns = [block.headers[name].astype(np.int64) for name in names]
    columns.append(block.flagged(constants.ACQ_IS_REVERSE).astype(np.int64))
    changed = np.any(np.diff(np.stack(columns), axis=1) != 0, axis=0)
    return np.concatenate([[0], np.cumsum(changed)])
