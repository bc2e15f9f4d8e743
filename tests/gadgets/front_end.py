"""A stand-in for Gadgetron's C++ front end: RemoveROOversampling, AccTrig, BucketToBuffer and ReferencePrep."""

import dataclasses
from collections.abc import Iterable

import numpy as np
from gadgetron.types.recon_data import SamplingDescription
from ismrmrd import constants

from voxelsigma.formats.header import Encoding
from voxelsigma.formats.readouts import HEADER_DTYPE, ReadoutBlock
from voxelsigma.gadgets.placement import ReadoutGeometry
from voxelsigma.gadgets.wire import Bucket, ReconBit, ReconBuffer, ReconData

Axes = tuple[str, str, str]


def without_oversampling(block: ReadoutBlock, encoding: Encoding) -> ReadoutBlock:
    """As RemoveROOversampling: fewer samples, and header fields divided by the same ratio."""
    geometry = ReadoutGeometry.of(encoding)
    length = block.samples.shape[2]
    ratio = geometry.oversampled / geometry.size
    samples = ReadoutGeometry(length, int(length / ratio)).remove(block.samples)
    headers = block.headers.copy()
    headers["number_of_samples"] = samples.shape[2]
    for name in ("center_sample", "discard_pre", "discard_post"):
        headers[name] = (headers[name] / ratio).astype(np.uint16)
    path = np.zeros((len(block), samples.shape[2], 0), dtype=np.float32)
    return ReadoutBlock(headers, samples.astype(np.complex64), path)


def bucket_of(blocks: Iterable[ReadoutBlock]) -> Bucket:
    """As AccTrig: reference lines apart, those that are imaging lines too in both."""
    only = constants.ACQ_IS_PARALLEL_CALIBRATION
    both = constants.ACQ_IS_PARALLEL_CALIBRATION_AND_IMAGING
    kept = list(blocks)
    data = [block.select(~block.flagged(only)) for block in kept]
    reference = [block.select(block.flagged(only, both)) for block in kept]
    return Bucket(
        data=tuple(block for block in data if len(block)), reference=tuple(block for block in reference if len(block))
    )


def recon_data_of(bucket: Bucket, encoding: Encoding, axes: Axes = ("slice", "average", "repetition")) -> ReconData:
    """As BucketToBuffer, whose axes SLC, S and N stand for the counters `axes` (`none` for neither)."""
    reference = _buffer(bucket.reference, encoding, axes) if bucket.reference else None
    return ReconData((ReconBit(_buffer(bucket.data, encoding, axes), reference),))


def prepared(found: ReconData) -> ReconData:
    """As ReferencePrep: reference lines averaged over N and S and cut out as a block, their headers left alone."""
    (bit,) = found.bits
    assert bit.reference is not None
    buffer = bit.reference
    sampled = buffer.headers["number_of_samples"] > 0
    count = np.maximum(1, sampled.sum(axis=(1, 2), keepdims=True))[:, :, :, None, :, :, None]
    mean = buffer.data.sum(axis=(1, 2), keepdims=True) / count
    lines = np.flatnonzero(sampled.any(axis=(0, 1, 2, 3)))
    parts = np.flatnonzero(sampled.any(axis=(0, 1, 2, 4)))
    block = mean[..., parts[0] : parts[-1] + 1, lines[0] : lines[-1] + 1, :].astype(np.complex64)
    sampling = SamplingDescription.from_buffer_copy(bytes(buffer.sampling))
    for entry, size in zip(sampling.sampling_limits[1:], (block.shape[5], block.shape[4]), strict=True):
        entry.min, entry.center, entry.max = 0, size // 2, size - 1
    return ReconData((ReconBit(bit.data, ReconBuffer(np.ascontiguousarray(block), buffer.headers, sampling)),))


def _buffer(blocks: tuple[ReadoutBlock, ...], encoding: Encoding, axes: Axes) -> ReconBuffer:
    headers = np.concatenate([block.headers for block in blocks])
    samples = np.concatenate([block.samples for block in blocks])
    sizes = [1 if name == "none" else int(headers["idx"][name].max()) + 1 for name in axes]
    k2, k1, _ = encoding.encoded_matrix
    data = np.zeros((*sizes, samples.shape[1], k2, k1, samples.shape[2]), dtype=np.complex64)
    kept = np.zeros((*sizes, k2, k1), dtype=HEADER_DTYPE)
    for header, readout in zip(headers, samples, strict=True):
        counters = header["idx"]
        where = [0 if name == "none" else int(counters[name]) for name in axes]
        row = int(counters["kspace_encode_step_2"]) + k2 // 2 - encoding.line_limit(2).center
        line = int(counters["kspace_encode_step_1"]) + k1 // 2 - encoding.line_limit(1).center
        before, after = int(header["discard_pre"]), len(readout[0]) - int(header["discard_post"])
        # a line that comes twice overwrites itself
        slot = tuple(where)
        data[slot][:, row, line, before:after] = readout[:, before:after]
        kept[slot][row, line] = header
    sampling = SamplingDescription()
    head, length = headers[0], samples.shape[2]
    limits = (
        (int(head["discard_pre"]), length // 2, length - int(head["discard_post"]) - 1),
        (0, k1 // 2, k1 - 1),
        (0, k2 // 2, k2 - 1),
    )
    for entry, (first, centre, last) in zip(sampling.sampling_limits, limits, strict=True):
        entry.min, entry.center, entry.max = first, centre, last
    sampling.encoded_matrix[:] = (length, k1, k2)
    return ReconBuffer(data, kept, sampling)


def changed(found: ReconData, **fields: object) -> ReconData:
    """With other contents of the imaging buffer."""
    (bit,) = found.bits
    return ReconData((dataclasses.replace(bit, data=dataclasses.replace(bit.data, **fields)),))  # type: ignore[arg-type]
