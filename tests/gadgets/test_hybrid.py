"""Behind Gadgetron's own front end: buckets and RECON_DATA give what the readouts themselves give."""

import dataclasses
import logging
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from ismrmrd import Image, Waveform, constants
from tests.gadgets.front_end import bucket_of, changed, prepared, recon_data_of, without_oversampling
from tests.gadgets.streams import Gadgets, over_the_wire, through

from voxelsigma.formats.header import Encoding, parse_header
from voxelsigma.formats.readouts import ReadoutBlock
from voxelsigma.formats.simulate import SimulatedScan, Simulation, simulate
from voxelsigma.gadgets.context import Context
from voxelsigma.gadgets.items import KSpace
from voxelsigma.gadgets.registry import create
from voxelsigma.gadgets.wire import Bucket, ReconData

WHITENED = ("accumulate", {"prewhitened": "true"})
SENSE: Gadgets = (("coil_maps", {}), ("reconstruct", {}), ("sketch", {"maps": "magnitude complex snr gfactor"}))


def whitened(scan: SimulatedScan) -> tuple[Context, list[ReadoutBlock]]:
    context = Context(header=parse_header(scan.header_xml))
    return context, through(context, scan.blocks, (("prewhiten", {}),))


def cropped(blocks: Iterable[ReadoutBlock], encoding: Encoding) -> list[ReadoutBlock]:
    return [without_oversampling(block, encoding) for block in blocks]


def small(**changes: Any) -> SimulatedScan:
    values = {"matrix": (1, 32, 32), "coils": 3, "acceleration": 2, "mask": "uniform_1d", "reference_lines": 12}
    return simulate(Simulation(**{**values, "noise_samples": 1024, "seed": 5, **changes}))


def assert_equal(one: KSpace, other: KSpace) -> None:
    scale = np.abs(other.data).max()
    np.testing.assert_allclose(one.data, other.data, atol=1e-5 * scale)
    np.testing.assert_allclose(one.variance, other.variance, atol=1e-6)
    np.testing.assert_array_equal(one.reference_lines, other.reference_lines)
    assert one.reference is not None
    assert other.reference is not None
    np.testing.assert_allclose(one.reference, other.reference, atol=1e-5 * scale)
    np.testing.assert_array_equal(one.headers, other.headers)
    for name in ("limits", "encoded_fov_mm", "recon_fov_mm", "recon_matrix", "partial_fourier", "incomplete", "key"):
        assert getattr(one, name) == getattr(other, name), name


@pytest.mark.parametrize("removed", [False, True])
@pytest.mark.parametrize("reference", ["lines", "block"])
def test_averages_side_by_side_are_averaged_here(removed: bool, reference: str) -> None:
    context, blocks = whitened(small(averages=2))
    (expected,) = through(context, blocks, (WHITENED,))
    encoding = context.header.encodings[0]
    collected = recon_data_of(bucket_of(cropped(blocks, encoding) if removed else blocks), encoding)
    assert collected.bits[0].data.data.shape[1] == 2
    if reference == "block":
        collected = prepared(collected)
    (found,) = through(context, over_the_wire(collected), (WHITENED,))
    assert_equal(found, expected)
    sampled = found.variance[0].any(axis=1)
    np.testing.assert_allclose(found.variance[0, sampled], 1)


def test_averages_that_come_one_by_one_make_one_volume() -> None:
    context, blocks = whitened(small(averages=2))
    encoding = context.header.encodings[0]
    (expected,) = through(context, blocks, (WHITENED,))
    singles = [recon_data_of(bucket_of([block]), encoding, ("slice", "none", "none")) for block in blocks]
    assert len(singles) == 2
    (found,) = through(context, singles, (WHITENED,))
    assert_equal(found, expected)
    with pytest.raises(ValueError, match="16 of 16 lines, 16 of 32 readouts with averages"):
        through(context, singles[:1], (WHITENED,))


@pytest.mark.parametrize("axes", [("slice", "average", "repetition"), ("slice", "repetition", "none")])
def test_every_line_goes_by_its_own_counters(axes: tuple[str, str, str]) -> None:
    context, blocks = whitened(small(slices=2, repetitions=3))
    encoding = context.header.encodings[0]
    expected = through(context, blocks, (WHITENED,))
    collected = recon_data_of(bucket_of(cropped(blocks, encoding)), encoding, axes)
    found = through(context, [collected], (WHITENED,))
    assert len(found) == 6
    key = {kspace.key: kspace for kspace in found}
    for kspace in expected:
        assert_equal(key[kspace.key], kspace)


def test_a_volume_of_three_dimensions() -> None:
    context, blocks = whitened(small(matrix=(16, 16, 16), mask="poisson_disc", reference_lines=8))
    encoding = context.header.encodings[0]
    (expected,) = through(context, blocks, (WHITENED,))
    whole = recon_data_of(bucket_of(cropped(blocks, encoding)), encoding)
    for collected in (whole, prepared(whole)):
        (found,) = through(context, [collected], (WHITENED,))
        assert_equal(found, expected)


def test_buckets_pass_their_waveforms_and_count_no_line_twice() -> None:
    context, blocks = whitened(small())
    (expected,) = through(context, blocks, (WHITENED,))
    waveform = Waveform.from_array(np.arange(8, dtype=np.uint32).reshape(2, 4))
    bucket = dataclasses.replace(bucket_of(blocks), waveforms=(waveform,))
    passed, found = through(context, over_the_wire(bucket), (WHITENED,))
    np.testing.assert_array_equal(passed.data, waveform.data)
    assert_equal(found, expected)


def test_a_volume_ends_on_its_flag_whatever_the_order_of_its_lines() -> None:
    context, blocks = whitened(small(mask="random_1d", matrix=(1, 64, 32)))
    flags = [block.headers["flags"].copy() for block in blocks]
    # the last one in time is the first line of the buffer
    flags[0][0], flags[0][-1] = flags[0][0] | flags[0][-1], 0
    moved = dataclasses.replace(blocks[0], headers=blocks[0].headers.copy())
    moved.headers["flags"] = flags[0]
    collected = recon_data_of(bucket_of([moved]), context.header.encodings[0])
    found = through(context, [collected, "behind"], (WHITENED,))
    assert [type(item) for item in found] == [KSpace, str]


def test_readouts_without_their_oversampling_are_not_cropped_again(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="voxelsigma")
    logging.getLogger("voxelsigma").propagate = True
    context, blocks = whitened(small(repetitions=2))
    expected = through(context, blocks, (WHITENED,))
    assert "removed upstream" not in caplog.text
    found = through(context, cropped(blocks, context.header.encodings[0]), (WHITENED,))
    for one, other in zip(found, expected, strict=True):
        assert_equal(one, other)
    text = "readouts of 32 samples with the encoded matrix 64: their oversampling was removed"
    # one record, however many handlers other tests have left
    assert len({id(record) for record in caplog.records if text in record.getMessage()}) == 1


def test_oversampling_must_not_change_within_a_volume() -> None:
    context, (block,) = whitened(small())
    (other,) = cropped([block], context.header.encodings[0])
    half = [block.select(slice(0, 10)), other.select(slice(10, None))]
    with pytest.raises(ValueError, match=r"covers samples 0 to 31 of 32, those before it \(0, 64\) of 64"):
        through(context, half, (WHITENED,))


def asymmetric(block: ReadoutBlock) -> ReadoutBlock:
    """As AsymmetricEchoAdjustRO leaves it: 16 of 64 samples are zeros and marked."""
    samples, headers = block.samples.copy(), block.headers.copy()
    samples[..., :16] = 0
    headers["discard_pre"] = 16
    return dataclasses.replace(block, samples=samples, headers=headers)


def test_an_asymmetric_echo_keeps_its_window() -> None:
    context, blocks = whitened(small())
    encoding = context.header.encodings[0]
    upstream = cropped([asymmetric(block) for block in blocks], encoding)
    (expected,) = through(context, upstream, (WHITENED,))
    assert expected.limits[2] == (8, 31)
    assert expected.partial_fourier == "k0 0.75"
    whole = recon_data_of(bucket_of(upstream), encoding)
    (found,) = through(context, [whole], (WHITENED,))
    assert_equal(found, expected)
    sampled = found.variance[0].any(axis=1)
    # after upstream's crop nothing more is known of the noise than that it was white before
    np.testing.assert_array_equal(found.variance[0, sampled, :8], 0)
    np.testing.assert_array_equal(found.variance[0, sampled, 8:], 2)
    assert found.readout is None
    # without parallel imaging BucketToBuffer leaves the discarded samples out
    (bit,) = whole.bits
    assert bit.reference is not None
    short = [dataclasses.replace(buffer, data=buffer.data[..., 8:]) for buffer in (bit.data, bit.reference)]
    (found,) = through(
        context, [ReconData((dataclasses.replace(bit, data=short[0], reference=short[1]),))], (WHITENED,)
    )
    assert_equal(found, expected)


def test_an_asymmetric_echo_that_nobody_filled_is_recognised() -> None:
    context, blocks = whitened(small())
    encoding = context.header.encodings[0]
    (expected,) = through(context, cropped([asymmetric(block) for block in blocks], encoding), (WHITENED,))
    short = []
    for block in cropped(blocks, encoding):
        headers = block.headers.copy()
        headers["number_of_samples"], headers["center_sample"] = 24, 8
        short.append(ReadoutBlock(headers, block.samples[..., 8:].copy(), block.trajectory[:, 8:]))
    (found,) = through(context, short, (WHITENED,))
    assert found.limits == expected.limits
    np.testing.assert_array_equal(found.variance, expected.variance)


def test_a_reference_block_off_the_centre_is_placed_by_its_headers() -> None:
    context, (block,) = whitened(small())
    only, both = constants.ACQ_IS_PARALLEL_CALIBRATION, constants.ACQ_IS_PARALLEL_CALIBRATION_AND_IMAGING
    late = block.headers["idx"]["kspace_encode_step_1"] <= 12
    kept = block.select(~(block.flagged(only) & late))
    kept.headers["flags"][kept.flagged(both) & (kept.headers["idx"]["kspace_encode_step_1"] <= 12)] = 0
    encoding = context.header.encodings[0]
    (expected,) = through(context, [kept], (WHITENED,))
    assert np.flatnonzero(expected.reference_lines[0])[0] == 13
    collected = prepared(recon_data_of(bucket_of(cropped([kept], encoding)), encoding))
    (found,) = through(context, [collected], (WHITENED,))
    assert_equal(found, expected)


def test_without_reference_lines_the_imaging_lines_centre_serves_or_nothing_does() -> None:
    for acceleration, works in ((1, True), (2, False)):
        context, blocks = whitened(small(acceleration=acceleration, reference_lines=0))
        collected = recon_data_of(bucket_of(blocks), context.header.encodings[0])
        if works:
            assert len(through(context, [collected], (WHITENED, *SENSE))) == 5
        else:
            with pytest.raises(ValueError, match="slice 0 has no reference lines, and only 1 fully sampled"):
                through(context, [collected], (WHITENED, *SENSE))


def test_whitening_is_only_claimed_where_it_is_told() -> None:
    context, blocks = whitened(small())
    collected = recon_data_of(bucket_of(blocks), context.header.encodings[0])
    (found,) = through(context, [collected], (("accumulate", {}),))
    assert found.whitening is None
    (found,) = through(context, [collected], (WHITENED,))
    assert found.whitening is not None
    with pytest.raises(ValueError, match="were not whitened"):
        through(context, [collected], (("accumulate", {}), *SENSE))


@pytest.mark.parametrize("model", ["sense", "unrolled_small"])
def test_one_external_each_gives_the_series_of_the_hybrid_chain(model: str) -> None:
    """One gadget after the other behind the front end, every item through the wire between them."""
    context, blocks = whitened(small(coils=4, noise_samples=4096))
    sketch = {"seed": "5", "estimator": "sketch", "probes": "16"}
    gadgets = (WHITENED, ("coil_maps", {"kernel": "4"}), ("reconstruct", {"model": model}), ("sketch", sketch))
    collected = recon_data_of(bucket_of(blocks), context.header.encodings[0])
    image, sigma = through(context, [collected], gadgets)
    items: list[Any] = [collected]
    for (name, properties), forward in zip(gadgets, ("", "kspace", "kspace sensitivities", ""), strict=True):
        items = list(create(name, {**properties, "forward": forward}, context)(iter(over_the_wire(*items))))
    assert [item.image_series_index for item in items] == [1, 2000]
    assert np.abs(items[0].data - image.data).max() <= 1e-5 * image.data.max()
    ratio = items[1].data[sigma.data > 1e-3] / sigma.data[sigma.data > 1e-3]
    assert np.percentile(np.abs(ratio - 1), 99) <= 1e-3
    assert items[1].meta == sigma.meta


# --- what cannot be meant


@pytest.fixture(scope="module")
def collected() -> tuple[Context, ReconData]:
    context, blocks = whitened(small())
    return context, recon_data_of(bucket_of(blocks), context.header.encodings[0])


@pytest.mark.parametrize("gadget", ["coil_maps", "reconstruct", "sketch"])
def test_collected_data_need_accumulate(collected: tuple[Context, ReconData], gadget: str) -> None:
    context, found = collected
    for item, name in ((found, "RECON_DATA"), (Bucket((), ()), "a BUCKET")):
        with pytest.raises(ValueError, match=rf"{gadget}: got {name} of .*put 'accumulate' \(with prewhitened='true'"):
            through(context, [item], ((gadget, {}),))


@pytest.mark.parametrize("name", ["trajectory", "density"])
def test_non_cartesian_data_are_refused(collected: tuple[Context, ReconData], name: str) -> None:
    context, found = collected
    with pytest.raises(ValueError, match="RECON_DATA brings a trajectory or density weights; only Cartesian"):
        through(context, [changed(found, **{name: np.zeros((3, 4), np.float32)})], (WHITENED,))


def test_headers_with_a_trajectory_are_refused(collected: tuple[Context, ReconData]) -> None:
    context, found = collected
    headers = found.bits[0].data.headers.copy()
    headers["trajectory_dimensions"] = 2
    with pytest.raises(ValueError, match="RECON_DATA brings a trajectory"):
        through(context, [changed(found, headers=headers)], (WHITENED,))


def test_contradictions_with_the_header_are_refused(collected: tuple[Context, ReconData]) -> None:
    context, found = collected
    data, headers = found.bits[0].data.data, found.bits[0].data.headers

    def refused(item: ReconData, text: str) -> None:
        with pytest.raises(ValueError, match=text):
            through(context, [item], (WHITENED,))

    wide = np.concatenate([data, data], axis=-1)
    refused(
        changed(found, data=wide), r"matrix \(z, y, x\) of \(1, 32, 128\); the header's encoded matrix is \(1, 32, 64"
    )
    refused(
        changed(found, data=np.roll(data, 2, axis=-2), headers=np.roll(headers, 2, axis=-1)),
        "holds the line of kspace_encode_step_1 0 at 2; the header's encoding limits put it at 0",
    )
    refused(ReconData(found.bits * 2), "RECON_DATA has 2 encoding spaces; the header has 1")
    strange = headers.copy()
    strange["number_of_samples"][strange["number_of_samples"] > 0] = 200
    refused(changed(found, headers=strange), r"a line of RECON_DATA has 64 samples; its header states 200")
    (bit,) = prepared(found).bits
    assert bit.reference is not None
    less = dataclasses.replace(bit.reference, data=bit.reference.data[..., 1:, :])
    refused(
        ReconData((dataclasses.replace(bit, reference=less),)),
        r"reference lines have shape \(k2, k1\) \(1, 11\), but their headers mark lines over \(1, 12\)",
    )
    refused(
        ReconData((dataclasses.replace(bit, reference=dataclasses.replace(less, headers=np.zeros_like(headers))),)),
        "come without a header",
    )


def test_an_empty_buffer_is_no_imaging_readout(collected: tuple[Context, ReconData]) -> None:
    context, found = collected
    empty = changed(found, headers=np.zeros_like(found.bits[0].data.headers))
    with pytest.raises(ValueError, match="ended without an imaging readout"):
        through(context, [ReconData((dataclasses.replace(empty.bits[0], reference=None),))], (WHITENED,))


@pytest.mark.parametrize("dtype", [np.int16, np.uint16])
def test_images_of_others_pass_whatever_their_type(collected: tuple[Context, ReconData], dtype: Any) -> None:
    context, found = collected
    foreign = Image.from_array(np.ones((1, 4, 4), dtype), transpose=False, image_series_index=1)
    passed = through(context, [foreign, found], (WHITENED, ("coil_maps", {"kernel": "4"}), *SENSE[1:]))
    assert passed[0] is foreign
    assert len(passed) == 6
