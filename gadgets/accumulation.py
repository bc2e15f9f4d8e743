"""Accumulation: readouts to the k-space of whole volumes."""

import logging
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from ismrmrd import constants

from voxelsigma.formats.header import Encoding
from voxelsigma.formats.readouts import ReadoutBlock, Samples
from voxelsigma.gadgets.context import Context
from voxelsigma.gadgets.items import KSpace, NoiseCovariance, Stream, VolumeKey, Whitening, volume_key
from voxelsigma.gadgets.placement import ReadoutGeometry, line_position, placed_samples
from voxelsigma.gadgets.properties import boolean, choice, sidecars
from voxelsigma.gadgets.volume import LineBuffer, Volume
from voxelsigma.gadgets.whitening import NOT_IMAGING

logger = logging.getLogger("voxelsigma.accumulate")

LAST_OF_ALL = (constants.ACQ_LAST_IN_REPETITION, constants.ACQ_LAST_IN_MEASUREMENT)


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
        """Readouts in, one `KSpace` a volume out; everything else passes."""
        for encoding in self.context.header.encodings[:1]:
            if encoding.trajectory != "cartesian":
                raise ValueError(
                    f"accumulate: the header's trajectory is {encoding.trajectory!r}; only 'cartesian' can be placed"
                )
        state = _State(self.properties, self.context)
        for item in items:
            if isinstance(item, NoiseCovariance):
                state.whitening = whitening_of(item)
                if "covariance" in self.properties.forward:
                    yield item
            elif isinstance(item, ReadoutBlock):
                yield from state.add(item)
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
    open: dict[VolumeKey, Volume] = field(default_factory=dict)
    emitted: set[VolumeKey] = field(default_factory=set)
    references: dict[VolumeKey, LineBuffer] = field(default_factory=dict)

    def add(self, block: ReadoutBlock) -> Iterator[KSpace]:
        """Place the readouts of a block, in order."""
        skipped = block.flagged(constants.ACQ_IS_NOISE_MEASUREMENT, *NOT_IMAGING)
        for part, ignored in block.runs(skipped):
            if ignored:
                self.ignored += len(part)
                # the last readout of a measurement may be a navigator; its flag counts all the same
                for number in range(len(part)):
                    yield from self._close(part.select(slice(number, number + 1)))
            else:
                for alike, _ in part.runs(_manner(part)):
                    yield from self._add_alike(alike)

    def end(self) -> Iterator[KSpace]:
        """Judge what is still open when the stream ends."""
        if self.ignored:
            logger.info("%d noise and navigator readouts are no lines of an image", self.ignored)
        if not self.open and not self.emitted:
            raise ValueError(
                f"accumulate: the stream ended without an imaging readout "
                f"({self.ignored} noise or navigator readouts, {self.readouts} reference readouts)"
            )
        for volume in list(self.open.values()):
            yield self._finish(volume)

    def _add_alike(self, block: ReadoutBlock) -> Iterator[KSpace]:
        """Place readouts that were acquired alike."""
        self._check(block)
        encoding = self._encoding(block)
        geometry = ReadoutGeometry.of(encoding)
        placed, acquired = placed_samples(block, geometry.oversampled)
        samples = geometry.remove(placed)
        lines = np.stack([line_position(block, encoding, axis) for axis in (2, 1)], axis=1)
        reference_only = block.flagged(constants.ACQ_IS_PARALLEL_CALIBRATION)
        both = block.flagged(constants.ACQ_IS_PARALLEL_CALIBRATION_AND_IMAGING)
        last = block.flagged(constants.ACQ_LAST_IN_SLICE, *LAST_OF_ALL)
        for number, header in enumerate(block.headers):
            line = (int(lines[number, 0]), int(lines[number, 1]))
            if reference_only[number] or both[number]:
                self._add_reference(samples[number], line, header, encoding)
            if not reference_only[number] or both[number]:
                volume = yield from self._volume(volume_key(header), encoding, len(samples[number]))
                volume.add_image(samples[number], line, header, acquired)
            if last[number]:
                yield from self._close(block.select(slice(number, number + 1)))
        self.readouts += len(block)

    def _add_reference(self, samples: Samples, line: tuple[int, int], header: np.void, encoding: Encoding) -> None:
        """Keep a reference line, on the matrix of the imaging encoding."""
        imaging = self.context.header.encodings[0]
        if encoding is not imaging:
            samples, line = _moved(samples, line, encoding, imaging)
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

    def _volume(self, key: VolumeKey, encoding: Encoding, coils: int) -> Generator[KSpace, None, Volume]:
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
            self.open[key] = Volume.start(key, encoding, coils)
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


def _moved(
    samples: Samples, line: tuple[int, int], source: Encoding, target: Encoding
) -> tuple[Samples, tuple[int, int]]:
    """A reference readout of an encoding space of its own, on the matrix of the imaging one.

    Raises
    ------
    ValueError
        If the fields of view differ, or the line lies outside the imaging matrix.
    """
    fields = [
        (*encoding.encoded_fov_mm[:2], encoding.encoded_fov_mm[2] * geometry.size / geometry.oversampled)
        for encoding in (source, target)
        for geometry in (ReadoutGeometry.of(encoding),)
    ]
    if not np.allclose(fields[0], fields[1], rtol=0.01):
        raise ValueError(
            f"accumulate: reference lines have a field of view of {fields[0][::-1]} mm, imaging lines "
            f"{fields[1][::-1]} mm; they must agree"
        )
    moved = [
        index - before // 2 + after // 2
        for index, before, after in zip(line, source.encoded_matrix, target.encoded_matrix, strict=False)
    ]
    if any(not 0 <= index < size for index, size in zip(moved, target.encoded_matrix, strict=False)):
        raise ValueError(f"accumulate: reference line {line} lies outside the imaging matrix {target.encoded_matrix}")
    size, length = ReadoutGeometry.of(target).size, samples.shape[1]
    placed = np.zeros((len(samples), size), dtype=np.complex64)
    first = size // 2 - length // 2
    lower, upper = max(0, first), min(size, first + length)
    placed[:, lower:upper] = samples[:, lower - first : upper - first]
    return placed, (moved[0], moved[1])
