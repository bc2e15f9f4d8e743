"""Prewhitening: white noise with unit deviation per component, by the covariance of a noise measurement."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np
from ismrmrd import constants

from voxelsigma.formats.noise_file import check_finite
from voxelsigma.formats.readouts import NOT_IMAGING, ReadoutBlock
from voxelsigma.gadgets.context import Context
from voxelsigma.gadgets.items import Item, Stream, VolumeKey, volume_key
from voxelsigma.gadgets.noise_sources import NoiseSources, edge_of_kspace, line_distances, oversampled
from voxelsigma.gadgets.properties import boolean, sidecars, text
from voxelsigma.noise.covariance import (
    NoiseCovariance,
    gadgetron_scale,
    whiten,
    whitened_variance_factor,
    whitening_matrix,
)
from voxelsigma.noise.whitened_variance import OuterLines, WhitenedVariance, whitened_variance

logger = logging.getLogger("voxelsigma.prewhiten")

ENDS_OF_IMAGES: Final = (
    constants.ACQ_LAST_IN_SLICE,
    constants.ACQ_LAST_IN_REPETITION,
    constants.ACQ_LAST_IN_MEASUREMENT,
)

LARGEST_DEVIATION: Final = 0.20
"""Whitened data whose variance deviates by more from what is expected are warned of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrewhitenProperties:
    """Properties of `prewhiten`.

    `noise_file` is raw data with noise readouts, or a covariance as Gadgetron stores it; it goes before the host's own.
    `store` says whether the stream's noise is kept in Gadgetron's storage service.
    """

    noise_file: str = text("")
    store: bool = boolean(True)
    forward: tuple[str, ...] = sidecars()


@dataclass(frozen=True, slots=True)
class Prewhiten:
    """Whiten readouts as Gadgetron's NoiseAdjust does.

    The covariance comes from the first of these that there is: a noise file, noise readouts of the stream before
    the data, the storage service (for the header's Noise dependency). Noise readouts are consumed. Data for which none
    is there wait for noise readouts; where none come before the end, the covariance is estimated
    from the edge of k-space and everything made from it is labelled `uncalibrated`.
    """

    properties: PrewhitenProperties
    context: Context

    def __call__(self, items: Stream) -> Stream:
        """Readouts in, whitened readouts out, the covariance before them where it is to be forwarded."""
        named = Path(self.properties.noise_file) if self.properties.noise_file else self.context.noise
        sources = NoiseSources(self.context.header, named, self.properties.store)
        state = _State(self.context, sources, "covariance" in self.properties.forward)
        for item in items:
            if isinstance(item, ReadoutBlock):
                is_noise = item.flagged(constants.ACQ_IS_NOISE_MEASUREMENT)
                for block, noisy in item.runs(is_noise):
                    if noisy:
                        state.noise.append(block)
                    else:
                        yield from state.add(block)
            elif state.waiting:
                # order is kept: what comes behind waiting readouts waits with them
                state.waiting.append(item)
            else:
                yield item
        yield from state.end()


@dataclass(slots=True)
class _State:
    """What a stream has brought so far."""

    context: Context
    sources: NoiseSources
    forward: bool
    noise: list[ReadoutBlock] = field(default_factory=list)
    waiting: list[Item] = field(default_factory=list)
    whitener: "_Whitener | None" = None
    check: "_ScaleCheck | None" = None

    def add(self, block: ReadoutBlock) -> Iterator[Item]:
        """Readouts that are not noise."""
        if self.whitener is None and (self.noise or not self.waiting):
            # without new noise there is nothing that was not there for the first of the waiting ones
            self._start(block)
            yield from self._release()
        if self.whitener is None:
            self.waiting.append(block)
            return
        self._late()
        yield from self._whitened(block)

    def end(self) -> Iterator[Item]:
        """The stream has ended."""
        readouts = [item for item in self.waiting if isinstance(item, ReadoutBlock)]
        if self.whitener is None and readouts:
            if self.noise:
                self._start(readouts[0])
            else:
                self.whitener = self._fixed(self._from_edge(readouts), readouts[0])
            yield from self._release()
        if self.whitener is not None:
            self._late()
            yield from self._judged(final=True)
        elif self.noise:
            covariance = self.sources.noise_scan(self.noise)
            logger.info("the stream is a noise scan (%d readouts): nothing to whiten", sum(map(len, self.noise)))
            if self.forward:
                yield covariance

    def _start(self, block: ReadoutBlock) -> None:
        """Choose the covariance for the scan, if there is one yet."""
        # the first readout of those that wait fixes the scale
        first = next((item for item in self.waiting if isinstance(item, ReadoutBlock)), block)
        covariance = self.sources.choose(self.noise, first.samples.shape[1])
        if covariance is not None:
            self.whitener = self._fixed(covariance, first)
            self.noise = []

    def _release(self) -> Iterator[Item]:
        """The covariance where asked for, then what waited."""
        if self.whitener is None:
            return
        if self.forward:
            yield self.whitener.covariance
        waiting, self.waiting = self.waiting, []
        for item in waiting:
            if isinstance(item, ReadoutBlock):
                yield from self._whitened(item)
            else:
                yield item

    def _whitened(self, block: ReadoutBlock) -> Iterator[Item]:
        assert self.whitener is not None
        found = self.whitener(block)
        if self.check is not None:
            self.check.add(found)
            if found.flagged(*ENDS_OF_IMAGES).any():
                yield from self._judged(final=False)
        yield found

    def _judged(self, *, final: bool) -> Iterator[Item]:
        """The covariance once more, with the variance that was found, when the scale has been judged."""
        if self.check is None or self.whitener is None:
            return
        verdict = self.check.judge(final=final)
        if verdict is None:
            return
        self.check = None
        if verdict.value is None:
            logger.info("the scale of the whitened data cannot be checked: %s", verdict.reason)
            return
        self.whitener = replace(
            self.whitener, covariance=replace(self.whitener.covariance, measured_variance=verdict.value)
        )
        _report(verdict, self.whitener.covariance)
        if self.forward:
            yield self.whitener.covariance

    def _late(self) -> None:
        """Noise readouts that came when the data were being whitened."""
        if not self.noise:
            return
        assert self.whitener is not None
        if not self.sources.late(self.noise):
            count = sum(map(len, self.noise))
            logger.info("noise readouts after the first whitened data are ignored: %d", count)
        self.noise = []

    def _from_edge(self, blocks: list[ReadoutBlock]) -> NoiseCovariance:
        """Covariance of the outermost lines, where no noise was measured."""
        logger.warning(
            "the stream has no noise readouts%s: the covariance is estimated from the edge of k-space, "
            "and every map is labelled uncalibrated",
            f", and {self.sources.not_found}" if self.sources.not_found else "",
        )
        lines = [block.select(~block.flagged(*NOT_IMAGING)) for block in blocks]
        return edge_of_kspace([block for block in lines if len(block)], self.context.header)

    def _fixed(self, covariance: NoiseCovariance, first: ReadoutBlock) -> "_Whitener":
        """Fix the scale for the scan, at its first readout that is not noise."""
        dwell = float(first.headers["sample_time_us"][0]) or (0.0 if covariance.calibrated else 1.0)
        scale = gadgetron_scale(dwell, covariance.dwell_time_us, covariance.bandwidth)
        if 0 in (dwell, covariance.dwell_time_us):
            logger.warning(
                "dwell times are %g us (imaging) and %g us (noise): 0 is unknown, the scale is taken as 1",
                dwell,
                covariance.dwell_time_us,
            )
        counted = f"{covariance.samples} samples ({covariance.effective_samples:.0f} independent)"
        logger.info(
            "covariance of %d coils from %s: %s, dwell times %g us (noise) and %g us (imaging), "
            "bandwidth %.3f, scale %.4g",
            covariance.coils,
            covariance.source,
            counted if covariance.samples else "an unknown number of samples",
            covariance.dwell_time_us,
            dwell,
            covariance.bandwidth,
            scale,
        )
        if covariance.calibrated:
            self.check = _ScaleCheck(self.context)
        matrix = whitening_matrix(covariance.matrix, scale)
        return _Whitener(matrix, replace(covariance, applied_scale=scale))


@dataclass(frozen=True, slots=True)
class _Whitener:
    """A whitening matrix that is fixed for the scan."""

    matrix: np.ndarray[tuple[int, ...], np.dtype[np.complex64]]
    covariance: NoiseCovariance

    def __call__(self, block: ReadoutBlock) -> ReadoutBlock:
        coils = block.samples.shape[1]
        if coils != len(self.matrix):
            raise ValueError(
                f"prewhiten: readout {int(block.headers['scan_counter'][0])} has {coils} channels, "
                f"the noise covariance {len(self.matrix)}; the number of channels must not change in a scan"
            )
        check_finite(block, "prewhiten")
        return block.with_samples(whiten(block.samples, self.matrix).astype(np.complex64, copy=False))


@dataclass(slots=True)
class _ScaleCheck:
    """Keeps lines of the first image, to tell the variance of the noise in them."""

    context: Context
    lines: OuterLines = field(default_factory=OuterLines)
    key: VolumeKey | None = None
    shape: tuple[int, ...] = ()
    _judged_at: int = 0

    def add(self, block: ReadoutBlock) -> None:
        """Take the lines of the first image among whitened readouts."""
        usable = ~block.flagged(*NOT_IMAGING) & (block.headers["encoding_space_ref"] == 0)
        if not usable.any():
            return
        if self.key is None:
            self.key = volume_key(block.headers[usable][0])
            self.shape = block.samples.shape[1:]
        for name in VolumeKey.__dataclass_fields__:
            usable &= block.headers["idx"][name] == getattr(self.key, name)
        if block.samples.shape[1:] != self.shape or not usable.any():
            return
        chosen = block if usable.all() else block.select(usable)
        samples, reverse = chosen.samples, chosen.flagged(constants.ACQ_IS_REVERSE)
        if reverse.any():
            samples = np.where(reverse[:, None, None], samples[..., ::-1], samples)
        self.lines.add(samples, line_distances(chosen.headers, self.context.header.encodings[0]))

    def judge(self, *, final: bool) -> WhitenedVariance | None:
        """The variance found; None if more lines may come that tell it."""
        # an image may have many ends (partitions, averages): trying at each would cost more than it tells
        if not final and self.lines.lines < 2 * self._judged_at:
            return None
        self._judged_at = self.lines.lines
        encoding = self.context.header.encodings[0]
        verdict = whitened_variance(*self.lines.split(), oversampled=oversampled(encoding))
        return verdict if final or verdict.value is not None else None


def _report(verdict: WhitenedVariance, covariance: NoiseCovariance) -> None:
    """Say whether the scale is right."""
    assert verdict.value is not None
    expected = 2 * whitened_variance_factor(covariance.coils, covariance.effective_samples)
    independent = [verdict.samples, covariance.coils * covariance.effective_samples]
    error = sum(1 / count for count in independent if count > 0) ** 0.5
    if abs(verdict.value / expected - 1) <= max(LARGEST_DEVIATION, 5 * error):
        logger.info("variance of the whitened data without object: %.3g, expected %.3g", verdict.value, expected)
        return
    logger.warning(
        "variance of the whitened data without object is %.3g; expected is %.3g: every sigma is wrong by about "
        "a factor of %.2f. Check the header's relativeReceiverNoiseBandwidth (%.3f used), the dwell times of noise "
        "(%g us) and imaging readouts, and where the covariance comes from (%s)",
        verdict.value,
        expected,
        (verdict.value / expected) ** 0.5,
        covariance.bandwidth,
        covariance.dwell_time_us,
        covariance.source,
    )
