"""Readouts to k-space: placement, averages, reference lines, flags, completeness."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from ismrmrd import constants

from voxelsigma.formats.readouts import ReadoutBlock
from voxelsigma.formats.simulate import SimulatedScan, Simulation, simulate
from voxelsigma.gadgets.items import KSpace

PREWHITENED = ("accumulate", {"prewhitened": "true"})


def flag(number: int) -> np.uint64:
    return np.uint64(1 << (number - 1))


def imaging(scan: SimulatedScan) -> ReadoutBlock:
    return scan.blocks[-1]


def changed(block: ReadoutBlock, **fields: Any) -> ReadoutBlock:
    headers = block.headers.copy()
    for name, value in fields.items():
        target = headers["idx"] if name in headers["idx"].dtype.names else headers
        target[name] = value
    return dataclasses.replace(block, headers=headers)


def without_flags(block: ReadoutBlock) -> ReadoutBlock:
    last = (
        constants.ACQ_LAST_IN_SLICE,
        constants.ACQ_LAST_IN_REPETITION,
        constants.ACQ_LAST_IN_MEASUREMENT,
    )
    kept = block.headers["flags"].copy()
    for number in last:
        kept &= ~flag(number)
    return changed(block, flags=kept)


def test_lines_go_where_the_limits_centre_says(scan: SimulatedScan, run: Any) -> None:
    (kspace,) = run(scan.header_xml, [imaging(scan)], PREWHITENED)
    assert isinstance(kspace, KSpace)
    assert kspace.data.shape == (4, 1, 32, 32)
    sampled = np.flatnonzero(kspace.variance[0].any(axis=1))
    np.testing.assert_array_equal(sampled, np.flatnonzero(scan.mask[0]))
    np.testing.assert_array_equal(np.flatnonzero(kspace.reference_lines[0]), np.arange(10, 22))


def test_a_shifted_centre_shifts_the_lines(scan: SimulatedScan, run: Any) -> None:
    xml = scan.header_xml.replace(
        b"<minimum>0</minimum><maximum>31</maximum><center>16</center>",
        b"<minimum>0</minimum><maximum>25</maximum><center>12</center>",
        1,
    )
    block = imaging(scan)
    kept = block.select(block.headers["idx"]["kspace_encode_step_1"] <= 25)
    (kspace,) = run(xml, [kept], PREWHITENED)
    lines = np.flatnonzero(scan.mask[0])
    np.testing.assert_array_equal(np.flatnonzero(kspace.variance[0].any(axis=1)), lines[lines <= 25] + 4)
    assert kspace.limits[1] == (4, 29)


def test_readout_oversampling_is_removed_and_noise_stays_white(scan: SimulatedScan, run: Any) -> None:
    rng = np.random.default_rng(0)
    block = imaging(scan)
    shape = block.samples.shape
    noise = (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(np.complex64)
    (kspace,) = run(scan.header_xml, [block.with_samples(noise)], PREWHITENED)
    found = kspace.data[:, 0][:, kspace.variance[0, :, 0] > 0]
    # 2048 complex samples: the mean power has a relative deviation of 0.022, five of them are 0.11 (6e-7 false alarms)
    assert np.mean(np.abs(found) ** 2) == pytest.approx(2, rel=0.11)
    white = found.reshape(4, -1, 32)
    neighbours = np.mean(white[..., 1:] * white[..., :-1].conj())
    assert abs(neighbours) < 0.25


def test_the_crop_keeps_what_lies_inside_the_field_of_view(run: Any) -> None:
    plain = simulate(
        Simulation(matrix=(1, 32, 32), coils=2, acceleration=1, mask="uniform_1d", oversampling=1, snr=1e5)
    )
    wide = simulate(Simulation(matrix=(1, 32, 32), coils=2, acceleration=1, mask="uniform_1d", oversampling=2, snr=1e5))
    items = [run(scan.header_xml, [imaging(scan)], PREWHITENED)[0] for scan in (plain, wide)]
    plain_data, wide_data = (item.data for item in items)
    # what rings beyond the field of view folds back in the one and is cut off in the other
    assert np.linalg.norm(wide_data - plain_data) < 0.05 * np.linalg.norm(plain_data)
    gain = np.vdot(plain_data, wide_data) / np.vdot(plain_data, plain_data)
    assert gain == pytest.approx(1, abs=0.01)


def test_averages_are_averaged_and_their_variance_halves(run: Any) -> None:
    scan = simulate(
        Simulation(matrix=(1, 32, 32), coils=2, acceleration=2, mask="uniform_1d", reference_lines=8, averages=2)
    )
    (kspace,) = run(scan.header_xml, scan.blocks[1:], PREWHITENED)
    sampled = kspace.variance[0, :, 0] > 0
    np.testing.assert_allclose(kspace.variance[0, sampled], 1.0)
    singles = [
        run(
            scan.header_xml.replace(
                b"<average><minimum>0</minimum><maximum>1<", b"<average><minimum>0</minimum><maximum>0<"
            ),
            [block],
            PREWHITENED,
        )[0].data
        for block in scan.blocks[1:]
    ]
    np.testing.assert_allclose(kspace.data, (singles[0] + singles[1]) / 2, atol=1e-5)


def test_reverse_readouts_are_turned_round(scan: SimulatedScan, run: Any) -> None:
    block = imaging(scan)
    length = block.samples.shape[2]
    odd = np.arange(len(block)) % 2 == 1
    headers = block.headers.copy()
    headers["flags"][odd] |= flag(constants.ACQ_IS_REVERSE)
    headers["center_sample"][odd] = length - 1 - headers["center_sample"][odd]
    samples = block.samples.copy()
    samples[odd] = samples[odd][..., ::-1]
    turned = dataclasses.replace(block, headers=headers, samples=samples)
    (expected,) = run(scan.header_xml, [block], PREWHITENED)
    (found,) = run(scan.header_xml, [turned], PREWHITENED)
    np.testing.assert_array_equal(found.data, expected.data)


def test_discarded_samples_are_zero_filled(scan: SimulatedScan, run: Any) -> None:
    block = changed(imaging(scan), discard_pre=8)
    (kspace,) = run(scan.header_xml, [block], PREWHITENED)
    assert kspace.readout is not None
    assert (kspace.readout.size, kspace.readout.start, kspace.readout.stop) == (64, 8, 64)
    assert kspace.limits[2] == (4, 31)


def asymmetric(block: ReadoutBlock, dropped: int) -> ReadoutBlock:
    length = block.samples.shape[2]
    short = dataclasses.replace(block, samples=np.ascontiguousarray(block.samples[..., dropped:]))
    short = dataclasses.replace(short, trajectory=np.zeros((len(block), length - dropped, 0), np.float32))
    return changed(short, number_of_samples=length - dropped, center_sample=length // 2 - dropped)


def test_an_asymmetric_echo_is_placed_by_its_centre(scan: SimulatedScan, run: Any) -> None:
    block = asymmetric(imaging(scan), 16)
    (kspace,) = run(scan.header_xml, [block], PREWHITENED)
    assert kspace.partial_fourier == "k0 0.75"
    padded = np.concatenate([np.zeros_like(block.samples[..., :16]), block.samples], axis=-1)
    (expected,) = run(scan.header_xml, [imaging(scan).with_samples(padded)], PREWHITENED)
    np.testing.assert_allclose(kspace.data, expected.data, atol=1e-6)
    # the noise that is left: trace of the covariance is what was acquired and lies inside the field of view
    sampled = kspace.variance[0, :, 0] > 0
    assert kspace.variance[0, sampled].sum(axis=1) == pytest.approx(2 * 48 * 0.5, rel=1e-4)


def test_asymmetric_echo_variance_is_the_noise_that_passes(scan: SimulatedScan, run: Any) -> None:
    rng = np.random.default_rng(1)
    block = asymmetric(imaging(scan), 16)
    total = np.zeros((32, 32))
    trials = 60
    for _ in range(trials):
        shape = block.samples.shape
        noise = (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(np.complex64)
        (kspace,) = run(scan.header_xml, [block.with_samples(noise)], PREWHITENED)
        total += np.mean(np.abs(kspace.data[:, 0]) ** 2, axis=0)
    measured = (total / trials)[scan.mask[0]].mean(axis=0)
    # 60 · 4 · 16 samples a column: relative deviation 0.016, six of them (2e-9 a column)
    np.testing.assert_allclose(measured, kspace.variance[0][scan.mask[0]][0], atol=0.2)


def test_partial_fourier_is_named(scan: SimulatedScan, run: Any) -> None:
    xml = scan.header_xml.replace(
        b"<minimum>0</minimum><maximum>31</maximum><center>16</center>",
        b"<minimum>8</minimum><maximum>31</maximum><center>16</center>",
        1,
    )
    block = imaging(scan)
    kept = block.select(block.headers["idx"]["kspace_encode_step_1"] >= 8)
    (kspace,) = run(xml, [kept], PREWHITENED)
    assert kspace.partial_fourier == "k1 0.75"


def test_noise_and_navigator_readouts_are_no_lines(scan: SimulatedScan, run: Any) -> None:
    block = imaging(scan)
    navigator = changed(block.select(slice(0, 2)), flags=flag(constants.ACQ_IS_NAVIGATION_DATA))
    (expected,) = run(scan.header_xml, [block], PREWHITENED)
    (found,) = run(scan.header_xml, [scan.blocks[0], navigator, block], PREWHITENED)
    np.testing.assert_array_equal(found.data, expected.data)


def test_slices_repetitions_and_contrasts_are_kept_apart(run: Any) -> None:
    scan = simulate(
        Simulation(
            matrix=(1, 32, 32),
            coils=2,
            acceleration=2,
            mask="uniform_1d",
            reference_lines=8,
            slices=3,
            repetitions=2,
        )
    )
    found = run(scan.header_xml, scan.blocks[1:], PREWHITENED)
    keys = [(kspace.key.slice, kspace.key.repetition) for kspace in found]
    assert keys == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]
    assert found[0].central_header["position"][2] == pytest.approx(-5)


def test_interleaved_slices_end_with_the_stream(run: Any) -> None:
    scan = simulate(
        Simulation(matrix=(1, 32, 32), coils=2, acceleration=2, mask="uniform_1d", reference_lines=8, slices=2)
    )
    first, second = (without_flags(block) for block in scan.blocks[1:])
    mixed = [block.select(slice(n, n + 1)) for n in range(len(first)) for block in (first, second)]
    found = run(scan.header_xml, mixed, PREWHITENED)
    expected = run(scan.header_xml, [first, second], PREWHITENED)
    assert [kspace.key.slice for kspace in found] == [0, 1]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.data, other.data)


def test_a_reference_scan_of_its_own_serves_all_repetitions(run: Any) -> None:
    scan = simulate(
        Simulation(matrix=(1, 32, 32), coils=2, acceleration=2, mask="uniform_1d", reference_lines=8, repetitions=2)
    )
    first, second = scan.blocks[1:]
    is_reference = first.flagged(
        constants.ACQ_IS_PARALLEL_CALIBRATION, constants.ACQ_IS_PARALLEL_CALIBRATION_AND_IMAGING
    )
    separate = changed(first.select(is_reference), flags=flag(constants.ACQ_IS_PARALLEL_CALIBRATION))
    lines = [block.select(~block.flagged(constants.ACQ_IS_PARALLEL_CALIBRATION)) for block in (first, second)]
    cleared = [
        changed(
            block,
            flags=block.headers["flags"] & ~flag(constants.ACQ_IS_PARALLEL_CALIBRATION_AND_IMAGING),
        )
        for block in lines
    ]
    found = run(scan.header_xml, [separate, *cleared], PREWHITENED)
    assert len(found) == 2
    for kspace in found:
        assert kspace.reference_lines.sum() == 8
        assert kspace.variance.any(axis=2).sum() == 16


def test_a_truncated_volume_is_an_error_with_the_counts(scan: SimulatedScan, run: Any) -> None:
    half = imaging(scan).select(slice(0, 11))
    with pytest.raises(ValueError, match=r"slice 0 is incomplete: \d+ of 16 lines"):
        run(scan.header_xml, [half], PREWHITENED)


def test_a_line_lost_on_the_way_is_noticed_in_spite_of_the_flags(scan: SimulatedScan, run: Any) -> None:
    block = imaging(scan)
    lost = int(np.flatnonzero(scan.mask[0])[2])
    kept = block.select(block.headers["idx"]["kspace_encode_step_1"] != lost)
    with pytest.raises(ValueError, match="15 of 16 lines"):
        run(scan.header_xml, [kept], PREWHITENED)


def test_an_incomplete_volume_is_labelled_where_asked(scan: SimulatedScan, run: Any) -> None:
    half = imaging(scan).select(slice(0, 14))
    properties = {"prewhitened": "true", "incomplete": "emit"}
    (kspace,) = run(scan.header_xml, [half], ("accumulate", properties))
    assert "of 16 lines" in kspace.incomplete


def test_a_missing_average_is_noticed(run: Any) -> None:
    scan = simulate(
        Simulation(matrix=(1, 32, 32), coils=2, acceleration=2, mask="uniform_1d", reference_lines=8, averages=2)
    )
    with pytest.raises(ValueError, match="16 of 16 lines, 16 of 32 readouts with averages"):
        run(scan.header_xml, scan.blocks[1:2], PREWHITENED)


def test_irregular_sampling_without_a_last_flag_is_incomplete(run: Any) -> None:
    scan = simulate(Simulation(matrix=(1, 64, 32), coils=2, acceleration=3, mask="random_1d", reference_lines=8))
    assert len(run(scan.header_xml, scan.blocks[1:], PREWHITENED)) == 1
    with pytest.raises(ValueError, match="no readout flagged as the last one"):
        run(scan.header_xml, [without_flags(scan.blocks[1])], PREWHITENED)


def test_a_volume_ends_when_the_next_repetition_begins(run: Any) -> None:
    scan = simulate(
        Simulation(matrix=(1, 32, 32), coils=2, acceleration=2, mask="uniform_1d", reference_lines=8, repetitions=2)
    )
    first, second = (without_flags(block) for block in scan.blocks[1:])
    found = run(
        scan.header_xml, [first, second.select(slice(0, 1)), "marker", second.select(slice(1, None))], PREWHITENED
    )
    assert [type(item).__name__ for item in found] == ["KSpace", "str", "KSpace"]


def test_a_readout_after_the_end_of_its_volume_is_an_error(scan: SimulatedScan, run: Any) -> None:
    block = imaging(scan)
    with pytest.raises(ValueError, match="came after that volume had ended"):
        run(scan.header_xml, [block, block.select(slice(0, 1))], PREWHITENED)


def test_unknown_items_pass_in_order(scan: SimulatedScan, run: Any) -> None:
    found = run(scan.header_xml, ["before", imaging(scan), "behind"], PREWHITENED)
    assert found[0] == "before"
    assert found[2] == "behind"


def test_three_dimensional_scans_keep_both_axes(run: Any) -> None:
    scan = simulate(
        Simulation(matrix=(24, 32, 16), coils=2, acceleration=3, mask="random_2d", reference_lines=8, seed=2)
    )
    (kspace,) = run(scan.header_xml, scan.blocks[1:], PREWHITENED)
    assert kspace.data.shape == (2, 24, 32, 16)
    np.testing.assert_array_equal(kspace.variance[..., 0] > 0, scan.mask)
    assert kspace.volumetric


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"kspace_encode_step_1": 40}, r"kspace_encode_step_1 40; .* only 0 to 31 fit the encoded matrix of 32"),
        ({"kspace_encode_step_2": 1}, r"kspace_encode_step_2 1; .* only 0 to 0 fit"),
        ({"encoding_space_ref": 3}, "encoding space 3; the header has 1"),
        (
            {"center_sample": 5},
            r"of 64 samples \(discard 0 and 0, centre 5\) does not fit the encoded readout of 64",
        ),
        ({"discard_pre": 64}, "does not fit the encoded readout"),
    ],
)
def test_bad_headers_are_refused(scan: SimulatedScan, run: Any, change: dict[str, int], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        run(scan.header_xml, [changed(imaging(scan), **change)], PREWHITENED)


def test_a_changing_channel_count_is_refused(scan: SimulatedScan, run: Any) -> None:
    block = imaging(scan)
    fewer = dataclasses.replace(block, samples=block.samples[:, :3])
    with pytest.raises(ValueError, match="has 3 channels, those before it 4"):
        run(scan.header_xml, [block.select(slice(0, 4)), fewer.select(slice(4, 8))], PREWHITENED)


def test_trajectories_are_refused(scan: SimulatedScan, run: Any) -> None:
    block = imaging(scan)
    curved = dataclasses.replace(block, trajectory=np.zeros((len(block), 64, 2), np.float32))
    with pytest.raises(ValueError, match="brings a trajectory of 2 dimensions"):
        run(scan.header_xml, [curved], PREWHITENED)


def test_a_stream_without_imaging_is_refused(scan: SimulatedScan, run: Any) -> None:
    with pytest.raises(ValueError, match="without an imaging readout"):
        run(scan.header_xml, scan.blocks[:1], PREWHITENED)


def test_non_cartesian_headers_are_refused(scan: SimulatedScan, run: Any) -> None:
    xml = scan.header_xml.replace(b"<trajectory>cartesian", b"<trajectory>radial")
    with pytest.raises(ValueError, match="trajectory is 'radial'"):
        run(xml, [imaging(scan)], PREWHITENED)


def test_reference_lines_of_a_smaller_encoding_are_centred(scan: SimulatedScan, run: Any) -> None:
    start = scan.header_xml.index(b"<encoding>")
    stop = scan.header_xml.index(b"</encoding>") + len(b"</encoding>")
    encoding = scan.header_xml[start:stop]
    small = encoding.replace(b"<y>32</y>", b"<y>16</y>").replace(
        b"<maximum>31</maximum><center>16</center>", b"<maximum>15</maximum><center>8</center>"
    )
    xml = scan.header_xml[:stop] + small + scan.header_xml[stop:]
    block = imaging(scan)
    is_reference = block.flagged(
        constants.ACQ_IS_PARALLEL_CALIBRATION, constants.ACQ_IS_PARALLEL_CALIBRATION_AND_IMAGING
    )
    separate = block.select(is_reference)
    separate = changed(
        separate,
        encoding_space_ref=1,
        flags=flag(constants.ACQ_IS_PARALLEL_CALIBRATION),
        kspace_encode_step_1=separate.headers["idx"]["kspace_encode_step_1"] - 8,
    )
    rest = block.select(~block.flagged(constants.ACQ_IS_PARALLEL_CALIBRATION))
    rest = changed(rest, flags=rest.headers["flags"] & ~flag(constants.ACQ_IS_PARALLEL_CALIBRATION_AND_IMAGING))
    (expected,) = run(scan.header_xml, [block], PREWHITENED)
    (found,) = run(xml, [separate, rest], PREWHITENED)
    np.testing.assert_allclose(found.reference, expected.reference, atol=1e-6)
