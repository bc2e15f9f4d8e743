"""Prewhitening: the covariance from the noise readouts, then white noise with unit deviation per component."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from ismrmrd import constants

from voxelsigma.formats.readouts import ReadoutBlock
from voxelsigma.gadgets.context import Context
from voxelsigma.gadgets.items import Item, Stream
from voxelsigma.gadgets.properties import sidecars
from voxelsigma.noise.covariance import (
    GADGETRON_BANDWIDTH,
    NoiseCovariance,
    effective_samples,
    estimate_covariance,
    gadgetron_scale,
    whiten,
    whitening_matrix,
)
from voxelsigma.noise.edge import edge_covariance

logger = logging.getLogger("voxelsigma.prewhiten")

NOT_IMAGING: Final = (
    constants.ACQ_IS_NAVIGATION_DATA,
    constants.ACQ_IS_PHASECORR_DATA,
    constants.ACQ_IS_HPFEEDBACK_DATA,
    constants.ACQ_IS_DUMMYSCAN_DATA,
    constants.ACQ_IS_RTFEEDBACK_DATA,
    constants.ACQ_IS_SURFACECOILCORRECTIONSCAN_DATA,
    # phase stabilisation; ismrmrd 1.14 has no names for these two
    30,
    31,
)
"""Flags of readouts that are no lines of the image's k-space."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrewhitenProperties:
    """Properties of `prewhiten`."""

    forward: tuple[str, ...] = sidecars()


@dataclass(frozen=True, slots=True)
class Prewhiten:
    """Whiten readouts as Gadgetron's NoiseAdjust does.

    Noise readouts are consumed. Data that arrive before any noise readout wait for one; where none comes before the
    end, the covariance is estimated from the edge of k-space and everything made from it is
    labelled `uncalibrated`.
    """

    properties: PrewhitenProperties
    context: Context

    def __call__(self, items: Stream) -> Stream:
        """Readouts in, whitened readouts out, the covariance before them where it is to be forwarded."""
        noise: list[ReadoutBlock] = []
        waiting: list[Item] = []
        whitener: _Whitener | None = None
        for item in items:
            if not isinstance(item, ReadoutBlock):
                # order is kept: what comes behind waiting readouts waits with them
                yield from self._pass(item, waiting)
                continue
            is_noise = item.flagged(constants.ACQ_IS_NOISE_MEASUREMENT)
            for block, noisy in item.runs(is_noise):
                if noisy and whitener is None:
                    noise.append(block)
                elif noisy:
                    logger.info("noise readouts after the first whitened data are ignored: %d", len(block))
                elif whitener is None and noise:
                    whitener = self._whitener(self._from_noise(noise), block)
                    yield from self._release(whitener, waiting)
                    waiting = []
                    yield whitener(block)
                elif whitener is None:
                    waiting.append(block)
                else:
                    yield whitener(block)
        if whitener is None:
            yield from self._at_end(noise, waiting)

    def _pass(self, item: Item, waiting: list[Item]) -> Iterator[Item]:
        if waiting:
            waiting.append(item)
        else:
            yield item

    def _release(self, whitener: "_Whitener", waiting: list[Item]) -> Iterator[Item]:
        """The covariance where asked for, then what waited."""
        if "covariance" in self.properties.forward:
            yield whitener.covariance
        for item in waiting:
            yield whitener(item) if isinstance(item, ReadoutBlock) else item

    def _at_end(self, noise: list[ReadoutBlock], waiting: list[Item]) -> Iterator[Item]:
        """The stream has ended without whitening anything."""
        readouts = [item for item in waiting if isinstance(item, ReadoutBlock)]
        if not readouts:
            if noise:
                count = sum(map(len, noise))
                raise ValueError(f"prewhiten: the stream holds noise readouts only ({count}) and no imaging readout")
            yield from waiting
            return
        covariance = self._from_noise(noise) if noise else self._from_edge(readouts)
        yield from self._release(self._whitener(covariance, readouts[0]), waiting)

    def _from_noise(self, blocks: list[ReadoutBlock]) -> NoiseCovariance:
        """Covariance of the noise readouts."""
        shapes = {block.samples.shape[1] for block in blocks}
        if len(shapes) > 1:
            raise ValueError(f"prewhiten: noise readouts have {sorted(shapes)} channels; expected one number")
        for block in blocks:
            _check_finite(block)
        # readouts of different length share coils: one readout after the other along time
        length = min(block.samples.shape[2] for block in blocks)
        equal = np.concatenate([block.samples[:, :, :length] for block in blocks])
        columns = [np.moveaxis(block.samples, 1, 0).reshape(1, block.samples.shape[1], -1) for block in blocks]
        samples = np.concatenate(columns, axis=2)
        matrix = estimate_covariance(samples)
        coils, count = matrix.shape[0], samples.shape[2]
        if count < 10 * coils:
            logger.warning(
                "only %d noise samples for %d coils: at least %d are needed for a useful covariance",
                count,
                coils,
                10 * coils,
            )
        bandwidth = self.context.header.noise_bandwidth
        if bandwidth is None:
            logger.info("header has no relativeReceiverNoiseBandwidth: %.3f is used", GADGETRON_BANDWIDTH)
        correlated = effective_samples(equal) if equal.shape[0] * length > coils else float(count)
        return NoiseCovariance(
            matrix=matrix,
            samples=count,
            effective_samples=correlated * count / max(1, equal.shape[0] * length),
            dwell_time_us=float(blocks[0].headers["sample_time_us"][0]),
            bandwidth=GADGETRON_BANDWIDTH if bandwidth is None else bandwidth,
            labels=self.context.header.coil_labels,
        )

    def _from_edge(self, blocks: list[ReadoutBlock]) -> NoiseCovariance:
        """Covariance of the outermost lines, where no noise was measured."""
        logger.warning(
            "the stream has no noise readouts: the covariance is estimated from the edge of k-space, "
            "and every map is labelled uncalibrated"
        )
        lines = [block.select(~block.flagged(*NOT_IMAGING)) for block in blocks]
        lines = [block for block in lines if len(block)]
        shapes = {block.samples.shape[1:] for block in lines}
        if len(shapes) != 1:
            raise ValueError(
                f"prewhiten: no noise readouts, and imaging readouts of {len(shapes)} shapes "
                "(channels, samples): the covariance cannot be estimated from them"
            )
        for block in lines:
            _check_finite(block)
        headers = np.concatenate([block.headers for block in lines])
        encoding = self.context.header.encodings[0]
        distances = np.hypot(
            *(
                (headers["idx"][name].astype(np.float64) - encoding.line_limit(axis).center)
                / encoding.encoded_matrix[2 - axis]
                for axis, name in ((1, "kspace_encode_step_1"), (2, "kspace_encode_step_2"))
            )
        )
        covariance = edge_covariance(
            np.concatenate([block.samples for block in lines]),
            distances,
            float(headers["sample_time_us"][0]) or 1.0,
            oversampled=encoding.encoded_fov_mm[2] > 1.2 * encoding.recon_fov_mm[2],
        )
        return replace(covariance, labels=self.context.header.coil_labels)

    def _whitener(self, covariance: NoiseCovariance, first: ReadoutBlock) -> "_Whitener":
        """Fix the scale for the scan, at its first readout that is not noise."""
        dwell = float(first.headers["sample_time_us"][0]) or (0.0 if covariance.calibrated else 1.0)
        scale = gadgetron_scale(dwell, covariance.dwell_time_us, covariance.bandwidth)
        if scale == 1.0 and 0 in (dwell, covariance.dwell_time_us):
            logger.warning(
                "dwell times are %g us (imaging) and %g us (noise): 0 is unknown, the scale is taken as 1",
                dwell,
                covariance.dwell_time_us,
            )
        logger.info(
            "covariance of %d coils from %s: %d samples (%.0f independent), dwell times %g us (noise) and %g us "
            "(imaging), bandwidth %.3f, scale %.4g",
            covariance.coils,
            covariance.source,
            covariance.samples,
            covariance.effective_samples,
            covariance.dwell_time_us,
            dwell,
            covariance.bandwidth,
            scale,
        )
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
        _check_finite(block)
        return block.with_samples(whiten(block.samples, self.matrix).astype(np.complex64, copy=False))


def _check_finite(block: ReadoutBlock) -> None:
    # a sum is not finite exactly if a sample is not (or the sum overflows, which no scanner's data does)
    sums = block.samples.sum(axis=(1, 2))
    if not np.isfinite(sums).all():
        bad = int(np.flatnonzero(~np.isfinite(sums))[0])
        raise ValueError(
            f"prewhiten: readout {int(block.headers['scan_counter'][bad])} holds NaN or Inf samples; "
            "expected finite samples"
        )
