"""Where the noise covariance of a scan comes from, and whether its sources agree."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from voxelsigma.formats.header import Encoding, ScanHeader
from voxelsigma.formats.noise_file import check_finite, covariance_of_noise, read_noise_file
from voxelsigma.formats.readouts import Headers, ReadoutBlock
from voxelsigma.gadgets.storage import (
    ADDRESS_VARIABLE,
    StorageError,
    fetch_covariance,
    storage_address,
    storage_tags,
    store_covariance,
)
from voxelsigma.noise.covariance import (
    GADGETRON_BANDWIDTH,
    NoiseCovariance,
    noise_power_error,
    noise_power_ratio,
)
from voxelsigma.noise.edge import edge_covariance

logger = logging.getLogger("voxelsigma.prewhiten")

LARGEST_DIFFERENCE: Final = 0.10
"""Two sources whose noise power differs by more are warned of."""


@dataclass(slots=True)
class NoiseSources:
    """The sources of a scan, in their order: a file, the stream, the storage service.

    Parameters
    ----------
    header
        Header of the scan.
    file
        The file named by a property or the host; None if there is none.
    store
        Whether the stream's noise is kept in the storage service.
    not_found
        Where the header's Noise dependency was looked for in vain, in words; empty before, and where it was found.
    """

    header: ScanHeader
    file: Path | None = None
    store: bool = True
    not_found: str = ""
    _asked: bool = False
    _streamed: bool = False
    _stored: NoiseCovariance | None = None
    _used: list[NoiseCovariance] = field(default_factory=list)

    def choose(self, blocks: list[ReadoutBlock], channels: int) -> NoiseCovariance | None:
        """The covariance to whiten with, when the first readout that is not noise is there.

        Parameters
        ----------
        blocks
            Noise readouts of the stream before it; they are kept in the storage service too.
        channels
            Channels of that readout.

        Returns
        -------
            None if no source has one yet: the stream may still bring noise.

        Raises
        ------
        OSError, ValueError
            If the source that comes first cannot be used; the text says why.
        """
        found: list[NoiseCovariance] = []
        if self.file is not None:
            try:
                named = read_noise_file(self.file, bandwidth=self.header.noise_bandwidth)
            except OSError as error:
                raise OSError(f"prewhiten: noise file {error}") from error
            except ValueError as error:
                raise ValueError(f"prewhiten: noise file {error}") from None
            _check_count(named)
            found.append(self._matched(named, channels))
        if blocks:
            found += self._from_stream(blocks, needed=not found)
        stored = self.stored()
        if stored is not None:
            try:
                found.append(self._matched(stored, channels))
            except ValueError as error:
                if not found:
                    raise
                logger.warning("%s; it is not used", error)
        for number, first in enumerate(found):
            for second in found[number + 1 :]:
                compare(first, second)
        self._used = found
        return found[0] if found else None

    def late(self, blocks: list[ReadoutBlock]) -> bool:
        """Noise readouts that came when the data were being whitened: keep and compare the first of them.

        Returns
        -------
            Whether they were of use; once the stream's noise is known, more of it is not.
        """
        if self._streamed:
            return False
        found = self._from_stream(blocks, needed=False)
        for covariance in found:
            for other in self._used:
                compare(other, covariance)
        return bool(found)

    def noise_scan(self, blocks: list[ReadoutBlock]) -> NoiseCovariance:
        """The stream was a noise scan of its own: keep its covariance for those that depend on it.

        Raises
        ------
        ValueError
            If it cannot be kept: the scan would have been for nothing.
        """
        covariance = self._estimate(blocks)
        _check_count(covariance)
        reason = self._keep(covariance)
        if reason:
            count = sum(map(len, blocks))
            raise ValueError(
                f"prewhiten: the stream holds noise readouts only ({count}) and no imaging readout, and their "
                f"covariance could not be stored for other measurements: {reason}"
            )
        return covariance

    def stored(self) -> NoiseCovariance | None:
        """The covariance stored for the measurement that the header's Noise dependency names; asked for once."""
        if self._asked:
            return self._stored
        self._asked = True
        address = storage_address()
        for measurement in noise_dependencies(self.header):
            self.not_found = f"the header's noise dependency {measurement} was not found: "
            if address is None:
                self.not_found += f"no storage service to ask ({ADDRESS_VARIABLE} is not set)"
                continue
            try:
                bandwidth = self.header.noise_bandwidth
                found = fetch_covariance(
                    address,
                    storage_tags(self.header, measurement),
                    bandwidth=GADGETRON_BANDWIDTH if bandwidth is None else bandwidth,
                )
                if found is not None:
                    _check_count(found)
            except (StorageError, ValueError) as error:
                logger.warning("noise dependency %s: %s; going on without it", measurement, error)
                self.not_found += str(error)
                continue
            if found is not None:
                self._stored, self.not_found = found, ""
                break
            logger.info("storage at %s has no noise covariance of measurement %s", address, measurement)
            self.not_found += f"the storage service at {address} has no covariance of it"
        return self._stored

    def _from_stream(self, blocks: list[ReadoutBlock], *, needed: bool) -> list[NoiseCovariance]:
        """The covariance of the stream's noise readouts, kept in the storage service; none if it is unusable."""
        self._streamed = True
        try:
            covariance = self._estimate(blocks)
            _check_count(covariance)
        except ValueError as error:
            if needed:
                raise
            logger.warning("the noise readouts of the stream are not used: %s", error)
            return []
        reason = self._keep(covariance)
        if reason:
            logger.debug("the covariance is not stored for other measurements: %s", reason)
        return [covariance]

    def _estimate(self, blocks: list[ReadoutBlock]) -> NoiseCovariance:
        if self.header.noise_bandwidth is None:
            logger.info("header has no relativeReceiverNoiseBandwidth: %.3f is used", GADGETRON_BANDWIDTH)
        try:
            return covariance_of_noise(blocks, bandwidth=self.header.noise_bandwidth, labels=self.header.coil_labels)
        except ValueError as error:
            raise ValueError(f"prewhiten: {error}") from None

    def _keep(self, covariance: NoiseCovariance) -> str:
        """Store a covariance under this measurement's own ID; why not, or nothing if it was."""
        address = storage_address()
        measurement = getattr(self.header.document.measurementInformation, "measurementID", None)
        if not self.store:
            return "property 'store' is false"
        if address is None:
            return f"{ADDRESS_VARIABLE} is not set"
        if not measurement:
            return "the header has no measurementInformation.measurementID"
        try:
            store_covariance(address, storage_tags(self.header, measurement), covariance)
        except StorageError as error:
            logger.warning("the noise covariance could not be stored: %s", error)
            return str(error)
        logger.info("the noise covariance is stored at %s for measurement %s", address, measurement)
        return ""

    def _matched(self, covariance: NoiseCovariance, channels: int) -> NoiseCovariance:
        return matched(covariance, self.header.coil_labels, channels)


def noise_dependencies(header: ScanHeader) -> list[str]:
    """IDs of the measurements that the header names as its noise."""
    information: Any = header.document.measurementInformation
    entries = [] if information is None else information.measurementDependency
    return [
        str(entry.measurementID)
        for entry in entries
        if entry.measurementID and str(entry.dependencyType).strip().lower() == "noise"
    ]


def matched(covariance: NoiseCovariance, labels: tuple[str, ...], channels: int) -> NoiseCovariance:
    """A covariance with its channels in the order of the imaging data, by coil labels where both have them.

    Parameters
    ----------
    covariance
        From elsewhere.
    labels
        Coil labels of the imaging header, in channel order; empty if it has none.
    channels
        Channels of the imaging readouts.

    Raises
    ------
    ValueError
        If it has another number of channels.
    """
    if covariance.coils != channels:
        raise ValueError(
            f"prewhiten: {covariance.source} has {covariance.coils} channels, the imaging readouts {channels}; "
            "they must be equal"
        )
    if not (len(labels) == len(covariance.labels) == channels) or labels == covariance.labels:
        return replace(covariance, labels=labels or covariance.labels)
    if set(labels) != set(covariance.labels) or len(set(labels)) < channels:
        logger.warning(
            "%s has the coils %s, the header %s: they cannot be matched, and the channels are taken in their order",
            covariance.source,
            " ".join(covariance.labels),
            " ".join(labels),
        )
        return covariance
    order = [covariance.labels.index(label) for label in labels]
    logger.info("%s: channels reordered by their coil labels", covariance.source)
    return replace(covariance, matrix=covariance.matrix[np.ix_(order, order)], labels=labels)


def compare(first: NoiseCovariance, second: NoiseCovariance) -> None:
    """Warn of two sources whose noise power differs by more than 10 % (and by more than chance)."""
    try:
        ratio = noise_power_ratio(first, second)
    except ValueError as error:
        logger.warning("%s and %s cannot be compared: %s", first.source, second.source, error)
        return
    tolerance = max(LARGEST_DIFFERENCE, 5 * noise_power_error(first, second))
    report: Callable[..., None] = logger.info if abs(ratio - 1) <= tolerance else logger.warning
    report(
        "noise power of %s is %.3g times that of %s (at equal bandwidth); %s is used",
        second.source,
        ratio,
        first.source,
        first.source,
    )


def edge_of_kspace(blocks: list[ReadoutBlock], header: ScanHeader) -> NoiseCovariance:
    """Covariance of the outermost lines, where no noise was measured.

    Parameters
    ----------
    blocks
        Lines of the image's k-space.
    header
        Header of the scan.

    Raises
    ------
    ValueError
        If they differ in shape, hold NaN or Inf, or leave fewer samples than coils.
    """
    shapes = {block.samples.shape[1:] for block in blocks}
    if len(shapes) != 1:
        raise ValueError(
            f"prewhiten: no noise readouts, and imaging readouts of {len(shapes)} shapes "
            "(channels, samples): the covariance cannot be estimated from them"
        )
    for block in blocks:
        check_finite(block, "prewhiten")
    headers = np.concatenate([block.headers for block in blocks])
    encoding = header.encodings[0]
    covariance = edge_covariance(
        np.concatenate([block.samples for block in blocks]),
        line_distances(headers, encoding),
        float(headers["sample_time_us"][0]) or 1.0,
        oversampled=oversampled(encoding),
    )
    return replace(covariance, labels=header.coil_labels)


def line_distances(headers: Headers, encoding: Encoding) -> npt.NDArray[np.float64]:
    """Distance of each readout from the centre of k-space over the encoded matrix, shape `(readouts,)`."""
    along = [
        (headers["idx"][name].astype(np.float64) - encoding.line_limit(axis).center) / encoding.encoded_matrix[2 - axis]
        for axis, name in ((1, "kspace_encode_step_1"), (2, "kspace_encode_step_2"))
    ]
    return np.hypot(*along)


def oversampled(encoding: Encoding) -> bool:
    """Whether the readout is oversampled, so that its outer field of view meets the receiver's filter."""
    return encoding.encoded_fov_mm[2] > 1.2 * encoding.recon_fov_mm[2]


def _check_count(covariance: NoiseCovariance) -> None:
    """Refuse a covariance of no more samples than coils, warn of few; an unknown number passes."""
    coils, count = covariance.coils, covariance.samples
    if 0 < count <= coils:
        raise ValueError(
            f"prewhiten: {covariance.source}: {count} noise samples for {coils} coils; more samples than coils are "
            f"needed, at least {10 * coils} for a useful covariance"
        )
    if 0 < count < 10 * coils:
        logger.warning(
            "%s: only %d noise samples for %d coils: at least %d are needed for a useful covariance",
            covariance.source,
            count,
            coils,
            10 * coils,
        )
