"""Noise covariances in files: raw data with noise readouts, or a blob as Gadgetron stores it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from ismrmrd import constants

from voxelsigma.formats.noise_blob import MAGIC, MOST_BYTES, decode_noise_blob
from voxelsigma.formats.raw_file import READOUTS_PER_BLOCK, RawFile, open_raw
from voxelsigma.formats.readouts import ReadoutBlock
from voxelsigma.noise.covariance import (
    GADGETRON_BANDWIDTH,
    NoiseCovariance,
    effective_samples,
    estimate_covariance,
)


def covariance_of_noise(
    blocks: list[ReadoutBlock], *, bandwidth: float | None, labels: tuple[str, ...], source: str = "noise readouts"
) -> NoiseCovariance:
    """Covariance of noise readouts, as Gadgetron's NoiseAdjust estimates it.

    Parameters
    ----------
    blocks
        The noise readouts; they may differ in length.
    bandwidth
        Relative receiver noise bandwidth, None for Gadgetron's 0.793.
    labels
        Coil names in channel order; empty if unknown.
    source
        Where they come from, in words.

    Raises
    ------
    ValueError
        If they differ in channels, hold NaN or Inf, or are not more samples than coils.
    """
    shapes = {block.samples.shape[1] for block in blocks}
    if len(shapes) > 1:
        raise ValueError(f"noise readouts have {sorted(shapes)} channels; expected one number")
    for block in blocks:
        check_finite(block)
    (coils,) = shapes
    columns = [np.moveaxis(block.samples, 1, 0).reshape(1, coils, -1) for block in blocks]
    samples = np.concatenate(columns, axis=2)
    matrix = estimate_covariance(samples)
    count = samples.shape[2]
    # readouts of different length share coils: one readout after the other along time
    length = min(block.samples.shape[2] for block in blocks)
    equal = np.concatenate([block.samples[:, :, :length] for block in blocks])
    used = equal.shape[0] * length
    correlated = effective_samples(equal) * count / used if used > coils else float(count)
    return NoiseCovariance(
        matrix=matrix,
        samples=count,
        effective_samples=correlated,
        dwell_time_us=float(blocks[0].headers["sample_time_us"][0]),
        bandwidth=GADGETRON_BANDWIDTH if bandwidth is None else bandwidth,
        labels=labels,
        source=source,
    )


def read_noise_file(path: Path, *, bandwidth: float | None = None, group: str = "dataset") -> NoiseCovariance:
    """Read a noise covariance from raw data with noise readouts, or from a blob as Gadgetron stores it.

    Parameters
    ----------
    path
        The file; which of the two it is its first bytes tell.
    bandwidth
        Relative receiver noise bandwidth of the imaging header; None takes the noise file's own, or else 0.793.
    group
        Dataset group of raw data.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is neither, holds no noise readout, or no usable one.
    OSError
        If it cannot be read, or is damaged.
    """
    # the source goes into metadata, which consoles read as ASCII
    source = f"noise file {path.name}".encode("ascii", "backslashreplace").decode("ascii")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected raw data with noise readouts or a noise covariance")
    blob = _blob(path)
    if blob is None:
        return _from_raw(path, bandwidth, group, source)
    try:
        return decode_noise_blob(blob, bandwidth=GADGETRON_BANDWIDTH if bandwidth is None else bandwidth, source=source)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def check_finite(block: ReadoutBlock, gadget: str = "") -> None:
    """Refuse readouts with samples that are not finite; the text names the first one, and the gadget where given."""
    # a sum is not finite exactly if a sample is not (or the sum overflows, which no scanner's data does)
    sums = block.samples.sum(axis=(1, 2))
    if not np.isfinite(sums).all():
        bad = int(np.flatnonzero(~np.isfinite(sums))[0])
        where = f"{gadget}: " if gadget else ""
        raise ValueError(
            f"{where}readout {int(block.headers['scan_counter'][bad])} holds NaN or Inf samples; "
            "expected finite samples"
        )


def _blob(path: Path) -> bytes | None:
    """All bytes of a blob; None if the file is none."""
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                return None
            rest = file.read(MOST_BYTES)
    except OSError as error:
        raise OSError(f"{path}: cannot be read ({error.strerror or error})") from error
    return MAGIC + rest


def _from_raw(path: Path, bandwidth: float | None, group: str, source: str) -> NoiseCovariance:
    with open_raw(path, group) as raw:
        blocks = _noise_blocks(raw)
        if not blocks:
            raise ValueError(f"{path}: none of its {len(raw)} acquisitions is flagged as a noise measurement")
        own = raw.header.noise_bandwidth
        try:
            return covariance_of_noise(
                blocks,
                bandwidth=own if bandwidth is None else bandwidth,
                labels=raw.header.coil_labels,
                source=source,
            )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def _noise_blocks(raw: RawFile) -> list[ReadoutBlock]:
    """The noise readouts; of a whole scan the samples of all others are not read."""
    data: Any = raw.group["data"]
    found = []
    for first in range(0, len(raw), READOUTS_PER_BLOCK):
        part = slice(first, first + READOUTS_PER_BLOCK)
        try:
            flags = data.fields("head")[part]["flags"]
            chosen = (flags & np.uint64(1 << (constants.ACQ_IS_NOISE_MEASUREMENT - 1))) != 0
            if not chosen.any():
                continue
            records = data[part]
        except OSError as error:
            raise OSError(f"{raw.path}: cannot be read after acquisition {first} ({error})") from error
        for block in replace(raw, group={"data": records}).blocks():
            noisy = block.flagged(constants.ACQ_IS_NOISE_MEASUREMENT)
            if noisy.any():
                found.append(block.select(noisy))
    return found
