"""What a file holds, in lines for a terminal."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from ismrmrd import constants

from voxelsigma.formats.hdf5 import open_hdf5
from voxelsigma.formats.header import COUNTERS, Encoding
from voxelsigma.formats.image_file import Series, read_series, series_names
from voxelsigma.formats.raw_file import RawFile, open_raw


def describe(path: Path, group: str = "dataset") -> Iterator[str]:
    """Lines that tell what a raw data or image file holds.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such file or group, or it is neither.
    """
    if _holds_images(path, group):
        yield from _describe_images(path, group)
        return
    with open_raw(path, group) as raw:
        yield from _describe_raw(raw)


def _holds_images(path: Path, group: str) -> bool:
    with open_hdf5(path, "ISMRMRD raw data or images") as file:
        return bool(series_names(file, group))


def _describe_images(path: Path, group: str) -> Iterator[str]:
    yield f"{path}: ISMRMRD images, group {group!r}"
    for series in read_series(path, group):
        count, channels, *size = series.data.shape
        meta = series.attributes[0]
        shape = " x ".join(str(length) for length in size if length > 1)
        yield (
            f"  series {series.index}: {count} x {shape}, {series.data.dtype}"
            f"{f', {channels} channels' if channels > 1 else ''}, {meta.get('ImageComments', 'no comment')}"
        )
    yield from _provenance_of(read_series(path, group)[-1])


def _provenance_of(series: Series) -> Iterator[str]:
    """How the last series, a map where there is one, was made."""
    for key, value in series.attributes[0].items():
        if key.startswith("voxelsigma_"):
            yield f"  {key.removeprefix('voxelsigma_').replace('_', ' ')}: {value}"


def _describe_raw(raw: RawFile) -> Iterator[str]:
    document = raw.header.document
    measurement = document.measurementInformation
    name = "" if measurement is None else f", protocol {measurement.protocolName}"
    yield f"{raw.path}: ISMRMRD raw data, {len(raw)} readouts{name}"
    for number, encoding in enumerate(raw.header.encodings):
        yield from _describe_encoding(number, encoding)
    yield from _describe_readouts(raw)


def _describe_encoding(number: int, encoding: Encoding) -> Iterator[str]:
    def crossed(values: tuple[float, float, float]) -> str:
        return " x ".join(f"{value:g}" for value in values[::-1])

    factors = " x ".join(str(factor) for factor in encoding.acceleration[::-1])
    yield (
        f"  encoding {number}: {encoding.trajectory}, matrix {crossed(encoding.encoded_matrix)} over "
        f"{crossed(encoding.encoded_fov_mm)} mm, image {crossed(encoding.recon_matrix)} over "
        f"{crossed(encoding.recon_fov_mm)} mm, acceleration {factors}"
    )
    for axis in (1, 2):
        limit = encoding.line_limit(axis)
        if limit.maximum:
            yield f"    k{axis}: lines {limit.minimum} to {limit.maximum}, centre {limit.center}"
    counts = {name: encoding.last(name) + 1 for name in (*COUNTERS, "average") if encoding.last(name)}
    if counts:
        yield "    " + ", ".join(f"{count} {name}s" for name, count in counts.items())


def _describe_readouts(raw: RawFile) -> Iterator[str]:
    kinds = {
        "noise": constants.ACQ_IS_NOISE_MEASUREMENT,
        "reference only": constants.ACQ_IS_PARALLEL_CALIBRATION,
        "reference and imaging": constants.ACQ_IS_PARALLEL_CALIBRATION_AND_IMAGING,
        "navigator": constants.ACQ_IS_NAVIGATION_DATA,
        "reverse": constants.ACQ_IS_REVERSE,
    }
    counts = dict.fromkeys(kinds, 0)
    channels: set[int] = set()
    dwell: dict[bool, set[float]] = {True: set(), False: set()}
    noise_samples = 0
    for block in raw.blocks():
        channels.add(block.samples.shape[1])
        noisy = block.flagged(constants.ACQ_IS_NOISE_MEASUREMENT)
        noise_samples += int(noisy.sum()) * block.samples.shape[2]
        for kind, flag in kinds.items():
            counts[kind] += int(block.flagged(flag).sum())
        for is_noise in (True, False):
            dwell[is_noise] |= {float(value) for value in np.unique(block.headers["sample_time_us"][noisy == is_noise])}
    listed = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    yield f"  {'/'.join(str(count) for count in sorted(channels))} channels{f'; readouts: {listed}' if listed else ''}"
    if noise_samples:
        bandwidth = raw.header.noise_bandwidth
        yield (
            f"  noise: {noise_samples} samples a channel, dwell times {_microseconds(dwell[True])} (noise) and "
            f"{_microseconds(dwell[False])} (imaging), relative bandwidth "
            f"{'not stated' if bandwidth is None else f'{bandwidth:g}'}"
        )
    else:
        yield "  noise: no noise readouts; maps of this scan would be uncalibrated"


def _microseconds(values: set[float]) -> str:
    return "/".join(f"{value:g} us" for value in sorted(values)) or "none"
